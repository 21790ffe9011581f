"""Timing of work on a CUDA device."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from zimage_mxfp8.bench import timing
from zimage_mxfp8.bench.timing import Calls, capture


def microseconds_in_turn(ways: Mapping[str, Calls], repeats: int = 20) -> dict[str, float]:
    """Return the median time of one call of each way to do the same, in CUDA graphs.

    All calls of a way are in one graph. Calls that work on different memory, more than the cache
    holds, keep the cache from helping.
    """
    return timing.microseconds_in_turn(
        {way: capture(calls) for way, calls in ways.items()}, repeats
    )


def microseconds(calls: Calls, repeats: int = 20) -> float:
    """Return the median time of one call of a single way; see `microseconds_in_turn`."""
    return microseconds_in_turn({"": calls}, repeats)[""]


def copy_bandwidth() -> float:
    """Return the speed of a device copy in TB/s, read and written: the best of sizes and ways."""

    def bandwidth(elements: int) -> float:
        source = torch.randn(elements, device="cuda")
        target = torch.empty_like(source)
        times = [
            microseconds([lambda: target.copy_(source)], 10),
            microseconds([lambda: torch.mul(source, 1.0, out=target)], 10),
        ]
        return 8 * elements / min(times) / 1e6

    return max(bandwidth(1 << bits) for bits in (27, 28, 29))
