"""The load that the benchmark of the server offers."""

from __future__ import annotations

import itertools
import statistics

import pytest

from benchmarks.suites.serving import random_times


@pytest.mark.parametrize(
    ("rate", "seconds", "count"), [(0.85, 13, 11), (2.04, 13, 27), (3.9, 60, 234)]
)
def test_as_many_requests_come_as_the_rate_says(rate: float, seconds: float, count: int) -> None:
    times = random_times(rate, seconds)
    assert len(times) == count
    assert times == sorted(times) and times[0] >= 0 and times[-1] <= seconds


def test_times_are_those_of_a_poisson_process() -> None:
    """Intervals between them are exponential: as wide as their mean, and with their tail."""
    times = random_times(50, 100)
    intervals = [b - a for a, b in itertools.pairwise(times)]
    assert statistics.mean(intervals) == pytest.approx(1 / 50, rel=0.01)
    assert statistics.stdev(intervals) == pytest.approx(1 / 50, rel=0.05)
    longer = sum(interval > 2 / 50 for interval in intervals) / len(intervals)
    assert longer == pytest.approx(0.1353, abs=0.02)  # exp(-2)
