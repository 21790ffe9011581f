"""Operations of the core registered with torch.library, in the namespace `zimage_mxfp8`.

torch.compile and torch.export put them in their graphs unchanged. Eager code calls the core itself,
which costs less than a registered operation. Each has a schema of plain tensors, which declares
mutated arguments, and a fake version, which gives shapes and dtypes. There are no derivatives.

An MXFP8 matrix is codes, scales, rows and columns, one with a scale per row codes and scales. A
result in one of the formats of `ops.fused` is two tensors: codes and scales, or the values in
bfloat16 and an empty tensor. Shapes, dtypes and errors are those of the functions of `ops` with the
same names.
"""

# ruff: noqa: ARG005 - a fake version has the arguments of its operation

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...layout import padded_shape, scale_shape
from ...ops import fused, gemm_epilogues, low_rank
from ...ops.codec import MXFP8Array
from ...ops.gemm import Int8Array, RowScaledArray
from ...ops.gemm_epilogues import GemmEpilogue
from ...ops.low_rank import LowRankAddend
from . import by_core

NAMESPACE = "zimage_mxfp8"
Pair = tuple[torch.Tensor, torch.Tensor]
_Function = Callable[..., Any]


def _register(schema: str, fake: _Function, writes: tuple[str, ...] = ()) -> Callable[..., Any]:
    """Register the decorated function as an operation of its name, with a fake version."""

    def register(function: _Function) -> _Function:
        operation = torch.library.custom_op(
            f"{NAMESPACE}::{function.__name__}", function, mutates_args=writes, schema=schema
        )
        operation.register_fake(fake)
        return operation

    return register


def _parts(result: Any) -> Pair:
    if isinstance(result, (MXFP8Array, RowScaledArray, Int8Array)):
        return result.codes, result.scales
    return result, result.new_empty(0)


def _with_row_scales(codes: torch.Tensor, scales: torch.Tensor) -> RowScaledArray | Int8Array:
    """Return the matrix of codes, which are int8 or E4M3, and scales of rows."""
    return (Int8Array if codes.dtype == torch.int8 else RowScaledArray)(codes, scales)


def _fake_parts(like: torch.Tensor, columns: Any, output_format: str) -> Pair:
    """Return empty tensors like those of `_parts` for [M, columns], M and device as in `like`."""
    shape = (like.shape[0], columns)
    if output_format == "bfloat16":
        return like.new_empty(shape, dtype=torch.bfloat16), like.new_empty(0, dtype=torch.bfloat16)
    if output_format in ("row-scaled", "int8"):
        dtype = torch.int8 if output_format == "int8" else torch.float8_e4m3fn
        codes = like.new_empty(shape, dtype=dtype)
        return codes, like.new_empty(shape[:1], dtype=torch.float32)
    codes = like.new_empty(padded_shape(shape), dtype=torch.float8_e4m3fn)
    return codes, like.new_empty(scale_shape(shape), dtype=torch.uint8)


@_register(
    "(Tensor matrix) -> (Tensor, Tensor)",
    lambda matrix: _fake_parts(matrix, matrix.shape[1], "mxfp8"),
)
def quantize(matrix: torch.Tensor) -> Pair:
    """Encode [M, K] in MXFP8; blocks with NaN or infinity become NaN."""
    return _parts(by_core.quantize(matrix))


@_register(
    "(Tensor matrix) -> (Tensor, Tensor)",
    lambda matrix: _fake_parts(matrix, matrix.shape[1], "row-scaled"),
)
def quantize_rows(matrix: torch.Tensor) -> Pair:
    """Encode [M, K] in E4M3 with a scale per row."""
    return _parts(by_core.quantize_rows(matrix))


@_register(
    "(Tensor matrix) -> (Tensor, Tensor)",
    lambda matrix: _fake_parts(matrix, matrix.shape[1], "int8"),
)
def quantize_int8(matrix: torch.Tensor) -> Pair:
    """Rotate [M, K] and encode it in INT8 with a scale per row."""
    return _parts(by_core.quantize_int8(matrix))


@_register(
    "(Tensor codes, Tensor scales, SymInt rows, SymInt columns, ScalarType dtype) -> Tensor",
    lambda codes, scales, rows, columns, dtype: codes.new_empty((rows, columns), dtype=dtype),
)
def dequantize(
    codes: torch.Tensor, scales: torch.Tensor, rows: int, columns: int, dtype: torch.dtype
) -> torch.Tensor:
    """Decode MXFP8: [rows, columns] of `dtype`."""
    return by_core.dequantize(MXFP8Array(codes, scales, (rows, columns)), dtype)


@_register(
    "(Tensor x, Tensor codes, Tensor scales, SymInt rows, SymInt columns) -> Tensor",
    lambda x, codes, scales, rows, columns: x.new_empty((x.shape[0], rows)),
)
def gemm_weight_only(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, rows: int, columns: int
) -> torch.Tensor:
    """Multiply [M, K] with decoded MXFP8 weights [N, K]: [M, N] in the dtype of x."""
    return by_core.multiply_weight_only(x, MXFP8Array(codes, scales, (rows, columns)))


@_register(
    "(Tensor codes, Tensor scales, Tensor weight_codes, Tensor weight_scales, ScalarType dtype)"
    " -> Tensor",
    lambda codes, scales, weight_codes, weight_scales, dtype: codes.new_empty(
        (codes.shape[0], weight_codes.shape[0]), dtype=dtype
    ),
)
def gemm_row_scaled(
    codes: torch.Tensor,
    scales: torch.Tensor,
    weight_codes: torch.Tensor,
    weight_scales: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply FP8 or INT8 [M, K] with weights [N, K] of the same format: [M, N] of `dtype`."""
    x, weights = _with_row_scales(codes, scales), _with_row_scales(weight_codes, weight_scales)
    return by_core.multiply_row_scaled(x, weights, dtype)


@_register(
    "(Tensor codes, Tensor scales, SymInt tokens, Tensor weight_codes, Tensor weight_scales,"
    " SymInt rows, SymInt columns, bool decoded, ScalarType dtype) -> Tensor",
    lambda codes, scales, tokens, weight_codes, weight_scales, rows, columns, decoded, dtype: (
        codes.new_empty((tokens, rows), dtype=dtype)
    ),
)
def gemm_mxfp8(
    codes: torch.Tensor,
    scales: torch.Tensor,
    tokens: int,
    weight_codes: torch.Tensor,
    weight_scales: torch.Tensor,
    rows: int,
    columns: int,
    decoded: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply MXFP8 [tokens, columns] with MXFP8 weights [rows, columns]: [tokens, rows].

    With `decoded`, a kernel that decodes both operands first is used, else the device's fastest.
    """
    multiply = by_core.multiply_decoded if decoded else by_core.multiply_mxfp8
    x = MXFP8Array(codes, scales, (tokens, columns))
    return multiply(x, MXFP8Array(weight_codes, weight_scales, (rows, columns)), dtype)


@_register(
    "(Tensor gate, Tensor up, str output_format) -> (Tensor, Tensor)",
    lambda gate, up, output_format: _fake_parts(gate, gate.shape[1], output_format),
)
def silu_multiply(
    gate: torch.Tensor, up: torch.Tensor, output_format: fused.ActivationFormat
) -> Pair:
    """Compute `ops.fused.silu_multiply`."""
    return _parts(fused.silu_multiply(gate, up, output_format))


@_register(
    "(Tensor x, Tensor weight, Tensor? scale, Tensor? items, str output_format, float eps)"
    " -> (Tensor, Tensor)",
    lambda x, weight, scale, items, output_format, eps: _fake_parts(x, x.shape[1], output_format),
)
def norm_modulate(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    items: torch.Tensor | None,
    output_format: fused.ActivationFormat,
    eps: float,
) -> Pair:
    """Compute `ops.fused.norm_modulate`."""
    return _parts(fused.norm_modulate(x, weight, scale, items, output_format, eps))


@_register(
    "(Tensor(a!) x, Tensor y, Tensor norm_weight, Tensor? gate, Tensor? items, float eps,"
    " Tensor? addend, Tensor? addend_factor) -> ()",
    lambda x, y, norm_weight, gate, items, eps, addend, addend_factor: None,
    ("x",),
)
def add_norm(
    x: torch.Tensor,
    y: torch.Tensor,
    norm_weight: torch.Tensor,
    gate: torch.Tensor | None,
    items: torch.Tensor | None,
    eps: float,
    addend: torch.Tensor | None,
    addend_factor: torch.Tensor | None,
) -> None:
    """Compute `ops.fused.add_norm_modulate` without the norm that follows; writes x."""
    fused.add_norm_modulate(
        x, y, norm_weight, gate, None, None, items, "bfloat16", eps, addend, addend_factor
    )


@_register(
    "(Tensor(a!) x, Tensor y, Tensor norm_weight, Tensor? gate, Tensor next_weight,"
    " Tensor? next_scale, Tensor? items, str output_format, float eps, Tensor? addend,"
    " Tensor? addend_factor) -> (Tensor, Tensor)",
    lambda x, y, norm_weight, gate, next_weight, next_scale, items, output_format, *_: _fake_parts(
        x, x.shape[1], output_format
    ),
    ("x",),
)
def add_norm_modulate(
    x: torch.Tensor,
    y: torch.Tensor,
    norm_weight: torch.Tensor,
    gate: torch.Tensor | None,
    next_weight: torch.Tensor,
    next_scale: torch.Tensor | None,
    items: torch.Tensor | None,
    output_format: fused.ActivationFormat,
    eps: float,
    addend: torch.Tensor | None,
    addend_factor: torch.Tensor | None,
) -> Pair:
    """Compute `ops.fused.add_norm_modulate`; writes x."""
    norms = norm_weight, gate, next_weight, next_scale
    return _parts(
        fused.add_norm_modulate(x, y, *norms, items, output_format, eps, addend, addend_factor)
    )


@_register(
    "(Tensor(a!) matrix, Tensor q_weight, Tensor k_weight, Tensor rotations, SymInt q_heads, "
    "SymInt k_heads, float eps) -> ()",
    lambda matrix, q_weight, k_weight, rotations, q_heads, k_heads, eps: None,
    ("matrix",),
)
def rotate_heads(
    matrix: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    rotations: torch.Tensor,
    q_heads: int,
    k_heads: int,
    eps: float,
) -> None:
    """Compute `ops.fused.rotate_heads`; writes the matrix."""
    fused.rotate_heads(matrix, q_weight, k_weight, rotations, q_heads, k_heads, eps)


@_register(
    "(Tensor codes, Tensor scales, Tensor down_codes, Tensor down_scales, Tensor factors)"
    " -> Tensor",
    lambda codes, scales, down_codes, down_scales, factors: codes.new_empty(
        (codes.shape[0], factors.shape[0]), dtype=torch.bfloat16
    ),
)
def narrow_gemm(
    codes: torch.Tensor,
    scales: torch.Tensor,
    down_codes: torch.Tensor,
    down_scales: torch.Tensor,
    factors: torch.Tensor,
) -> torch.Tensor:
    """Compute `ops.low_rank.narrow_gemm` of operands with row scales."""
    a, down = _with_row_scales(codes, scales), _with_row_scales(down_codes, down_scales)
    result: torch.Tensor = low_rank.narrow_gemm(a, down, factors)
    return result


@_register(
    "(Tensor matrix, Tensor down, Tensor factors) -> Tensor",
    lambda matrix, down, factors: matrix.new_empty((matrix.shape[0], factors.shape[0])),
)
def narrow_gemm_plain(
    matrix: torch.Tensor, down: torch.Tensor, factors: torch.Tensor
) -> torch.Tensor:
    """Compute `ops.low_rank.narrow_gemm` of bfloat16."""
    result: torch.Tensor = low_rank.narrow_gemm(matrix, down, factors)
    return result


@_register(
    "(Tensor codes, Tensor scales, Tensor weight_codes, Tensor weight_scales, Tensor x, Tensor u)"
    " -> Tensor",
    lambda codes, scales, weight_codes, weight_scales, x, u: codes.new_empty(
        (codes.shape[0], weight_codes.shape[0]), dtype=torch.bfloat16
    ),
)
def gemm_low_rank(
    codes: torch.Tensor,
    scales: torch.Tensor,
    weight_codes: torch.Tensor,
    weight_scales: torch.Tensor,
    x: torch.Tensor,
    u: torch.Tensor,
) -> torch.Tensor:
    """Compute `ops.gemm_epilogues.gemm_low_rank` of operands with row scales."""
    a, b = _with_row_scales(codes, scales), _with_row_scales(weight_codes, weight_scales)
    result: torch.Tensor = gemm_epilogues.gemm_low_rank(a, b, LowRankAddend(x, u))
    return result


@_register(
    "(Tensor matrix, Tensor weight_codes, Tensor weight_scales, Tensor x, Tensor u) -> Tensor",
    lambda matrix, weight_codes, weight_scales, x, u: matrix.new_empty(
        (matrix.shape[0], weight_codes.shape[0])
    ),
)
def gemm_weight_only_low_rank(
    matrix: torch.Tensor,
    weight_codes: torch.Tensor,
    weight_scales: torch.Tensor,
    x: torch.Tensor,
    u: torch.Tensor,
) -> torch.Tensor:
    """Compute `ops.gemm_epilogues.gemm_low_rank` of bfloat16 and MXFP8."""
    rows, columns = weight_codes.shape
    weights = MXFP8Array(weight_codes, weight_scales, (rows, columns))
    result: torch.Tensor = gemm_epilogues.gemm_low_rank(matrix, weights, LowRankAddend(x, u))
    return result


def _register_gemm(epilogue: GemmEpilogue) -> Any:
    """Register a GEMM of operands with row scales and an epilogue, as `gemm_` and its name.

    Its `x` and `u` are the low-rank addend; both are None without one.
    """

    def fake(*parts: Any) -> Any:
        codes, _, weight_codes, _, _, _, *arguments = parts
        columns = weight_codes.shape[0] // epilogue.rows_per_column
        result = _fake_parts(codes, columns, epilogue.output_format(arguments))
        return result if epilogue.encodes else result[0]

    def gemm(
        codes: torch.Tensor,
        scales: torch.Tensor,
        weight_codes: torch.Tensor,
        weight_scales: torch.Tensor,
        x: torch.Tensor | None,
        u: torch.Tensor | None,
        *arguments: Any,
    ) -> Any:
        a, b = _with_row_scales(codes, scales), _with_row_scales(weight_codes, weight_scales)
        addend = None if x is None else LowRankAddend(x, u)
        result = epilogue.gemm(a, b, *arguments, addend=addend)
        return _parts(result) if epilogue.encodes else result

    gemm.__name__ = f"gemm_{epilogue.name}"
    operands = (
        "Tensor codes, Tensor scales, Tensor weight_codes, Tensor weight_scales,"
        " Tensor? x, Tensor? u"
    )
    returns = "(Tensor, Tensor)" if epilogue.encodes else "Tensor"
    return _register(f"({operands}, {epilogue.schema}) -> {returns}", fake)(gemm)


GEMM_EPILOGUES = {name: _register_gemm(row) for name, row in gemm_epilogues.EPILOGUES.items()}
