"""How results look on a terminal: tables, sizes and progress bars."""

from __future__ import annotations

import json
import shlex
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bar
from rich.table import Table

from ..error_stats import ErrorStats, total
from ..pipeline import Progress, ProgressCallback
from ..text import printable
from .streams import tell

if TYPE_CHECKING:
    from ..generation.generator import GenerationCallback, GenerationProgress

_PLAIN_WIDTH = 160  # of tables that go to a file or a pipe
_UNKNOWN_WIDTH = 80  # of a terminal


def console(stderr: bool = False) -> Console:
    """A console that prints text as it is (names may hold brackets)."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _PLAIN_WIDTH
    made = Console(
        stderr=stderr, markup=False, highlight=False, emoji=False, width=width, soft_wrap=False
    )
    if made.width < 1:  # COLUMNS=0
        made.width = _UNKNOWN_WIDTH
    return made


def print_json(document: Any) -> None:
    """Print JSON for machines."""
    print(json.dumps(document, indent=2))


def warn(sentences: Sequence[str]) -> None:
    """Print warnings to stderr."""
    for sentence in sentences:
        tell(f"warning: {sentence}")


def note(sentences: Sequence[str]) -> None:
    """Print remarks to stderr."""
    for sentence in sentences:
        tell(f"note: {sentence}")


def size_text(nbytes: int) -> str:
    """A size in binary units, as people read it."""
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def print_text(text: str, style: str | None = None, indent: str = "") -> None:
    """Print a sentence; on a terminal, lines end between words, and all but the first begin so."""
    out, text = console(), printable(text)
    if sys.stdout.isatty():
        text = textwrap.fill(
            text,
            out.width,
            subsequent_indent=indent,
            break_long_words=False,  # a path is copied
            break_on_hyphens=False,
        )
    out.print(text, style=style, soft_wrap=True)


def print_table(
    title: str | None, columns: Sequence[str], rows: Sequence[Sequence[str]], spare: int = 0
) -> None:
    """Print a table; columns whose names end with ">" are right-aligned.

    Args:
        title: printed before it.
        columns: their names.
        rows: their cells.
        spare: so many of the last columns are left out, from the right, where the terminal is too
            narrow for them; `--json` has to have them.
    """
    if title:
        print_text(title, style="bold")  # by itself: the table would wrap it to its own width
    cells = [list(map(printable, row)) for row in rows]
    names = [column.removesuffix(">") for column in columns]
    out, shown = console(), len(columns)
    while shown > len(columns) - spare and _table_width(names[:shown], cells) > out.width:
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
    out.print(table)
    if shown < len(columns):
        print_text(f"--json and wider terminals also show: {', '.join(names[shown:])}.")


def _table_width(names: Sequence[str], cells: Sequence[Sequence[str]]) -> int:
    """Of a table with these columns, if no cell is wrapped; rows may have more cells."""
    columns = zip(names, *(row[: len(names)] for row in cells), strict=True)
    return 1 + sum(3 + max(map(cell_len, column)) for column in columns)


def print_errors(errors: dict[str, ErrorStats], worst: int = 10) -> None:
    """Print error statistics: all layers together, then the layers with the largest error."""
    order = sorted(errors, key=lambda name: -errors[name].relative_squared_error)[:worst]
    shown = {"all layers": total(errors.values()), **{name: errors[name] for name in order}}
    print_table(
        f"Relative squared error against the original: all, and the {len(order)} worst layers",
        ["tensor", "squared error>", "SNR (dB)>", "largest>"],
        [
            [name, f"{s.relative_squared_error:.3e}", f"{s.snr_db:.1f}", f"{s.max_error:.3e}"]
            for name, s in shown.items()
        ],
    )


@contextmanager
def progress_bar(title: str) -> Iterator[ProgressCallback | None]:
    """A progress bar on stderr with throughput and time left; None if that is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    bar = Bar(
        TextColumn(title),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console(stderr=True),
        transient=True,
    )
    with bar:
        task = bar.add_task(title, total=None)

        def update(progress: Progress) -> None:
            bar.update(task, completed=progress.done, total=progress.total)

        yield update


@contextmanager
def stage_bar() -> Iterator[GenerationCallback]:
    """A bar on stderr for each stage of a generation; if that is no terminal, some lines."""
    if not sys.stderr.isatty():
        yield _stage_lines()
        return
    bar = Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[state]}"),
        console=console(stderr=True),
        transient=True,
    )
    with bar:
        task = bar.add_task("", total=None, state="")

        def update(progress: GenerationProgress) -> None:
            bar.update(
                task,
                description=_stage_name(progress),
                completed=progress.done,
                total=progress.total,
                state=_stage_state(progress),
                # Bytes come more often than a screen need show them; all else is drawn at once.
                refresh=progress.stage != "transformer" or progress.done == 0,
            )

        yield update


def _stage_lines() -> GenerationCallback:
    """A line when a stage begins, and for every tenth of the steps and images."""
    last: tuple[str, int] | None = None

    def update(progress: GenerationProgress) -> None:
        nonlocal last
        state = _stage_state(progress)
        now = (progress.stage, 10 * progress.done // progress.total if state else 0)
        if now != last:
            tell(_stage_name(progress) + (f": {state}" if state else ""))
            last = now

    return update


def _stage_name(progress: GenerationProgress) -> str:
    loading = progress.stage in ("text encoder", "transformer", "VAE")
    return f"loading the {progress.stage}" if loading else progress.stage


def _stage_state(progress: GenerationProgress) -> str:
    """How far a stage of several pieces is; empty for others."""
    if progress.stage == "denoising":
        return f"step {progress.done} of {progress.total}, {progress.seconds:.2f} s a step"
    if progress.stage == "decoding" and progress.total > 1:
        return f"image {progress.done} of {progress.total}"
    return ""


@contextmanager
def count_bar() -> Iterator[Callable[[str, str, int, int], None]]:
    """A bar on stderr for stages of steps that have names; if that is no terminal, some lines.

    A stage, step, done and total are given to it. For commands that may take hours: a log has to
    tell that they live.
    """
    if not sys.stderr.isatty():
        yield _count_lines()
        return
    bar = Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console(stderr=True),
        transient=True,
    )
    with bar:
        task = bar.add_task("", total=None)

        def update(stage: str, step: str, done: int, total: int) -> None:
            what = printable(step or stage)[:40]
            bar.update(task, description=what, completed=done, total=total or None)

        yield update


def _count_lines() -> Callable[[str, str, int, int], None]:
    """A line when a stage begins, and whenever another tenth of everything is done."""
    last: tuple[str, int] | None = None

    def update(stage: str, _step: str, done: int, total: int) -> None:
        nonlocal last
        now = (stage, 10 * done // total if total else 0)
        if now != last:
            count = f" ({done:,} of {total:,})" if total else ""
            tell(f"{stage}{count}")
            last = now

    return update


def convert_command(source: str, options: str, name: str) -> str:
    """A command line to copy. It names an output: the default one may be there already."""
    path = Path(source)
    stem = path.stem if path.is_file() else path.name
    output = shlex.quote(str(path.with_name(f"{stem}-{name}.safetensors")))
    return f"zimage-mxfp8 convert -i {shlex.quote(source)} {options} -o {output}"
