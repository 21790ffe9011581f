"""`Arithmetic` by the registered operations, for torch.compile and torch.export to trace."""

from __future__ import annotations

import torch

from ...ops.codec import MXFP8Array
from ...ops.gemm import Int8Array, RowScaledArray, WithRowScales
from . import torch_library
from .by_core import (
    decoded_workspace,
    fold,
    row_scaled_workspace,
    weight_only_workspace,
)

__all__ = [
    "decoded_workspace",
    "dequantize",
    "fold",
    "multiply_decoded",
    "multiply_mxfp8",
    "multiply_row_scaled",
    "multiply_weight_only",
    "quantize",
    "quantize_int8",
    "quantize_rows",
    "row_scaled_workspace",
    "weight_only_workspace",
]


def quantize(matrix: torch.Tensor) -> MXFP8Array:
    """Encode a matrix in MXFP8."""
    codes, scales = torch_library.quantize(matrix)
    return MXFP8Array(codes, scales, (matrix.shape[0], matrix.shape[1]))


def quantize_rows(matrix: torch.Tensor) -> RowScaledArray:
    """Encode a matrix in E4M3 with a scale per row."""
    return RowScaledArray(*torch_library.quantize_rows(matrix))


def dequantize(array: MXFP8Array, dtype: torch.dtype) -> torch.Tensor:
    """Decode a matrix from MXFP8."""
    out: torch.Tensor = torch_library.dequantize(array.codes, array.scales, *array.shape, dtype)
    return out


def multiply_weight_only(x: torch.Tensor, weights: MXFP8Array) -> torch.Tensor:
    """Multiply with the decoded weights."""
    out: torch.Tensor = torch_library.gemm_weight_only(
        x, weights.codes, weights.scales, *weights.shape
    )
    return out


def multiply_row_scaled(
    x: WithRowScales, weights: WithRowScales, dtype: torch.dtype
) -> torch.Tensor:
    """Multiply FP8 or INT8 with a scale per row."""
    out: torch.Tensor = torch_library.gemm_row_scaled(
        x.codes, x.scales, weights.codes, weights.scales, dtype
    )
    return out


def quantize_int8(matrix: torch.Tensor) -> Int8Array:
    """Rotate a matrix and encode it in INT8."""
    return Int8Array(*torch_library.quantize_int8(matrix))


def multiply_mxfp8(x: MXFP8Array, weights: MXFP8Array, dtype: torch.dtype) -> torch.Tensor:
    """Multiply by the device's fastest kernel."""
    return _multiply(x, weights, False, dtype)


def multiply_decoded(x: MXFP8Array, weights: MXFP8Array, dtype: torch.dtype) -> torch.Tensor:
    """Multiply by a kernel that decodes both operands first."""
    return _multiply(x, weights, True, dtype)


def _multiply(
    x: MXFP8Array, weights: MXFP8Array, decoded: bool, dtype: torch.dtype
) -> torch.Tensor:
    out: torch.Tensor = torch_library.gemm_mxfp8(
        x.codes,
        x.scales,
        x.shape[0],
        weights.codes,
        weights.scales,
        *weights.shape,
        decoded,
        dtype,
    )
    return out
