"""Scores and recommendations from metrics, by the rules of quant_probe.

Its defaults for Z-Image are the defaults here, except that attention is exempt from the spread
filter, as its documentation advises.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ...checks import number
from ...errors import UsageError
from ...zimage.layers import ZIMAGE
from .weight_metrics import WeightMetrics

Recommendation = Literal["*KEEP*", "FP8", "NVFP4"]
Reason = Literal[
    "kurtosis_floor",
    "score_percentile",
    "score_below_fp8_min",
    "default",
    "group_keep_resolved",
    "group_fp8_promotion",
    "group_spread_demotion",
    "spread_demotion",
]


@dataclass(frozen=True)
class ProbeRules:
    """The numbers that decide; the defaults are quant_probe's for Z-Image.

    Attributes:
        outlier_sigma: standard deviations from the mean beyond which an element is an outlier.
        kurtosis_weight: share of the excess kurtosis in the score.
        range_weight: share of the dynamic range.
        ar_weight: share of the aspect ratio. The three sum to 1.
        fp8_percentile: percentile of the scores from which FP8 is recommended.
        keep_percentile: percentile of the scores from which a weight is kept.
        kurtosis_keep: excess kurtosis from which a weight is kept whatever its score.
        fp8_min_score: least score for FP8.
        min_group_spread: a main layer type is low-spread if its groups' scores span less.
        extreme_pct: percentage of the main blocks that is extreme at each end.
        spread_filter_exempt: layer types that are never low-spread.

    Raises:
        UsageError: if a value is not a number or is out of range, weights do not sum to 1, or a
            layer type is unknown.
    """

    outlier_sigma: float = 3.0
    kurtosis_weight: float = 0.6
    range_weight: float = 0.3
    ar_weight: float = 0.1
    fp8_percentile: float = 50.0
    keep_percentile: float = 90.0
    kurtosis_keep: float = 8.0
    fp8_min_score: float = 0.0
    min_group_spread: float = 0.20
    extreme_pct: float = 10.0
    spread_filter_exempt: tuple[str, ...] = ("attention.qkv", "attention.out")

    def __post_init__(self) -> None:
        self._check("outlier_sigma", 0, math.inf)
        for name in ("kurtosis_weight", "range_weight", "ar_weight"):
            self._check(name, 0, 1)
        for name in ("fp8_percentile", "keep_percentile"):
            self._check(name, 0, 100)
        self._check("extreme_pct", 0, 100)
        self._check("kurtosis_keep", -math.inf, math.inf)
        self._check("fp8_min_score", 0, math.inf)
        self._check("min_group_spread", 0, math.inf)
        total = self.kurtosis_weight + self.range_weight + self.ar_weight
        if abs(total - 1) > 1e-6:
            raise UsageError(
                "kurtosis_weight",
                f"and the two other weights must sum to 1, but they sum to {total:.6g}",
                "change `range_weight` or `ar_weight` too",
            )
        if not isinstance(self.spread_filter_exempt, (list, tuple)):
            raise UsageError(
                "spread_filter_exempt",
                f"must be a list of layer types, not {type(self.spread_filter_exempt).__name__}",
            )
        for kind in self.spread_filter_exempt:
            if kind not in ZIMAGE.layer_types():
                raise UsageError(
                    "spread_filter_exempt",
                    f'has the unknown layer type "{kind}"',
                    f"name some of {', '.join(ZIMAGE.layer_types())}",
                )

    def _check(self, name: str, least: float, most: float) -> None:
        value = number(name, getattr(self, name))
        object.__setattr__(self, name, value)
        if not least <= value <= most:  # NaN neither
            limit = f"from {least:g} to {most:g}" if math.isfinite(most) else f"{least:g} or more"
            if math.isinf(least):
                limit = "a number"
            raise UsageError(name, f"must be {limit}, not {value:g}")


@dataclass(frozen=True)
class Thresholds:
    """Scores from which a weight is kept or stored in FP8."""

    fp8: float
    keep: float


def _quantile(values: Iterable[float], share: float) -> float:
    """Return a quantile with linear interpolation, in float32 as torch.quantile computes it.

    A tie of several weights at the threshold falls as quant_probe's does.
    """
    ordered = np.sort(np.array(list(values), np.float32))
    rank = np.float32(share) * np.float32(ordered.size - 1)
    below = int(rank)
    weight = rank - np.float32(below)
    low, high = ordered[below], ordered[min(below + 1, ordered.size - 1)]
    if weight < 0.5:
        return float(low + weight * (high - low))
    return float(high - (high - low) * (np.float32(1) - weight))


def _scaled(value: float, low: float, high: float) -> float:
    """Return the position of a value between two others, 0 to 1; 0 if they are the same."""
    return (value - low) / (high - low) if high > low else 0.0


def scores(
    metrics: Sequence[WeightMetrics], layer_types: Sequence[str], rules: ProbeRules
) -> list[float]:
    """Return the score of each weight among all of them, 0 to 1.

    Kurtosis is clipped to the quartiles plus 1.5 interquartile ranges over all weights and scaled;
    dynamic range and aspect ratio are scaled between the least and the most of their layer type.
    """
    kurtosis = [m.excess_kurtosis for m in metrics]
    q25, q75 = _quantile(kurtosis, 0.25), _quantile(kurtosis, 0.75)
    low, high = q25 - 1.5 * (q75 - q25), q75 + 1.5 * (q75 - q25)
    by_type: dict[str, list[WeightMetrics]] = {}
    for kind, m in zip(layer_types, metrics, strict=True):
        by_type.setdefault(kind, []).append(m)
    ranges = _limits({kind: [m.dynamic_range for m in ms] for kind, ms in by_type.items()})
    ratios = _limits({kind: [m.aspect_ratio for m in ms] for kind, ms in by_type.items()})
    return [
        rules.kurtosis_weight * _scaled(max(low, min(high, m.excess_kurtosis)), low, high)
        + rules.range_weight * _scaled(m.dynamic_range, *ranges[kind])
        + rules.ar_weight * _scaled(m.aspect_ratio, *ratios[kind])
        for kind, m in zip(layer_types, metrics, strict=True)
    ]


def _limits(values: Mapping[str, Sequence[float]]) -> dict[str, tuple[float, float]]:
    return {kind: (min(numbers), max(numbers)) for kind, numbers in values.items()}


def thresholds(all_scores: Sequence[float], rules: ProbeRules) -> Thresholds:
    """Return the scores at the two percentiles."""
    return Thresholds(
        _quantile(all_scores, rules.fp8_percentile / 100),
        _quantile(all_scores, rules.keep_percentile / 100),
    )


def recommend(
    score: float, kurtosis: float, limits: Thresholds, rules: ProbeRules
) -> tuple[Recommendation, Reason]:
    """Return the recommended format for a weight or a group of weights, and the reason."""
    if kurtosis >= rules.kurtosis_keep:
        return "*KEEP*", "kurtosis_floor"
    if score >= limits.keep:
        return "*KEEP*", "score_percentile"
    if score < limits.fp8:
        return "NVFP4", "default"
    if score < rules.fp8_min_score:
        return "NVFP4", "score_below_fp8_min"
    return "FP8", "score_percentile"
