"""`zimage-mxfp8 merge-lora`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..text import plural
from . import loras
from .arguments import add_json, add_overwrite, add_threads, checkpoint_path, local_path


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser], line: str) -> None:
    """Add this command to the parser."""
    parser = commands.add_parser(
        "merge-lora",
        help=line,
        description="Write a plain checkpoint with adapters merged into its weights, in the same "
        "dtypes and ComfyUI's layout. To quantise the result too, use 'convert --lora' instead: it "
        "rounds once.",
        intermixed=True,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "source", type=local_path, metavar="FILE", help="safetensors file or folder"
    )
    parser.add_argument("output", type=checkpoint_path, metavar="OUT", help="file to write")
    loras.add_lora(parser, required=True)
    add_overwrite(parser)
    add_threads(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    loras.limit_blas(arguments.loras)
    from ..conversion.merge_loras import merge_loras
    from . import display

    report = merge_loras(
        arguments.source,
        arguments.output,
        arguments.loras,
        overwrite=arguments.overwrite,
        threads=arguments.threads,
        progress=True,
    )
    display.warn(report.warnings)
    display.note(report.notes)
    if arguments.json:
        display.print_json(report.to_dict())
    display.wrote(
        Path(report.output),
        f"{plural(report.changed, 'tensor')} changed by {plural(len(report.loras), 'adapter')}, "
        f"{report.file_bytes:,} bytes",
        as_json=arguments.json,
    )
    return 0
