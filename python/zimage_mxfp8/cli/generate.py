"""`zimage-mxfp8 generate`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ..errors import UnsupportedError
from ..generation.settings import (
    DEFAULT_SIZE,
    DEFAULT_STRENGTH,
    MOST_GUIDANCE,
    MOST_PICTURES,
    GenerationSettings,
)
from ..transformer.compute import COMPUTE_MODES
from .arguments import add_overwrite, count, file_path, spellings


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command to the parser."""
    parser = commands.add_parser(
        "generate",
        help="make pictures from a prompt",
        description="Make pictures with an MXFP8 transformer and the other parts (text encoder, "
        "tokenizer, VAE, scheduler) of a diffusers folder on this machine. No network.",
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        *spellings("--model-dir"),
        required=True,
        type=Path,
        metavar="DIR",
        help="diffusers folder of Z-Image",
    )
    parser.add_argument(
        "--transformer",
        type=Path,
        metavar="FILE",
        help="MXFP8 or plain checkpoint (default: the folder's own transformer)",
    )
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what to show")
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        type=file_path,
        metavar="FILE",
        help="PNG file; with --batch its name gets -0, -1, ... before the suffix",
    )
    parser.add_argument(
        "--steps",
        type=count(1),
        default=8,
        metavar="N",
        help="forward passes of the transformer (default: 8, for Turbo)",
    )
    for side in ("height", "width"):
        parser.add_argument(
            f"--{side}",
            type=count(1),
            metavar="PIXELS",
            help=f"a multiple of 16 (default: {DEFAULT_SIZE}, or the init image's)",
        )
    parser.add_argument(
        "--seed",
        type=count(0),
        metavar="N",
        help="of the noise; the pictures of a batch have N, N + 1, ... (default: drawn and shown)",
    )
    parser.add_argument(
        "--guidance",
        type=float,
        default=0.0,
        metavar="SCALE",
        help=f"classifier-free guidance up to {MOST_GUIDANCE}, twice the work (default: 0, none, "
        "for Turbo)",
    )
    parser.add_argument(
        *spellings("--negative-prompt"),
        metavar="TEXT",
        help="what not to show, with --guidance",
    )
    parser.add_argument(
        "--batch",
        type=count(1),
        default=1,
        metavar="N",
        help=f"pictures to make together, up to {MOST_PICTURES} (default: 1)",
    )
    parser.add_argument(
        *spellings("--init-image"), type=Path, metavar="FILE", help="picture to start from"
    )
    parser.add_argument(
        "--strength",
        type=float,
        metavar="0.01-1",
        help="how much of the init image turns into noise, and of the steps is made "
        f"(default: {DEFAULT_STRENGTH})",
    )
    parser.add_argument(
        "--compute",
        choices=("auto", *COMPUTE_MODES),
        default="auto",
        help="how MXFP8 layers are multiplied (default: the fastest that the device has)",
    )
    parser.add_argument(
        "--device",
        metavar="cpu|cuda|cuda:N",
        help="where to run (default: cuda if torch has it)",
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="of everything that is not 8 bits wide (default: bfloat16)",
    )
    parser.add_argument(
        "--offload",
        action="store_true",
        help="load text encoder, transformer and VAE one after another, so that memory holds one",
    )
    add_overwrite(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from ..checkpoint.output import check_target, write_file
    from ..generation.folder import open_model_folder
    from ..generation.pictures import open_init_image, picture_paths, png_bytes

    settings = GenerationSettings(
        prompt=arguments.prompt,
        negative_prompt=arguments.negative_prompt,
        steps=arguments.steps,
        height=arguments.height,
        width=arguments.width,
        guidance=arguments.guidance,
        seed=arguments.seed,
        batch=arguments.batch,
        init_image=arguments.init_image,
        strength=arguments.strength,
    )
    outputs = picture_paths(arguments.output, settings.batch)
    inputs = [path for path in (arguments.transformer, arguments.init_image) if path]
    for output in outputs:
        check_target(output, inputs, overwrite=arguments.overwrite)
    # Wrong names are told now, and not after seconds of importing and minutes of loading.
    open_model_folder(arguments.model_dir)
    keep_libraries_quiet()
    try:
        if settings.init_image is not None:
            open_init_image(settings.init_image)
        from ..generation.generator import ZImageGenerator
    except (ImportError, RuntimeError) as error:  # the latter comes from diffusers' lazy modules
        reason = str(error).strip().splitlines()[0]
        raise UnsupportedError(
            f"generate needs torch, diffusers, transformers and Pillow ({reason}): "
            'pip install "zimage-mxfp8[generate]"'
        ) from None
    from . import display

    with display.stage_bar() as progress:
        generator = ZImageGenerator(
            arguments.model_dir,
            arguments.transformer,
            arguments.device,
            arguments.compute,
            arguments.dtype,
            offload=arguments.offload,
            progress=progress,
        )
        made = generator.generate(settings, progress)
    display.warn(made.warnings)
    for i, output in enumerate(outputs):
        content = png_bytes(made.images[i], made.metadata(i))
        write_file(output, content, overwrite=arguments.overwrite)
        print(
            f"{output}: {made.settings.width}x{made.settings.height}, seed {made.seed(i)}, "
            f"{made.steps} steps of {made.step_seconds:.2f} s, compute {made.compute} on "
            f"{made.device}"
        )
    return 0


def keep_libraries_quiet() -> None:
    """No network, and no progress bars and notes of the libraries between ours.

    They look at these variables when they are imported.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    for library in ("DIFFUSERS", "TRANSFORMERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
