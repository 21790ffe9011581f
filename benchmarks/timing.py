"""Timing of work on a CUDA device."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

import torch

Calls = Sequence[Callable[[], object]]


def _graph(calls: Calls) -> torch.cuda.CUDAGraph:
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [call() for call in calls]  # alive until the end, so each has its own memory
    del results
    return graph


def microseconds_in_turn(ways: Mapping[str, Calls], repeats: int = 20) -> dict[str, float]:
    """Return the median time of one call of each way to do the same, in CUDA graphs.

    All calls of a way are in one graph, so that launching costs nothing. Calls that work on
    different memory, more than the cache holds, keep the cache from helping. The ways take turns,
    so that clocks, which fall under load, are the same for all.
    """
    graphs = {way: _graph(calls) for way, calls in ways.items()}
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats + 3):
        for way, graph in graphs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[way].append(begin.elapsed_time(end) * 1000 / len(ways[way]))
    return {way: statistics.median(of_way[3:]) for way, of_way in times.items()}


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
