"""`zimage-mxfp8 dequantize`."""

from __future__ import annotations

import argparse

from .arguments import add_overwrite, add_threads, checkpoint_path, local_path


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser], line: str) -> None:
    """Add this command to the parser."""
    parser = commands.add_parser(
        "dequantize",
        help=line,
        description="Write the BF16 checkpoint that a file in MXFP8 or INT8 ConvRot encodes.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("file", type=local_path, metavar="FILE")
    parser.add_argument("-o", "--output", type=checkpoint_path, required=True, metavar="OUT")
    add_overwrite(parser)
    add_threads(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from ..conversion.dequantization import dequantize_checkpoint
    from . import display

    dequantize_checkpoint(
        arguments.file,
        arguments.output,
        overwrite=arguments.overwrite,
        threads=arguments.threads,
        progress=True,
    )
    size = display.size_text(arguments.output.stat().st_size)
    display.wrote(arguments.output, f"weights decoded to BF16, {size}")
    return 0
