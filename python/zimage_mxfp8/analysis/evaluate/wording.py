"""Metrics as people read them, on the page and in tables."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .metrics import Summary

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
