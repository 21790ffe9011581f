"""Pages of sections, plots and tables: one HTML file that needs no network.

The plots are drawn by plotly.js, which is inside the file. Everything else reads without scripts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from ...system.optional_packages import check_installed
from ...text import plural, printable

if TYPE_CHECKING:
    import plotly.graph_objects as go

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Paragraph:
    """Running text."""

    text: str


@dataclass(frozen=True)
class Copyable:
    """Text in a fixed-width font with a button that copies it.

    Attributes:
        label: what it is.
        text: what is copied.
    """

    label: str
    text: str


@dataclass(frozen=True)
class Figure:
    """A plot.

    Attributes:
        title: above it, and its name to screen readers.
        plot: from `figures`.
    """

    title: str
    plot: go.Figure


@dataclass(frozen=True)
class Column:
    """Column of a `Table`.

    Attributes:
        title: its head.
        digits: decimals that its numbers are shown with; None for a column of text.
    """

    title: str
    digits: int | None = None


Cell = str | float | None


@dataclass(frozen=True)
class Table:
    """A table that sorts by a click on a head and filters by words.

    Attributes:
        columns: from the left.
        rows: a value for each column; None leaves a cell empty.
    """

    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]


Block = Paragraph | Copyable | Figure | Table


@dataclass(frozen=True)
class Section:
    """Part of a page, with a title of its own.

    Attributes:
        title: its title.
        blocks: what it shows, from the top.
    """

    title: str
    blocks: Sequence[Block]


def render_page(title: str, sections: Sequence[Section]) -> str:
    """Return the page as HTML, with scripts and styles inside.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    check_installed("plots", "a page with plots")
    from plotly.offline import get_plotlyjs

    body = "\n".join(_section(section) for section in sections)
    style, script = ((_FOLDER / name).read_text("utf-8") for name in ("page.css", "page.js"))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(title)}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<main>
<h1>{_text(title)}</h1>
{body}
</main>
<script>{get_plotlyjs()}</script>
<script>
{script}</script>
</body>
</html>
"""


def _text(text: str) -> str:
    return escape(printable(text))


def _section(section: Section) -> str:
    blocks = "\n".join(map(_block, section.blocks))
    return f"<section>\n<h2>{_text(section.title)}</h2>\n{blocks}\n</section>"


def _block(block: Block) -> str:
    if isinstance(block, Paragraph):
        return f"<p>{_text(block.text)}</p>"
    if isinstance(block, Copyable):
        return (
            f'<div class="copyable"><p>{_text(block.label)} <button type="button">Copy</button>'
            f"</p><pre>{_text(block.text)}</pre></div>"
        )
    if isinstance(block, Figure):
        # JSON in a script element: "<" could end it.
        data = str(block.plot.to_json()).replace("<", "\\u003c")
        return (
            f'<figure><figcaption>{_text(block.title)}</figcaption><div class="plot" role="img" '
            f'aria-label="{_text(block.title)}"><script type="application/json">{data}</script>'
            "</div></figure>"
        )
    return _table(block)


def _table(table: Table) -> str:
    heads = "".join(
        f'<th scope="col"{_kind(column)}><button type="button">{_text(column.title)}</button></th>'
        for column in table.columns
    )
    rows = "\n".join(
        "<tr>" + "".join(map(_cell, table.columns, row)) + "</tr>" for row in table.rows
    )
    return (
        '<div class="table"><p><label>Filter <input type="search"></label> '
        f"<output>{plural(len(table.rows), 'row')}</output></p>\n"
        f"<div><table><thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div></div>"
    )


def _kind(column: Column) -> str:
    return "" if column.digits is None else ' class="number"'


def _cell(column: Column, value: Cell) -> str:
    if value is None:
        return "<td></td>"
    if column.digits is None or isinstance(value, str):
        return f"<td>{_text(str(value))}</td>"
    return f'<td class="number" data-value="{value!r}">{value:.{column.digits}f}</td>'
