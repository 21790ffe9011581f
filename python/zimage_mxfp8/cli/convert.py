"""`zimage-mxfp8 convert`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError
from .arguments import add_json, add_overwrite, add_threads, count, spellings

if TYPE_CHECKING:
    from ..conversion.plan import Plan
    from ..conversion.report import ConversionReport
    from ..recipes import Recipe

# convert_to_quant's flags that ask for something that this program does not do: (flag, what it
# asks for). They are refused with a sentence instead of "unrecognized arguments".
_REFUSED = {
    "INT8": ("--int8", "--convrot", "--dynamic-convrot"),
    "NVFP4": ("--nvfp4",),
    "mixed formats": ("--fallback", "--custom-layers", "--custom-type", "--make-hybrid-mxfp8"),
    "learned rounding": (
        *("--optimizer", "--num-iter", "--lr", "--lr-schedule", "--top-p", "--min-k", "--max-k"),
        *("--full-matrix", "--scale-optimization", "--scale-refinement", "--use-speed"),
    ),
    "skipping layers by heuristics": ("--heur",),
    "another output dtype": ("--output-dtype", "--preserve-layers"),
    "full-precision products": ("--full-precision-matrix-mult",),
    "an error-correction LoRA": ("--extract-lora",),
    "another model's filter": (
        *("--flux2", "--wan", "--qwen", "--hunyuan", "--t5xxl", "--ltxv2", "--krea2", "--anima"),
        *("--lens", "--boogu", "--ideogram4", "--minimaxh3", "--radiance"),
    ),
}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command to the parser."""
    parser = commands.add_parser(
        "convert",
        help="convert a checkpoint to MXFP8",
        description="Convert a Z-Image checkpoint (BF16, F16 or F32) to MXFP8 for ComfyUI.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "-i",
        "--input",
        required=True,
        type=Path,
        metavar="PATH",
        help="safetensors file, or diffusers folder",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="output file (default: the input's name with -mxfp8 before the suffix)",
    )
    parser.add_argument(
        "--recipe",
        metavar="NAME|FILE",
        help="which layers stay as they are: a built-in recipe (see 'zimage-mxfp8 recipes') or a "
        "TOML file (default: uniform)",
    )
    parser.add_argument(
        *spellings("--exclude-layers"),
        action="append",
        default=[],
        metavar="REGEX",
        help="also keep the tensors whose full name this regular expression finds; repeatable",
    )
    parser.add_argument(
        *spellings("--any-model"),
        action="store_true",
        help="accept a checkpoint that is not Z-Image; every 2-D weight that no pattern excludes "
        "is quantised",
    )
    parser.add_argument(
        "--nonfinite",
        choices=("error", "keep"),
        default="error",
        help="a weight with NaN or Inf stops the conversion (default), or stays as it is",
    )
    parser.add_argument(
        *spellings("--bias-correction"),
        choices=("timesteps", "synthetic", "none"),
        default="timesteps",
        help="timesteps: exact, from the checkpoint's own timestep embedder (default); synthetic: "
        "convert_to_quant's numbers, needs torch; none: leave biases alone",
    )
    parser.add_argument(
        "--timesteps",
        default="turbo",
        metavar="N|turbo|base",
        help="the sampler's steps for --bias-correction timesteps: turbo is 8 (default), base 50",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="show what would happen, and the exact output size"
    )
    parser.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        help="write each layer's error and scale histogram as JSON, measured in the same pass",
    )
    add_overwrite(parser)
    add_threads(parser)
    add_json(parser)
    _add_convert_to_quant_options(parser)


def _add_convert_to_quant_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("options of convert_to_quant 1.3.4, for its command lines")
    group.add_argument("--mxfp8", action="store_true", help="accepted: always so")
    group.add_argument("--zimage", action="store_true", help="recipe zimage")
    group.add_argument(
        *spellings("--zimage-refiner"), action="store_true", help="recipe zimage-refiner"
    )
    group.add_argument("--simple", action="store_true", help="accepted: always so")
    for flag in ("--comfy-quant", "--save-quant-metadata"):
        group.add_argument(*spellings(flag), action="store_true", help="accepted: always so")
    group.add_argument(
        *spellings("--low-memory"), "-lm", action="store_true", help="accepted: always so"
    )
    group.add_argument(
        *spellings("--calib-samples"),
        type=count(1),
        default=3072,
        metavar="N",
        help="rows of random input for --bias-correction synthetic (default: 3072)",
    )
    group.add_argument(
        *spellings("--manual-seed"),
        type=count(0),
        default=42,
        metavar="N",
        help="seed for --bias-correction synthetic (default: 42)",
    )
    for what, flags in _REFUSED.items():
        for flag in flags:
            parser.add_argument(
                *spellings(flag), nargs="?", action=_Refuse, help=argparse.SUPPRESS, const=what
            )


class _Refuse(argparse.Action):
    """An option of convert_to_quant that asks for something else than MXFP8."""

    def __call__(self, parser: argparse.ArgumentParser, *arguments: object) -> None:
        parser.error(
            f"{arguments[2]} asks convert_to_quant for {self.const}, which this program does not "
            "do: it writes MXFP8 rounded to nearest"
        )


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    recipe = _choose_recipe(arguments)
    if arguments.dry_run:
        return _dry_run(arguments, recipe)

    from ..checkpoint.output import check_target, write_file
    from ..conversion.convert import convert, default_output
    from . import display

    output = arguments.output or default_output(arguments.input)
    if arguments.report is not None:
        if arguments.report.absolute() == output.absolute():
            raise UsageError("--report and the output are the same file")
        check_target(arguments.report, [arguments.input], overwrite=arguments.overwrite)
    with display.progress_bar("converting") as progress:
        report = convert(
            arguments.input,
            output,
            recipe=recipe,
            exclude_layers=arguments.exclude_layers,
            any_model=arguments.any_model,
            nonfinite=arguments.nonfinite,
            bias_correction=arguments.bias_correction,
            timesteps=arguments.timesteps,
            calibration_samples=arguments.calib_samples,
            seed=arguments.manual_seed,
            overwrite=arguments.overwrite,
            error_stats=arguments.report is not None,
            threads=arguments.threads,
            progress=progress,
        )
    if arguments.report is not None:
        write_file(arguments.report, json.dumps(report.to_dict(), indent=1).encode())
    display.warn(report.warnings)
    if arguments.json:
        document = report.to_dict()
        document.pop("tensors", None)
        display.print_json(document)
    elif sys.stdout.isatty():
        print_summary(report)
    else:
        print(f"{report.output}: {report.quantized} layers in MXFP8, {report.file_bytes} bytes")
    return 0


def _choose_recipe(arguments: argparse.Namespace) -> Recipe:
    from ..recipes import DEFAULT, load_recipe

    filters = [name for name in ("zimage", "zimage_refiner") if getattr(arguments, name)]
    if (filters or arguments.mxfp8) and not arguments.simple:
        raise UsageError(
            "convert_to_quant learns its rounding unless --simple is given, and this program "
            "rounds to nearest: add --simple"
            + (", or choose the filter with --recipe zimage" if filters else ", or drop --mxfp8")
        )
    if not filters:
        return load_recipe(arguments.recipe or DEFAULT)
    if arguments.recipe is not None:
        raise UsageError("--zimage and --zimage_refiner choose recipes; drop them or --recipe")
    recipes = [load_recipe(name.replace("_", "-")) for name in filters]
    return recipes[0] if len(recipes) == 1 else recipes[0].with_rules_of(recipes[1])


def print_summary(report: ConversionReport) -> None:
    """Print what a conversion did."""
    from . import display

    rows = [["quantised to MXFP8", str(report.quantized)]]
    rows += [[f"kept: {reason}", str(number)] for reason, number in report.kept.items()]
    if report.corrected_biases:
        rows.append([f"biases corrected ({report.bias_correction})", str(report.corrected_biases)])
    display.print_table(f"{report.output} (recipe {report.recipe})", ["what", "tensors>"], rows)
    speed = report.input_bytes / report.seconds / 1e9 if report.seconds else 0.0
    display.console().print(
        f"{display.size_text(report.input_bytes)} -> {display.size_text(report.output_bytes)} "
        f"({report.ratio - 1:+.1%}) in {report.seconds:.1f} s, {speed:.2f} GB/s"
    )
    if report.errors is not None:
        display.print_errors(report.errors)


def _dry_run(arguments: argparse.Namespace, recipe: Recipe) -> int:
    from ..conversion.convert import default_output, plan_conversion
    from . import display

    plan = plan_conversion(
        arguments.input,
        recipe=recipe,
        exclude_layers=arguments.exclude_layers,
        any_model=arguments.any_model,
        nonfinite=arguments.nonfinite,
        threads=arguments.threads,
    )
    output = arguments.output or default_output(arguments.input)
    display.warn(plan.warnings)
    if arguments.json:
        display.print_json(_plan_document(plan, output))
        return 0
    display.print_table(
        "Tensors",
        ["tensor", "type", "shape", "becomes", "bytes>", "why"],
        [
            [
                name,
                planned.source.dtype,
                "x".join(map(str, planned.source.shape)) or "scalar",
                _becomes(plan, name),
                f"{plan.output_nbytes(name):,}",
                planned.reason,
            ]
            for name, planned in plan.tensors.items()
        ],
    )
    display.print_table(
        "Groups", ["group", "quantised>", "kept>", "bytes now>", "bytes then>"], _group_rows(plan)
    )
    before = plan.checkpoint.nbytes
    display.console().print(
        f"{output} would have exactly {plan.size:,} bytes ({display.size_text(plan.size)}), "
        f"{plan.size / before - 1:+.1%}; {len(plan.quantized)} layers in MXFP8",
        soft_wrap=True,
    )
    return 0


def _becomes(plan: Plan, name: str) -> str:
    return "MXFP8" if plan.tensors[name].action == "quantize" else plan.places[name].dtype


def _group_rows(plan: Plan) -> list[list[str]]:
    groups: dict[str, list[int]] = {}
    for name, planned in plan.tensors.items():
        row = groups.setdefault(planned.group, [0, 0, 0, 0])
        row[0 if planned.action == "quantize" else 1] += 1
        row[2] += planned.source.nbytes
        row[3] += plan.output_nbytes(name)
    ordered = sorted(groups.items(), key=lambda item: -item[1][2])
    return [[name, *(f"{value:,}" for value in row)] for name, row in ordered]


def _plan_document(plan: Plan, output: Path) -> dict[str, object]:
    return {
        "input": str(plan.checkpoint.path),
        "output": str(output),
        "recipe": plan.recipe.name,
        "quantized": len(plan.quantized),
        "input_bytes": plan.checkpoint.nbytes,
        "output_bytes": plan.size - len(plan.header),
        "file_bytes": plan.size,
        "warnings": list(plan.warnings),
        "tensors": {
            name: {
                "dtype": planned.source.dtype,
                "shape": list(planned.source.shape),
                "becomes": _becomes(plan, name),
                "bytes": plan.output_nbytes(name),
                "group": planned.group,
                "reason": planned.reason,
            }
            for name, planned in plan.tensors.items()
        },
    }
