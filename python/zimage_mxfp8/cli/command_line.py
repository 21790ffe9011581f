"""The command line of `zimage-mxfp8`: parses it, runs a command, turns errors into exit codes.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted. Commands import what they need when
they run, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import errno
import os
from collections.abc import Sequence

from .._core import __version__
from ..errors import Error, UsageError
from . import (
    compare,
    completion,
    convert,
    demo,
    dequantize,
    device_warnings,
    doctor,
    generate,
    inspect,
    merge_lora,
    probe,
    recipes,
    sensitivity,
    streams,
    validate,
)
from .arguments import Parser
from .interrupts import is_interrupt
from .wording import CommandLineError, sentence

_COMMANDS = (
    convert,
    inspect,
    validate,
    dequantize,
    merge_lora,
    generate,
    probe,
    compare,
    sensitivity,
    recipes,
    doctor,
    demo,
    completion,
)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = Parser(
        prog="zimage-mxfp8",
        description="Convert Z-Image checkpoints to MXFP8, check them, look inside and run them.",
    )
    parser.add_argument("--version", action="version", version=f"zimage-mxfp8 {__version__}")
    parser.add_argument(
        "--cmake-dir",
        action=_PrintCMakeDir,
        nargs=0,
        help="print the folder of the CMake package, for find_package(zimage_mxfp8 CONFIG)",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add_parser(commands)
    for own in commands.choices.values():  # errors are worded with the options of these
        own.set_defaults(parsers=(own, *commands.choices.values()))
    return parser


class _PrintCMakeDir(argparse.Action):
    """Like `--version`: print and exit, without a command."""

    def __call__(self, parser: argparse.ArgumentParser, *_arguments: object) -> None:
        from ..system.diagnosis import cmake_dir

        print(cmake_dir())
        parser.exit()


def run(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code, but Ctrl-C is raised."""
    streams.prepare()
    try:
        code = _run(argv)
    except SystemExit as error:  # argparse: --help, --version, wrong usage
        code = error.code if isinstance(error.code, int) else 2
    unprinted = streams.flush_stdout()
    if unprinted and code == 0 and not isinstance(unprinted, BrokenPipeError):
        return _fail(f"standard output: {unprinted.strerror}", 1)
    return code


def _run(argv: Sequence[str] | None) -> int:
    arguments = argparse.Namespace()
    try:
        parser = build_parser()
        if "_ARGCOMPLETE" in os.environ:  # a shell asks for completions
            from .completer import answer

            answer(parser)
        parser.parse_args(argv, arguments)
        with device_warnings.as_lines():
            return int(arguments.run(arguments))
    except (Error, MemoryError, OSError) as error:
        if is_interrupt(error):
            raise
        if isinstance(error, BrokenPipeError):  # the reader of our output went away
            return 1
        is_usage = isinstance(error, (UsageError, CommandLineError))
        return _fail(_sentence(error, arguments), 2 if is_usage else 1)


def _sentence(error: Error | MemoryError | OSError, arguments: argparse.Namespace) -> str:
    if isinstance(error, Error):
        return sentence(error, getattr(arguments, "parsers", ()))
    if isinstance(error, MemoryError):
        return f"out of memory; {_remedy_for_memory(arguments)}"
    place, reason = error.filename, error.strerror or str(error)
    # What print could not write is still there and fails again, if there is a buffer. Without one
    # a full disk tells: whoever writes a file names it.
    if not place and (streams.flush_stdout() or error.errno in _FULL):
        place = "standard output"
    return f"{place}: {reason}" if place else reason


def _remedy_for_memory(arguments: argparse.Namespace) -> str:
    """Return an option that the command has and that is not in use already, if there is one."""
    if getattr(arguments, "threads", 1) != 1:
        return "--threads 1 needs less"
    if not getattr(arguments, "offload", True):
        return "--offload needs less"
    return "close other programs, or use a machine with more"


def _fail(sentence: str, code: int) -> int:
    streams.report_line(f"error: {sentence}")
    return code
