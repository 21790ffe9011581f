"""Progress bars on stderr.

Each is a context manager that gives the callback to draw with, or None if stderr is not a terminal.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, TypeVar

from ..errors import UsageError
from ..text import printable

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import ProgressColumn

    from ..analysis.compare.run import CompareCallback, CompareProgress
    from ..generation.generator import GenerationCallback, GenerationProgress
    from ..streaming.jobs import Progress, ProgressCallback, StageCallback, StageProgress

_Callback = TypeVar("_Callback", bound=Callable[..., object])


def shown(
    progress: _Callback | bool | None,
    bar: Callable[[], AbstractContextManager[_Callback | None]],
) -> AbstractContextManager[_Callback | None]:
    """Return the callback for an argument `progress`: the caller's own, or for True a bar's.

    Raises:
        UsageError: neither a function nor True, False or None.
    """
    if progress is True:
        return bar()
    if not progress:
        return nullcontext()
    if not callable(progress):
        raise UsageError("progress", f"must be a function, True or None, not {repr(progress)[:80]}")
    return nullcontext(progress)


def _is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def byte_bar(title: str) -> Callable[[], AbstractContextManager[ProgressCallback | None]]:
    """Make a bar with throughput and time left."""

    @contextmanager
    def bar() -> Iterator[ProgressCallback | None]:
        if not _is_terminal():
            yield None
            return
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        with _bar(
            TextColumn(title, markup=False),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        ) as drawn:
            task = drawn.add_task(title, total=None)

            def update(progress: Progress) -> None:
                drawn.update(task, completed=progress.done, total=progress.total)

            yield update

    return bar


@contextmanager
def compare_bar() -> Iterator[CompareCallback]:
    """Yield the callback of a bar per stage of a comparison."""
    with ExitStack() as drawn:
        stage: str | None = None
        update: ProgressCallback | None = None

        def show(progress: CompareProgress) -> None:
            nonlocal stage, update
            if progress.stage != stage:
                drawn.close()
                stage = progress.stage
                update = drawn.enter_context(byte_bar(f"comparing: {stage}")())
            if update is not None:
                update(progress)

        yield show


@contextmanager
def stage_bar() -> Iterator[GenerationCallback | None]:
    """Yield the callback of a bar per stage of a generation; None if stderr is not a terminal."""
    if not _is_terminal():
        yield None
        return
    from rich.progress import BarColumn, TextColumn

    with _bar(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[state]}", markup=False),
    ) as bar:
        task = bar.add_task("", total=None, state="")

        def update(progress: GenerationProgress) -> None:
            bar.update(
                task,
                description=_generation_stage(progress),
                completed=progress.done,
                total=progress.total,
                state=_generation_state(progress),
                # Bytes are reported more often than a screen must show them; everything else is
                # drawn at once.
                refresh=progress.stage != "transformer" or progress.done == 0,
            )

        yield update


@contextmanager
def stage_bar_or_lines(print_line: Callable[[str], None]) -> Iterator[GenerationCallback]:
    """Yield the callback of a bar per stage of a generation; lines if stderr is not a terminal.

    Lines are printed when a stage begins, and for every tenth of the steps and images.
    """
    with stage_bar() as bar:
        if bar is not None:
            yield bar
            return
        last: tuple[str, int] | None = None

        def update(progress: GenerationProgress) -> None:
            nonlocal last
            state = _generation_state(progress)
            now = (progress.stage, 10 * progress.done // progress.total if state else 0)
            if now != last:
                print_line(_generation_stage(progress) + (f": {state}" if state else ""))
                last = now

        yield update


def _generation_stage(progress: GenerationProgress) -> str:
    loading = progress.stage in ("text encoder", "transformer", "ControlNet", "VAE")
    return f"loading the {progress.stage}" if loading else progress.stage


def _generation_state(progress: GenerationProgress) -> str:
    """Describe the progress of a stage with several parts; empty for others."""
    if progress.stage == "denoising":
        return f"step {progress.done} of {progress.total}, {progress.seconds:.2f} s per step"
    if progress.stage == "decoding" and progress.total > 1:
        return f"image {progress.done} of {progress.total}"
    return ""


def _print_line(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextmanager
def analysis_bar(
    print_line: Callable[[str], None] = _print_line,
) -> Iterator[StageCallback]:
    """Yield the callback of a bar for the stages of an analysis; lines if stderr is not a terminal.

    The analysis may take hours: a log must show that it is running.
    """
    if not _is_terminal():
        yield _stage_lines(print_line)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    with _bar(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    ) as bar:
        task = bar.add_task("", total=None)

        def update(progress: StageProgress) -> None:
            what = printable(progress.what or progress.stage)[:40]
            bar.update(
                task, description=what, completed=progress.done, total=progress.total or None
            )

        yield update


def _stage_lines(print_line: Callable[[str], None]) -> StageCallback:
    """Print a line when a stage begins, and after every tenth of all work."""
    last: tuple[str, int] | None = None

    def update(progress: StageProgress) -> None:
        nonlocal last
        now = (progress.stage, 10 * progress.done // progress.total if progress.total else 0)
        if now != last:
            count = f" ({progress.done:,} of {progress.total:,})" if progress.total else ""
            print_line(f"{progress.stage}{count}")
            last = now

    return update


def _bar(*columns: ProgressColumn) -> Bar:
    from rich.progress import Progress as Bar

    from .screen import console

    return Bar(*columns, console=console(stderr=True), transient=True)
