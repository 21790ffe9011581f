"""How far an image is from a reference, and what many such figures say together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import flip_evaluator
import numpy as np
import numpy.typing as npt
from scipy import stats
from skimage import metrics

if TYPE_CHECKING:
    from PIL.Image import Image

_LEVELS = 255  # from black to white
CONFIDENCE = 0.95


@dataclass(frozen=True)
class ImageMetrics:
    """How far an image is from its reference.

    Attributes:
        psnr: peak signal-to-noise ratio in dB of all values of red, green and blue; infinite for
            equal images.
        ssim: mean structural similarity, up to 1, as Wang et al. (2004) compute it: Gaussian
            windows of 11 x 11 pixels with a standard deviation of 1.5, mean over red, green and
            blue.
        flip: mean of NVIDIA's perceptual difference LDR-FLIP, 0 (equal) to 1, for a screen with 67
            pixels per degree of the field of view.
    """

    psnr: float
    ssim: float
    flip: float


@dataclass(frozen=True)
class Summary:
    """A metric over many pairs of images.

    Attributes:
        mean: of the pairs.
        low: lower end of the 95 % confidence interval of the mean (Student's t); None for fewer
            than two pairs.
        high: its upper end.
        worst: of the pairs.
    """

    mean: float
    low: float | None
    high: float | None
    worst: float


def compare_images(image: Image, reference: Image) -> ImageMetrics:
    """Measure an image against its reference, both RGB with 8 bits and of one size."""
    found, wanted = np.asarray(image), np.asarray(reference)
    if np.array_equal(found, wanted):
        return ImageMetrics(psnr=math.inf, ssim=1.0, flip=0.0)
    ssim = metrics.structural_similarity(
        found,
        wanted,
        channel_axis=-1,
        data_range=_LEVELS,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    _, flip, _ = flip_evaluator.evaluate(
        _as_fractions(wanted), _as_fractions(found), "LDR", applyMagma=False
    )
    return ImageMetrics(
        psnr=float(metrics.peak_signal_noise_ratio(wanted, found, data_range=_LEVELS)),
        ssim=float(ssim),
        flip=float(flip),
    )


def summarize(
    values: Sequence[float], *, high_is_good: bool, limits: tuple[float, float]
) -> Summary:
    """Return mean, confidence interval and worst value.

    Infinite values (the PSNR of equal images) count in neither mean nor interval unless all are
    infinite: a single one would hide all others.

    Args:
        values: of all pairs, one at least.
        high_is_good: whether the lowest value is the worst.
        limits: the least and the largest value that the metric can have. The interval ends there:
            Student's t knows no limits, and its intervals of few pairs are wide.
    """
    worst = min(values) if high_is_good else max(values)
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return Summary(math.inf, None, None, worst)
    mean = sum(finite) / len(finite)
    if len(finite) < 2:
        return Summary(mean, None, None, worst)
    error = float(np.std(finite, ddof=1)) / math.sqrt(len(finite))
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(finite) - 1)) * error
    return Summary(mean, max(mean - reach, limits[0]), min(mean + reach, limits[1]), worst)


def _as_fractions(levels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    return levels.astype(np.float32) / np.float32(_LEVELS)
