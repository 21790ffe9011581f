"""Warnings about the device, printed as lines of stderr for users of commands."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import DeviceWarning
from .streams import report_line


@contextmanager
def as_lines() -> Iterator[None]:
    """Print warnings of that kind like this program's own; leave others unchanged."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", DeviceWarning)
        show = warnings.showwarning

        def show_or_report(message: Any, category: Any, *place: Any, **options: Any) -> None:
            if issubclass(category, DeviceWarning):
                report_line(f"warning: {message}")
            else:
                show(message, category, *place, **options)

        warnings.showwarning = show_or_report
        yield
