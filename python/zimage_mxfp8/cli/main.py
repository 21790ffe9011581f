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
from pathlib import Path

from ..errors import Error, UsageError
from ..text import printable
from . import (
    compare,
    convert,
    demo,
    dequantize,
    doctor,
    generate,
    inspect,
    probe,
    recipes,
    sensitivity,
    validate,
)
from .arguments import Parser

_COMMANDS = (
    convert,
    inspect,
    validate,
    dequantize,
    generate,
    probe,
    compare,
    sensitivity,
    recipes,
    doctor,
    demo,
)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = Parser(
        prog="zimage-mxfp8",
        description="Convert Z-Image checkpoints to MXFP8, check them, look inside and run them.",
    )
    parser.add_argument(
        "--version", action="version", version=f"zimage-mxfp8 {version('zimage-mxfp8')}"
    )
    parser.add_argument(
        "--cmake-dir",
        action=_PrintCMakeDir,
        nargs=0,
        help="print the folder of the CMake package, for find_package(zimage_mxfp8 CONFIG)",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add_parser(commands)
    return parser


class _PrintCMakeDir(argparse.Action):
    """Like `--version`: print and exit, without a command."""

    def __call__(self, parser: argparse.ArgumentParser, *_arguments: object) -> None:
        from ..diagnosis import cmake_dir

        print(cmake_dir())
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    _prepare_streams()
    try:
        code = _run(argv)
    except SystemExit as error:  # argparse: --help, --version, wrong usage
        code = error.code if isinstance(error.code, int) else 2
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if code == 0 and not isinstance(error, BrokenPipeError):
            return _fail(f"standard output: {error.strerror}", 1)
    return code


def _run(argv: Sequence[str] | None) -> int:
    arguments = argparse.Namespace()
    try:
        build_parser().parse_args(argv, arguments)
        return int(arguments.run(arguments))
    except UsageError as error:
        return _fail(str(error), 2)
    except Error as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return _fail("interrupted; no partial output was left", 130)
    except MemoryError:
        return _fail(f"out of memory; {_remedy_for_memory(arguments)}", 1)
    except BrokenPipeError:  # the reader of our output went away
        return 1
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        return _fail(f"{place}{error.strerror or error}", 1)


def _remedy_for_memory(arguments: argparse.Namespace) -> str:
    """An option that the command has and that is not in use already, if there is one."""
    if getattr(arguments, "threads", 1) != 1:
        return "--threads 1 needs less"
    if not getattr(arguments, "offload", True):
        return "--offload needs less"
    return "close other programs, or use a machine with more"


def _prepare_streams() -> None:
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 - for the process's life
        elif isinstance(stream, io.TextIOWrapper):  # names may hold what the encoding lacks
            stream.reconfigure(errors="backslashreplace")


def _fail(sentence: str, code: int) -> int:
    print(f"zimage-mxfp8: error: {printable(sentence)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
