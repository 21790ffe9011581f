"""`zimage-mxfp8 inspect`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..text import printable
from .arguments import add_json


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command to the parser."""
    parser = commands.add_parser(
        "inspect",
        help="show what is in a checkpoint",
        description="Show the tensors of a safetensors file or a diffusers folder, by groups.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("file", type=Path, metavar="PATH")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from ..inspection import inspect
    from . import display

    found = inspect(arguments.file)
    if arguments.json:
        display.print_json(found.to_dict())
        return 0
    rows = [
        [
            group.name,
            ", ".join(f"{count} {form}" for form, count in group.formats.items()),
            f"{group.parameters:,}",
            display.size_text(group.nbytes),
        ]
        for group in found.groups
    ]
    files = f", {found.files} files" if found.files > 1 else ""
    quantized = f", quantised: {found.quantization}" if found.quantization else ""
    title = f"{found.path}: {found.kind}{quantized}{files}"
    if not rows:
        display.print_text(title)
        display.print_text(f"no command takes it: {found.remedy}")
        return 0
    display.print_table(title, ["group", "tensors", "parameters>", "size>"], rows)
    out = display.console()
    out.print(f"{found.parameters:,} parameters, {display.size_text(found.nbytes)}")
    if found.provenance:
        made = ", ".join(
            f"{key.replace('_', ' ')} {value}"
            for key, value in found.provenance.items()
            if key != "version"
        )
        version = found.provenance.get("version", "of an unknown version")
        out.print(printable(f"converted by zimage-mxfp8 {version}: {made}"), soft_wrap=True)
    if found.accepted_by:
        out.print(f"accepted by {', '.join(found.accepted_by)}", soft_wrap=True)
    elif found.remedy:
        out.print(f"no command takes it: {found.remedy}", soft_wrap=True)
    for key, value in found.metadata.items():
        out.print(f"metadata {key}: {printable(value[:200])}{'...' if len(value) > 200 else ''}")
    display.warn(found.breaches)
    return 0
