"""Printing other than results, and streams that cannot be written."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import TextIO

from ..text import printable


def prepare() -> None:
    """Make both streams accept any text."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 - for the process's life
        elif isinstance(
            stream, io.TextIOWrapper
        ):  # names may hold characters that the encoding lacks
            stream.reconfigure(errors="backslashreplace")


def report_line(sentence: str) -> None:
    """Print a line to stderr; ignore failures, because the work does not depend on it."""
    try:
        print(f"zimage-mxfp8: {printable(sentence)}", file=sys.stderr, flush=True)
    except OSError:
        _drop(sys.stderr)


def own_stream(stream: TextIO) -> TextIO:
    """Return a stream to the same file that stays when output to this one is dropped.

    It is the stream itself where there is no file behind it.
    """
    try:
        copy = os.dup(stream.fileno())
    except (OSError, ValueError, AttributeError):
        return stream
    file = io.FileIO(copy, "w")
    return io.TextIOWrapper(file, "utf-8", "backslashreplace", write_through=True)


def flush_stdout() -> OSError | None:
    """Flush stdout; if it cannot be written, drop the rest and return the error."""
    try:
        sys.stdout.flush()
    except OSError as error:
        _drop(sys.stdout)
        return error
    return None


def _drop(stream: TextIO) -> None:
    """Discard a stream's buffer and later output, because Python flushes it at exit."""
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())
