"""Metrics as people read them, on the page and in tables."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

from ...text import plural

if TYPE_CHECKING:
    from .metrics import Summary
    from .weights import WeightComparison

_MAX_PROMPT = 120  # characters


def number_text(value: float, decimals: int) -> str:
    """Return a metric; an infinite PSNR is "equal", as the images are."""
    return f"{value:.{decimals}f}" if math.isfinite(value) else "equal"


def psnr_text(value: float) -> str:
    """Return a PSNR with its unit."""
    return f"{number_text(value, 2)} dB" if math.isfinite(value) else "equal"


def interval_text(summary: Summary, decimals: int) -> str:
    """Return a confidence interval; "-" for fewer than two pairs."""
    if summary.low is None or summary.high is None:
        return "-"
    return f"{summary.low:.{decimals}f} to {summary.high:.{decimals}f}"


def shortened(prompt: str) -> str:
    """Return the beginning of a long prompt."""
    return prompt if len(prompt) <= _MAX_PROMPT else f"{prompt[: _MAX_PROMPT - 1]}…"


def formats_text(formats: Counter[str]) -> str:
    """Return how many matrices are stored in each format: "185 MXFP8, 23 BF16"."""
    return ", ".join(f"{count:,} {name}" for name, count in formats.most_common())


def weight_failures(weights: WeightComparison, limit: float) -> list[str]:
    """Return clauses about the weights that a threshold of their error does not let pass."""
    found = []
    worst, above = weights.worst, weights.above(limit)
    if worst is not None and above:
        found.append(
            f"the relative squared error of {worst.name} is {worst.relative_squared_error:.4g}, "
            f"above {limit:g}"
        )
        if above > 1:
            found[-1] += f", and that of {plural(above - 1, 'other weight matrix', 'others')} too"
    if missing := weights.not_comparable:
        count = plural(len(missing), "weight matrix", "weight matrices")
        have = "has" if len(missing) == 1 else "have"
        found.append(
            f"{count}, such as {missing[0].name}, {have} no counterpart of the same shape, so the "
            "error of the weights is not known"
        )
    return found
