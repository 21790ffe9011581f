"""Weights in INT8 with one scale per row, after a rotation of blocks of columns (ConvRot)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ... import _core
from ...checkpoint import quantization as markers
from ...dtypes import DTypeName
from ...errors import UsageError
from ...system.devices import is_cpu
from ..encoder import Encoder
from ..error_stats import ErrorStats, sum_of_squares
from .weight_format import Bytes, Counts, Matrix, Stored, WeightFormat

_GROUPS = (256, 64)  # columns that convert_to_quant rotates together; the first that divides K
_SLICE = 1 << 18  # elements that are compared at once, so that they stay in the cache


@dataclass(frozen=True)
class Int8ConvRot(WeightFormat):
    """Codes [N, K] from -127 to 127, and scales [N, 1].

    Attributes:
        group: columns that are rotated together; None for those that convert_to_quant chooses.
    """

    group: int | None = None

    name = "int8-convrot"
    title = "INT8 ConvRot"
    can_reproduce_convert_to_quant = False

    def codes(self, shape: tuple[int, int]) -> Stored:
        """Return how the codes are stored."""
        return Stored("I8", shape)

    def scales(self, shape: tuple[int, int]) -> Stored:
        """Return how the scales are stored."""
        return Stored("F32", (shape[0], 1))

    def marker(self, shape: tuple[int, int], *, full_precision: bool = False) -> dict[str, Any]:
        """Return the description of a layer."""
        return markers.int8_marker(self.group_of(shape[1]), full_precision=full_precision)

    def group_of(self, columns: int) -> int:
        """Return how many columns are rotated together; 1 if the matrix is not rotated."""
        if self.group is not None:
            return self.group
        return next((group for group in _GROUPS if columns % group == 0), 1)

    def encoder(self, device: str = "cpu") -> Encoder:
        """Return an encoder on the CPU."""
        if not is_cpu(device):  # before the question whether this machine has such a device
            raise UsageError(
                "device",
                f"must be cpu for {self.name}: its bytes follow from the order of sums on a CPU",
                "leave out `device`",
            )
        return _Encoder(self)

    def decode(self, codes: Bytes, scales: Bytes, matrix: Matrix, dtype: DTypeName) -> None:
        """Decode rows, and rotate them back."""
        _core.dequantize_convrot(codes, scales, self.group_of(matrix.shape[1]), matrix, dtype, 1)

    def damaged_codes(self, codes: Bytes) -> Counts:
        """Return the number of codes that do not occur."""
        return {
            "has codes of -128, which no encoder writes": int(
                np.count_nonzero(codes.view(np.int8) == -128)
            )
        }

    def damaged_scales(self, scales: Bytes) -> Counts:
        """Return the number of scales that are not finite and positive."""
        numbers = scales.view(np.float32)
        is_finite = np.isfinite(numbers)
        return {
            "has NaN or infinite scales": int(np.count_nonzero(~is_finite)),
            "has scales of 0 or less, which no encoder writes": int(
                np.count_nonzero(is_finite & (numbers <= 0))
            ),
        }

    def change_times(
        self, matrix: Matrix, dtype: DTypeName, codes: Bytes, scales: Bytes, vector: Any
    ) -> Any:
        """Multiply the change by encoding with a vector."""
        return np.concatenate(
            [
                ((original.astype(np.float64) - decoded) * vector).sum(1)
                for original, decoded in self._decoded(matrix, dtype, codes, scales)
            ]
        )

    def measure(self, matrix: Matrix, dtype: DTypeName, codes: Bytes, scales: Bytes) -> ErrorStats:
        """Return error statistics of encoded rows.

        The histogram counts the exponents of scales: as the scale bytes of MXFP8 do, byte b stands
        for 2^(b - 127), and here for all numbers up to twice that.
        """
        exponents = (scales.view(np.uint32) >> 23) & 0xFF
        stats = ErrorStats(
            elements=matrix.size, scale_histogram=np.bincount(exponents, minlength=256)
        )
        for original, decoded in self._decoded(matrix, dtype, codes, scales):
            change = original - decoded
            stats.squared_error += sum_of_squares(change)
            stats.squared_signal += sum_of_squares(original)
            stats.max_error = max(stats.max_error, float(change.max()), -float(change.min()))
        return stats

    def _decoded(
        self, matrix: Matrix, dtype: DTypeName, codes: Bytes, scales: Bytes
    ) -> Iterator[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]:
        """Yield some rows at a time in float32, before and after they were encoded."""
        rows, columns = matrix.shape
        of_rows = codes.reshape(rows, columns)
        of_scales = scales.reshape(rows, -1)
        step = max(1, _SLICE // columns)
        for begin in range(0, rows, step):
            part = slice(begin, begin + step)
            plain = np.empty(matrix[part].shape, np.uint32)
            decoded = np.empty_like(plain)
            _core.cast(matrix[part], dtype, plain, "float32", 1)
            self.decode(of_rows[part], of_scales[part], decoded, "float32")
            yield plain.view(np.float32), decoded.view(np.float32)


@dataclass(frozen=True)
class _Encoder:
    form: Int8ConvRot

    def encode(self, matrix: Matrix, dtype: DTypeName, codes: Bytes, scales: Bytes) -> None:
        """Encode a matrix, see `Encoder.encode`."""
        group = self.form.group_of(matrix.shape[1])
        _core.quantize_convrot(matrix, dtype, group, codes, scales, 1)
