"""The fused kernels of the core: called directly, or as registered operations while traced.

The functions are documented in `ops.fused` and `ops.gemm_epilogues`.
"""

from __future__ import annotations

from typing import Any

import torch

from ..ops import fused, gemm_epilogues, low_rank
from ..ops.codec import MXFP8Array
from ..ops.fused import ActivationFormat
from ..ops.gemm import Int8Array, RowScaledArray
from ..ops.low_rank import LowRankAddend
from .arithmetic import torch_library


def _result(parts: torch_library.Pair, output_format: ActivationFormat, shape: torch.Size) -> Any:
    """Return the result of a fused kernel from the two tensors of a registered operation."""
    values, scales = parts
    if output_format == "bfloat16":
        return values
    if output_format == "row-scaled":
        return RowScaledArray(values, scales)
    if output_format == "int8":
        return Int8Array(values, scales)
    return MXFP8Array(values, scales, (shape[0], shape[1]))


def join_columns(left: torch.Tensor, right: torch.Tensor, output_format: ActivationFormat) -> Any:
    """Join the columns of two matrices. `torch.compile` cannot trace it."""
    return fused.join_columns(left, right, output_format)


def silu_multiply(gate: torch.Tensor, up: torch.Tensor, output_format: ActivationFormat) -> Any:
    """Compute silu(gate) * up."""
    if not torch.compiler.is_compiling():
        return fused.silu_multiply(gate, up, output_format)
    return _result(torch_library.silu_multiply(gate, up, output_format), output_format, gate.shape)


def norm_modulate(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    items: torch.Tensor | None,
    output_format: ActivationFormat,
    eps: float,
) -> Any:
    """Compute RMSNorm(x) * weight * (1 + scale[item])."""
    if not torch.compiler.is_compiling():
        return fused.norm_modulate(x, weight, scale, items, output_format, eps)
    parts = torch_library.norm_modulate(x, weight, scale, items, output_format, eps)
    return _result(parts, output_format, x.shape)


def add_norm_modulate(
    x: torch.Tensor,
    y: torch.Tensor,
    norm_weight: torch.Tensor,
    gate: torch.Tensor | None,
    next_weight: torch.Tensor | None,
    next_scale: torch.Tensor | None,
    items: torch.Tensor | None,
    output_format: ActivationFormat,
    eps: float,
    addend: torch.Tensor | None,
    addend_factor: torch.Tensor | None,
) -> Any:
    """Add tanh(gate[item]) * RMSNorm(y) * norm_weight to x in place, and norm the result.

    An addend is multiplied by its factor and added to x too.
    """
    added = addend, addend_factor
    if not torch.compiler.is_compiling():
        return fused.add_norm_modulate(
            x, y, norm_weight, gate, next_weight, next_scale, items, output_format, eps, *added
        )
    if next_weight is None:
        return torch_library.add_norm(x, y, norm_weight, gate, items, eps, *added)
    parts = torch_library.add_norm_modulate(
        x, y, norm_weight, gate, next_weight, next_scale, items, output_format, eps, *added
    )
    return _result(parts, output_format, x.shape)


def rotate_heads(
    matrix: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    rotations: torch.Tensor,
    q_heads: int,
    k_heads: int,
    eps: float,
) -> None:
    """Norm and rotate the heads of q and k in place."""
    tracing = torch.compiler.is_compiling()
    call = torch_library.rotate_heads if tracing else fused.rotate_heads
    call(matrix, q_weight, k_weight, rotations, q_heads, k_heads, eps)


def narrow_gemm(a: Any, down: Any, factors: torch.Tensor) -> torch.Tensor:
    """Compute factors * A D^T, of operands with row scales or of bfloat16."""
    result: torch.Tensor
    if not torch.compiler.is_compiling():
        result = low_rank.narrow_gemm(a, down, factors)
    elif isinstance(a, (RowScaledArray, Int8Array)):
        result = torch_library.narrow_gemm(a.codes, a.scales, down.codes, down.scales, factors)
    else:
        result = torch_library.narrow_gemm_plain(a, down, factors)
    return result


def gemm_low_rank(
    a: RowScaledArray | Int8Array | torch.Tensor,
    b: RowScaledArray | Int8Array | MXFP8Array,
    addend: LowRankAddend,
) -> torch.Tensor:
    """Compute a b^T with a low-rank addend, of operands with row scales, or bfloat16 and MXFP8."""
    result: torch.Tensor
    if not torch.compiler.is_compiling():
        result = gemm_epilogues.gemm_low_rank(a, b, addend)
    else:
        factors = (b.codes, b.scales, addend.x, addend.u)
        if isinstance(a, (RowScaledArray, Int8Array)):
            result = torch_library.gemm_low_rank(a.codes, a.scales, *factors)
        else:
            result = torch_library.gemm_weight_only_low_rank(a, *factors)
    return result


def gemm_with_epilogue(
    epilogue: str,
    a: RowScaledArray | Int8Array,
    b: RowScaledArray | Int8Array,
    addend: LowRankAddend | None,
    kernel: str | None,
    *arguments: Any,
    out: torch.Tensor | None = None,
) -> Any:
    """Compute the GEMM of `ops.gemm_epilogues` with an epilogue and its arguments.

    While traced, the kernel is always that of least cost, and nothing is written to `out`.
    """
    row = gemm_epilogues.EPILOGUES[epilogue]
    if not torch.compiler.is_compiling():
        options = {} if out is None else {"out": out}  # not every epilogue takes it
        return row.gemm(a, b, *arguments, addend=addend, kernel=kernel, **options)
    call = torch_library.GEMM_EPILOGUES[epilogue]
    x, u = (None, None) if addend is None else (addend.x, addend.u)
    result = call(a.codes, a.scales, b.codes, b.scales, x, u, *arguments)
    if not row.encodes:
        return result
    shape = torch.Size((a.codes.shape[0], b.codes.shape[0] // row.rows_per_column))
    return _result(result, row.output_format(arguments), shape)
