"""The options of convert_to_quant 1.3.4, so that its command lines run unchanged."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from .arguments import count
from .wording import CommandLineError

if TYPE_CHECKING:
    from ..conversion.recipes import Recipe

# Options for behaviour that is always on here.
_ALWAYS_SO = ("--mxfp8", "--simple", "--comfy-quant", "--save-quant-metadata", "--low-memory")

_INT8 = "INT8 by these options"
_INSTEAD = {_INT8: "--format int8-convrot writes INT8 with rotated weights"}

# Options for features that this program does not have. They are refused with a sentence instead of
# "unrecognized arguments".
_REFUSED = {
    _INT8: ("--int8", "--convrot", "--convrot-group-size", "--dynamic-convrot"),
    "NVFP4": ("--nvfp4",),
    "mixed formats": (
        *("--fallback", "--fallback-block-size", "--fallback-simple", "--custom-layers"),
        *("--custom-type", "--custom-block-size", "--custom-scaling-mode", "--custom-simple"),
        *("--custom-heur", "--custom-full-precision-mm", "--custom-fpmm", "--custom-convrot"),
        *("--custom-convrot-group-size", "--layer-config", "--fullmatch", "--make-hybrid-mxfp8"),
        "--tensor-scales",
    ),
    "FP8 with other scales": (
        *("--scaling-mode", "--block-size", "--group-size", "--input-scale", "--input-scales"),
        *("--no-normalize-scales", "--scaled-fp8-marker"),
    ),
    "learned rounding": (
        *("--optimizer", "--num-iter", "--lr", "--lr-schedule", "--lr-gamma", "--lr-patience"),
        *("--lr-factor", "--lr-min", "--lr-cooldown", "--lr-threshold", "--lr-adaptive-mode"),
        *("--lr-threshold-mode", "--lr-shape-influence", "--early-stop-loss", "--early-stop-lr"),
        *("--early-stop-stall", "--top-p", "--min-k", "--max-k", "--full-matrix", "--use-speed"),
        *("--scale-optimization", "--scale-refinement", "--calib-cpu"),
    ),
    "skipping layers by heuristics": ("--heur",),
    "another output dtype": ("--output-dtype", "--preserve-layers"),
    "full-precision GEMMs": ("--full-precision-matrix-mult", "--full-precision-mm"),
    "an error-correction LoRA": (
        *("--extract-lora", "--lora-rank", "--lora-target", "--lora-depth", "--lora-ar-threshold"),
        "--lora-output",
    ),
    "another conversion": (
        *("--convert-fp8-scaled", "--convert-int8-scaled", "--hp-filter", "--legacy-input-add"),
        *("--cleanup-fp8-scaled", "--actcal", "--actcal-samples", "--actcal-percentile"),
        *("--actcal-lora", "--actcal-seed", "--actcal-device", "--edit-quant", "--remove-keys"),
        *("--add-keys", "--quant-filter"),
    ),
    "another model's filter": (
        *("--anima", "--boogu", "--distillation-large", "--distillation-small", "--flux2"),
        *("--gemma4", "--generic-text", "--hunyuan", "--ideogram4", "--krea2", "--lens"),
        *("--ltxv2", "--minimaxh3", "--mistral", "--nerf-large", "--nerf-small", "--qwen"),
        *("--qwen-vlm", "--qwen35", "--radiance", "--t5xxl", "--visual", "--wan"),
    ),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options to the parser of `convert`."""
    group = parser.add_argument_group("options of convert_to_quant 1.3.4, for its command lines")
    group.add_argument("--zimage", action="store_true", help="recipe zimage")
    group.add_argument("--zimage-refiner", action="store_true", help="recipe zimage-refiner")
    for flag in _ALWAYS_SO:
        short = ["-lm"] if flag == "--low-memory" else []
        group.add_argument(flag, *short, action="store_true", help="accepted: always so")
    group.add_argument(
        "--calib-samples",
        dest="calibration_samples",
        type=count(1),
        default=3072,
        metavar="N",
        help="rows of random input for --bias-correction synthetic (default: 3072)",
    )
    group.add_argument(
        "--manual-seed",
        dest="seed",
        type=count(0),
        default=42,
        metavar="N",
        help="seed for --bias-correction synthetic (default: 42)",
    )
    group.add_argument("--verbose", metavar="LEVEL", help="accepted, changes nothing")
    group.add_argument("--verbose-pinned", action="store_true", help="accepted, changes nothing")
    for what, flags in _REFUSED.items():
        for flag in flags:
            parser.add_argument(flag, nargs="?", action=_Refuse, help=argparse.SUPPRESS, const=what)


class _Refuse(argparse.Action):
    """An option for another result than MXFP8 rounded to nearest."""

    def __call__(self, parser: argparse.ArgumentParser, *arguments: object) -> None:
        parser.error(
            f"{arguments[2]} asks convert_to_quant for {self.const}, which this program does not "
            f"do: {_INSTEAD.get(str(self.const), 'it writes MXFP8 rounded to nearest')}"
        )


def choose_recipe(arguments: argparse.Namespace) -> Recipe:
    """Return the recipe that `--recipe` or the filters choose."""
    from ..conversion.recipes import DEFAULT, load_recipe

    filters = [name for name in ("zimage", "zimage_refiner") if getattr(arguments, name)]
    if (filters or arguments.mxfp8) and arguments.format != "mxfp8":
        flag = f"--{filters[0]}" if filters else "--mxfp8"
        raise CommandLineError(
            f"{flag} reproduces convert_to_quant's MXFP8 files, and the format is "
            f"{arguments.format}; drop it, and choose layers with --recipe or --exclude-layers"
        )
    if (filters or arguments.mxfp8) and not arguments.simple:
        raise CommandLineError(
            "convert_to_quant learns its rounding unless --simple is given, and this program "
            "rounds to nearest: add --simple"
            + (", or choose the filter with --recipe zimage" if filters else ", or drop --mxfp8")
        )
    if not filters:
        if arguments.mxfp8 and arguments.recipe is None:
            print(
                "zimage-mxfp8: warning: without --zimage this program's recipe uniform applies; "
                "--recipe convert-to-quant does the same as convert_to_quant",
                file=sys.stderr,
            )
        return load_recipe(arguments.recipe or DEFAULT)
    if arguments.recipe is not None:
        raise CommandLineError(
            "--zimage and --zimage-refiner choose recipes; drop them or --recipe"
        )
    recipes = [load_recipe(name.replace("_", "-")) for name in filters]
    return recipes[0] if len(recipes) == 1 else recipes[0].with_rules_of(recipes[1])
