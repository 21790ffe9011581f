"""The steps of a generation: their times, whether images stay finite, and who is told of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from .preview import Previews

# Called with the number of steps that are done, and the latents [batch, 16, H, W] after them.
StepCallback = Callable[[int, torch.Tensor], object]


class Steps:
    """Watches the steps of a pipeline and keeps the device busy meanwhile.

    Args:
        device: where the pipeline runs.
        report: called with the steps that are done, the number of steps, and the seconds of the
            last one.
        previews: shown between the steps.
        on_step: called after each step.

    Attributes:
        finite: for each step, which images were finite after it: flags [batch] on the device.
    """

    def __init__(
        self,
        device: torch.device,
        report: Callable[[int, int, float], object],
        previews: Previews | None,
        on_step: StepCallback | None,
    ) -> None:
        self.finite: list[torch.Tensor] = []
        self._previews = previews
        self._on_step = on_step
        self._device = device
        self._report = report
        self._total = 0
        # When steps begin and end: events of CUDA, or seconds.
        self._begins = [self._now()]
        self._ends: list[Any] = []

    def __call__(
        self, pipeline: Any, _step: int, _timestep: Any, tensors: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Diffusers' `callback_on_step_end`: a step is over, or on its way on a CUDA device."""
        self._total = pipeline.num_timesteps
        self.finite.append(tensors["latents"].isfinite().flatten(1).all(1))
        self._ends.append(self._now())
        if self._device.type != "cuda":
            self._tell(len(self.finite))
        elif len(self.finite) > 1:
            # Of the step before, so that this one is there to be run in the meantime.
            self._ends[-2].synchronize()
            self._tell(len(self.finite) - 1)
        done = len(self.finite)
        if self._on_step is not None:
            self._on_step(done, tensors["latents"])
        if self._previews is not None:
            self._previews.after_step(done, self._total, pipeline.scheduler, tensors["latents"])
        self._begins.append(self._now())
        return {}

    def finish(self) -> None:
        """Wait for the last step, and let go of what only steps need."""
        self._previews = None
        if self._device.type == "cuda":
            self._ends[-1].synchronize()
            self._tell(len(self.finite))

    def seconds(self) -> list[float]:
        """Time of each step, after `finish`."""
        return [self._between(i) for i in range(len(self.finite))]

    def _tell(self, done: int) -> None:
        self._report(done, self._total, self._between(done - 1))

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _between(self, i: int) -> float:
        begin, end = self._begins[i], self._ends[i]
        if self._device.type != "cuda":
            return float(end - begin)
        return float(begin.elapsed_time(end)) / 1000
