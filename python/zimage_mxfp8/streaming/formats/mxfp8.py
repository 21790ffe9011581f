"""Weights in MXFP8."""

from __future__ import annotations

from typing import Any

import numpy as np

from ... import _core
from ...checkpoint import quantization as markers
from ...checkpoint.quantized_layers import QuantizedLayer
from ...dtypes import DTypeName
from ...layout import padded_shape, scale_shape
from ...text import plural
from ..encoder import CPU, CudaEncoder, Encoder
from ..error_stats import ErrorStats
from .weight_format import Bytes, Flaws, Matrix, Stored, WeightFormat


class MXFP8(WeightFormat):
    """E4M3 codes, padded to multiples of 32, and E8M0 scales in the blocked layout."""

    name = "mxfp8"
    title = "MXFP8"
    can_reproduce_convert_to_quant = True

    def codes(self, shape: tuple[int, int]) -> Stored:
        """Return how the codes are stored."""
        return Stored("F8_E4M3", padded_shape(shape))

    def scales(self, shape: tuple[int, int]) -> Stored:
        """Return how the scales are stored: as U8, which every reader has."""
        return Stored("U8", scale_shape(shape))

    def marker(self, shape: tuple[int, int], *, full_precision: bool = False) -> dict[str, Any]:
        """Return the description of a layer."""
        return markers.layer_marker(shape, full_precision=full_precision)

    def encoder(self, device: int | None = None) -> Encoder:
        """Return an encoder on a CUDA device or on the CPU."""
        return CPU if device is None else CudaEncoder(device)

    def decode(self, codes: Bytes, scales: Bytes, matrix: Matrix, dtype: DTypeName) -> None:
        """Decode rows."""
        _core.dequantize(codes, scales, matrix, dtype, 1)

    def has_nan(self, codes: Bytes, scales: Bytes) -> bool:
        """Return whether rows have NaN codes or scales."""
        return bool(((codes & 0x7F) == 0x7F).any() or (scales == 255).any())

    def change_times(
        self, matrix: Matrix, dtype: DTypeName, codes: Bytes, scales: Bytes, vector: Any
    ) -> Any:
        """Multiply the change by encoding with a vector."""
        change = np.empty(len(matrix), np.float64)
        _core.residual_times_vector(matrix, dtype, codes, scales, vector, change, 1)
        return change

    def measure(self, matrix: Matrix, dtype: DTypeName, codes: Bytes, scales: Bytes) -> ErrorStats:
        """Return error statistics of encoded rows."""
        rows, columns = matrix.shape
        error, signal, worst = _core.measure_residual(matrix, dtype, codes, scales, 1)
        plain = np.empty((rows, -(-columns // 32)), np.uint8)
        _core.from_blocked(scales, plain)
        histogram = np.bincount(plain.reshape(-1), minlength=256)
        return ErrorStats(error, signal, worst, rows * columns, histogram)

    def flaws(self, layer: QuantizedLayer, codes: Bytes, scales: Bytes, begin: int) -> Flaws:
        """Return NaN, padding that is not zero, and scales of blocks of zeros."""
        codes = codes.reshape(-1, layer.weight.shape[1])
        rows, cols = layer.shape
        real_rows = min(rows - begin, codes.shape[0])
        blocks = -(-cols // 32)
        magnitude = codes & 0x7F
        padding = int(np.count_nonzero(codes[real_rows:])) + int(np.count_nonzero(codes[:, cols:]))
        plain = np.empty((codes.shape[0], blocks), np.uint8)
        _core.from_blocked(scales, plain)
        stray = int(np.count_nonzero(scales)) - int(np.count_nonzero(plain[:real_rows]))
        words = magnitude.view(np.uint64).reshape(codes.shape[0], blocks, 4)
        is_zero = (words[..., 0] | words[..., 1] | words[..., 2] | words[..., 3]) == 0
        orphans = int((is_zero & (plain != 0)).sum())
        weight, scale = layer.weight.name, layer.scale.name
        flaws = Flaws(
            [
                (weight, "has NaN codes", int((magnitude == 0x7F).sum())),
                (weight, "has codes other than 0 in its padding", padding),
                (scale, "has NaN scales", int((plain == 255).sum())),
                (scale, "has scales other than 0 in its padding", stray),
                (scale, "has scales other than 0 for blocks of zeros", orphans),
            ],
            [],
        )
        if ambiguous := int((~is_zero & (plain == 0)).sum()):
            flaws.notes.append(
                f'"{scale}" has {plural(ambiguous, "block")} of numbers with scale 0, '
                "which comfy-kitchen reads as 0 and the hardware as 2^-127"
            )
        return flaws

    def misordering(self, expected: Bytes, found: Bytes) -> str | None:
        """Return the order of a layer's scales, if it is a known wrong one."""
        rearranged = np.empty(expected.size, np.uint8)
        _core.to_blocked(expected, rearranged)
        if np.array_equal(found, rearranged):
            return "has its scales swizzled twice"
        _core.from_blocked(expected, rearranged.reshape(expected.shape))
        if np.array_equal(found, rearranged):
            return "has its scales in row-major order, not in the 128x4 blocked layout"
        if np.array_equal(np.sort(found), np.sort(expected.reshape(-1))):
            return "has the right scales in a wrong order"
        return None
