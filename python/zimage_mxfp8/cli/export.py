"""`zimage-mxfp8 export`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..text import plural
from .arguments import add_json, add_overwrite, add_threads, checkpoint_path, local_path
from .wording import CommandLineError

if TYPE_CHECKING:
    from ..conversion.export_layouts import ExportPlan

_FORMATS = {
    "diffusers": "MXFP8",
    "comfyui": "MXFP8",
    "fp8-rowwise": "FP8 with a scale per row",
    "int8-convrot": "INT8 ConvRot",
}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser], line: str) -> None:
    """Add this command to the parser."""
    parser = commands.add_parser(
        "export",
        help=line,
        description="Write a checkpoint in another layout, with its scales and descriptions of "
        "layers. 'diffusers' and 'comfyui' move bytes and change no number; 'fp8-rowwise' folds "
        "the scales of each row into one; 'int8-convrot' decodes the weights and encodes them in "
        "INT8.",
        intermixed=True,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "source", type=local_path, metavar="FILE", help="safetensors file or diffusers folder"
    )
    parser.add_argument("--to", choices=tuple(_FORMATS), required=True, help="the layout")
    parser.add_argument(
        "-o",
        "--output",
        type=local_path,
        required=True,
        metavar="OUT",
        help="file to write; for diffusers the transformer's folder",
    )
    parser.add_argument("--dry-run", action="store_true", help="show the exact output size")
    add_overwrite(parser)
    add_threads(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    if arguments.to != "diffusers":
        try:
            checkpoint_path(str(arguments.output))
        except argparse.ArgumentTypeError as error:
            raise CommandLineError(f"argument -o/--output: {error}") from None
    from ..conversion.export import export, plan_export
    from . import display

    if arguments.dry_run:
        return _show(plan_export(arguments.source, arguments.to), arguments)
    report = export(
        arguments.source,
        arguments.output,
        arguments.to,
        overwrite=arguments.overwrite,
        threads=arguments.threads,
        progress=True,
    )
    display.note(report.notes)
    if arguments.json:
        display.print_json(report.to_dict())
    display.wrote(
        arguments.output,
        f"{_content(report.to, report.layers)}, {report.file_bytes:,} bytes",
        as_json=arguments.json,
    )
    return 0


def _show(plan: ExportPlan, arguments: argparse.Namespace) -> int:
    from . import display

    if arguments.json:
        display.print_json(
            {
                "input": str(plan.source.checkpoint.path),
                "output": str(arguments.output),
                "to": plan.to,
                "layers": plan.layers,
                "tensors": len(plan.places),
                "file_bytes": plan.size,
                "notes": plan.notes,
            }
        )
        return 0
    display.note(plan.notes)
    screen = display.screen()
    size = f"exactly {plan.size:,} bytes ({display.size_text(plan.size)})"
    screen.text(f"{arguments.output} would have {size}; {_content(plan.to, plan.layers)}")
    return 0


def _content(to: str, layers: int) -> str:
    return f"{plural(layers, 'layer')} in {_FORMATS[to]}" if layers else "not quantised"
