"""Turns of threads that need a shared value in different states."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Turns:
    """Lets calls that need the same value run together; the others wait until those end.

    Without calls the value is 1. Copies and pickles begin without calls.

    Attributes:
        value: the value of the calls that run.
    """

    def __init__(self) -> None:
        self.value = 1.0
        self._running = 0
        self._ended = threading.Condition()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    @contextmanager
    def turn(self, value: float, changed: Callable[[], None]) -> Iterator[None]:
        """Run a block while `value` holds; `changed` is called whenever it has changed."""
        with self._ended:
            self._ended.wait_for(lambda: not self._running or self.value == value)
            self._set(value, changed)
            self._running += 1
        try:
            yield
        finally:
            with self._ended:
                self._running -= 1
                if not self._running:
                    self._ended.notify_all()
                    self._set(1.0, changed)

    def _set(self, value: float, changed: Callable[[], None]) -> None:
        if value != self.value:
            self.value = value
            changed()
