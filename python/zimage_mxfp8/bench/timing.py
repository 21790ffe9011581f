"""Timing of calls on a device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

Calls = Sequence[Callable[[], object]]
_Way = TypeVar("_Way", bound=Hashable)

_WARM_UP, _RUNS = 3, 5  # forwards, at most
_WARM_UP_MS, _RUNS_MS = 500.0, 2000.0  # of slow devices
_GRAPH_WARM_UP = 3  # replays


@dataclass(frozen=True)
class Captured:
    """Calls in a CUDA graph.

    Attributes:
        graph: runs all of them.
        calls: the calls, which hold the memory that the graph reads.
    """

    graph: torch.cuda.CUDAGraph
    calls: Calls


def capture(calls: Calls) -> Captured:
    """Capture calls in a CUDA graph, so that launching them costs nothing."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [call() for call in calls]  # alive until the end, so each has its own memory
    del results
    return Captured(graph, calls)


def microseconds_in_turn(ways: Mapping[_Way, Captured], repeats: int) -> dict[_Way, float]:
    """Return the median time of one call of each way to do the same.

    The ways take turns, so that clocks, which fall under load, are the same for all.
    """
    times: dict[_Way, list[float]] = {way: [] for way in ways}
    for _ in range(repeats + _GRAPH_WARM_UP):
        for way, captured in ways.items():
            elapsed = _milliseconds_on_cuda(captured.graph.replay)
            times[way].append(elapsed * 1000 / len(captured.calls))
    return {way: statistics.median(of_way[_GRAPH_WARM_UP:]) for way, of_way in times.items()}


def milliseconds(
    call: Callable[[], object], device: torch.device, fewest: int
) -> tuple[float, int]:
    """Return the median time of a call, and the number of calls that were timed.

    Slow devices get fewer calls.

    Args:
        call: waits for nothing on CUDA.
        device: the CPU, or the current CUDA device.
        fewest: calls before the first that is timed, at least.
    """
    elapsed = _milliseconds_on_cuda if device.type == "cuda" else _milliseconds_on_cpu
    spent, last = 0.0, 0.0
    for done in range(max(fewest, _WARM_UP)):
        if done >= fewest and spent > _WARM_UP_MS:
            break
        last = elapsed(call)
        spent += last
    runs = max(1, min(_RUNS, int(_RUNS_MS / last)))
    return statistics.median(elapsed(call) for _ in range(runs)), runs


def _milliseconds_on_cuda(call: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def _milliseconds_on_cpu(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1000
