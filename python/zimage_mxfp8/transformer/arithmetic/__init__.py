"""8-bit arithmetic of the transformer: by the core's kernels, or by torch without them.

All functions take torch tensors, run on torch's current stream and, except for `fold`, do not wait
for the device. Both implementations give the same bytes, except for the bits of NaN and the order
of a rotation's sums, and the same GEMM results, except for the order of sums that are not exact.
"""

from __future__ import annotations

from typing import Protocol

import torch

from ...ops.codec import MXFP8Array
from ...ops.fused import ActivationFormat
from ...ops.gemm import FoldStats, Int8Array, RowScaledArray, WithRowScales
from ...system import devices
from . import by_core, by_operations, by_torch

__all__ = ["Arithmetic", "on"]


class Arithmetic(Protocol):
    """The transformer's operations on 8-bit matrices. K is a multiple of 32."""

    def quantize(self, matrix: torch.Tensor) -> MXFP8Array:
        """Encode a matrix in MXFP8; blocks with NaN or infinity become NaN."""

    def quantize_rows(self, matrix: torch.Tensor) -> RowScaledArray:
        """Encode a matrix in E4M3 with a scale per row, see `ops.gemm.quantize_rows`."""

    def dequantize(self, array: MXFP8Array, dtype: torch.dtype) -> torch.Tensor:
        """Decode a matrix from MXFP8; exact in bfloat16 and float32."""

    def fold(self, array: MXFP8Array) -> tuple[RowScaledArray, FoldStats]:
        """Fold the block scales into one per row; wait for the device. See `ops.gemm.fold`."""

    def multiply_weight_only(self, x: torch.Tensor, weights: MXFP8Array) -> torch.Tensor:
        """Multiply [M, K] with the decoded weights [N, K]: [M, N] in the dtype of x."""

    def weight_only_workspace(self, shape: tuple[int, int], dtype: torch.dtype) -> int:
        """Return the bytes that `multiply_weight_only` takes on CUDA for weights [N, K]."""

    def multiply_row_scaled(
        self, x: WithRowScales, weights: WithRowScales, dtype: torch.dtype
    ) -> torch.Tensor:
        """Multiply [M, K] with weights [N, K] in the same 8-bit format: [M, N] of `dtype`."""

    def row_scaled_workspace(
        self,
        operands: ActivationFormat,
        tokens: int,
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> int:
        """Return the bytes of `multiply_row_scaled` on CUDA for x [M, K], weights [N, K]."""

    def quantize_int8(self, matrix: torch.Tensor) -> Int8Array:
        """Rotate a matrix and encode it in INT8, see `ops.fused.quantize_rotated`."""

    def multiply_mxfp8(
        self, x: MXFP8Array, weights: MXFP8Array, dtype: torch.dtype
    ) -> torch.Tensor:
        """Multiply [M, K] with weights [N, K] by the fastest kernel: [M, N] of `dtype`."""

    def multiply_decoded(
        self, x: MXFP8Array, weights: MXFP8Array, dtype: torch.dtype
    ) -> torch.Tensor:
        """Multiply like `multiply_mxfp8`, both operands decoded first."""

    def decoded_workspace(
        self, tokens: int, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> int:
        """Return the bytes that `multiply_decoded` takes on CUDA for x [M, K], weights [N, K]."""


def on(device: torch.device) -> Arithmetic:
    """Return the implementation for a device, in eager code or in code that torch traces."""
    if not devices.has_kernels(devices.core_index(device)):
        return by_torch
    return by_operations if torch.compiler.is_compiling() else by_core
