"""`Arithmetic` by the kernels of the core, on the CPU and on CUDA devices."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F

from ... import _core
from ...ops import codec, fused
from ...ops import gemm as matmul
from ...ops.arrays import dtype_name
from ...ops.codec import MXFP8Array
from ...ops.fused import ActivationFormat
from ...ops.gemm import FoldStats, Int8Array, RowScaledArray, WithRowScales, gemm
from ...ops.low_rank import NARROW_ROWS
from ...system.devices import core_index, has_kernels, native_gemm_unsupported
from . import int8, scaled_mm

LIBRARY_WORKSPACE = 32 << 20  # bytes of cuBLASLt's workspace, which the model counts once


def quantize(matrix: torch.Tensor) -> MXFP8Array:
    """Encode a matrix in MXFP8."""
    return codec.quantize(matrix, nonfinite="encode")


def quantize_rows(matrix: torch.Tensor) -> RowScaledArray:
    """Encode a matrix in E4M3 with a scale per row."""
    return matmul.quantize_rows(matrix)


def dequantize(array: MXFP8Array, dtype: torch.dtype) -> torch.Tensor:
    """Decode a matrix from MXFP8."""
    decoded: torch.Tensor = codec.dequantize(array, dtype)
    return decoded


def fold(array: MXFP8Array) -> tuple[RowScaledArray, FoldStats]:
    """Fold the block scales into one per row."""
    return matmul.fold(array)


def multiply_weight_only(x: torch.Tensor, weights: MXFP8Array) -> torch.Tensor:
    """Multiply with the decoded weights."""
    if x.is_cuda and x.dtype == torch.bfloat16:
        out: torch.Tensor = gemm(x, weights, dtype=x.dtype)
        return out
    return F.linear(x, dequantize(weights, x.dtype))


def weight_only_workspace(shape: tuple[int, int], dtype: torch.dtype) -> int:
    """Return the bytes of the decoded weights, which few tokens do not need."""
    return shape[0] * shape[1] * dtype.itemsize


def multiply_row_scaled(
    x: WithRowScales, weights: WithRowScales, dtype: torch.dtype
) -> torch.Tensor:
    """Multiply FP8 or INT8 with a scale per row; by torch if the core has no kernel."""
    device = x.codes.device
    if isinstance(x, Int8Array):
        if not _core_multiplies_int8(weights.shape, dtype, device):
            return int8.multiply(x, weights, dtype)
    elif row_scaled_unsupported(core_index(device)):
        return scaled_mm.multiply(x, weights, dtype)
    out: torch.Tensor = gemm(x, weights, dtype=dtype)
    return out


def row_scaled_workspace(
    operands: ActivationFormat,
    tokens: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> int:
    """Return bytes that `multiply_row_scaled` takes on CUDA beyond `LIBRARY_WORKSPACE`."""
    index = core_index(device)
    if operands == "int8":
        if not _core_multiplies_int8(shape, dtype, device):
            return int8.workspace(tokens, shape)
    elif row_scaled_unsupported(index):
        return scaled_mm.workspace(tokens, shape, dtype)
    name = dtype_name(dtype, "dtype")
    _, nbytes = matmul.choice((tokens, *shape, operands, operands, name, False), index)
    return max(0, nbytes - LIBRARY_WORKSPACE)


def row_scaled_unsupported(device: int) -> str:
    """Return why the core does not multiply row-scaled FP8 fast on a CUDA device; "" if it does.

    Args:
        device: its index, or -1 for the CPU, which has no fast way and uses the core.
    """
    return "" if device < 0 else _cuda_unsupported("row-scaled", device)


def int8_unsupported(device: int) -> str:
    """Return why the core does not multiply INT8 on a CUDA device with kernels; "" if it does.

    Args:
        device: its index.
    """
    return _cuda_unsupported("int8", device)


def quantize_int8(matrix: torch.Tensor) -> Int8Array:
    """Rotate a matrix and encode it in INT8; by torch on the CPU."""
    is_fast = matrix.is_cuda and matrix.dtype == torch.bfloat16
    return fused.quantize_rotated(matrix) if is_fast else int8.quantize_rotated(matrix)


def _core_multiplies_int8(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> bool:
    rows, columns = shape
    fits = rows % 8 == 0 and columns % int8.MAX_BLOCK == 0 and dtype == torch.bfloat16
    return fits and device.type == "cuda" and not int8_unsupported(device.index)


def takes_epilogues(device: int, operands: ActivationFormat) -> bool:
    """Return whether GEMMs of two operands in a format take epilogues on a CUDA device."""
    return has_kernels(device) and not _cuda_unsupported(operands, device)


@cache
def takes_addends(device: int, a: ActivationFormat, b: ActivationFormat) -> bool:
    """Return whether GEMMs of operands in these formats add a low-rank addend on a CUDA device."""
    problem = _core.GemmProblem(128, 128, 128, a, b, "bfloat16", False, addend_rank=NARROW_ROWS)
    return any(
        not _core.gemm_unsupported(kernel.name, problem, device) for kernel in _core.gemm_kernels()
    )


# Constants to torch.compile, see `devices.has_kernels`.
row_scaled_unsupported.__dict__["_dynamo_marked_constant"] = True
int8_unsupported.__dict__["_dynamo_marked_constant"] = True
takes_epilogues.__dict__["_dynamo_marked_constant"] = True


@cache
def _cuda_unsupported(operands: ActivationFormat, device: int) -> str:
    return native_gemm_unsupported(operands, device)


def multiply_mxfp8(x: MXFP8Array, weights: MXFP8Array, dtype: torch.dtype) -> torch.Tensor:
    """Multiply by the device's fastest kernel."""
    out: torch.Tensor = gemm(x, weights, dtype=dtype)
    return out


def multiply_decoded(x: MXFP8Array, weights: MXFP8Array, dtype: torch.dtype) -> torch.Tensor:
    """Multiply by the faster of the two kernels that decode first."""
    out: torch.Tensor = gemm(x, weights, dtype=dtype, kernel=_decoding_kernel(x.codes.device))
    return out


def decoded_workspace(
    tokens: int,
    shape: tuple[int, int],
    dtype: torch.dtype,  # noqa: ARG001 - of the interface
    device: torch.device,
) -> int:
    """Return the bytes of both decoded operands, which are bfloat16 for every dtype."""
    if _decoding_kernel(device) == "reference":
        return 0
    return (tokens + shape[0]) * shape[1] * torch.bfloat16.itemsize


def _decoding_kernel(device: torch.device) -> str:
    if device.type == "cpu":
        return "reference"
    problem = _core.GemmProblem(128, 128, 128, "mxfp8", "mxfp8", "bfloat16", False)
    unsupported = _core.gemm_unsupported("dequantize", problem, device.index)
    return "reference" if unsupported else "dequantize"
