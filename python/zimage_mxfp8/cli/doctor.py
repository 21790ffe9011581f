"""`zimage-mxfp8 doctor`."""

from __future__ import annotations

import argparse

from .arguments import add_json


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser], line: str) -> None:
    """Add this command to the parser."""
    parser = commands.add_parser(
        "doctor",
        help=line,
        description="Show the versions of this installation, the devices that it finds, which "
        "kernel each uses for GEMMs, and why not others.",
    )
    parser.set_defaults(run=run)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from ..printing.diagnosis import print_diagnosis
    from ..system.diagnosis import diagnose
    from . import display

    found = diagnose()
    if arguments.json:
        display.print_json(found.to_dict())
        return 0
    print_diagnosis(found, display.screen())
    return 0
