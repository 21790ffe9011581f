"""The log: one line of JSON per request, and per failure. Prompts are not in it."""

from __future__ import annotations

import io
import json
import logging
import queue
import re
import threading
import time
from collections.abc import Mapping
from typing import Any, TextIO

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_MAX_WAITING = 10_000  # lines, for a reader that is slow


class LogWriter:
    """Writes lines from a thread of its own: neither a slow reader nor a full disk holds others up.

    Args:
        stream: where lines go.

    Attributes:
        dropped: lines that could not be written.
    """

    def __init__(self, stream: TextIO) -> None:
        self.dropped = 0
        self._stream = stream
        self._lines: queue.Queue[str | None] = queue.Queue(_MAX_WAITING)
        self._thread = threading.Thread(target=self._work, name="log", daemon=True)
        self._thread.start()

    def write(self, fields: Mapping[str, Any]) -> None:
        """Append a line with these fields after the time, in seconds since 1970."""
        try:
            self._lines.put_nowait(json.dumps({"time": round(time.time(), 3), **fields}))
        except queue.Full:
            self.dropped += 1

    def close(self, seconds: float = 1.0) -> None:
        """Write what waits, within a time."""
        try:
            self._lines.put(None, timeout=seconds)
        except queue.Full:
            return
        self._thread.join(seconds)

    def _work(self) -> None:
        while (line := self._lines.get()) is not None:
            self._write(line)

    def _write(self, line: str) -> None:
        try:
            self._stream.write(f"{line}\n")
            self._stream.flush()
        except (OSError, ValueError):  # a full disk, a closed pipe
            self.dropped += 1


class LogHandler(logging.Handler):
    """Writes the records of Python's `logging` as lines of such a log."""

    def __init__(self, writer: LogWriter) -> None:
        super().__init__()
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        """Append a record."""
        # Not the level's name, which any library may change.
        event = "warning" if record.levelno < logging.ERROR else "error"
        self._writer.write({"event": event, "detail": self.format(record)})


def log_into(writer: LogWriter, name: str) -> logging.Logger:
    """Write the records of a logger as lines of such a log and nowhere else; return the logger."""
    logger = logging.getLogger(name)
    logger.handlers = [LogHandler(writer)]
    logger.propagate = False
    return logger


class LogStream(io.TextIOBase):
    """Stands in for stdout where a library prints what belongs into such a log.

    Args:
        writer: gets each piece that is written, if it is not blank.
    """

    def __init__(self, writer: LogWriter) -> None:
        super().__init__()
        self._writer = writer

    def write(self, text: str) -> int:
        """Append a piece of text."""
        if detail := _COLOUR.sub("", text).strip():
            self._writer.write({"event": "warning", "detail": detail})
        return len(text)
