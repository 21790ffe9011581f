"""Ctrl-C in a process that runs one command line.

It raises KeyboardInterrupt, and is ignored as long as that is on its way out: nothing may disturb
what cleans up. Some places swallow what is raised in them (`__del__`, callbacks of C libraries);
the exception is gone then, and the next Ctrl-C raises another.
"""

from __future__ import annotations

import signal
import weakref
from types import FrameType

_on_their_way: weakref.WeakSet[KeyboardInterrupt] = weakref.WeakSet()


class _Interrupt(KeyboardInterrupt):
    """Unlike its base it can be referenced weakly."""

    def __init__(self) -> None:
        super().__init__()
        _on_their_way.add(self)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in a command that keeps something, with the sentence that says what."""


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    if not _on_their_way:
        raise _Interrupt


def install() -> None:
    """Handle Ctrl-C this way, unless it is ignored (nohup) or somebody else handles it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)


def finish() -> None:
    """Ignore Ctrl-C if `install` handles it: all is done, and Python's own end cannot handle it."""
    if signal.getsignal(signal.SIGINT) is _interrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def is_interrupt(error: BaseException | None) -> bool:
    """Whether an error is Ctrl-C, or what somebody made of it.

    Python 3.11 and older raise RuntimeError for whatever happens while a class is made.
    """
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None
