"""Low-rank addends of GEMMs on a Hopper GPU, against torch in float64.

pytest -m gpu
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import zimage_mxfp8 as zm
from zimage_mxfp8.ops import fused
from zimage_mxfp8.ops.gemm_epilogues import gemm_low_rank, gemm_rotate_heads, gemm_silu_multiply
from zimage_mxfp8.ops.low_rank import LowRankAddend, narrow_gemm
from zimage_mxfp8.transformer.arithmetic import by_core, int8
from zimage_mxfp8.transformer.fused_low_rank import two_int8_terms, two_terms

pytestmark = pytest.mark.gpu

ROUNDING = 2.0**-8  # half a unit in the last place of BF16
SUMS = 2.0**-9  # of the tensor cores' sums in FP8, see test_gemm_epilogues_cuda.py


@pytest.fixture(autouse=True)
def _hopper() -> None:
    if not by_core.takes_addends(torch.cuda.current_device(), "row-scaled", "row-scaled"):
        pytest.skip("no kernel of this device adds a low-rank addend")


def random(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator(device="cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda")


def operand(rows: int, depth: int, seed: int) -> zm.RowScaledArray:
    return zm.quantize_rows(random(rows, depth, seed=seed) / depth**0.5)


def codes(array: zm.RowScaledArray) -> torch.Tensor:
    values: torch.Tensor = array.codes.view(torch.float8_e4m3fn).double()
    return values


@pytest.mark.parametrize("tokens", [1, 63, 100, 129, 1152, 4224, 16512])
@pytest.mark.parametrize(
    ("rank", "depth"), [(32, 3840), (128, 10240), (64, 352), (32, 32), (96, 3840), (256, 416)]
)
def test_narrow_gemm(tokens: int, rank: int, depth: int) -> None:
    a, down = operand(tokens, depth, 1), two_terms(random(rank, depth, seed=2))
    factors = random(rank, seed=3)
    result = narrow_gemm(a, down, factors)
    terms = codes(down) * down.scales.double()[:, None]
    exact = codes(a) @ (terms[0::2] + terms[1::2]).T * factors
    size = codes(a).norm(dim=1)[:, None] * (terms[0::2].norm(dim=1) + terms[1::2].norm(dim=1))
    allowed = 1.01 * ROUNDING * exact.abs() + SUMS * size * factors.abs()
    assert result.dtype == torch.bfloat16 and result.shape == exact.shape
    assert ((result.double() - exact).abs() <= allowed).all()
    assert ((result.double() - exact).norm() / exact.norm()).item() < 5e-3
    assert torch.equal(narrow_gemm(a, down, factors), result)


@pytest.mark.parametrize("tokens", [1, 63, 100, 129, 1152, 4224, 16512])
@pytest.mark.parametrize(
    ("rank", "depth"), [(32, 3840), (128, 10240), (64, 352), (32, 32), (96, 3840), (256, 416)]
)
def test_narrow_gemm_of_bfloat16(tokens: int, rank: int, depth: int) -> None:
    wide = random(tokens, depth + 64, seed=1).bfloat16()
    a, down, factors = wide[:, :depth], random(rank, depth, seed=2).bfloat16(), random(rank, seed=3)
    result = narrow_gemm(a, down, factors)
    exact = a.double() @ down.double().T * factors
    size = a.double().norm(dim=1)[:, None] * down.double().norm(dim=1) * factors.abs()
    assert result.dtype == torch.bfloat16 and result.shape == exact.shape
    assert ((result.double() - exact).abs() <= 1.01 * ROUNDING * exact.abs() + 1e-6 * size).all()
    assert torch.equal(narrow_gemm(a, down, factors), result)


def addend_of(tokens: int, rows: int, rank: int) -> LowRankAddend:
    # The products of codes have some thousands.
    x, u = random(tokens, rank, seed=4) * 500, random(rows, rank, seed=5)
    return LowRankAddend(x.bfloat16(), u.bfloat16())


def exact_sums(
    a: zm.RowScaledArray, b: zm.RowScaledArray, addend: LowRankAddend
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scaled sums in float64, and the bound of their error in the tensor cores."""
    scales = a.scales.double()[:, None] * b.scales.double()
    sums = codes(a) @ codes(b).T + addend.x.double() @ addend.u.double().T
    sizes = codes(a).square().sum(1).sqrt()[:, None] * codes(b).square().sum(1).sqrt()
    sizes += addend.x.double().norm(dim=1)[:, None] * addend.u.double().norm(dim=1)
    return sums * scales, (sizes * SUMS + sums.abs() * ROUNDING) * scales


@pytest.mark.parametrize("tokens", [1, 63, 129, 1088, 4224])
@pytest.mark.parametrize(
    ("rows", "depth", "rank"), [(3840, 3840, 32), (3840, 10240, 128), (8, 32, 8), (520, 160, 200)]
)
def test_gemm_low_rank(tokens: int, rows: int, depth: int, rank: int) -> None:
    a, b, addend = operand(tokens, depth, 6), operand(rows, depth, 7), addend_of(tokens, rows, rank)
    result = gemm_low_rank(a, b, addend).double()
    exact, allowed = exact_sums(a, b, addend)
    assert ((result - exact).abs() <= allowed + ROUNDING * exact.abs()).all()
    assert ((result - exact).norm() / exact.norm()).item() < 5e-3


@pytest.mark.parametrize("tokens", [1, 129, 1152, 4224])
@pytest.mark.parametrize(
    ("rows", "depth", "rank"), [(3840, 3840, 32), (3840, 10240, 128), (8, 32, 8), (520, 160, 200)]
)
def test_weight_only(tokens: int, rows: int, depth: int, rank: int) -> None:
    a = (random(tokens, depth, seed=6) / depth**0.5).bfloat16()
    b = zm.quantize(random(rows, depth, seed=7))
    addend = addend_of(tokens, rows, rank)
    addend = LowRankAddend(addend.x / 500, addend.u)
    result = gemm_low_rank(a, b, addend)
    exact = a.double() @ zm.dequantize(b, "float32").double().T
    exact += addend.x.double() @ addend.u.double().T
    sizes = 3 * (1 + rank**0.5)
    allowed = 1.01 * ROUNDING * exact.abs() + 1e-5 * sizes
    assert ((result.double() - exact).abs() <= allowed).all()
    zeros = LowRankAddend(torch.zeros_like(addend.x), addend.u)
    plain = zm.gemm(a, b)
    difference = (gemm_low_rank(a, b, zeros).double() - plain.double()).norm()
    assert (difference / plain.double().norm()).item() < 4e-3


@pytest.mark.parametrize("tokens", [1, 129, 576, 4224])
@pytest.mark.parametrize(
    ("columns", "depth", "rank"), [(10240, 3840, 64), (10240, 128, 32), (200, 128, 32)]
)
def test_silu_multiply(tokens: int, columns: int, depth: int, rank: int) -> None:
    a, b = operand(tokens, depth, 8), operand(2 * columns, depth, 9)
    addend = addend_of(tokens, 2 * columns, rank)
    result = gemm_silu_multiply(a, b, addend=addend).double()
    gate, up = exact_sums(a, b, addend)[0].chunk(2, dim=1)
    exact = torch.nn.functional.silu(gate) * up
    assert ((result - exact).norm() / exact.norm()).item() < 6e-3
    encoded = gemm_silu_multiply(a, b, "row-scaled", addend=addend)
    want = zm.quantize_rows(gemm_silu_multiply(a, b, addend=addend))
    assert torch.equal(encoded.codes.view(torch.uint8), want.codes.view(torch.uint8))


@pytest.mark.parametrize("tokens", [1, 129, 1088, 4224])
def test_rotate_heads(tokens: int) -> None:
    a, b = operand(tokens, 3840, 10), operand(11520, 3840, 11)
    angles = random(tokens, 64, seed=12)
    rotations = torch.stack((angles.cos(), angles.sin()), dim=-1)
    weight = torch.ones(128, device="cuda", dtype=torch.bfloat16)
    addend = addend_of(tokens, 11520, 96)
    result = gemm_rotate_heads(a, b, weight, weight, rotations, 30, 30, addend=addend)
    exact = exact_sums(a, b, addend)[0].bfloat16()
    fused.rotate_heads(exact, weight, weight, rotations, 30, 30)
    assert ((result.double() - exact.double()).norm() / exact.double().norm()).item() < 8e-3


def int8_values(array: zm.Int8Array) -> torch.Tensor:
    values: torch.Tensor = array.codes.double() * array.scales.double()[:, None]
    return values


@pytest.mark.parametrize("tokens", [1, 100, 129, 1152, 4224])
@pytest.mark.parametrize(
    ("rank", "depth"), [(32, 3840), (128, 10240), (64, 352), (32, 32), (256, 416)]
)
def test_narrow_gemm_of_int8(tokens: int, rank: int, depth: int) -> None:
    a = fused.quantize_rotated(random(tokens, depth, seed=1).bfloat16())
    matrix, factors = random(rank, depth, seed=2), random(rank, seed=3)
    down = two_int8_terms(matrix)
    terms = int8_values(down)
    rotated = int8.rotate_columns(matrix).double()
    assert ((terms[0::2] + terms[1::2] - rotated).norm() / rotated.norm()).item() < 1e-4
    exact = int8_values(a) @ (terms[0::2] + terms[1::2]).T * factors
    result = narrow_gemm(a, down, factors)
    # Both sums of integers are exact; their sum in float32 and the scales are not.
    size = int8_values(a).norm(dim=1)[:, None] * terms[0::2].norm(dim=1) * factors.abs()
    allowed = 1.01 * ROUNDING * exact.abs() + 1e-5 * size
    assert ((result.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("tokens", [1, 63, 129, 1088, 1152, 4224])
@pytest.mark.parametrize(
    ("rows", "depth", "rank"),
    [(3840, 3840, 32), (3840, 10240, 128), (200, 352, 64), (8, 32, 96), (4096, 128, 160)],
)
def test_gemm_low_rank_of_int8(tokens: int, rows: int, depth: int, rank: int) -> None:
    a, b = (
        fused.quantize_rotated((random(count, depth, seed=seed) / depth**0.5).bfloat16())
        for count, seed in ((tokens, 1), (rows, 2))
    )
    x, u = random(tokens, rank, seed=3).bfloat16(), random(rows, rank, seed=4).bfloat16()
    exact = int8_values(a) @ int8_values(b).T + x.double() @ u.double().T
    result = gemm_low_rank(a, b, LowRankAddend(x, u))
    size = x.double().norm(dim=1)[:, None] * u.double().norm(dim=1)
    allowed = 1.01 * ROUNDING * exact.abs() + 2.0**-12 * size
    assert ((result.double() - exact).abs() <= allowed).all()
    assert torch.equal(result, gemm_low_rank(a, b, LowRankAddend(x, u)))


@pytest.mark.parametrize("tokens", [1, 129, 576, 4224])
@pytest.mark.parametrize(
    ("columns", "depth", "rank"), [(10240, 3840, 64), (10240, 128, 32), (200, 128, 32)]
)
def test_epilogues_of_int8_follow_the_addend(
    tokens: int, columns: int, depth: int, rank: int
) -> None:
    """Computed from the rounded sums, as they would be apart."""
    a, b = (
        fused.quantize_rotated((random(count, depth, seed=seed) / depth**0.5).bfloat16())
        for count, seed in ((tokens, 1), (2 * columns, 2))
    )
    x, u = random(tokens, rank, seed=3).bfloat16(), random(2 * columns, rank, seed=4).bfloat16()
    addend = LowRankAddend(x, u)
    gate, up = gemm_low_rank(a, b, addend).chunk(2, dim=1)
    assert torch.equal(gemm_silu_multiply(a, b, addend=addend), fused.silu_multiply(gate, up))
    rows = 384 * (columns // 384) or 384
    b, addend = zm.Int8Array(b.codes[:rows], b.scales[:rows]), LowRankAddend(x, u[:rows])
    weight = random(128, seed=5).bfloat16()
    rotations = torch.nn.functional.normalize(random(tokens, 64, 2, seed=6), dim=-1)
    want = gemm_low_rank(a, b, addend)
    fused.rotate_heads(want, weight, weight, rotations, rows // 384, rows // 384)
    found = gemm_rotate_heads(
        a, b, weight, weight, rotations, rows // 384, rows // 384, addend=addend
    )
    assert torch.equal(found, want)


def test_an_addend_of_zeros_changes_nothing() -> None:
    a, b = operand(300, 3840, 13), operand(2 * 1024, 3840, 14)
    zeros = LowRankAddend(
        *(torch.zeros(n, 32, device="cuda", dtype=torch.bfloat16) for n in (300, 2048))
    )
    with_zeros = gemm_silu_multiply(a, b, addend=zeros)
    assert torch.equal(with_zeros, gemm_silu_multiply(a, b, kernel="fp8_sm90"))


def test_views_and_wrong_arguments() -> None:
    a, b, addend = operand(40, 64, 15), operand(256, 64, 16), addend_of(40, 256, 32)
    wide = torch.cat([addend.x, addend.x], 1)[:, :32]
    want = gemm_low_rank(a, b, addend)
    assert torch.equal(gemm_low_rank(a, b, LowRankAddend(wide, addend.u)), want)

    def refused(x: Any, u: Any, words: str) -> None:
        with pytest.raises(zm.InvalidArgumentError, match=words):
            gemm_low_rank(a, b, LowRankAddend(x, u))

    refused(addend.x[:39], addend.u, r"X must be BF16 \[40, 32\]")
    refused(addend.x, addend.u[:, :24], "widths differ")
    refused(addend.x[:, :12], addend.u[:, :12], "multiple of 8")
    refused(addend.x.float(), addend.u, "must be bfloat16")
    with pytest.raises(zm.InvalidArgumentError, match="multiple of 64 rows"):
        narrow_gemm(a, operand(40, 64, 17), torch.zeros(20, device="cuda"))
    with pytest.raises(zm.InvalidArgumentError, match="both be BF16, row-scaled FP8 or INT8"):
        narrow_gemm(a, zm.quantize(random(64, 64, seed=17)), torch.zeros(64, device="cuda"))
    with pytest.raises(zm.InvalidArgumentError, match=r"factors must be \[32\]"):
        narrow_gemm(a, operand(64, 64, 17), torch.zeros(64, device="cuda"))
    with pytest.raises(zm.UnsupportedError, match="adds no low-rank addend"):
        gemm_low_rank(a, b, addend, kernel="fp8_rowwise")
