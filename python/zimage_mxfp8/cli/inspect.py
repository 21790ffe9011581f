"""`zimage-mxfp8 inspect`."""

from __future__ import annotations

import argparse

from .arguments import add_json, local_path


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser], line: str) -> None:
    """Add this command to the parser."""
    parser = commands.add_parser(
        "inspect",
        help=line,
        description="Show the tensors of a safetensors file or a diffusers folder, by groups.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("file", type=local_path, metavar="PATH")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from ..checkpoint.inspection import inspect
    from ..printing.inspection import print_inspection
    from ..printing.screen import first_few
    from . import display
    from .command_line import command_parsers
    from .wording import with_options

    found = inspect(arguments.file)
    parsers = command_parsers(arguments.command)
    found.accepted_by = [with_options(use, parsers) for use in found.accepted_by]
    found.refusal = with_options(found.refusal, parsers)
    if arguments.json:
        display.print_json(found.to_dict())
        return 0
    print_inspection(found, display.screen())
    display.warn(first_few(found.breaches, "breaches", "--json"))
    return 0
