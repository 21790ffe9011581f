"""`zimage-mxfp8 compare`."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from ..text import plural
from .arguments import (
    add_json,
    add_overwrite,
    add_threads,
    converter,
    file_path,
    local_path,
)

if TYPE_CHECKING:
    from ..analysis.pages.page import Origin


def _fraction(text: str) -> float:
    number = float(text)
    if not 0 < number <= 1:
        raise ValueError
    return number


def _error_bound(text: str) -> float:
    number = float(text)
    if not 0 <= number < float("inf"):
        raise ValueError
    return number


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser], line: str) -> None:
    """Add this command to the parser."""
    parser = commands.add_parser(
        "compare",
        help=line,
        description="Measure the error of number formats on a checkpoint's weights: MXFP8, FP8, "
        "INT8, MXFP4, NVFP4, with other scales, with formats chosen per block and with low-rank "
        "branches.",
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "file", type=local_path, metavar="PATH", help="safetensors file, or diffusers folder"
    )
    parser.add_argument(
        "--layers",
        metavar="REGEX",
        help="compare only the weights with a full name that this regular expression finds",
    )
    parser.add_argument(
        "--sample",
        type=converter(_fraction, "a fraction above 0 and up to 1"),
        default=1 / 8,
        metavar="FRACTION",
        help="of the rows, for all formats but MXFP8 E4M3, which is measured on every row "
        "(default: 0.125; 1 takes several times as long)",
    )
    parser.add_argument(
        "--low-rank",
        choices=("groups", "all", "none"),
        default="groups",
        help="measure low-rank branches on one layer per group (default), on all, or not",
    )
    parser.add_argument(
        "--csv", type=file_path, metavar="FILE", help="write every layer's figures as CSV"
    )
    parser.add_argument(
        "--html",
        type=file_path,
        metavar="FILE",
        help="write a page with a map of the network and tables",
    )
    parser.add_argument(
        "--write-recipe",
        type=file_path,
        metavar="FILE.toml",
        help="write a recipe for 'convert --recipe' that keeps the layers above --bound, the "
        "embedders and the final layer",
    )
    parser.add_argument(
        "--bound",
        type=converter(_error_bound, "a relative squared error: finite, and at least 0"),
        default=1e-3,
        metavar="ERROR",
        help="relative squared error in MXFP8 above which a layer is kept (default: 0.001)",
    )
    parser.add_argument(
        "--any-model",
        action="store_true",
        help="accept a checkpoint that is not Z-Image",
    )
    add_overwrite(parser)
    add_threads(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    # Before NumPy is imported: its GEMMs then run on --threads cores, see `compare_low_rank`.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from ..analysis.compare.outputs import CompareOutputs
    from ..analysis.compare.run import compare_weights
    from ..checkpoint.identify import open_for
    from ..checkpoint.output import check_distinct, check_target
    from ..printing.compare import print_compare
    from . import display
    from .pages import write_page

    if arguments.html is not None:
        found = open_for(arguments.file, "analyse", any_model=arguments.any_model)
        inputs = found.checkpoint.inputs
        check_target(arguments.html, inputs, overwrite=arguments.overwrite, argument="html")
        check_distinct({name: getattr(arguments, name) for name in ("html", "csv", "write_recipe")})
    outputs = CompareOutputs(
        arguments.csv, arguments.write_recipe, arguments.bound, arguments.overwrite
    )
    report = compare_weights(
        arguments.file,
        outputs,
        any_model=arguments.any_model,
        layers=arguments.layers,
        sample=arguments.sample,
        low_rank=arguments.low_rank,
        threads=arguments.threads,
        progress=True,
    )

    def page(origin: Origin) -> str:
        from ..analysis.compare.page import compare_page

        return compare_page(report, arguments.bound, origin)

    display.warn(report.warnings)
    try:
        display.show(report, print_compare, as_json=arguments.json)
    finally:  # also if nobody reads standard output any more
        outputs.write(report)
        write_page(arguments, page)
    kept, above = report.kept(arguments.bound), report.above(arguments.bound)
    for path, what in (
        (arguments.csv, f"the figures of {plural(len(report.layers), 'layer')}"),
        (arguments.html, "a page with a map and tables"),
        (
            arguments.write_recipe,
            f"a recipe that keeps {plural(len(kept), 'layer')}, {len(above):,} of them for the "
            "squared error",
        ),
    ):
        if path is not None:
            display.wrote(path, what, as_json=arguments.json)
    return 0
