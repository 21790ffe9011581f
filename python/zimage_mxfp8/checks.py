"""Checks of arguments: suitable values become Python's own types, others raise an error.

Python's own operators would name the types that they cannot compare, but not the argument.
"""

from __future__ import annotations

import math
import operator
import os
import sys
from collections.abc import Callable
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import UsageError
from .text import is_web_address

if TYPE_CHECKING:
    from PIL.Image import Image

_T = TypeVar("_T")
_MAX_LORA_WEIGHT = 1e6  # far beyond any use; far below where float32 overflows


def whole_number(name: str, value: Any) -> int:
    """Return a whole number of any type, NumPy's included.

    Raises:
        UsageError: if the argument `name` has another type.
    """

    def convert(value: Any) -> int:
        if isinstance(value, bool):  # an int to Python, but a mistake here
            raise TypeError
        return operator.index(value)

    return _converted(name, convert, "a whole number", value)


def number(name: str, value: Any) -> float:
    """Return a real number, also infinity or NaN; errors as in `whole_number`."""
    return _converted(name, _real, "a number", value)


def finite_number(name: str, value: Any) -> float:
    """Return a finite real number; errors as in `whole_number`."""

    def convert(value: Any) -> float:
        converted = _real(value)
        if not math.isfinite(converted):
            raise ValueError
        return converted

    return _converted(name, convert, "a finite number", value)


def lora_weight(name: str, value: Any) -> float:
    """Return the weight of an adapter, within 1e6 of 0; errors as in `whole_number`."""
    number = finite_number(name, value)
    if abs(number) > _MAX_LORA_WEIGHT:
        limit = f"{_MAX_LORA_WEIGHT:,.0f}"
        raise UsageError(name, f"must be within {limit} of 0, not {number!r}")
    return number


def path(name: str, value: Any) -> Path:
    """Return a path; errors as in `whole_number`."""
    return _converted(name, _path, "a path", value)


def image_source(name: str, value: Any) -> Path | Image:
    """Return a PIL image itself, or the path of an image; errors as in `whole_number`."""
    loaded = sys.modules.get("PIL.Image")  # without it there are no such images
    if loaded is not None and isinstance(value, loaded.Image):
        image: Image = value
        return image
    return _converted(name, _path, "a path or a PIL image", value)


def file_or_folder(name: str, value: Any) -> Path:
    """Return the path of a file or folder; errors as in `whole_number`."""
    return _converted(name, _path, "the path of a file or folder", value)


def text(name: str, value: Any) -> str:
    """Return text that UTF-8 can encode; errors as in `whole_number`."""
    if not isinstance(value, str):
        raise _wrong_type(name, "a text", value)
    if any("\ud800" <= c <= "\udfff" for c in value):  # Python's stand-ins for other bytes
        raise UsageError(name, "must be UTF-8 text")
    return value


def check_threads(threads: Any) -> None:
    """Check a number of threads.

    Raises:
        UsageError: if it is not a number of threads.
    """
    if not isinstance(threads, int) or threads < 0:
        raise UsageError("threads", "must be 0 (one per core) or more")


def _path(value: Any) -> Path:
    text = os.fspath(value)
    if isinstance(text, str) and is_web_address(text):
        raise ValueError
    if not text or b"\0" in os.fsencode(text):  # an empty path would be the current folder
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
    # Only the beginning: the value may be anything, even a whole image.
    return UsageError(name, f"must be {what}, not {repr(value)[:80]}")
