"""Blocks of pages: text, text to copy, terms and tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...text import plural
from .colors import PALETTE, Range
from .markup import breakable, element, text

_FILTERED = 15  # rows up to which a table is seen at a glance
_SHORT = 24  # characters of words that stay on one line


@dataclass(frozen=True)
class Paragraph:
    """Running text."""

    words: str

    def html(self) -> str:
        """Return the block as HTML."""
        return element("p", text(self.words))


@dataclass(frozen=True)
class Copyable:
    """Text in a fixed-width font with a button that copies it.

    Attributes:
        label: what it is.
        content: what is copied.
    """

    label: str
    content: str

    def html(self) -> str:
        """Return the block as HTML."""
        button = element("button", "Copy", type="button")
        label = element("p", element("span", text(self.label)) + button)
        return element("div", label + element("pre", text(self.content)), class_="copyable")


@dataclass(frozen=True)
class Terms:
    """Words and what they mean.

    Attributes:
        meanings: by word.
    """

    meanings: Mapping[str, str]

    def html(self) -> str:
        """Return the block as HTML."""
        pairs = (
            element("div", element("dt", text(word)) + element("dd", text(meaning)))
            for word, meaning in self.meanings.items()
        )
        return element("dl", "".join(pairs), class_="terms")


@dataclass(frozen=True)
class Column:
    """Column of a `Table`.

    Attributes:
        title: its head.
        digits: decimals that its numbers are shown with; None for a column of text.
        dots: whether a dot on a logarithmic scale goes with each number, dark for the smallest.
    """

    title: str
    digits: int | None = None
    dots: bool = False


Cell = str | float | None


@dataclass(frozen=True)
class Table:
    """A table that sorts by a click on a head, filters by words and is downloaded as CSV.

    Numbers have thousands separators; the CSV has all their digits. A narrow window shows a card
    for each row.

    Attributes:
        columns: from the left; the first names the row.
        rows: a value for each column; None leaves a cell empty.
        name: of the CSV file, without suffix.
        chosen: numbers of rows that stand out.
    """

    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    name: str
    chosen: Sequence[int] = ()

    def html(self) -> str:
        """Return the block as HTML."""
        heads = "".join(
            element(
                "th",
                element("button", text(column.title), type="button"),
                scope="col",
                class_="number" if column.digits is not None else None,
            )
            for column in self.columns
        )
        scales = [
            _scale(column, [row[i] for row in self.rows]) for i, column in enumerate(self.columns)
        ]
        rows = "\n".join(
            element("tr", self._cells(row, scales), class_="chosen" if i in self.chosen else None)
            for i, row in enumerate(self.rows)
        )
        table = f"<table><thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}\n</tbody></table>"
        count = element("output", plural(len(self.rows), "row"))
        search = ""
        if len(self.rows) > _FILTERED:
            search = element("label", "Filter " + element("input", type="search"))
        button = element("button", "Download CSV", type="button", class_="csv")
        tools = element("div", search + count + button, class_="tools")
        long_names = any(len(str(row[0])) > _SHORT for row in self.rows)
        kind = "rows named" if long_names else "rows"
        return element(
            "div", tools + element("div", table, class_=kind), class_="table", data_name=self.name
        )

    def _cells(self, row: Sequence[Cell], scales: Sequence[Range | None]) -> str:
        first, *others = map(_cell, self.columns, row, scales)
        return first.replace("<td", '<th scope="row"', 1).replace("</td>", "</th>") + "".join(
            others
        )


def _scale(column: Column, values: Sequence[Cell]) -> Range | None:
    """Return the range of the logarithms of a column with dots."""
    if not column.dots:
        return None
    logarithms = [math.log10(v) for v in values if isinstance(v, (int, float)) and v > 0]
    return Range(min(logarithms, default=0.0), max(logarithms, default=1.0))


def _cell(column: Column, value: Cell, scale: Range | None) -> str:
    if value is None:
        return "<td></td>"
    if column.digits is None or isinstance(value, str):
        words = str(value)
        if len(words) <= _SHORT:
            return element("td", text(words), class_="short")
        return element("td", breakable(words))
    shown = f"{round(value, column.digits) + 0.0:,.{column.digits}f}"  # no "-0.00"
    exact = repr(value)
    kept = exact if exact != shown.replace(",", "") else None
    content = shown if scale is None else _dotted(value, shown, scale)
    return element("td", content, class_="number dots" if scale else "number", data_v=kept)


def _dotted(value: float, shown: str, scale: Range) -> str:
    dot = ""
    if value > 0:
        at = math.log10(value)
        share = (at - scale.low) / (scale.high - scale.low) if scale.high > scale.low else 0.0
        dot = element(
            "i", style=f"left:calc((100% - 14px)*{share:.3f});background:{PALETTE[scale.level(at)]}"
        )
    return element("span", element("span", dot, class_="track") + shown, class_="dotted")
