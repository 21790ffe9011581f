"""Error statistics of quantised matrices."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

_INFINITE_DB = 400.0  # means "no error" in JSON, which has no infinity


def snr_db(relative_squared_error: float) -> float:
    """Return the signal-to-noise ratio in dB; 400 where there is no error."""
    return -10.0 * math.log10(relative_squared_error) if relative_squared_error else _INFINITE_DB


def snr_text(snr: float, decimals: int, unit: str = "") -> str:
    """Return a ratio of `snr_db` as people read it: "exact" where there is no error."""
    return "exact" if snr == _INFINITE_DB else f"{snr:.{decimals}f}{unit}"


def sum_of_squares(matrix: npt.NDArray[np.float32]) -> float:
    """Return the sum of squares: of a row in float32, of all rows in float64."""
    return float(np.einsum("ij,ij->i", matrix, matrix).sum(dtype=np.float64))


@dataclass
class ErrorStats:
    """Error of a quantised matrix against its original.

    Attributes:
        squared_error: sum of (w - wq)^2.
        squared_signal: sum of w^2.
        max_error: largest |w - wq|.
        elements: number of elements.
        scale_histogram: number of scales with each exponent byte: MXFP8's scale bytes, or the
            exponents of float32 scales, [256].
    """

    squared_error: float = 0.0
    squared_signal: float = 0.0
    max_error: float = 0.0
    elements: int = 0
    scale_histogram: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, np.int64))

    def add(self, other: ErrorStats) -> None:
        """Add the statistics of further rows."""
        self.squared_error += other.squared_error
        self.squared_signal += other.squared_signal
        self.max_error = max(self.max_error, other.max_error)
        self.elements += other.elements
        self.scale_histogram = self.scale_histogram + other.scale_histogram

    @property
    def relative_squared_error(self) -> float:
        """Squared error over squared signal; 0 for a matrix of zeros."""
        return self.squared_error / self.squared_signal if self.squared_signal else 0.0

    @property
    def snr_db(self) -> float:
        """Signal-to-noise ratio in dB."""
        return snr_db(self.relative_squared_error)

    def to_dict(self) -> dict[str, Any]:
        """Return the values for JSON; the histogram has only the scale bytes that occur."""
        return {
            "relative_squared_error": self.relative_squared_error,
            "snr_db": self.snr_db,
            "max_error": self.max_error,
            "elements": self.elements,
            "scale_histogram": {
                str(byte): int(self.scale_histogram[byte])
                for byte in np.flatnonzero(self.scale_histogram)
            },
        }


def merge_rows(parts: Mapping[tuple[str, int], ErrorStats]) -> dict[str, ErrorStats]:
    """Merge statistics by (tensor, first row) to statistics by tensor, in row order.

    The fixed order makes the sums independent of the order of the parts.
    """
    merged: dict[str, ErrorStats] = {}
    for name, row in sorted(parts):
        merged.setdefault(name, ErrorStats()).add(parts[name, row])
    return merged


def total(parts: Iterable[ErrorStats]) -> ErrorStats:
    """Return the statistics of all tensors together."""
    result = ErrorStats()
    for part in parts:
        result.add(part)
    return result
