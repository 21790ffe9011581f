"""What is printed besides results, and streams that cannot be written."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import TextIO

from ..text import printable


def prepare() -> None:
    """Let both streams take whatever is printed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 - for the process's life
        elif isinstance(stream, io.TextIOWrapper):  # names may hold what the encoding lacks
            stream.reconfigure(errors="backslashreplace")


def report_line(sentence: str) -> None:
    """Print a line to stderr, if that can be written: the work does not depend on it."""
    try:
        print(f"zimage-mxfp8: {printable(sentence)}", file=sys.stderr, flush=True)
    except OSError:
        _drop(sys.stderr)


def flush_stdout() -> OSError | None:
    """Print what stdout still holds; if it cannot be written, drop that and return why."""
    try:
        sys.stdout.flush()
    except OSError as error:
        _drop(sys.stdout)
        return error
    return None


def _drop(stream: TextIO) -> None:
    """Send what a stream holds, and whatever comes, nowhere: Python flushes it when it ends."""
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())
