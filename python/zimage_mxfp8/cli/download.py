"""Models named as on the Hugging Face hub: `--download`, and its output."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..text import printable
from .streams import report_line

if TYPE_CHECKING:
    from ..checkpoint.hub import Download


def add_download(parser: argparse.ArgumentParser) -> None:
    """Add `--download`."""
    parser.add_argument(
        "--download",
        action="store_true",
        help="fetch files of OWNER/NAME that the local cache lacks from the Hugging Face hub; "
        "without it there is no network access",
    )


def resolve(text: str, parts: Sequence[str], *, download: bool) -> Path:
    """Find a path or a name on the hub, see `hub.resolve`."""
    from ..checkpoint import hub

    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # it would resolve more than models
    return hub.resolve(text, parts, download=download, report=_show)


def _show(download: Download) -> None:
    if download.done == 0:
        _print_plan(download)
        if not sys.stderr.isatty():
            from huggingface_hub.utils import disable_progress_bars

            disable_progress_bars()
    if download.done < len(download.files) and not sys.stderr.isatty():
        file = download.files[download.done]
        report_line(f"downloading {file.name} ({download.done + 1} of {len(download.files)})")


def _print_plan(download: Download) -> None:
    """Print a table of folders to stderr: stdout is for results."""
    from rich.table import Table

    from .display import console, size_text

    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for file in download.files:
        part = file.name.rpartition("/")[0] or file.name
        counts[part] += 1
        sizes[part] += file.nbytes
    report_line(f"to download from {download.repo}:")
    table = Table()
    table.add_column("what", overflow="fold")
    table.add_column("files", justify="right")
    table.add_column("size", justify="right")
    for part, count in counts.items():
        table.add_row(printable(part), str(count), size_text(sizes[part]))
    table.add_section()
    table.add_row("total", str(counts.total()), size_text(sizes.total()))
    console(stderr=True).print(table)
