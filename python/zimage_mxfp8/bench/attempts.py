"""Measurements that may fail one by one, and their progress."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import Error
from ..streaming.jobs import StageCallback, StageProgress
from ..system.devices import memory_for
from .report import Missing


class Attempts:
    """Runs measurements and keeps the reasons of those that fail.

    Args:
        device: where they run.
        total: how many items `begin` will announce.
        progress: called when an item begins.

    Attributes:
        missing: what failed or was left out.
    """

    def __init__(self, device: torch.device, total: int, progress: StageCallback | None) -> None:
        self.missing: list[Missing] = []
        self._device = device
        self._total, self._begun = total, 0
        self._progress = progress

    def begin(self, what: str) -> None:
        """Report that an item begins, and free the memory of the one before."""
        self._free()
        if self._progress is not None:
            self._progress(StageProgress(f"measuring {what}", "", self._begun, self._total))
        self._begun += 1

    @contextmanager
    def at(self, part: str, what: str) -> Iterator[None]:
        """Run a block; if it fails, keep the reason and free the memory that it took."""
        try:
            with memory_for(what, self._device, "measure on another device"):
                yield
            return
        except (Error, RuntimeError) as error:
            self.leave_out(part, what, _reason(error))
        self._free()  # here, where the error no longer holds the frames

    def leave_out(self, part: str, what: str, reason: str) -> None:
        """Keep why something is not measured."""
        self.missing.append(Missing(part, what, reason))

    def _free(self) -> None:
        gc.collect()  # a model's parts refer to each other
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _reason(error: Exception) -> str:
    """Return the first line: torch's errors go on about debugging."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
