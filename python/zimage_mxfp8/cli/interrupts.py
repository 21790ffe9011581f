"""Handling of Ctrl-C in a process that runs one command line.

Ctrl-C raises KeyboardInterrupt, and is ignored while that exception propagates, so that nothing
disturbs the cleanup. Some places swallow exceptions (`__del__`, callbacks of C libraries); the
exception is gone then, and the next Ctrl-C raises another.
"""

from __future__ import annotations

import signal
import weakref
from types import FrameType

_on_their_way: weakref.WeakSet[KeyboardInterrupt] = weakref.WeakSet()


class _Interrupt(KeyboardInterrupt):
    """A KeyboardInterrupt that can be referenced weakly, unlike its base class."""

    def __init__(self) -> None:
        super().__init__()
        _on_their_way.add(self)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in a command that keeps results, with a sentence about them."""


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    if not _on_their_way:
        raise _Interrupt


def install() -> None:
    """Handle Ctrl-C this way, unless it is ignored (nohup) or another handler is installed."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)


def finish() -> None:
    """Ignore Ctrl-C if `install` handles it: the work is done, and Python's exit cannot."""
    if signal.getsignal(signal.SIGINT) is _interrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def is_interrupt(error: BaseException | None) -> bool:
    """Return whether an error is Ctrl-C, or was raised in its place.

    Python 3.11 and older raise RuntimeError for any exception while a class is created.
    """
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None
