"""`zimage-mxfp8 sensitivity`."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checks import text
from ..errors import UnsupportedError, UsageError
from .arguments import add_json, add_overwrite, count, file_path, spellings
from .generate import keep_libraries_quiet

if TYPE_CHECKING:
    from ..analysis.sensitivity.run import Choice, Measured, SensitivityReport

_SHOWN = 15  # layers of the ranking


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command to the parser."""
    parser = commands.add_parser(
        "sensitivity",
        help="measure what quantising each layer does to the output",
        description="Quantise every layer and every group of layers of the original model alone, "
        "measure how far its output moves at several timesteps, and find a set of layers to keep "
        "that holds a bound. For a GPU; on the CPU for small models.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("file", type=Path, metavar="FILE", help="plain checkpoint or folder")
    parser.add_argument(
        "--bound",
        type=float,
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
        *spellings("--model-dir"),
        type=Path,
        metavar="DIR",
        help="diffusers folder with the text encoder for --prompt",
    )
    parser.add_argument(
        "--size",
        type=count(16),
        default=512,
        metavar="PIXELS",
        help="side of the pictures, a multiple of 16 (512)",
    )
    parser.add_argument(
        "--timesteps", type=count(1), default=4, metavar="N", help="of 8 to measure at (4)"
    )
    parser.add_argument("--seed", type=count(0), default=0, metavar="N", help="of the noise (0)")
    parser.add_argument(
        "--state",
        type=file_path,
        metavar="FILE.json",
        help="keep measurements in this file, so that an interrupted run can go on",
    )
    parser.add_argument(
        *spellings("--write-recipe"),
        type=file_path,
        metavar="FILE.toml",
        help="write the set that was found as a recipe for convert",
    )
    parser.add_argument(
        "--html", type=file_path, metavar="FILE.html", help="write a page with plots and tables"
    )
    parser.add_argument("--device", metavar="cpu|cuda|cuda:N", help="default: cuda if torch has it")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    add_overwrite(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from ..analysis.page import check_plots_available
    from ..checkpoint.output import check_distinct, check_target, write_file
    from ..checkpoint.source import open_checkpoint
    from ..recipes import recipe_toml
    from . import display

    if bool(arguments.prompt) != bool(arguments.model_dir):
        raise UsageError("--prompt and --model-dir go together: the folder has the text encoder")
    outputs = [path for path in (arguments.write_recipe, arguments.html) if path is not None]
    inputs = open_checkpoint(arguments.file).inputs
    for output in outputs:
        check_target(output, inputs, overwrite=arguments.overwrite)
    check_distinct([*outputs, *([arguments.state] if arguments.state else [])])
    if arguments.html:
        check_plots_available()
    try:
        import torch

        from ..analysis.sensitivity.recipe import sensitivity_recipe
        from ..analysis.sensitivity.run import analyse_sensitivity, check_settings
    except ImportError as error:
        raise UnsupportedError(
            f'sensitivity needs torch ({error}): pip install "zimage-mxfp8[torch]"'
        ) from None
    size = (arguments.size, arguments.size)
    # Told now, and not after the text encoder was loaded.
    check_settings(arguments.bound, size, arguments.timesteps, arguments.seed)
    dtype = getattr(torch, arguments.dtype)
    with display.count_bar() as progress:
        captions = None
        if arguments.prompt:
            progress("encoding the prompts", "", 0, 0)
            captions = _captions(arguments, dtype)
        report = analyse_sensitivity(
            arguments.file,
            captions=captions,
            bound=arguments.bound,
            size=size,
            timesteps=arguments.timesteps,
            seed=arguments.seed,
            device=arguments.device,
            dtype=dtype,
            state=arguments.state,
            progress=lambda p: progress(p.stage, p.what, p.done, p.total),
        )
    if arguments.write_recipe:
        content = recipe_toml(sensitivity_recipe(report)).encode()
        write_file(arguments.write_recipe, content, overwrite=arguments.overwrite)
    if arguments.html:
        from ..analysis.sensitivity.page import sensitivity_page

        content = sensitivity_page(report).encode()
        write_file(arguments.html, content, overwrite=arguments.overwrite)
    if len(report.smallest.kept) == len(report.layers):
        display.warn(
            [
                f"the error is at most {report.bound:g} only with every layer kept: convert "
                "refuses a recipe that keeps them all"
            ]
        )
    if arguments.json:
        display.print_json(report.to_dict())
    else:
        _print(report, arguments.write_recipe)
    return 0


def _captions(arguments: argparse.Namespace, dtype: Any) -> list[Any]:
    from ..devices import memory_for, torch_device
    from ..generation.folder import open_model_folder
    from ..transformer.weights import open_model

    prompts = [text("--prompt", prompt) for prompt in arguments.prompt]
    folder = open_model_folder(arguments.model_dir)
    folder.check_captions_fit(arguments.file, open_model(arguments.file).config.cap_feat_dim)
    keep_libraries_quiet()
    try:
        from ..generation.components import TextEncoder
    except (ImportError, RuntimeError):  # the latter comes from diffusers' lazy modules
        raise UnsupportedError(
            '--prompt needs diffusers and transformers: pip install "zimage-mxfp8[generate]"'
        ) from None
    device = torch_device(arguments.device)
    with memory_for("the text encoder", device, "measure without --prompt"):
        encoder = TextEncoder(folder, device, dtype)
        return [encoder.encode(prompt) for prompt in prompts]


def _print(report: SensitivityReport, recipe: Path | None) -> None:
    from . import display

    columns = ["error>", "low>", "high>", "first step>", "last step>"]

    def row(measured: Measured) -> list[str]:
        e, steps = measured.error, [error.total for _, error in measured.by_step]
        return [f"{x:.2e}" for x in (e.total, e.low, e.high, steps[0], steps[-1])]

    display.print_table(
        "Squared error of the output relative to its energy, each group quantised alone: of all "
        "frequencies, of low and high ones, of all at the first and the last timestep",
        ["group", "layers>", *columns],
        [[m.name, str(m.layers), *row(m)] for m in report.groups],
        spare=2,
    )
    display.print_table(
        f"The {min(_SHOWN, len(report.layers))} layers that cost most for the bytes they save",
        ["layer", *columns],
        [[m.name, *row(m)] for m in report.layers[:_SHOWN]],
        spare=2,
    )
    drifting = sorted(report.salience.items(), key=lambda item: -item[1].activation_peak)[:_SHOWN]
    display.print_table(
        "Channels that stand out: the largest over the median, and the share over 5 medians",
        ["layer", "peak>", "activations>", "weights>", "drift in time>", "in depth>"],
        [
            [
                name,
                f"{s.activation_peak:.1f}",
                f"{s.activation_outliers:.2%}",
                f"{s.weight_outliers:.2%}",
                f"{s.time_drift:.0%}",
                f"{s.depth_drift:.0%}",
            ]
            for name, s in drifting
        ],
        spare=2,
    )

    def choice(what: str, chosen: Choice) -> list[str]:
        size = display.size_text(chosen.nbytes)
        return [what, str(len(chosen.kept)), size, f"{chosen.error:.4f}"]

    display.print_table(
        "Choices: relative error of the output (Frobenius) with all layers quantised but the kept",
        ["choice", "kept layers>", "size>", "error>"],
        [
            choice("every layer quantised", report.everything),
            choice("the model card's exclusions", report.card),
            choice(f"smallest for a bound of {report.bound:g}", report.smallest),
        ],
    )
    if report.smallest.kept:
        print("\nTo hold the bound, keep")
        for name in report.smallest.kept:
            print(name)
    if recipe is not None:
        options = f"--recipe {shlex.quote(str(recipe))}"
        print("\n" + display.convert_command(report.path, options, recipe.stem))
