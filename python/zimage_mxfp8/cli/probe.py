"""`zimage-mxfp8 probe`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..text import plural
from .arguments import (
    add_json,
    add_overwrite,
    add_threads,
    file_path,
    local_path,
    number,
)
from .next_commands import convert_command, convert_with_recipe

if TYPE_CHECKING:
    from ..analysis.pages.page import Origin
    from ..analysis.probe.run import ProbeReport
    from ..analysis.probe.scoring import ProbeRules
    from ..printing.screen import Screen

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
        "a layer type is demoted if its scores differ less by position (0.2)",
    ),
    ("--extreme-pct", "P", "percentage of the main blocks that is extreme at each end (10)"),
)


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser], line: str) -> None:
    """Add this command to the parser."""
    parser = commands.add_parser(
        "probe",
        help=line,
        description="Measure the sensitivity of each weight of Z-Image's blocks, and recommend "
        "weights to keep. Metrics, scores and recommendations are those of quant_probe.",
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "file",
        type=local_path,
        metavar="FILE",
        help="the checkpoint before quantisation: safetensors file, or diffusers folder",
    )
    parser.add_argument(
        "--csv", type=file_path, metavar="FILE", help="write one row per weight, like quant_probe"
    )
    parser.add_argument(
        "--html",
        type=file_path,
        metavar="FILE",
        help="write a page with a map of the network and tables, which needs no network connection",
    )
    parser.add_argument(
        "--write-recipe",
        type=file_path,
        metavar="FILE.toml",
        help="write the recipe that keeps the recommended weights, for convert --recipe",
    )
    rules = parser.add_argument_group(
        "rules", "Parameters of the recommendations, and their defaults."
    )
    for name, metavar, text in _RULES:
        rules.add_argument(name, type=number, metavar=metavar, help=text)
    rules.add_argument(
        "--spread-filter-exempt",
        nargs="*",
        metavar="TYPE",
        help="layer types that are decided weight by weight (attention.qkv attention.out)",
    )
    add_overwrite(parser)
    add_threads(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from ..analysis.probe.run import probe
    from ..checkpoint.identify import open_for
    from ..checkpoint.output import check_distinct, check_target, write_file
    from ..conversion.recipes import recipe_toml
    from ..printing.probe import print_probe
    from . import display
    from .pages import write_page

    rules = _rules(arguments)
    outputs = {name: getattr(arguments, name) for name in ("csv", "html", "write_recipe")}
    check_distinct(outputs)
    inputs = open_for(arguments.file, "analyse").checkpoint.inputs
    for name, path in outputs.items():
        if path is not None:
            check_target(path, inputs, overwrite=arguments.overwrite, argument=name)
    report = probe(arguments.file, rules=rules, threads=arguments.threads, progress=True)
    weights = plural(len(report.tensors), "weight")
    contents: list[tuple[Path | None, str, str]] = [
        (arguments.csv, report.to_csv(), f"one row for each of {weights}"),
        (
            arguments.write_recipe,
            recipe_toml(report.recipe),
            "the recipe that keeps them",
        ),
    ]

    def page(origin: Origin) -> str:
        from ..analysis.probe.page import probe_page

        return probe_page(report, origin)

    written = [(path, text, what) for path, text, what in contents if path is not None]
    try:
        if arguments.json:
            display.print_json(report.to_dict())
        else:
            screen = display.screen()
            print_probe(report, screen)
            _print_commands(report, screen, arguments.write_recipe)
    finally:  # also if nobody reads standard output any more
        for path, text, _ in written:
            write_file(path, text.encode(), overwrite=arguments.overwrite)
        write_page(arguments, page)
    for path, _, what in written:
        display.wrote(path, what, as_json=arguments.json)
    if arguments.html is not None:
        display.wrote(arguments.html, "a page with a map and tables", as_json=arguments.json)
    return 0


def _print_commands(report: ProbeReport, screen: Screen, recipe: Path | None) -> None:
    screen.line()
    if report.exclude_layers is not None:
        screen.line("To keep them in addition to the default recipe:")
        options = f"--exclude-layers '{report.exclude_layers}'"
        screen.line(convert_command(report.path, options, "excluded"))
        screen.line()
    note = "" if recipe else " (--write-recipe FILE.toml writes the recipe)"
    screen.text(f"To keep only them, the embedders and the final layer{note}:")
    screen.line(convert_with_recipe(report.path, recipe or Path("FILE.toml")))


def _rules(arguments: argparse.Namespace) -> ProbeRules:
    from ..analysis.probe.scoring import ProbeRules

    names = [name.lstrip("-").replace("-", "_") for name, *_ in _RULES]
    given = {name: getattr(arguments, name) for name in names}
    exempt = arguments.spread_filter_exempt
    given["spread_filter_exempt"] = None if exempt is None else tuple(exempt)
    return ProbeRules(**{name: value for name, value in given.items() if value is not None})
