"""`Arithmetic` by torch operations, for CUDA devices that this build has no kernels for."""

from __future__ import annotations

import torch

from ...layout import SCALE_TILE_ROWS
from ...ops import gemm as matmul
from ...ops.codec import MXFP8Array
from ...ops.fused import ActivationFormat
from ...ops.gemm import FoldStats, Int8Array, RowScaledArray, WithRowScales
from . import int8, scaled_mm, tiles, torch_codec
from .torch_codec import dequantize, quantize, quantize_rows

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


def fold(array: MXFP8Array) -> tuple[RowScaledArray, FoldStats]:
    """Fold the block scales into one per row."""
    folded, statistics = torch_codec.fold(array)
    return folded, matmul.fold_stats(statistics)


def multiply_weight_only(x: torch.Tensor, weights: MXFP8Array) -> torch.Tensor:
    """Multiply with the weights, decoding some rows at a time."""
    rows, columns = weights.shape
    out = torch.empty((x.shape[0], rows), dtype=x.dtype, device=x.device)
    for tile in tiles.row_tiles(rows, columns, tiles.WEIGHT_TILE, SCALE_TILE_ROWS):
        decoded = dequantize(torch_codec.rows_of(weights, tile), x.dtype)
        torch.mm(x, decoded.t(), out=out[:, tile])
    return out


def weight_only_workspace(shape: tuple[int, int], dtype: torch.dtype) -> int:
    """Return the bytes of the rows decoded at a time."""
    return min(shape[0] * shape[1], tiles.WEIGHT_TILE) * dtype.itemsize


def multiply_row_scaled(
    x: WithRowScales, weights: WithRowScales, dtype: torch.dtype
) -> torch.Tensor:
    """Multiply FP8 or INT8 with a scale per row."""
    multiply = int8.multiply if isinstance(x, Int8Array) else scaled_mm.multiply
    return multiply(x, weights, dtype)


def row_scaled_workspace(
    operands: ActivationFormat,
    tokens: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,  # noqa: ARG001 - of the interface
) -> int:
    """Return the bytes that `multiply_row_scaled` takes."""
    if operands == "int8":
        return int8.workspace(tokens, shape)
    return scaled_mm.workspace(tokens, shape, dtype)


quantize_int8 = int8.quantize_rotated


def multiply_decoded(x: MXFP8Array, weights: MXFP8Array, dtype: torch.dtype) -> torch.Tensor:
    """Multiply decoded operands."""
    return multiply_weight_only(dequantize(x, dtype), weights)


# Torch has block-scaled GEMMs on few devices; the mode for those needs kernels.
multiply_mxfp8 = multiply_decoded


def decoded_workspace(
    tokens: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,  # noqa: ARG001 - of the interface
) -> int:
    """Return the bytes of the decoded activations and of the weight rows decoded at a time."""
    return tokens * shape[1] * dtype.itemsize + weight_only_workspace(shape, dtype)
