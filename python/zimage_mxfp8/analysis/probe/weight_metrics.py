"""Statistics of one weight matrix, exact in float64, for matrices of any size.

The definitions are those of quant_probe (https://github.com/insecure-erasure/quant_probe), which
computes them in float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from ...dtypes import DTypeName

BIT_PATTERNS = 65536
_BLOCK = 1 << 17  # elements processed in float64 at once, so that they stay in the cache


@dataclass(frozen=True)
class WeightMetrics:
    """Statistics that show how hard a weight is to quantise.

    Attributes:
        excess_kurtosis: mean fourth power of the deviations over the fourth power of `std`, minus
            3: 0 for a normal distribution, more with heavier tails. 0 where `std` is 0.
        dynamic_range: max |w| - min |w|.
        std: unbiased standard deviation; 0 for a single element.
        outlier_pct: percentage of elements further from the mean than a number of `std`.
        aspect_ratio: the longer side over the shorter.
    """

    excess_kurtosis: float
    dynamic_range: float
    std: float
    outlier_pct: float
    aspect_ratio: float


def aspect_ratio(shape: tuple[int, ...]) -> float:
    """Return the longer side of a matrix over the shorter."""
    return max(shape) / min(shape)


@cache
def pattern_values(dtype: DTypeName) -> npt.NDArray[np.float64]:
    """Return the value of every bit pattern of BF16 or F16, with NaN and infinities, [65536]."""
    patterns = np.arange(BIT_PATTERNS, dtype=np.uint16)
    if dtype == "float16":
        values = patterns.view(np.float16).astype(np.float32)
    else:
        values = (patterns.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(invalid="ignore"):  # signalling NaN
        return values.astype(np.float64)


def metrics_of_counts(
    counts: npt.NDArray[np.uint64], dtype: DTypeName, shape: tuple[int, ...], outlier_sigma: float
) -> WeightMetrics:
    """Return the metrics of a BF16 or F16 matrix of finite elements.

    Args:
        counts: number of elements with each bit pattern, [65536].
        dtype: type of the elements.
        shape: shape of the matrix, which must not be empty.
        outlier_sigma: standard deviations from the mean beyond which an element is an outlier.
    """
    present = np.flatnonzero(counts)
    values, weights = pattern_values(dtype)[present], counts[present].astype(np.float64)
    elements = math.prod(shape)
    mean = float(weights @ values) / elements
    deviations = values - mean
    moments = Moments(
        elements,
        mean,
        float(weights @ deviations**2),
        0.0,  # not needed: there is nothing to merge with
        float(weights @ deviations**4),
        float(np.abs(values).min()),
        float(np.abs(values).max()),
    )
    outliers = float(weights @ (np.abs(deviations) > outlier_sigma * moments.std))
    return moments.metrics(shape, outliers)


@dataclass(frozen=True)
class Moments:
    """Moments of some elements of a matrix, which can be merged to those of all.

    Attributes:
        count: number of elements.
        mean: their mean.
        m2: sum of the squares of their deviations from it.
        m3: sum of the third powers.
        m4: sum of the fourth powers.
        smallest: smallest magnitude.
        largest: largest magnitude.
    """

    count: int
    mean: float
    m2: float
    m3: float
    m4: float
    smallest: float
    largest: float

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both parts together.

        The formulas are those of Pébay, "Formulas for Robust, One-Pass Parallel Computation of
        Covariances and Arbitrary-Order Statistical Moments" (SAND2008-6212): nothing large
        cancels.
        """
        a, b = self.count, other.count
        n = a + b
        delta = other.mean - self.mean
        m4 = self.m4 + other.m4 + delta**4 * a * b * (a * a - a * b + b * b) / n**3
        m4 += 6 * delta**2 * (a * a * other.m2 + b * b * self.m2) / n**2
        m4 += 4 * delta * (a * other.m3 - b * self.m3) / n
        m3 = self.m3 + other.m3 + delta**3 * a * b * (a - b) / n**2
        m3 += 3 * delta * (a * other.m2 - b * self.m2) / n
        return Moments(
            n,
            self.mean + delta * b / n,
            self.m2 + other.m2 + delta**2 * a * b / n,
            m3,
            m4,
            min(self.smallest, other.smallest),
            max(self.largest, other.largest),
        )

    @property
    def std(self) -> float:
        """Unbiased standard deviation; 0 for a single element."""
        return math.sqrt(self.m2 / (self.count - 1)) if self.count > 1 else 0.0

    def metrics(self, shape: tuple[int, ...], outliers: float) -> WeightMetrics:
        """Return the metrics of a matrix with this many outliers, once all of it is merged."""
        std = self.std
        return WeightMetrics(
            self.m4 / self.count / std**4 - 3.0 if std else 0.0,
            self.largest - self.smallest,
            std,
            100.0 * outliers / self.count,
            aspect_ratio(shape),
        )


def moments_of(elements: npt.NDArray[np.float32]) -> Moments:
    """Return the moments of finite float32 elements, [n] with n > 0."""
    total: Moments | None = None
    for begin in range(0, elements.size, _BLOCK):
        block = elements[begin : begin + _BLOCK].astype(np.float64)
        magnitudes = np.abs(block)
        mean = float(block.mean())
        block -= mean
        squares = block * block
        part = Moments(
            block.size,
            mean,
            float(squares.sum()),
            float(np.dot(squares, block)),
            float(np.dot(squares, squares)),
            float(magnitudes.min()),
            float(magnitudes.max()),
        )
        total = part if total is None else total.merge(part)
    assert total is not None
    return total


def count_outliers(elements: npt.NDArray[np.float32], mean: float, distance: float) -> int:
    """Return the number of float32 elements, [n], further than `distance` from `mean`."""
    total = 0
    for begin in range(0, elements.size, _BLOCK):
        block = elements[begin : begin + _BLOCK].astype(np.float64)
        block -= mean
        total += int(np.count_nonzero(np.abs(block) > distance))
    return total
