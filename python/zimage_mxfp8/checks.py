"""Checks of arguments: a value of a fitting type becomes Python's own, others are refused by name.

Python's own operators would say what they cannot compare, and not which argument it was.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable
from numbers import Real
from pathlib import Path
from typing import Any, TypeVar

from .errors import UsageError

_T = TypeVar("_T")


def whole_number(name: str, value: Any) -> int:
    """Return a whole number of any type, NumPy's too.

    Raises:
        UsageError: of another type; `name` is its argument.
    """

    def convert(value: Any) -> int:
        if isinstance(value, bool):  # an int to Python, and a slip of its writer
            raise TypeError
        return operator.index(value)

    return _converted(name, convert, "a whole number", value)


def number(name: str, value: Any) -> float:
    """Return a real number of any type; infinities and NaN are numbers too. Errors as above."""
    return _converted(name, _real, "a number", value)


def finite_number(name: str, value: Any) -> float:
    """Return a real number that is finite. Errors as above."""

    def convert(value: Any) -> float:
        converted = _real(value)
        if not math.isfinite(converted):
            raise ValueError
        return converted

    return _converted(name, convert, "a finite number", value)


def path(name: str, value: Any) -> Path:
    """Return a path. Errors as above."""
    return _converted(name, _path, "a path", value)


def file_or_folder(name: str, value: Any) -> Path:
    """Return a path of what may be either. Errors as above."""
    return _converted(name, _path, "the path of a file or folder", value)


def text(name: str, value: Any) -> str:
    """Text that UTF-8 has. Errors as above."""
    if not isinstance(value, str):
        raise _wrong_type(name, "a text", value)
    if any("\ud800" <= c <= "\udfff" for c in value):  # what Python makes of other bytes
        raise UsageError(name, "is not UTF-8 text")
    return value


def check_threads(threads: Any) -> None:
    """Check a number of threads.

    Raises:
        UsageError: it is none.
    """
    if not isinstance(threads, int) or threads < 0:
        raise UsageError("threads", "must be 0 (one a core) or more")


def _path(value: Any) -> Path:
    if "\0" in (text := os.fspath(value)):
        raise ValueError
    return Path(text)


def _real(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError
    return float(value)


def _converted(name: str, convert: Callable[[Any], _T], what: str, value: Any) -> _T:
    try:
        return convert(value)
    except (TypeError, ValueError, OverflowError):
        raise _wrong_type(name, what, value) from None


def _wrong_type(name: str, what: str, value: object) -> UsageError:
    # Only the beginning: it may be anything, a whole image too.
    return UsageError(name, f"must be {what}, not {repr(value)[:80]}")
