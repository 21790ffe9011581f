"""Search for the smallest set of layers to keep with an error of the output within a bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from .targets import Target


def by_worth(targets: Sequence[Target], error: Callable[[Target], float]) -> list[Target]:
    """Order layers by the benefit of keeping them: the error they cause alone per byte saved.

    Very small layers may need more bytes for padding than quantising them saves: those come first.
    """

    def worth(target: Target) -> float:
        return error(target) / target.saved if target.saved > 0 else math.inf

    return sorted(targets, key=worth, reverse=True)


def smallest_prefix(
    count: int, error_without: Callable[[int], float], bound: float
) -> tuple[int, float]:
    """Return the least k for which `error_without(k)` is within a bound, by bisection.

    `error_without` is measured, so it need not fall with every step; the returned k holds the
    bound, and the next smaller one that was tried does not.

    Returns:
        k and its error. k is `count` if only keeping everything holds the bound.
    """
    low, high = 0, count
    best = 0.0  # with everything kept nothing changes
    while low < high:
        middle = (low + high) // 2
        error = error_without(middle)
        if error <= bound:
            high, best = middle, error
        else:
            low = middle + 1
    return high, best
