"""The command line of `zimage-mxfp8`: parsing, running a command, exit codes for errors.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted. Commands import their modules when
they run, so that `--help` is fast.
"""

from __future__ import annotations

import argparse
import errno
import os
import shlex
import sys
from collections.abc import Sequence
from importlib import import_module

from .._core import __version__
from ..errors import Error, UsageError, remedy
from . import device_warnings, streams
from .arguments import Parser
from .interrupts import is_interrupt
from .wording import CommandLineError, sentence

# Modules of this package, and what `--help` says of each.
_COMMANDS = {
    "convert": "convert a checkpoint to MXFP8 or INT8",
    "inspect": "show the contents of a checkpoint",
    "validate": "check a quantised file, and compare it with its original",
    "dequantize": "decode a quantised file to a plain BF16 checkpoint",
    "export": "write a checkpoint in another layout: diffusers, ComfyUI, row-wise FP8 or INT8",
    "merge-lora": "merge adapters into a plain checkpoint",
    "generate": "make images from a prompt",
    "serve": "serve images over HTTP, and a page to make them",
    "probe": "find the weights that quantisation would hurt most",
    "compare": "measure the error of 8-bit and 4-bit formats",
    "sensitivity": "measure the effect of quantising each layer on the output",
    "evaluate": "compare the images of two transformers",
    "comfyui": "install the nodes in ComfyUI",
    "recipes": "show the recipes: which layers are kept, and why",
    "doctor": "show versions, devices and their kernels",
    "bench": "measure the speed of a device in every compute mode",
    "demo": "make a small Z-Image checkpoint, convert it, check the result and run it",
    "completion": "print the script that completes commands and options in a shell",
}
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the program.

    Args:
        command: the only command that gets its options; None: all of them get theirs.
    """
    parser = Parser(
        prog="zimage-mxfp8",
        description="Convert Z-Image checkpoints to 8 bits, check them, look inside and run them.",
    )
    parser.add_argument("--version", action="version", version=f"zimage-mxfp8 {__version__}")
    parser.add_argument(
        "--cmake-dir",
        action=_PrintCMakeDir,
        nargs=0,
        help="print the folder of the CMake package, for find_package(zimage_mxfp8 CONFIG)",
    )
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", dest="command", required=True
    )
    for name, line in _COMMANDS.items():
        if command in (None, name):
            import_module(f".{name.replace('-', '_')}", __package__).add_parser(commands, line)
        else:
            commands.add_parser(name, help=line)
    return parser


def command_parsers(command: str) -> list[argparse.ArgumentParser]:
    """Return the parsers with which errors of a command are worded: its own, then those of all."""
    parser = build_parser()
    (commands,) = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return [commands.choices[command], *commands.choices.values()]


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
        return _fail(f"standard output: {unprinted.strerror}; {remedy(unprinted)}", 1)
    return code


def _run(argv: Sequence[str] | None) -> int:
    arguments = argparse.Namespace()
    try:
        if "_ARGCOMPLETE" in os.environ:  # a shell requests completions
            from .completer import answer

            answer(build_parser())
        words = sys.argv[1:] if argv is None else argv
        arguments.command_line = shlex.join(["zimage-mxfp8", *words])  # for reports
        command = next((word for word in words if not word.startswith("-")), "")
        build_parser(command).parse_args(words, arguments)
        with device_warnings.as_lines():
            return int(arguments.run(arguments))
    except (Error, MemoryError, OSError) as error:
        if is_interrupt(error):
            raise
        if isinstance(error, BrokenPipeError):  # the reader of our output has gone
            return 1
        is_usage = isinstance(error, (UsageError, CommandLineError))
        return _fail(_sentence(error, arguments), 2 if is_usage else 1)


def _sentence(error: Error | MemoryError | OSError, arguments: argparse.Namespace) -> str:
    if isinstance(error, Error):
        return sentence(error, command_parsers(arguments.command))
    if isinstance(error, MemoryError):
        return f"out of memory; {_remedy_for_memory(arguments)}"
    place, reason = error.filename, error.strerror or str(error)
    if place and isinstance(error, PermissionError):
        return f"{place} cannot be used: no permission; allow this user to use it"
    # Text that print could not write stays in the buffer, if there is one, and fails again. Without
    # a buffer this is a full disk: errors of other files name the file.
    if not place and (streams.flush_stdout() or error.errno in _FULL):
        place = "standard output"
    return f"{place}: {reason}; {remedy(error)}" if place else reason


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
