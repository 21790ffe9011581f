"""`zimage-mxfp8 validate`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..text import plural, printable
from .arguments import add_json, add_threads

if TYPE_CHECKING:
    from ..validation import ValidationReport

_MOST_SHOWN = 20


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command to the parser."""
    parser = commands.add_parser(
        "validate",
        help="check an MXFP8 file, and compare it with its original",
        description="Check every rule of the MXFP8 file contract. Exit code 1 if one is broken.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument(
        "--against",
        type=Path,
        metavar="ORIGINAL",
        help="the checkpoint that it was converted from: proves codes, scales and their order, "
        "and measures errors",
    )
    add_threads(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from ..validation import validate
    from . import display

    with display.progress_bar("checking") as progress:
        report = validate(
            arguments.file, arguments.against, threads=arguments.threads, progress=progress
        )
    if arguments.json:
        display.print_json(report.to_dict())
    else:
        print_report(report)
    return 0 if report.ok else 1


def print_report(report: ValidationReport) -> None:
    """Print what was found."""
    from . import display

    out = display.console()
    for breach in report.breaches[:_MOST_SHOWN]:
        out.print(f"breach: {printable(str(breach))}", soft_wrap=True)
    if len(report.breaches) > _MOST_SHOWN:
        out.print(f"... and {len(report.breaches) - _MOST_SHOWN} more breaches (--json has all)")
    for note in report.notes:
        out.print(f"note: {note}", soft_wrap=True)
    if report.errors:
        display.print_errors(report.errors)
    compared = "; codes, scales and their order equal the original's" if report.against else ""
    if report.ok:
        out.print(f"{report.file}: sound, {report.layers} MXFP8 layers{compared}", soft_wrap=True)
    else:
        count = plural(len(report.breaches), "breach", "breaches")
        out.print(f"{report.file}: {count} of the contract", soft_wrap=True)
