"""`zimage-mxfp8 validate`."""

from __future__ import annotations

import argparse

from . import loras
from .arguments import add_json, add_threads, local_path


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser], line: str) -> None:
    """Add this command to the parser."""
    parser = commands.add_parser(
        "validate",
        help=line,
        description="Check every rule of the file contract, of MXFP8 or INT8 ConvRot. Exit code 1 "
        "if one is broken.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("file", type=local_path, metavar="FILE")
    parser.add_argument(
        "--against",
        type=local_path,
        metavar="ORIGINAL",
        help="the checkpoint that it was converted from: checks codes, scales and their order, "
        "and measures errors",
    )
    loras.add_lora(
        parser, text="with --against: an adapter that was merged, at its weight; repeatable"
    )
    add_threads(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    loras.limit_blas(arguments.loras)
    from ..conversion.validation.run import validate
    from ..printing.validation import print_validation
    from . import display

    report = validate(
        arguments.file,
        arguments.against,
        loras=arguments.loras,
        threads=arguments.threads,
        progress=True,
    )
    display.show(report, print_validation, as_json=arguments.json)
    return 0 if report.ok else 1
