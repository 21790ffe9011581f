"""Timing of work on a CUDA device."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch


def microseconds(calls: Sequence[Callable[[], object]], repeats: int = 20) -> float:
    """Median time of one call, of all calls captured in one CUDA graph.

    Launching costs nothing then. Calls that work on different memory, more than the cache holds,
    keep the cache from helping.
    """
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(repeats + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / len(calls))
    return statistics.median(times[3:])


def copy_bandwidth() -> float:
    """Device copy in TB/s, bytes read and written: the best of sizes and ways."""

    def bandwidth(elements: int) -> float:
        source = torch.randn(elements, device="cuda")
        target = torch.empty_like(source)
        times = [
            microseconds([lambda: target.copy_(source)], 10),
            microseconds([lambda: torch.mul(source, 1.0, out=target)], 10),
        ]
        return 8 * elements / min(times) / 1e6

    return max(bandwidth(1 << bits) for bits in (27, 28, 29))
