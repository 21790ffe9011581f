"""`zimage-mxfp8 convert`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..text import plural
from . import convert_to_quant, download, loras
from .arguments import (
    add_json,
    add_overwrite,
    add_threads,
    checkpoint_path,
    file_path,
)
from .wording import CommandLineError


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser], line: str) -> None:
    """Add this command to the parser."""
    parser = commands.add_parser(
        "convert",
        help=line,
        description="Convert a Z-Image checkpoint (BF16, F16 or F32) to MXFP8, or to INT8 ConvRot, "
        "for ComfyUI.",
        intermixed=True,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "file",
        nargs="?",
        metavar="FILE",
        help="safetensors file, diffusers folder, or OWNER/NAME[@REVISION][/FILE.safetensors] from "
        "the Hugging Face cache",
    )
    download.add_download(parser)
    parser.add_argument(
        "out",
        nargs="?",
        type=checkpoint_path,
        metavar="OUT",
        help="output file (default: the input's path with - and the format before .safetensors, "
        "as in -mxfp8; for OWNER/NAME in this folder)",
    )
    parser.add_argument("-i", "--input", metavar="FILE", help="the same as FILE")
    parser.add_argument(
        "-o", "--output", type=checkpoint_path, metavar="OUT", help="the same as OUT"
    )
    parser.add_argument(
        "--format",
        choices=("mxfp8", "int8-convrot"),
        default="mxfp8",
        help="how weights are encoded: mxfp8 (default), or int8-convrot: INT8 with one scale per "
        "row after a rotation, for GPUs without MXFP8",
    )
    parser.add_argument(
        "--recipe",
        metavar="NAME|FILE",
        help="which layers are kept: a built-in recipe (see 'zimage-mxfp8 recipes') or a "
        "TOML file (default: uniform; controlnet for a ControlNet)",
    )
    parser.add_argument(
        "--exclude-layers",
        action="append",
        default=[],
        metavar="REGEX",
        help="also keep tensors with a full name that this regular expression finds; repeatable",
    )
    loras.add_lora(parser)
    parser.add_argument(
        "--any-model",
        action="store_true",
        help="accept a checkpoint that is not Z-Image; every 2-D weight that no pattern excludes "
        "is quantised",
    )
    parser.add_argument(
        "--nonfinite",
        choices=("error", "keep"),
        default="error",
        help="a tensor with NaN or Inf stops the conversion (default), or is kept",
    )
    parser.add_argument(
        "--modulation-matmul",
        choices=("quantised", "full"),
        default="quantised",
        help="full: mark quantised modulations so that ComfyUI does not quantise their input on "
        "GPUs that multiply the format (default: quantised)",
    )
    parser.add_argument(
        "--hash-source",
        action="store_true",
        help="write the SHA-256 of the input's files into the output's header",
    )
    parser.add_argument(
        "--bias-correction",
        choices=("timesteps", "synthetic", "none"),
        default="timesteps",
        help="timesteps: exact, from the checkpoint's own timestep embedder (default); synthetic: "
        "convert_to_quant's numbers for MXFP8, needs torch; none: leave biases alone",
    )
    parser.add_argument(
        "--timesteps",
        default="turbo",
        metavar="N|turbo|base",
        help="the sampler's steps for --bias-correction timesteps: turbo is 8 (default), base 50",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="show the plan, by groups, and the exact output size",
    )
    parser.add_argument(
        "--tensors", action="store_true", help="with --dry-run: show every tensor too"
    )
    parser.add_argument(
        "--report",
        type=file_path,
        metavar="FILE",
        help="write each layer's relative squared error and scale histogram as JSON, measured in "
        "the same pass",
    )
    add_overwrite(parser)
    add_threads(parser)
    parser.add_argument(
        "--device",
        default="cpu",
        metavar="cpu|cuda|cuda:N",
        help="where weights are encoded (default: cpu); the bytes are the same; int8-convrot is "
        "encoded on the CPU",
    )
    add_json(parser)
    convert_to_quant.add_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    arguments.input, arguments.output = _files(arguments)
    arguments.recipe = convert_to_quant.choose_recipe(arguments)
    if arguments.dry_run and arguments.report is not None:
        raise CommandLineError("--report needs a conversion; drop it or --dry-run")
    if arguments.tensors and not arguments.dry_run:
        raise CommandLineError("--tensors belongs to --dry-run; add that")
    _resolve_input(arguments)
    from dataclasses import fields

    loras.limit_blas(arguments.loras)
    from ..conversion.convert import default_output, plan_conversion, run_conversion
    from ..conversion.options import ConversionOptions
    from ..printing.conversion import print_conversion
    from . import display, dry_run

    names = [field.name for field in fields(ConversionOptions) if field.init]
    options = ConversionOptions(**{name: getattr(arguments, name) for name in names})
    # Reported now, not after weights were read.
    options.weight_format.encoder(arguments.device)
    output = arguments.output or default_output(arguments.input, options.format)
    plan = plan_conversion(arguments.input, options, threads=arguments.threads)
    if arguments.dry_run:
        return dry_run.show(plan, output, arguments)
    report = run_conversion(
        plan,
        output,
        overwrite=arguments.overwrite,
        report=arguments.report,
        threads=arguments.threads,
        device=arguments.device,
        progress=True,
    )
    display.warn(report.warnings)
    display.note(report.notes)
    if arguments.json:
        document = report.to_dict()
        document.pop("tensors", None)
        display.print_json(document)
    elif sys.stdout.isatty():
        print_conversion(report, display.screen())
    display.wrote(
        Path(report.output),
        f"{plural(report.quantized, 'layer')} in {options.weight_format.title}, "
        f"{report.file_bytes:,} bytes",
        as_json=arguments.json,
    )
    if arguments.report is not None:
        what = "squared error and scale histogram of every layer"
        display.wrote(arguments.report, what, as_json=arguments.json)
    return 0


def _resolve_input(arguments: argparse.Namespace) -> None:
    """Replace the name of a model on the hub by its path in the cache."""
    from ..checkpoint import hub
    from ..checkpoint.output import check_target

    reference = hub.parse(arguments.input)
    if reference is not None:
        if arguments.output is None:  # in the input's folder it would be inside the cache
            arguments.output = Path(f"{reference.stem}-{arguments.format}.safetensors")
        if not arguments.dry_run:  # reported now, not after a download
            check_target(arguments.output, [], overwrite=arguments.overwrite)
    arguments.input = download.resolve(
        arguments.input, (hub.TRANSFORMER,), download=arguments.download
    )


def _files(arguments: argparse.Namespace) -> tuple[str, Path | None]:
    """Return input and output, each given by position or by option."""
    if arguments.file is None and arguments.input is None:
        raise CommandLineError("name the checkpoint to convert: zimage-mxfp8 convert FILE [OUT]")
    if None not in (arguments.file, arguments.input):
        raise CommandLineError(
            f"the input is given twice, as {arguments.file} and as -i {arguments.input}; give it "
            "once (-o names the output)"
        )
    if None not in (arguments.out, arguments.output):
        raise CommandLineError(
            f"the output is given twice, as {arguments.out} and as -o {arguments.output}; give it "
            "once"
        )
    return arguments.file or arguments.input, arguments.out or arguments.output
