"""`zimage-mxfp8 probe`."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from ..text import plural
from .arguments import add_json, add_overwrite, add_threads, file_path, spellings

if TYPE_CHECKING:
    from ..analysis.grouping import ProbedGroup
    from ..analysis.probe import ProbeReport
    from ..analysis.scoring import ProbeRules

# Option, placeholder, help; the defaults are those of ProbeRules.
_RULES = (
    ("--outlier-sigma", "N", "standard deviations beyond which an element is an outlier (3)"),
    ("--kurtosis-weight", "W", "share of the excess kurtosis in the score (0.6)"),
    ("--range-weight", "W", "share of the dynamic range (0.3)"),
    ("--ar-weight", "W", "share of the aspect ratio (0.1); the three sum to 1"),
    ("--fp8-percentile", "P", "percentile of the scores from which FP8 is recommended (50)"),
    ("--keep-percentile", "P", "percentile of the scores from which a weight is kept (90)"),
    ("--kurtosis-keep", "K", "excess kurtosis from which a weight is kept anyway (8)"),
    ("--fp8-min-score", "S", "least score for FP8 (0)"),
    (
        "--min-group-spread",
        "S",
        "a layer type whose scores differ less by position is demoted (0.2)",
    ),
    ("--extreme-pct", "P", "percentage of the main blocks that is extreme at each end (10)"),
)


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command to the parser."""
    parser = commands.add_parser(
        "probe",
        help="find the weights that quantisation would hurt most",
        description="Measure how sensitive each weight of Z-Image's blocks is, and recommend what "
        "to keep. Metrics, scores and recommendations are those of quant_probe.",
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "file",
        type=Path,
        metavar="FILE",
        help="the checkpoint before quantisation: safetensors file, or diffusers folder",
    )
    parser.add_argument(
        "--csv", type=file_path, metavar="FILE", help="write a row for each weight, as quant_probe"
    )
    parser.add_argument(
        "--html",
        type=file_path,
        metavar="FILE",
        help="write a page with heat maps and tables that needs no network (needs plotly)",
    )
    parser.add_argument(
        *spellings("--write-recipe"),
        type=file_path,
        metavar="FILE.toml",
        help="write the recipe that keeps what should be kept, for convert --recipe",
    )
    rules = parser.add_argument_group("rules", "The numbers that decide, and their defaults.")
    for name, metavar, text in _RULES:
        rules.add_argument(*spellings(name), type=float, metavar=metavar, help=text)
    rules.add_argument(
        *spellings("--spread-filter-exempt"),
        nargs="*",
        metavar="TYPE",
        help="layer types that are decided weight by weight (attention.qkv attention.out)",
    )
    add_overwrite(parser)
    add_threads(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from ..analysis.page import check_plots_available
    from ..analysis.probe import probe
    from ..checkpoint.output import check_distinct, check_target, write_file
    from ..checkpoint.source import open_checkpoint
    from ..recipes import recipe_toml
    from . import display

    rules = _rules(arguments)
    outputs = [p for p in (arguments.csv, arguments.html, arguments.write_recipe) if p is not None]
    check_distinct(outputs)
    inputs = open_checkpoint(arguments.file).inputs
    for path in outputs:
        check_target(path, inputs, overwrite=arguments.overwrite)
    if arguments.html is not None:
        check_plots_available()
    with display.progress_bar("probing") as progress:
        report = probe(arguments.file, rules=rules, threads=arguments.threads, progress=progress)
    contents: list[tuple[Path | None, str]] = [
        (arguments.csv, report.to_csv()),
        (arguments.write_recipe, recipe_toml(report.recipe)),
    ]
    if arguments.html is not None:
        from ..analysis.probe_page import probe_page

        contents.append((arguments.html, probe_page(report)))
    for target, text in contents:
        if target is not None:
            write_file(target, text.encode(), overwrite=arguments.overwrite)
    if arguments.json:
        display.print_json(report.to_dict())
    else:
        print_report(report, arguments.write_recipe)
    return 0


def _rules(arguments: argparse.Namespace) -> ProbeRules:
    from ..analysis.scoring import ProbeRules

    names = [name.lstrip("-").replace("-", "_") for name, *_ in _RULES]
    given = {name: getattr(arguments, name) for name in names}
    exempt = arguments.spread_filter_exempt
    given["spread_filter_exempt"] = None if exempt is None else tuple(exempt)
    return ProbeRules(**{name: value for name, value in given.items() if value is not None})


def print_report(report: ProbeReport, recipe: Path | None) -> None:
    """Print groups, counts and what to do with `convert`; `recipe` is the file written, if any."""
    from . import display

    display.print_table(
        f"{report.path}: {plural(len(report.tensors), 'weight')} probed",
        [
            *("layer type", "blocks>", "recommended", "score>", "kurtosis>", "largest>"),
            *("range>", "std>", "outliers (%)>"),
        ],
        [
            [
                group.layer_type,
                f"{group.first_block}-{group.last_block}",
                _group_recommendation(group),
                f"{group.score:.3f}",
                f"{group.metrics.excess_kurtosis:.3f}",
                f"{group.largest_kurtosis:.3f}",
                f"{group.metrics.dynamic_range:.3f}",
                f"{group.metrics.std:.4f}",
                f"{group.metrics.outlier_pct:.2f}",
            ]
            for group in report.groups
        ],
        spare=4,
    )
    if any(group.spread_filtered for group in report.groups):
        display.print_text(
            '"->" demotes, because the scores of the layer type differ too little by position '
            "(--min-group-spread)."
        )
    effective = [tensor.effective for tensor in report.tensors]
    counts = ", ".join(f"{effective.count(kind)} {kind}" for kind in ("*KEEP*", "FP8", "NVFP4"))
    display.print_text(
        f"{counts}. Scores from {report.thresholds.fp8:.4f} on are FP8's, from "
        f"{report.thresholds.keep:.4f} on they are kept. Convert writes MXFP8 for FP8 and NVFP4 "
        "alike."
    )
    # Printed as they are: what is to be copied must not be wrapped.
    if report.exclude_layers is None:
        print("No weight is worth keeping by these rules: there is nothing to exclude.")
    else:
        print("\nTo keep them besides what the default recipe keeps:")
        options = f"--exclude-layers '{report.exclude_layers}'"
        print(display.convert_command(report.path, options, "excluded"))
        print(_size(report.exclude_layers_bytes, report.input_bytes))
    print()
    display.print_text(
        f"To keep only them, the embedders and the final layer{_recipe_note(recipe)}:"
    )
    file = recipe or Path("FILE.toml")
    options = f"--recipe {shlex.quote(str(file))}"
    print(display.convert_command(report.path, options, file.stem))
    print(_size(report.recipe_bytes, report.input_bytes))


def _group_recommendation(group: ProbedGroup) -> str:
    if not group.spread_filtered:
        return group.recommendation
    demoted = "NVFP4" if group.recommendation == "FP8" else "FP8"
    return f"{group.recommendation} -> {demoted}"


def _recipe_note(recipe: Path | None) -> str:
    return "" if recipe else " (--write-recipe FILE.toml writes the recipe)"


def _size(nbytes: int | None, before: int) -> str:
    from . import display

    if nbytes is None:
        return "convert would refuse that; with --dry-run it says why"
    share = nbytes / before - 1
    return f"would write exactly {nbytes:,} bytes ({display.size_text(nbytes)}, {share:+.1%})"
