"""`zimage-mxfp8 compare`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..text import plural
from .arguments import add_json, add_overwrite, add_threads, file_path, spellings

if TYPE_CHECKING:
    from ..analysis.compare import CompareCallback, CompareProgress
    from ..analysis.compare_report import CompareReport, LayerComparison
    from ..pipeline import ProgressCallback

_MOST_SHOWN = 10


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


_fraction.__name__ = "fraction above 0 and up to 1"  # argparse puts it into its sentence
_error_bound.__name__ = "relative squared error"


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command to the parser."""
    parser = commands.add_parser(
        "compare",
        help="measure what 8-bit and 4-bit formats would cost",
        description="Measure what number formats lose on a checkpoint's weights: MXFP8, FP8, INT8, "
        "MXFP4, NVFP4, with other scales, with formats chosen for each block and with low-rank "
        "branches.",
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "file", type=Path, metavar="PATH", help="safetensors file, or diffusers folder"
    )
    parser.add_argument(
        "--layers",
        metavar="REGEX",
        help="compare only the weights whose full name this regular expression finds",
    )
    parser.add_argument(
        "--sample",
        type=_fraction,
        default=1 / 8,
        metavar="FRACTION",
        help="of the rows, for all formats but MXFP8 E4M3, which is measured on every row "
        "(default: 0.125; 1 takes several times as long)",
    )
    parser.add_argument(
        *spellings("--low-rank"),
        choices=("groups", "all", "none"),
        default="groups",
        help="measure low-rank branches on one layer for each group (default), on all, or not",
    )
    parser.add_argument(
        "--csv", type=file_path, metavar="FILE", help="write every layer's figures as CSV"
    )
    parser.add_argument(
        "--html", type=file_path, metavar="FILE", help="write a page with plots and tables"
    )
    parser.add_argument(
        *spellings("--write-recipe"),
        type=file_path,
        metavar="FILE.toml",
        help="write a recipe for 'convert --recipe' that keeps the layers above --bound, the "
        "embedders and the final layer",
    )
    parser.add_argument(
        "--bound",
        type=_error_bound,
        default=1e-3,
        metavar="ERROR",
        help="relative squared error in MXFP8 above which a layer is kept (default: 0.001)",
    )
    parser.add_argument(
        *spellings("--any-model"),
        action="store_true",
        help="accept a checkpoint that is not Z-Image",
    )
    add_overwrite(parser)
    add_threads(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    # Before NumPy is imported: its products then run on --threads cores, see `compare_low_rank`.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from ..analysis.compare import compare
    from ..analysis.page import check_plots_available
    from ..checkpoint.output import check_distinct, check_target, write_file
    from ..checkpoint.source import open_checkpoint
    from . import display

    if arguments.html is not None:
        check_plots_available()
        inputs = open_checkpoint(arguments.file).inputs
        check_target(arguments.html, inputs, overwrite=arguments.overwrite)
        outputs = (arguments.html, arguments.csv, arguments.write_recipe)
        check_distinct(path for path in outputs if path is not None)
    with _stage_bars() as progress:
        report = compare(
            arguments.file,
            any_model=arguments.any_model,
            layers=arguments.layers,
            sample=arguments.sample,
            low_rank=arguments.low_rank,
            csv=arguments.csv,
            write_recipe=arguments.write_recipe,
            bound=arguments.bound,
            overwrite=arguments.overwrite,
            threads=arguments.threads,
            progress=progress,
        )
    display.warn(report.warnings)
    if arguments.html is not None:
        from ..analysis.compare_page import compare_page

        content = compare_page(report, arguments.bound).encode()
        write_file(arguments.html, content, overwrite=arguments.overwrite)
    if arguments.json:
        display.print_json(report.to_dict())
        return 0
    print_report(report)
    if arguments.write_recipe is not None:
        kept = plural(len(report.kept(arguments.bound)), "layer")
        above = f"{len(report.above(arguments.bound)):,} of them for the error"
        display.print_text(f"{arguments.write_recipe} keeps {kept}, {above}")
    return 0


@contextmanager
def _stage_bars() -> Iterator[CompareCallback]:
    """A progress bar for each stage, one after another."""
    from . import display

    with ExitStack() as shown:
        stage: str | None = None
        update: ProgressCallback | None = None

        def progress(state: CompareProgress) -> None:
            nonlocal stage, update
            if state.stage != stage:
                shown.close()
                stage = state.stage
                update = shown.enter_context(display.progress_bar(f"comparing: {stage}"))
            if update is not None:
                update(state)

        yield progress


def print_report(report: CompareReport) -> None:
    """Print what was measured, and the answers."""
    from . import display

    _print_formats(report)
    _print_groups(report)
    if report.low_rank_summary:
        _print_low_rank(report)
    order = sorted(report.layers, key=_mxfp8_error, reverse=True)[:_MOST_SHOWN]
    display.print_table(
        f"The {plural(len(order), 'layer')} with the largest MXFP8 error",
        ["tensor", "error>", "SNR (dB)>"],
        [
            [
                layer.tensor,
                f"{_mxfp8_error(layer):.3e}",
                f"{layer.formats['mxfp8-e4m3'].snr_db:.2f}",
            ]
            for layer in order
        ],
        spare=1,
    )
    title = "What is said about 8 bits, and whether it holds for this checkpoint"
    display.print_text(title, style="bold")
    words = {True: "yes", False: "no", None: "-"}
    for answer in report.answers:
        # No table: three columns of prose would be too narrow to read.
        verdict = f"{words[answer.holds]:3}  {answer.claim}: {answer.finding}"
        display.print_text(verdict, indent=" " * 5)
    display.print_text(
        "Errors are those of weights alone, which do not tell how sensitive a layer is. "
        '"Little" is below 0.5 dB.'
    )


def _mxfp8_error(layer: LayerComparison) -> float:
    return layer.formats["mxfp8-e4m3"].relative_squared_error


def _print_formats(report: CompareReport) -> None:
    from ..analysis.formats import FORMATS
    from . import display

    gains = report.gains_db
    bf16 = report.sizes["bf16"]
    rows = [["BF16", "", "", "16.00", display.size_text(bf16.model_bytes), "", ""]]
    for name, kind in FORMATS.items():
        error, size = report.total.formats[name], report.sizes[name]
        rows.append(
            [
                kind.title,
                f"{error.relative_squared_error:.3e}",
                f"{error.snr_db:.2f}",
                f"{size.bits_per_weight:.2f}",
                display.size_text(size.model_bytes),
                f"{gains[name]:+.2f}",
                "exact" if name == "mxfp8-e4m3" else f"{error.standard_error:.1e}",
            ]
        )
    display.print_table(
        f"{report.input}: {plural(report.total.layers, 'linear')} in other formats",
        ["format", "error>", "SNR>", "bits>", "model>", "gain>", "std. error>"],
        rows,
        spare=2,
    )
    display.print_text(
        "Errors are squared and relative to the squared weights: of MXFP8 E4M3 on every row, of "
        f"the others on {report.sampled:.1%}. SNR and gain in dB; bits are those of a weight, and "
        "the model is a transformer with all of these linears in the format."
    )


def _print_groups(report: CompareReport) -> None:
    from ..analysis.formats import BASE_FORMATS
    from . import display

    first = ("mxfp8-e4m3", "fp8-row", "int8-row", "nvfp4")  # where not all have room
    names = [*first, *(name for name in BASE_FORMATS if name not in first)]
    display.print_table(
        "SNR (dB) by groups",
        ["group", *(f"{name}>" for name in names), "layers>"],
        [
            [
                group.name,
                *(f"{group.formats[name].snr_db:.2f}" for name in names),
                str(group.layers),
            ]
            for group in [report.total, *report.groups]
        ],
        spare=len(names) - len(first) + 1,
    )


def _print_low_rank(report: CompareReport) -> None:
    from ..error_stats import snr_db
    from . import display

    measured = len({error.tensor for error in report.low_rank})
    display.print_table(
        f"Low-rank branches in 16 bits, measured on {plural(measured, 'layer')}: SNR without them "
        "and gains with them in dB, on the residual and SVDQuant's way",
        ["format", "rank>", "bits a weight>", "SNR without>", "residual>", "SVDQuant's>"],
        [
            [
                summary.format,
                str(summary.rank),
                f"{summary.bits_per_weight:.2f}",
                f"{snr_db(summary.plain):.2f}",
                f"{summary.residual_gain_db:+.3f}",
                f"{summary.svdquant_gain_db:+.3f}",
            ]
            for summary in report.low_rank_summary
        ],
    )
