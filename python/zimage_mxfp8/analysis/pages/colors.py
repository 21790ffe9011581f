"""The colours of figures. They mean the same on every page: dark is harmless, light is harmful.

The palette goes from blue to amber, so that readers with any colour vision deficiency see the same
order; brightness alone tells it too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ANCHORS = ("#1d3a66", "#3f5f86", "#7d8590", "#bd9f68", "#f2b134", "#ffdf70")
_LEVELS = 64


def _palette() -> list[str]:
    anchors = np.array([[int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in ANCHORS])
    at = np.linspace(0, len(anchors) - 1, _LEVELS)
    channels = [np.interp(at, range(len(anchors)), anchors[:, i]) for i in range(3)]
    return [
        "#" + "".join(f"{round(value):02x}" for value in color)
        for color in zip(*channels, strict=True)
    ]


PALETTE = _palette()


@dataclass(frozen=True)
class Range:
    """The values that have the darkest and the lightest colour."""

    low: float
    high: float

    def level(self, value: float) -> int:
        """Return the number of a value's colour in the palette."""
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.0
        return round(min(max(share, 0.0), 1.0) * (_LEVELS - 1))


def color_range(values: Sequence[float], low: float, high: float) -> Range:
    """Return the range of colours: a given one, or more where values are more harmful.

    The given range keeps small differences from being shown as large ones. The other end goes to
    the largest value, but no further than three interquartile ranges above the third quartile: a
    few extreme values would hide the differences of all others.

    Args:
        values: that are shown.
        low: value of the darkest colour.
        high: value that has the lightest colour if none is above it.
    """
    if not values:
        return Range(low, high)
    q25, q75 = np.quantile(values, [0.25, 0.75])
    return Range(low, max(high, min(max(values), float(q75 + 3 * (q75 - q25)))))
