"""Output of commands: results to stdout, warnings to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..printing.screen import Screen
from ..printing.screen import console as console
from ..printing.screen import size_text as size_text
from ..text import printable
from .streams import report_line


def screen() -> Screen:
    """Return standard output."""
    return Screen(console(), wraps=sys.stdout.isatty(), complete="--json")


def print_json(document: Any) -> None:
    """Print JSON for machines."""
    print(json.dumps(document, indent=2))


def show(report: Any, tables: Callable[[Any, Screen], None], *, as_json: bool) -> None:
    """Print a report, as JSON or as the tables that a function makes of it."""
    if as_json:
        print_json(report.to_dict())
    else:
        tables(report, screen())


def warn(sentences: Sequence[str]) -> None:
    """Print warnings to stderr."""
    for sentence in sentences:
        report_line(f"warning: {sentence}")


def note(sentences: Sequence[str]) -> None:
    """Print notes to stderr."""
    for sentence in sentences:
        report_line(f"note: {sentence}")


def print_table(title: str | None, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, see `Screen.table`."""
    screen().table(title, columns, rows)


def wrote(path: Path, what: str, *, as_json: bool = False) -> None:
    """Report that a file was written, with its content.

    Args:
        path: the file.
        what: its content.
        as_json: whether stdout is for JSON alone; the line then goes to stderr.
    """
    line = f"wrote {path}: {what}"
    if as_json:
        report_line(line)
    else:
        print(printable(line), flush=True)
