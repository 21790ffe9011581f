"""Arguments that the fused kernels refuse, which needs no GPU; test_cuda_fused.py runs them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

import zimage_mxfp8 as zm
from zimage_mxfp8 import _core
from zimage_mxfp8.ops import fused
from zimage_mxfp8.ops.gemm_epilogues import gemm_rotate_heads, gemm_silu_multiply

X = torch.ones(4, 64).bfloat16()
WEIGHT = torch.ones(64).bfloat16()
SCALE = torch.ones(2, 64).bfloat16()
ITEMS = torch.zeros(4, dtype=torch.int32)
QKV = torch.ones(4, 768).bfloat16()
HEAD = torch.ones(128).bfloat16()
ROTATIONS = torch.ones(4, 64, 2)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: fused.join_columns(X, X[:2]), "right has 2 rows but left has 4"),
        (lambda: fused.join_columns(X, X.float()), "right must be bfloat16, not float32"),
        (lambda: fused.join_columns(X[:, :0], X[:, :0]), "rows must have 1 to 16384 columns"),
        (lambda: fused.join_columns(X, X[:, :5], "int8"), "INT8 needs a multiple of 32 columns"),
        (lambda: fused.silu_multiply(X, X[:2]), r"up is \[2, 64\] but gate is \[4, 64\]"),
        (lambda: fused.silu_multiply(X, X.float()), "up must be bfloat16, not float32"),
        (lambda: fused.silu_multiply(X.half(), X), "gate must be bfloat16, not float16"),
        (
            lambda: fused.silu_multiply(X, X, "fp8"),
            "output_format must be bfloat16, row-scaled, mxfp8 or int8",
        ),  # type: ignore[arg-type]
        (lambda: fused.silu_multiply(X[0], X[0]), "gate must have 2 dimensions"),
        (lambda: fused.silu_multiply(np.ones((4, 64)), X), "gate must be a torch tensor"),
        (lambda: fused.silu_multiply(X[:, :0], X[:, :0]), "rows must have 1 to 16384 columns"),
        (lambda: fused.norm_modulate(X, WEIGHT[:63]), r"weight must be \[64\], not \[63\]"),
        (lambda: fused.norm_modulate(X, WEIGHT.float()), "weight must be bfloat16"),
        (lambda: fused.norm_modulate(X, WEIGHT, SCALE), "one row where there are no items, not 2"),
        (lambda: fused.norm_modulate(X, WEIGHT, SCALE[:0], ITEMS), "one row or more, not 0"),
        (lambda: fused.norm_modulate(X, WEIGHT, SCALE[:1, :32]), "scale has 32 columns, not 64"),
        (lambda: fused.norm_modulate(X, WEIGHT, WEIGHT), "scale must have 2 dimensions"),
        (lambda: fused.norm_modulate(X, WEIGHT, SCALE, ITEMS.long()), "items must be int32"),
        (lambda: fused.norm_modulate(X, WEIGHT, SCALE, ITEMS[:3]), r"items must be \[4\]"),
        (lambda: fused.norm_modulate(X, WEIGHT, eps=-1), "eps must be 0 or more"),
        (lambda: fused.norm_modulate(X, WEIGHT, eps=float("nan")), "eps must be 0 or more"),
        (lambda: fused.norm_modulate(X, WEIGHT, eps="small"), "eps must be a number"),  # type: ignore[arg-type]
        (
            lambda: fused.norm_modulate(
                torch.ones(1, 16385).bfloat16(), torch.ones(16385).bfloat16()
            ),
            "1 to 16384 columns, not 16385",
        ),
        (lambda: fused.add_norm_modulate(X, X[:3], WEIGHT), r"y is \[3, 64\] but x is \[4, 64\]"),
        (lambda: fused.add_norm_modulate(X.t(), X.t(), WEIGHT[:4]), "x is written in place"),
        (
            lambda: fused.add_norm_modulate(X[:1].expand(4, 64), X, WEIGHT),
            "x is written in place",
        ),
        (lambda: fused.add_norm_modulate(X, X, WEIGHT), "x overlaps with y"),
        (
            lambda: fused.add_norm_modulate(X, X.clone(), WEIGHT, SCALE),
            "gate must have one row where",
        ),
        (
            lambda: fused.add_norm_modulate(X, X.clone(), WEIGHT, None, None, SCALE),
            "next_scale needs a next_weight",
        ),
        (
            lambda: fused.add_norm_modulate(X, X.clone(), WEIGHT, addend=X.clone()),
            "addend and addend_factor need each other",
        ),
        (
            lambda: fused.add_norm_modulate(
                X, X.clone(), WEIGHT, addend=X[:3].clone(), addend_factor=torch.ones(1)
            ),
            r"addend is \[3, 64\] but x is \[4, 64\]",
        ),
        (
            lambda: fused.add_norm_modulate(
                X, X.clone(), WEIGHT, addend=X.clone(), addend_factor=torch.ones(2)
            ),
            "addend_factor must be",
        ),
        (
            lambda: fused.add_norm_modulate(
                X, X.clone(), WEIGHT, addend=X, addend_factor=torch.ones(1)
            ),
            "x overlaps with addend",
        ),
        (
            lambda: fused.add_norm_modulate(X, X.clone(), WEIGHT, None, WEIGHT, SCALE),
            "next_scale must have one row where",
        ),
        (
            lambda: fused.rotate_heads(QKV, HEAD, HEAD, ROTATIONS, 3, 4),
            "the matrix's columns are 768, which cannot begin with 3 heads of q and 4 of k",
        ),
        (
            lambda: fused.rotate_heads(QKV, HEAD, HEAD, ROTATIONS, -1, 2),
            "q_heads must be 0 to 1048575, not -1",
        ),
        (
            lambda: fused.rotate_heads(QKV, HEAD, HEAD, ROTATIONS, 2, 2.0),
            "k_heads must be a whole number",
        ),  # type: ignore[arg-type]
        (lambda: fused.rotate_heads(QKV, HEAD, HEAD[:64], ROTATIONS, 2, 2), "k_weight must be"),
        (
            lambda: fused.rotate_heads(QKV, HEAD, HEAD, ROTATIONS[:3], 2, 2),
            r"rotations must be float32 \[4, 64, 2\], not float32 \[3, 64, 2\]",
        ),
        (
            lambda: fused.rotate_heads(QKV, HEAD, HEAD, ROTATIONS.double(), 2, 2),
            "rotations must be float32",
        ),
        (
            lambda: _core.silu_multiply(X, X, ("bfloat16", X, None, 4, 64)),
            "the target overlaps with gate",
        ),
        (
            lambda: _core.silu_multiply(X, X, ("bfloat16", X[:3].clone(), None, 3, 64)),
            r"the target is \[3, 64\] but gate is \[4, 64\]",
        ),
        (
            lambda: _core.silu_multiply(X, X, ("fp8", X, None, 4, 64)),
            'unknown operand format "fp8"',
        ),
        (
            lambda: _core.silu_multiply(X[:, ::2], X[:, ::2], ("bfloat16", X, None, 4, 32)),
            "gate must have adjacent elements in each row",
        ),
    ],
)
def test_misuse_is_a_typed_error(call: Callable[[], object], sentence: str) -> None:
    with pytest.raises(zm.InvalidArgumentError, match=sentence):
        call()


@pytest.mark.skipif(bool(_core.build_info().cuda), reason="this build has CUDA")
def test_without_cuda_they_say_so() -> None:
    for call in (
        lambda: fused.silu_multiply(X, X, "mxfp8"),
        lambda: fused.norm_modulate(X, WEIGHT, SCALE, ITEMS, "row-scaled"),
        lambda: fused.add_norm_modulate(X, X.clone(), WEIGHT, SCALE[:1], WEIGHT),
        lambda: fused.rotate_heads(QKV, HEAD, HEAD, ROTATIONS, 2, 2),
    ):
        with pytest.raises(zm.UnsupportedError, match="this build has no CUDA kernels"):
            call()


def test_gemm_epilogues_need_a_gpu() -> None:
    operand = zm.RowScaledArray(torch.zeros(4, 64, dtype=torch.uint8), torch.ones(4))
    with pytest.raises(zm.InvalidArgumentError, match="a must be on a CUDA device"):
        gemm_silu_multiply(operand, operand)
    with pytest.raises(zm.InvalidArgumentError, match="a must be on a CUDA device"):
        gemm_rotate_heads(X, operand, HEAD, HEAD, ROTATIONS, 2, 2)


def test_memory_that_cannot_be_written_to() -> None:
    with pytest.raises(zm.InvalidArgumentError, match=r"out must be \[4, 64\], not \[3, 64\]"):
        fused.ActivationMemory((4, 64), "bfloat16", X, X[:3])
    with pytest.raises(zm.InvalidArgumentError, match="out is written in place"):
        fused.ActivationMemory((64, 4), "bfloat16", X, X.t())
    with pytest.raises(zm.InvalidArgumentError, match="out must be bfloat16, not float32"):
        fused.ActivationMemory((4, 64), "bfloat16", X, X.float())


def test_nothing_to_do() -> None:
    empty = X[:0]
    assert fused.silu_multiply(empty, empty).shape == (0, 64)
    assert fused.norm_modulate(empty, WEIGHT, output_format="mxfp8").shape == (0, 64)
    assert fused.add_norm_modulate(empty, empty, WEIGHT) is None
    fused.rotate_heads(QKV[:0], HEAD, HEAD, ROTATIONS[:0], 2, 2)
