"""Metrics of the server for Prometheus, under names that begin with `zimage_`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .jobs import JobQueue, Outcome
from .request_log import LogWriter

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """Counts what the server does; an `Observer` of its jobs.

    Args:
        log: gets the details of failures.
    """

    def __init__(self, log: LogWriter) -> None:
        self._log = log
        self._registry = CollectorRegistry()
        self._jobs = Counter(
            "zimage_jobs", "Drawings that ended", ["outcome"], registry=self._registry
        )
        self._steps = Counter("zimage_steps", "Denoising steps done", registry=self._registry)
        self._stages = Histogram(
            "zimage_stage_seconds",
            "Time of each stage of a drawing",
            ["stage"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._refusals = Counter(
            "zimage_refusals",
            "Requests answered with an error",
            ["reason"],
            registry=self._registry,
        )
        for outcome in get_args(Outcome):  # so that all are there before the first
            self._jobs.labels(outcome)
        self._gauge(
            "zimage_log_lines_dropped", "Log lines that could not be written", lambda: log.dropped
        )

    def watch(self, queue: JobQueue, memory: Callable[[], dict[str, int]]) -> None:
        """Show the state of a queue, and the device's memory by kind."""
        self._gauge("zimage_queue_length", "Requests that wait", lambda: queue.waiting)
        self._gauge("zimage_running", "Requests that are drawn now", lambda: len(queue.running))
        self._gauge(
            "zimage_ready", "1 if requests are accepted and drawn", lambda: int(queue.is_ready)
        )
        if not memory():
            return
        gauge = Gauge(
            "zimage_device_memory_bytes", "Memory of the GPU", ["kind"], registry=self._registry
        )
        for kind in memory():
            gauge.labels(kind).set_function(partial(_of_kind, memory, kind))

    def text(self) -> bytes:
        """Return all metrics in Prometheus' format."""
        return generate_latest(self._registry)

    def refused(self, reason: str) -> None:
        """Count a request that was answered with an error."""
        self._refusals.labels(reason).inc()

    def stage_ended(self, stage: str, seconds: float) -> None:
        """Count a stage."""
        self._stages.labels(stage.replace(" ", "_")).observe(seconds)

    def step_done(self) -> None:
        """Count a step."""
        self._steps.inc()

    def job_ended(self, outcome: Outcome) -> None:
        """Count a drawing."""
        self._jobs.labels(outcome).inc()

    def failed(self, detail: str, request_id: str = "") -> None:
        """Log a failure, of a request if it has an id."""
        of_request = {"id": request_id} if request_id else {}
        self._log.write({"event": "failure", **of_request, "detail": detail})

    def _gauge(self, name: str, help_text: str, value: Callable[[], float]) -> None:
        Gauge(name, help_text, registry=self._registry).set_function(value)


def _of_kind(memory: Callable[[], dict[str, int]], kind: str) -> int:
    return memory()[kind]
