"""`zimage-mxfp8 demo`: the main job on an embedded default."""

from __future__ import annotations

import argparse
import shlex
import time
from pathlib import Path

from ..errors import MissingExtraError
from ..system.optional_packages import needed
from .arguments import add_overwrite, local_path
from .models import keep_libraries_quiet

_ORIGINAL, _CONVERTED = "z-image-demo.safetensors", "z-image-demo-mxfp8.safetensors"
_SHEET = "z-image-demo.png"
_DIM, _CAPTION_DIM = 256, 128
_MODES = {
    "weight-only": "not quantised",
    "fp8": "FP8 with a scale per token, as on Hopper",
    "mxfp8-emulated": "MXFP8, as on Blackwell",
    "int8": "INT8 with a scale per token, rotated",
}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser], line: str) -> None:
    """Add this command to the parser."""
    parser = commands.add_parser(
        "demo",
        help=line,
        description="Make a small checkpoint with Z-Image's 30 layers and random weights, convert "
        "it to MXFP8, validate it against its original and print the tables; then draw with the "
        "small trained model of the package in four compute modes, next to its BF16 original. No "
        "network.",
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "-o",
        "--output",
        type=local_path,
        metavar="FOLDER",
        help="keep the files in this folder (default: a temporary one, deleted at the end)",
    )
    add_overwrite(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    if arguments.output is None:
        import tempfile

        temporary = tempfile.TemporaryDirectory(prefix="zimage-mxfp8-demo-")
        try:
            with temporary as folder:
                code, drawn = _demo(Path(folder), overwrite=False)
        finally:
            temporary.cleanup()  # once more: Ctrl-C may have ended the first time
        kept = f"them and the picture {_SHEET}" if drawn else "them"
        print(f"\nThe files were temporary; zimage-mxfp8 demo -o FOLDER keeps {kept}.")
        _print_next("your.safetensors", "your-mxfp8.safetensors", can_draw=drawn)
        return code
    from . import display

    arguments.output.mkdir(parents=True, exist_ok=True)
    code, drawn = _demo(arguments.output, arguments.overwrite)
    original, converted = arguments.output / _ORIGINAL, arguments.output / _CONVERTED
    print()
    display.wrote(original, "a small Z-Image with random weights")
    display.wrote(converted, "the same in MXFP8")
    if drawn:
        display.wrote(arguments.output / _SHEET, "images of the small trained model")
    _print_next(str(original), str(converted), can_draw=drawn)
    return code


def _print_next(original: str, converted: str, *, can_draw: bool) -> None:
    """Commands to copy."""
    original, converted = shlex.quote(original), shlex.quote(converted)
    print("\nTo try next:")
    print(f"zimage-mxfp8 convert {original} --recipe zimage --dry-run")
    print(f"zimage-mxfp8 probe {original}")
    print(f"zimage-mxfp8 inspect {converted}")
    if can_draw:
        print(_drawing_command())


def _drawing_command() -> str:
    """Return the command line that draws an example of the small trained model."""
    from ..generation.small_model import FOLDER, TRANSFORMER, examples

    side, (example, *_) = examples()
    words = ["zimage-mxfp8", "generate", "--model-dir", FOLDER, "--transformer", TRANSFORMER]
    words += ["--prompt", example.prompt, "--seed", example.seed, "--height", side, "--width", side]
    return shlex.join(map(str, words))


def _demo(folder: Path, overwrite: bool) -> tuple[int, bool]:
    """Run the demo; return the exit code, and whether images were drawn."""
    from ..checkpoint.output import check_target
    from ..checkpoint.synthetic import write_synthetic_checkpoint
    from ..conversion.convert import convert
    from ..conversion.validation.run import validate
    from ..printing.conversion import print_conversion
    from ..printing.validation import print_validation
    from ..zimage.layers import zimage_shapes
    from . import display

    original, converted, sheet = (folder / name for name in (_ORIGINAL, _CONVERTED, _SHEET))
    for path in (original, converted, sheet):
        check_target(path, (), overwrite=overwrite)
    shapes = zimage_shapes(dim=_DIM, caption_dim=_CAPTION_DIM)
    write_synthetic_checkpoint(original, shapes, overwrite=overwrite, progress=True)
    print(f"1. made {original.name}: Z-Image with {_DIM} channels, random weights\n", flush=True)
    report = convert(original, converted, overwrite=overwrite, progress=True)
    print(f"2. zimage-mxfp8 convert {original.name} {converted.name}", flush=True)
    display.warn(report.warnings)
    print_conversion(report, display.screen())
    checked = validate(converted, original, progress=True)
    print(f"\n3. zimage-mxfp8 validate {converted.name} --against {original.name}", flush=True)
    print_validation(checked, display.screen())
    print(
        "\n4. The small trained model of the package draws in eight steps, on the CPU", flush=True
    )
    drawn = _draw(sheet, overwrite)
    return 0 if checked.ok else 1, drawn


def _draw(sheet: Path, overwrite: bool) -> bool:
    """Draw in the compute modes next to the BF16 original; return whether that was possible."""
    keep_libraries_quiet()
    try:
        with needed("generate", "drawing"):
            from ..generation.example_images import ExamplePainter, psnr
    except MissingExtraError as problem:
        print(f"skipped: {problem}")
        return False
    from ..checkpoint.output import write_file
    from ..generation.contact_sheet import Panel, contact_sheet
    from ..generation.images import open_image, plain_png_bytes
    from ..generation.small_model import examples
    from . import display
    from .inline_image import show

    side, shown = examples()
    painter = ExamplePainter(shown, side)
    originals = [open_image(example.image, "image of the original") for example in shown]
    columns, rows = {"BF16 weights": [Panel(original) for original in originals]}, []
    for compute, meaning in _MODES.items():
        begin = time.perf_counter()
        images = painter.draw(compute)
        seconds = time.perf_counter() - begin
        found = [psnr(*pair) for pair in zip(images, originals, strict=True)]
        columns[f"MXFP8, {compute}"] = [
            Panel(image, f"{decibels:.1f} dB")
            for image, decibels in zip(images, found, strict=True)
        ]
        mean, worst = sum(found) / len(found), min(found)
        rows.append([compute, meaning, f"{mean:.1f}", f"{worst:.1f}", f"{seconds:.1f}"])
    display.print_table(
        "Images of the MXFP8 file against those of the original's BF16 weights",
        ["compute mode", "activations", "PSNR, mean (dB)>", "worst>", "seconds>"],
        rows,
    )
    print(f"{len(shown)} images are too few to tell which mode is best.")
    picture = contact_sheet(columns, [example.prompt for example in shown])
    content = plain_png_bytes(picture)
    write_file(sheet, content, overwrite=overwrite)
    show(content)
    return True
