"""Commands in a pseudo-terminal."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys


def run_in_terminal(arguments: list[str], columns: int = 120) -> str:
    """Output of `zimage-mxfp8` when both streams are a terminal."""
    return python_in_terminal(["-m", "zimage_mxfp8.cli.main", *arguments], columns)


def python_in_terminal(arguments: list[str], columns: int = 120) -> str:
    """Output of Python when both streams are a terminal."""
    master, slave = pty.openpty()
    command = [sys.executable, *arguments]
    with subprocess.Popen(
        command, stdout=slave, stderr=slave, env={**os.environ, "COLUMNS": str(columns)}
    ):
        os.close(slave)
        chunks = []
        while True:
            try:
                chunk = os.read(master, 65536)
            except OSError:  # the other end is closed
                break
            if not chunk:
                break
            chunks.append(chunk)
    os.close(master)
    return b"".join(chunks).decode()


def tables_in_terminal(arguments: list[str], columns: int) -> tuple[list[list[list[str]]], str]:
    """The tables that a command prints, as rows of cells, and everything that it prints.

    No line is longer than the terminal is wide, but for commands, which are there to be copied.
    """
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", run_in_terminal(arguments, columns))
    tables: list[list[list[str]]] = []
    for line in re.split(r"[\r\n]+", text):
        assert len(line) <= columns or line.startswith("zimage-mxfp8 convert "), line
        if line.startswith("┏"):
            tables.append([])
        elif line.startswith(("┃", "│")):
            tables[-1].append([cell.strip() for cell in re.split("[┃│]", line)[1:-1]])
    return tables, text


def first_column(table: list[list[str]]) -> list[str]:
    """Without its title. A cell that goes on in a second line would be one more."""
    return [row[0] for row in table[1:]]
