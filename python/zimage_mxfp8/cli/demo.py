"""`zimage-mxfp8 demo`: the main job on an embedded default."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

_DIM, _CAPTION_DIM = 256, 128


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command to the parser."""
    parser = commands.add_parser(
        "demo",
        help="make a small Z-Image checkpoint, convert it and check the result",
        description="Make a small checkpoint with Z-Image's 30 layers and random weights, convert "
        "it to MXFP8, validate it against its original and print the tables. No network.",
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FOLDER",
        help="keep the files in this folder (default: a temporary one, deleted at the end)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    if arguments.output is None:
        with tempfile.TemporaryDirectory(prefix="zimage-mxfp8-demo-") as folder:
            code = _demo(Path(folder))
        print("The files were temporary; zimage-mxfp8 demo -o FOLDER keeps them.")
        return code
    arguments.output.mkdir(parents=True, exist_ok=True)
    return _demo(arguments.output)


def _demo(folder: Path) -> int:
    from ..checkpoint.zimage import zimage_shapes
    from ..conversion.convert import convert
    from ..synthetic import write_synthetic_checkpoint
    from ..validation import validate
    from . import display
    from .convert import print_summary
    from .validate import print_report

    original = folder / "z-image-demo.safetensors"
    converted = folder / "z-image-demo-mxfp8.safetensors"
    shapes = zimage_shapes(dim=_DIM, caption_dim=_CAPTION_DIM)
    with display.progress_bar("making weights") as progress:
        write_synthetic_checkpoint(original, shapes, overwrite=True, progress=progress)
    print(f"1. made {original.name}: Z-Image with {_DIM} channels, random weights\n", flush=True)
    with display.progress_bar("converting") as progress:
        report = convert(original, converted, overwrite=True, progress=progress)
    print(f"2. zimage-mxfp8 convert -i {original.name} -o {converted.name}", flush=True)
    display.warn(report.warnings)
    print_summary(report)
    with display.progress_bar("checking") as progress:
        checked = validate(converted, original, progress=progress)
    print(f"\n3. zimage-mxfp8 validate {converted.name} --against {original.name}", flush=True)
    print_report(checked)
    return 0 if checked.ok else 1
