"""`zimage-mxfp8 demo`: the main job on an embedded default."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

_DIM, _CAPTION_DIM = 256, 128
_CAPTION_TOKENS = 20
_LATENT_SIDE = 8  # 64 pixels


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command to the parser."""
    parser = commands.add_parser(
        "demo",
        help="make a small Z-Image checkpoint, convert it, check the result and run it",
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


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    if arguments.output is None:
        temporary = tempfile.TemporaryDirectory(prefix="zimage-mxfp8-demo-")
        try:
            with temporary as folder:
                code = _demo(Path(folder))
        finally:
            temporary.cleanup()  # once more: Ctrl-C may have ended the first time
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
    print(f"\n4. Turbo's eight steps with {converted.name}, on the CPU", flush=True)
    _run_both(original, converted)
    return 0 if checked.ok else 1


def _run_both(original: Path, converted: Path) -> None:
    """Denoise the same noise with both checkpoints and print how far apart the results are."""
    try:
        import torch
    except ImportError:
        print('skipped: torch is optional and not installed: pip install "zimage-mxfp8[torch]"')
        return
    from ..generation.sampler import denoise
    from ..transformer.config import LATENT_CHANNELS
    from ..transformer.model import ZImageTransformer
    from . import display

    random = torch.Generator().manual_seed(0)
    noise = torch.randn(LATENT_CHANNELS, 1, _LATENT_SIDE, _LATENT_SIDE, generator=random)
    caption = torch.randn(_CAPTION_TOKENS, _CAPTION_DIM, generator=random)
    results, rows = [], []
    for name, file, compute in (
        ("BF16, the original", original, "exact"),
        ("MXFP8, exact", converted, "exact"),
        ("MXFP8, emulated", converted, "emulated"),
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
        "Denoised latents against those of the original (random weights)",
        ["weights, compute mode", "relative error>", "seconds>"],
        rows,
    )
