"""Text and tables for users: on a terminal, in a file or pipe, or in a string."""

from __future__ import annotations

import io
import sys
import textwrap
from collections.abc import Callable, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from ..text import printable

_PLAIN_WIDTH = 160  # of tables in a file or a pipe
_UNKNOWN_WIDTH = 80  # of a terminal
_MAX_SHOWN = 5  # of sentences about the same


def console(stderr: bool = False) -> Console:
    """Return a console that prints text without markup (names may hold brackets)."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _PLAIN_WIDTH
    made = Console(
        stderr=stderr, markup=False, highlight=False, emoji=False, width=width, soft_wrap=False
    )
    if made.width < 1:  # COLUMNS=0
        made.width = _UNKNOWN_WIDTH
    return made


def size_text(nbytes: int) -> str:
    """Return a size in readable binary units."""
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def first_few(sentences: Sequence[str], what: str, complete: str) -> list[str]:
    """Return the first five sentences, and one that counts the others.

    Args:
        sentences: all of them.
        what: what they are, in the plural.
        complete: the option or call that shows all of them.
    """
    shown = list(sentences[:_MAX_SHOWN])
    if more := len(sentences) - len(shown):
        shown.append(f"... and {more:,} more {what} ({complete} has all)")
    return shown


class Screen:
    """A target for printed reports.

    Args:
        target: the console; its width is that of tables.
        wraps: whether lines of text end between words at that width.
        complete: the option or call that shows a whole report, for text that omits parts of it.
    """

    def __init__(self, target: Console, *, wraps: bool, complete: str = "to_dict()") -> None:
        self.complete = complete
        self._console = target
        self._wraps = wraps

    def line(self, text: str = "") -> None:
        """Print a line without wrapping, for users to copy."""
        self._console.print(printable(text), soft_wrap=True)

    def text(self, text: str, style: str | None = None, indent: str = "") -> None:
        """Print a sentence; if it is wrapped, all lines except the first begin with `indent`."""
        text = printable(text)
        if self._wraps:
            text = textwrap.fill(
                text,
                self._console.width,
                subsequent_indent=indent,
                break_long_words=False,  # users copy paths
                break_on_hyphens=False,
            )
        self._console.print(text, style=style, soft_wrap=True)

    def table(
        self,
        title: str | None,
        columns: Sequence[str],
        rows: Sequence[Sequence[str]],
        spare: int = 0,
    ) -> None:
        """Print a table; columns with names that end with ">" are right-aligned.

        Args:
            title: printed before it.
            columns: their names.
            rows: their cells.
            spare: number of the last columns that may be omitted, from the right, if the width is
                too small; `complete` must show them.
        """
        if title:
            self.text(title, style="bold")  # by itself: the table would wrap it to its own width
        cells = [list(map(printable, row)) for row in rows]
        names = [column.removesuffix(">") for column in columns]
        shown, width = len(columns), self._console.width
        while shown > len(columns) - spare and _table_width(names[:shown], cells) > width:
            shown -= 1
        table = Table()
        for name, column in zip(names[:shown], columns[:shown], strict=True):
            table.add_column(
                name,
                justify="right" if column.endswith(">") else "left",
                overflow="fold",  # a name cut short with "..." would hide its end
            )
        for row in cells:
            table.add_row(*row[:shown])
        self._console.print(table)
        if shown < len(columns):
            self.text(f"{self.complete} and wider terminals also show: {', '.join(names[shown:])}.")


def _table_width(names: Sequence[str], cells: Sequence[Sequence[str]]) -> int:
    """Return the width of a table without wrapped cells; rows may have more cells than columns."""
    columns = zip(names, *(row[: len(names)] for row in cells), strict=True)
    return 1 + sum(3 + max(map(cell_len, column)) for column in columns)


class _Text(io.StringIO):
    """Text for standard output, with its encoding: rich reads that when it draws lines."""

    @property
    def encoding(self) -> str | None:  # type: ignore[override]
        return getattr(sys.stdout, "encoding", None)


def as_text(show: Callable[[Screen], None]) -> str:
    """Return the output of `show` as plain text that fits standard output."""
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    text = _Text()
    target = Console(
        file=text,
        markup=False,
        highlight=False,
        emoji=False,
        color_system=None,
        force_terminal=False,
        width=console().width if is_terminal else _PLAIN_WIDTH,
    )
    show(Screen(target, wraps=is_terminal))
    return text.getvalue().removesuffix("\n")
