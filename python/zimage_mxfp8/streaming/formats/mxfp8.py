"""Weights in MXFP8."""

from __future__ import annotations

from typing import Any

import numpy as np

from ... import _core
from ...checkpoint import quantization as markers
from ...checkpoint.quantized_layers import QuantizedLayer
from ...dtypes import DTypeName
from ...layout import padded_shape, scale_shape
from ...system.devices import cuda_index
from ..encoder import CPU, CudaEncoder, Encoder
from ..error_stats import ErrorStats
from .weight_format import Bytes, Counts, Flaws, Matrix, Stored, WeightFormat

_NAN_SCALE = 255  # in E8M0


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

    def encoder(self, device: str = "cpu") -> Encoder:
        """Return an encoder on a CUDA device or on the CPU."""
        index = cuda_index(device)
        return CPU if index is None else CudaEncoder(index)

    def decode(self, codes: Bytes, scales: Bytes, matrix: Matrix, dtype: DTypeName) -> None:
        """Decode rows."""
        _core.dequantize(codes, scales, matrix, dtype, 1)

    def damaged_codes(self, codes: Bytes) -> Counts:
        """Return the number of NaN."""
        return {"has NaN codes": int(np.count_nonzero((codes & 0x7F) == 0x7F))}

    def damaged_scales(self, scales: Bytes) -> Counts:
        """Return the number of NaN."""
        return {"has NaN scales": int(np.count_nonzero(scales == _NAN_SCALE))}

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
        """Return NaN, padding that is not zero, and scales of blocks of zeros.

        What is NaN is not counted as anything else.
        """
        flaws = super().flaws(layer, codes, scales, begin)
        codes = codes.reshape(-1, layer.weight.shape[1])
        rows, cols = layer.shape
        real = min(rows - begin, codes.shape[0])
        blocks = -(-cols // 32)
        magnitude = codes & 0x7F
        padding = sum(
            int(np.count_nonzero((part != 0) & (part & 0x7F != 0x7F)))
            for part in (codes[real:], codes[:real, cols:])
        )
        plain = np.empty((codes.shape[0], blocks), np.uint8)
        _core.from_blocked(scales, plain)
        plain = plain[:real]
        stray = _count_numbers(scales) - _count_numbers(plain)
        words = magnitude[:real].view(np.uint64).reshape(real, blocks, 4)
        is_zero = (words[..., 0] | words[..., 1] | words[..., 2] | words[..., 3]) == 0
        weight, scale = layer.weight.name, layer.scale.name
        flaws.breaches += [
            (weight, "has codes other than 0 in its padding", padding),
            (scale, "has scales other than 0 in its padding", stray),
            (scale, "has scales other than 0 for blocks of zeros", _count_numbers(plain[is_zero])),
        ]
        what = (
            "has blocks of numbers with scale 0, which comfy-kitchen reads as 0 and the hardware "
            "as 2^-127"
        )
        flaws.notes.append((scale, what, int((~is_zero & (plain == 0)).sum())))
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


def _count_numbers(scales: Bytes) -> int:
    """Return how many scales are neither 0 nor NaN."""
    return int(np.count_nonzero((scales != 0) & (scales != _NAN_SCALE)))
