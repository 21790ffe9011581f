"""`zimage-mxfp8 demo`: the main job on an embedded default."""

from __future__ import annotations

import argparse
import shlex
import time
from pathlib import Path

from ..errors import MissingExtraError
from ..system.optional_packages import needed
from .arguments import add_overwrite

_ORIGINAL, _CONVERTED = "z-image-demo.safetensors", "z-image-demo-mxfp8.safetensors"
_DIM, _CAPTION_DIM = 256, 128
_CAPTION_TOKENS = 20
_LATENT_SIDE = 8  # 64 pixels


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser], line: str) -> None:
    """Add this command to the parser."""
    parser = commands.add_parser(
        "demo",
        help=line,
        description="Make a small checkpoint with Z-Image's 30 layers and random weights, convert "
        "it to MXFP8, validate it against its original, let both denoise the same latents and "
        "print the tables. No network.",
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
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
                code = _demo(Path(folder), overwrite=False)
        finally:
            temporary.cleanup()  # once more: Ctrl-C may have ended the first time
        print("\nThe files were temporary; zimage-mxfp8 demo -o FOLDER keeps them.")
        _print_next("your.safetensors", "your-mxfp8.safetensors")
        return code
    from . import display

    arguments.output.mkdir(parents=True, exist_ok=True)
    code = _demo(arguments.output, arguments.overwrite)
    original, converted = arguments.output / _ORIGINAL, arguments.output / _CONVERTED
    print()
    display.wrote(original, "a small Z-Image with random weights")
    display.wrote(converted, "the same in MXFP8")
    _print_next(str(original), str(converted))
    return code


def _print_next(original: str, converted: str) -> None:
    """Three commands to copy."""
    original, converted = shlex.quote(original), shlex.quote(converted)
    print("\nTo try next:")
    print(f"zimage-mxfp8 convert {original} --recipe zimage --dry-run")
    print(f"zimage-mxfp8 probe {original}")
    print(f"zimage-mxfp8 inspect {converted}")


def _demo(folder: Path, overwrite: bool) -> int:
    from ..checkpoint.output import check_target
    from ..checkpoint.synthetic import write_synthetic_checkpoint
    from ..conversion.convert import convert
    from ..conversion.validation import validate
    from ..printing.conversion import print_conversion
    from ..printing.validation import print_validation
    from ..zimage.layers import zimage_shapes
    from . import display

    original, converted = folder / _ORIGINAL, folder / _CONVERTED
    for path in (original, converted):
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
    print(f"\n4. Turbo's eight steps with {converted.name}, on the CPU", flush=True)
    _run_both(original, converted)
    return 0 if checked.ok else 1


def _run_both(original: Path, converted: Path) -> None:
    """Denoise the same noise with both checkpoints and print how far apart the results are."""
    try:
        with needed("torch", "denoising"):
            import torch
    except MissingExtraError as problem:
        print(f"skipped: {problem}")
        return
    from ..generation.sampler import denoise
    from ..transformer.model import ZImageTransformer
    from ..zimage.constants import LATENT_CHANNELS
    from . import display

    random = torch.Generator().manual_seed(0)
    noise = torch.randn(LATENT_CHANNELS, 1, _LATENT_SIDE, _LATENT_SIDE, generator=random)
    caption = torch.randn(_CAPTION_TOKENS, _CAPTION_DIM, generator=random)
    results, rows = [], []
    for name, file, compute in (
        ("BF16, the original", original, "weight-only"),
        ("MXFP8, weight-only", converted, "weight-only"),
        ("MXFP8, mxfp8-emulated", converted, "mxfp8-emulated"),
    ):
        # Sums in float32, so that the differences are those of the 8 bits.
        model = ZImageTransformer.from_checkpoint(file, "cpu", compute, torch.float32)
        begin = time.perf_counter()
        (latents,) = denoise(model, [noise], [caption])
        seconds = time.perf_counter() - begin
        results.append(latents)
        error = float((latents - results[0]).norm() / results[0].norm())
        rows.append([name, f"{error:.2%}" if error else "-", f"{seconds:.1f}"])
    display.print_table(
        "Denoised latents against those of the original (random weights): norm of the difference "
        "over that of the original",
        ["weights, compute mode", "relative error>", "seconds>"],
        rows,
    )
