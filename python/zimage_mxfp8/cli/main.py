"""Entry point of `zimage-mxfp8`: parses the command line and turns errors into exit codes.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted. Commands import what they need when
they run, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

from ..errors import Error, UsageError
from . import convert, demo, dequantize, inspect, recipes, validate
from .arguments import Parser

_COMMANDS = (convert, inspect, validate, dequantize, recipes, demo)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = Parser(
        prog="zimage-mxfp8",
        description="Convert Z-Image checkpoints to MXFP8, check them and look inside.",
    )
    parser.add_argument(
        "--version", action="version", version=f"zimage-mxfp8 {version('zimage-mxfp8')}"
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names may hold what the encoding lacks
            stream.reconfigure(errors="backslashreplace")
    arguments = build_parser().parse_args(argv)
    try:
        code = int(arguments.run(arguments))
        sys.stdout.flush()
        return code
    except UsageError as error:
        return _fail(str(error), 2)
    except Error as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return _fail("interrupted; nothing was kept", 130)
    except MemoryError:
        return _fail("out of memory; --threads 1 needs less", 1)
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        return _fail(f"{place}{error.strerror or error}", 1)


def _fail(sentence: str, code: int) -> int:
    line = " ".join(sentence.splitlines())  # names in files may hold line breaks
    print(f"zimage-mxfp8: error: {line}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
