"""`zimage-mxfp8 generate`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import OutputError
from ..generation.limits import (
    DEFAULT_CONTROL_STRENGTH,
    DEFAULT_MASKED_STRENGTH,
    DEFAULT_SIZE,
    DEFAULT_STRENGTH,
    MAX_GUIDANCE,
    MAX_IMAGES,
)
from ..text import plural
from .arguments import add_overwrite, count, file_path, local_path, number
from .download import add_download, resolve
from .loras import weighted_file
from .models import (
    add_compute,
    add_device_and_dtype,
    add_gpus,
    add_model_dir,
    add_offload,
    gpus_or_none,
    keep_libraries_quiet,
    settle_devices,
)
from .streams import report_line
from .wording import CommandLineError

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..generation.settings import GenerationSettings
    from ..generation.stored import StoredSettings


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser], line: str) -> None:
    """Add this command to the parser."""
    parser = commands.add_parser(
        "generate",
        help=line,
        description="Make images with a quantised transformer and the other parts (text encoder, "
        "tokenizer, VAE, scheduler) of a diffusers folder on this machine. No network without "
        "--download.",
    )
    parser.set_defaults(run=run)
    add_model_dir(parser)
    parser.add_argument(
        "--transformer",
        metavar="FILE",
        help="MXFP8, INT8 ConvRot or plain checkpoint, or "
        "OWNER/NAME[@REVISION][/FILE.safetensors] from the Hugging Face cache (default: the "
        "folder's own transformer)",
    )
    add_download(parser)
    parser.add_argument("--prompt", metavar="TEXT", help="description of the image")
    parser.add_argument(
        "--settings-from",
        type=local_path,
        metavar="PNG",
        help="take prompt, seed, size and other settings from an image that generate made, or from "
        "its text in AUTOMATIC1111's format; other options replace them",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=file_path,
        metavar="FILE",
        help="PNG file; with --batch its name gets -0, -1, ... before the suffix (default: a new "
        "name from the prompt and the seed)",
    )
    parser.add_argument(
        "--steps",
        type=count(1),
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
        help="of the noise; the images of a batch have N, N + 1, ... (default: drawn and shown)",
    )
    parser.add_argument(
        "--guidance",
        type=number,
        metavar="SCALE",
        help=f"classifier-free guidance up to {MAX_GUIDANCE}, ComfyUI's CFG minus 1; twice the "
        "work (default: 0, none, for Turbo)",
    )
    parser.add_argument(
        "--negative-prompt",
        metavar="TEXT",
        help="description of what to avoid, with --guidance",
    )
    parser.add_argument(
        "--batch",
        type=count(1),
        metavar="N",
        help=f"images to make together, up to {MAX_IMAGES} (default: 1)",
    )
    parser.add_argument("--init-image", type=local_path, metavar="FILE", help="image to start from")
    parser.add_argument(
        "--mask-image",
        type=local_path,
        metavar="FILE",
        help="what of the init image is drawn anew (white); the rest stays (black)",
    )
    parser.add_argument(
        "--strength",
        type=number,
        metavar="0.01-1",
        help="how much of the init image turns into noise, and of the steps is made "
        f"(default: {DEFAULT_STRENGTH}, with a mask {DEFAULT_MASKED_STRENGTH:g})",
    )
    parser.add_argument(
        "--lora",
        dest="loras",
        action="append",
        type=weighted_file,
        metavar="FILE[:WEIGHT]",
        help="adapter to add to the transformer's layers, which stay as they are; repeatable",
    )
    parser.add_argument(
        "--no-lora",
        dest="loras",
        action="store_const",
        const=[],
        help="with --settings-from, leave out the adapters that the image was made with",
    )
    parser.add_argument(
        "--controlnet",
        metavar="FILE",
        help="ControlNet for Z-Image (Fun-Controlnet-Union), plain or not, with --control-image",
    )
    parser.add_argument(
        "--control-image",
        type=local_path,
        metavar="FILE",
        help="what the ControlNet follows (edges, depth, a pose), of the image's aspect ratio",
    )
    parser.add_argument(
        "--control-strength",
        type=number,
        metavar="NUMBER",
        help=f"how much it counts (default: {DEFAULT_CONTROL_STRENGTH})",
    )
    for end, default in (("start", 0), ("end", 1)):
        parser.add_argument(
            f"--control-{end}",
            type=number,
            metavar="0-1",
            help=f"fraction of the steps at which it {end}s (default: {default})",
        )
    add_compute(parser)
    add_device_and_dtype(parser)
    add_gpus(parser)
    add_offload(parser)
    parser.add_argument(
        "--preview",
        type=count(1),
        metavar="N",
        help="every N steps, write a small estimate of the image to NAME.preview.png, until the "
        "end; the result stays the same",
    )
    add_overwrite(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    begin = time.perf_counter()
    stored, settings = _settings(arguments)
    settle_devices(arguments)
    if (arguments.controlnet is None) != (settings.control_image is None):
        raise CommandLineError("--controlnet and --control-image go together; give both or neither")
    report_line("checking the model folder and the output ...")  # before the slow imports
    from ..adapters.files import open_adapter
    from ..checkpoint import hub
    from ..checkpoint.output import check_target, write_file
    from ..generation.images import is_preview, open_image, png_bytes, preview_path, write_new
    from ..generation.parts import open_parts
    from ..printing.progress import stage_bar_or_lines
    from ..system.optional_packages import needed
    from . import display

    outputs = _outputs(arguments.output, settings)
    previews = [preview_path(output) for output in outputs] if arguments.preview else []
    images = {
        "init image": arguments.init_image,
        "mask image": arguments.mask_image,
        "control image": arguments.control_image,
    }
    inputs = [*images.values(), arguments.settings_from]
    inputs += [file for file, _ in settings.loras]
    inputs += [Path(arguments.controlnet)] if arguments.controlnet else []
    inputs += [Path(arguments.transformer)] if arguments.transformer else []
    for target in outputs:
        check_target(target, filter(None, inputs), overwrite=arguments.overwrite)
    for target in previews:
        may_replace = arguments.overwrite or is_preview(target)
        check_target(target, filter(None, inputs), overwrite=may_replace)
    # Wrong names are reported now, not after seconds of importing and minutes of loading.
    if not arguments.download:
        keep_libraries_quiet()
    own = () if arguments.transformer else (hub.TRANSFORMER,)
    model_dir = resolve(arguments.model_dir, (*hub.COMPONENTS, *own), download=arguments.download)
    transformer = None
    if arguments.transformer:
        transformer = resolve(
            arguments.transformer, (hub.TRANSFORMER,), download=arguments.download
        )
    controlnet = None
    if arguments.controlnet:
        controlnet = resolve(arguments.controlnet, (), download=arguments.download)
    parts = open_parts(model_dir, transformer, controlnet, arguments.compute)
    for file, _ in settings.loras:
        open_adapter(file, parts.transformer.config.shapes())  # for its error
    keep_libraries_quiet()
    report_line("loading torch and diffusers ...")
    with needed("generate", "generate"):
        for what, path in images.items():
            if path is not None:
                open_image(path, what)
        from ..generation.generator import ZImageGenerator

    with stage_bar_or_lines(report_line) as progress, PreviewFiles(previews) as preview_files:
        generator = ZImageGenerator(
            model_dir,
            transformer,
            None if arguments.gpus > 1 else arguments.device,
            arguments.compute,
            arguments.dtype,
            devices=gpus_or_none(arguments),
            controlnet=controlnet,
            offload=arguments.offload,
            progress=progress,
        )
        made = generator.generate(
            settings,
            progress,
            preview=preview_files.show if previews else None,
            preview_every=arguments.preview or 1,
        )
    display.warn(made.warnings)
    if stored is not None:
        display.warn(list(stored.warnings(made.metadata(0))))
    for i, output in enumerate(outputs):
        content = png_bytes(made.images[i], made.metadata(i))
        if arguments.output is None:
            output = write_new(output, content)
        else:
            write_file(output, content, overwrite=arguments.overwrite)
        print(
            f"{output}: {made.settings.width}x{made.settings.height}, seed {made.seed(i)}, "
            f"{plural(made.steps, 'step')} of {made.step_seconds:.2f} s, compute {made.compute} on "
            f"{made.device}"
        )
    print(f"total: {time.perf_counter() - begin:.1f} s{_peak_memory(made.device)}")
    return 0


def _settings(
    arguments: argparse.Namespace,
) -> tuple[StoredSettings | None, GenerationSettings]:
    """Return the image that `--settings-from` names, and the settings from it and the options."""
    from dataclasses import fields, replace

    from ..generation.settings import GenerationSettings, draw_seed

    given = {
        field.name: getattr(arguments, field.name)
        for field in fields(GenerationSettings)
        if getattr(arguments, field.name) is not None
    }
    stored = None
    if arguments.settings_from is not None:
        from ..generation.stored import read_settings

        stored = read_settings(arguments.settings_from)
        settings = stored.with_options(given)
    elif "prompt" in given:
        settings = GenerationSettings(**given)
    else:
        raise CommandLineError(
            "the following arguments are required: --prompt, or --settings-from with an image"
        )
    # Drawn here already, because file names may contain it.
    seed = draw_seed() if settings.seed is None else settings.seed
    return stored, replace(settings, seed=seed)


def _outputs(given: Path | None, settings: GenerationSettings) -> list[Path]:
    from ..generation.images import free_path, image_paths, name_from_prompt

    if given is not None:
        return image_paths(given, settings.batch)
    assert settings.seed is not None
    name = name_from_prompt(settings.prompt)
    return [free_path(Path(f"{name}-{settings.seed + i}.png")) for i in range(settings.batch)]


def _peak_memory(device: str) -> str:
    """Return the end of the summary; empty if the system does not know the peak."""
    from .display import size_text

    if device.startswith("cuda"):
        import torch

        allocated = size_text(torch.cuda.max_memory_allocated(device))
        reserved = size_text(torch.cuda.max_memory_reserved(device))
        return f", peak memory of {device}: {allocated} allocated, {reserved} reserved"
    from ..generation.memory import peak_resident_bytes

    peak = peak_resident_bytes()
    return "" if peak is None else f", peak memory of the process: {size_text(peak)}"


class PreviewFiles:
    """Preview images on the disk, deleted at the end. Their failures do not stop the image."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._written: set[Path] = set()
        self._failed = False

    def __enter__(self) -> PreviewFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for path in self._written:
            with suppress(OSError):
                path.unlink()

    def show(self, _step: int, images: Sequence[Image]) -> None:
        """Replace the files."""
        from ..checkpoint.output import write_file
        from ..generation.images import preview_png_bytes

        for path, image in zip(self._paths, images, strict=True):
            if self._failed:
                return
            self._written.add(path)  # first: Ctrl-C may come at any time
            try:
                write_file(path, preview_png_bytes(image), overwrite=True)
            except OutputError as error:
                report_line(f"warning: no more previews: {error}")
                self._failed = True
