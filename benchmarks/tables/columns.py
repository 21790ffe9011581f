"""Tables in Markdown from the rows of result files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"

Row = dict[str, Any]
Rows = Sequence[Row]


def rows_of(name: str, **where: Any) -> list[Row]:
    """Return the rows of a result file that have these values."""
    rows = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))["rows"]
    return [row for row in rows if where.items() <= row.items()]


def one(rows: Rows, **where: Any) -> Row | None:
    """Return the row that has these values, or None. ValueError if there are more."""
    found = [row for row in rows if where.items() <= row.items()]
    if len(found) > 1:
        raise ValueError(f"{len(found)} rows have {where}")
    return found[0] if found else None


@dataclass(frozen=True)
class Column:
    """A column: its title, and its text for the rows that share a line."""

    title: str
    cell: Callable[[Rows], str]
    right: bool = True


def cell(pattern: str, **where: Any) -> Callable[[Rows], str]:
    """Show the row that has these values by a format such as "{us:.1f}", or "-" without one."""

    def show(rows: Rows) -> str:
        row = one(rows, **where)
        return "-" if row is None else pattern.format_map(row)

    return show


def label(pattern: str) -> Callable[[Rows], str]:
    """Show a value that the rows of a line share."""
    return lambda rows: pattern.format_map(rows[0])


def table(rows: Iterable[Row], by: Sequence[str], columns: Sequence[Column]) -> str:
    """Build a table with one line for each combination of the columns `by`."""
    lines: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        lines.setdefault(tuple(row.get(name) for name in by), []).append(row)
    text = [
        "| " + " | ".join(column.title for column in columns) + " |",
        "| " + " | ".join("---:" if column.right else "---" for column in columns) + " |",
    ]
    text += [
        "| " + " | ".join(column.cell(members) for column in columns) + " |"
        for members in lines.values()
    ]
    return "\n".join(re.sub(" {2,}", " ", line) for line in text) + "\n"
