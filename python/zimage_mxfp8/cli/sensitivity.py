"""`zimage-mxfp8 sensitivity`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..analysis.sensitivity.settings import MEASURED_MODES, check_settings
from ..checks import text
from ..system.optional_packages import needed
from ..text import plural
from .arguments import add_json, add_overwrite, count, file_path, local_path, number
from .interrupts import Interrupted, is_interrupt
from .models import add_device, add_dtype, keep_libraries_quiet
from .next_commands import convert_with_recipe
from .streams import report_line
from .wording import CommandLineError

if TYPE_CHECKING:
    from ..analysis.pages.page import Origin


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser], line: str) -> None:
    """Add this command to the parser."""
    parser = commands.add_parser(
        "sensitivity",
        help=line,
        description="Quantise every layer and every group of layers of the original model alone, "
        "measure the error of its output at several timesteps, and find a set of layers to keep "
        "that holds a bound. For a GPU; on the CPU for small models.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("file", type=local_path, metavar="FILE", help="plain checkpoint or folder")
    parser.add_argument(
        "--bound",
        type=number,
        default=0.05,
        metavar="ERROR",
        help="relative error of the output that the set has to hold (default: 0.05)",
    )
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="caption to measure with, repeatable; needs --model-dir (default: synthetic ones)",
    )
    parser.add_argument(
        "--model-dir",
        type=local_path,
        metavar="DIR",
        help="diffusers folder with the text encoder for --prompt",
    )
    parser.add_argument(
        "--size",
        type=count(16),
        default=512,
        metavar="PIXELS",
        help="side of the images, a multiple of 16 (512)",
    )
    parser.add_argument(
        "--timesteps", type=count(1), default=4, metavar="N", help="of 8 to measure at (4)"
    )
    parser.add_argument("--seed", type=count(0), default=0, metavar="N", help="of the noise (0)")
    parser.add_argument(
        "--compute",
        choices=MEASURED_MODES,
        default="mxfp8",
        help="compute mode that the MXFP8 file will run in, on this device or another "
        "(default: mxfp8)",
    )
    parser.add_argument(
        "--state",
        type=file_path,
        metavar="FILE.json",
        help="keep measurements in this file, so that an interrupted run can continue",
    )
    parser.add_argument(
        "--write-recipe",
        type=file_path,
        metavar="FILE.toml",
        help="write the set that was found as a recipe for convert",
    )
    parser.add_argument(
        "--html",
        type=file_path,
        metavar="FILE.html",
        help="write a page with a map of the network and tables",
    )
    add_device(parser)
    add_dtype(parser, ("bfloat16", "float32"), "bfloat16", "default: bfloat16")
    add_overwrite(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from ..checkpoint.output import check_distinct, check_target, write_file
    from ..conversion.recipes import recipe_toml
    from ..printing.progress import analysis_bar
    from ..transformer.model_file import open_model
    from . import display
    from .pages import write_page

    if bool(arguments.prompt) != bool(arguments.model_dir):
        raise CommandLineError(
            "--prompt and --model-dir go together, because the folder has the text encoder; "
            "give both or neither"
        )
    # Reported now, not after torch was imported and the text encoder loaded.
    size = (arguments.size, arguments.size)
    check_settings(arguments.bound, size, arguments.timesteps, arguments.seed, arguments.compute)
    inputs = open_model(arguments.file, "measure").checkpoint.inputs
    outputs = {name: getattr(arguments, name) for name in ("write_recipe", "html")}
    for name, output in outputs.items():
        if output is not None:
            check_target(output, inputs, overwrite=arguments.overwrite, argument=name)
    check_distinct({**outputs, "state": arguments.state})
    with needed("torch", "sensitivity"):
        import torch

        from ..analysis.sensitivity.recipe import sensitivity_recipe
        from ..analysis.sensitivity.run import analyse_sensitivity
        from ..printing.sensitivity import print_sensitivity
        from ..streaming.jobs import StageProgress
    dtype = getattr(torch, arguments.dtype)
    with _keeping(arguments.state), analysis_bar(report_line) as progress:
        captions = None
        if arguments.prompt:
            progress(StageProgress("encoding the prompts", "", 0, 0))
            captions = _captions(arguments, dtype)
        report = analyse_sensitivity(
            arguments.file,
            captions=captions,
            bound=arguments.bound,
            size=size,
            timesteps=arguments.timesteps,
            seed=arguments.seed,
            compute=arguments.compute,
            device=arguments.device,
            dtype=dtype,
            state=arguments.state,
            progress=progress,
        )
    if len(report.smallest.kept) == len(report.layers):
        display.warn(
            [
                f"the relative error is at most {report.bound:g} only with every layer kept: "
                "convert refuses a recipe that keeps them all"
            ]
        )

    def page(origin: Origin) -> str:
        from ..analysis.sensitivity.page import sensitivity_page

        return sensitivity_page(report, origin)

    try:
        if arguments.json:
            display.print_json(report.to_dict())
        else:
            screen = display.screen()
            print_sensitivity(report, screen)
            if arguments.write_recipe:
                screen.line()
                screen.line(convert_with_recipe(report.path, arguments.write_recipe))
    finally:  # also if nobody reads standard output any more
        if arguments.write_recipe:
            content = recipe_toml(sensitivity_recipe(report)).encode()
            write_file(arguments.write_recipe, content, overwrite=arguments.overwrite)
        write_page(arguments, page)
    kept = plural(len(report.smallest.kept), "layer")
    for path, what in (
        (arguments.write_recipe, f"the recipe that keeps {kept} of the blocks"),
        (arguments.html, "a page with a map and tables"),
        (arguments.state, "the measurements, from which the same command continues"),
    ):
        if path is not None:
            display.wrote(path, what, as_json=arguments.json)
    return 0


@contextmanager
def _keeping(state: Path | None) -> Iterator[None]:
    """Let Ctrl-C report that the measurements are kept, if they are."""
    try:
        yield
    except BaseException as error:
        if state is None or not state.exists() or not is_interrupt(error):
            raise
        raise Interrupted(
            f"{state} keeps the measurements, and the same command continues from there"
        ) from error


def _captions(arguments: argparse.Namespace, dtype: Any) -> list[Any]:
    from ..generation.folder import open_model_folder
    from ..system.devices import memory_for, torch_device
    from ..transformer.model_file import open_model

    prompts = [text("prompt", prompt) for prompt in arguments.prompt]
    folder = open_model_folder(arguments.model_dir)
    folder.check_captions_fit(arguments.file, open_model(arguments.file).config.cap_feat_dim)
    keep_libraries_quiet()
    with needed("generate", "--prompt"):
        from ..generation.components import TextEncoder
    device = torch_device(arguments.device)
    with memory_for("the text encoder", device, "measure without --prompt"):
        encoder = TextEncoder(folder, device, dtype)
        return [encoder.encode(prompt) for prompt in prompts]
