"""Tables of `compare`."""

from __future__ import annotations

from ..analysis.compare.formats import BASE_FORMATS, FORMATS
from ..analysis.compare.report import MXFP8, CompareReport, LayerComparison
from ..streaming.error_stats import snr_db, snr_text
from ..text import plural
from .screen import Screen, size_text

_MAX_SHOWN = 10


def print_compare(report: CompareReport, screen: Screen) -> None:
    """Print the figures and the answers."""
    _print_formats(report, screen)
    _print_groups(report, screen)
    if report.low_rank_summary:
        _print_low_rank(report, screen)
    order = sorted(report.layers, key=_mxfp8_error, reverse=True)[:_MAX_SHOWN]
    screen.table(
        f"The {plural(len(order), 'layer')} with the largest squared error in MXFP8",
        ["tensor", "squared error>", "SNR (dB)>"],
        [
            [
                layer.tensor,
                f"{_mxfp8_error(layer):.3e}",
                snr_text(layer.formats[MXFP8].snr_db, 2),
            ]
            for layer in order
        ],
        spare=1,
    )
    title = "Claims about 8 bits, and whether they hold for this checkpoint"
    screen.text(title, style="bold")
    words = {True: "yes", False: "no", None: "-"}
    for answer in report.answers:
        # Not a table: three columns of prose would be too narrow to read.
        verdict = f"{words[answer.holds]:3}  {answer.claim}: {answer.finding}"
        screen.text(verdict, indent=" " * 5)
    screen.text(
        "Squared errors are those of weights alone, which do not show how sensitive a layer is. "
        '"Little" is below 0.5 dB.'
    )


def _mxfp8_error(layer: LayerComparison) -> float:
    return layer.formats[MXFP8].relative_squared_error


def _print_formats(report: CompareReport, screen: Screen) -> None:
    gains = report.gains_db
    bf16 = report.sizes["bf16"]
    rows = [["BF16", "", "", "16.00", size_text(bf16.model_bytes), "", ""]]
    for name, kind in FORMATS.items():
        error, size = report.total.formats[name], report.sizes[name]
        rows.append(
            [
                kind.title,
                f"{error.relative_squared_error:.3e}",
                snr_text(error.snr_db, 2),
                f"{size.bits_per_weight:.2f}",
                size_text(size.model_bytes),
                f"{gains[name]:+.2f}",
                "exact" if name == MXFP8 else f"{error.standard_error:.1e}",
            ]
        )
    screen.table(
        f"{report.input}: {plural(report.total.layers, 'linear')} in other formats",
        ["format", "squared error>", "SNR>", "bits>", "model>", "gain>", "standard error>"],
        rows,
        spare=2,
    )
    screen.text(
        "Squared errors are relative to the squared weights: of MXFP8 E4M3 on every row, of the "
        f"others on {report.sampled:.1%}, with their standard errors. SNR and gain in dB; bits are "
        "those of a weight, and the model is a transformer with all of these linears in the format."
    )


def _print_groups(report: CompareReport, screen: Screen) -> None:
    first = (MXFP8, "fp8-row", "int8-row", "nvfp4")  # if there is no room for all
    names = [*first, *(name for name in BASE_FORMATS if name not in first)]
    screen.table(
        "SNR (dB) by group",
        ["group", *(f"{name}>" for name in names), "layers>"],
        [
            [
                group.name,
                *(snr_text(group.formats[name].snr_db, 2) for name in names),
                str(group.layers),
            ]
            for group in [report.total, *report.groups]
        ],
        spare=len(names) - len(first) + 1,
    )


def _print_low_rank(report: CompareReport, screen: Screen) -> None:
    measured = len({error.tensor for error in report.low_rank})
    screen.table(
        f"Low-rank branches in 16 bits, measured on {plural(measured, 'layer')}: SNR without them "
        "and gains with them in dB, on the residual and SVDQuant's way",
        ["format", "rank>", "bits per weight>", "SNR without>", "residual>", "SVDQuant's>"],
        [
            [
                summary.format,
                str(summary.rank),
                f"{summary.bits_per_weight:.2f}",
                snr_text(snr_db(summary.plain), 2),
                f"{summary.residual_gain_db:+.3f}",
                f"{summary.svdquant_gain_db:+.3f}",
            ]
            for summary in report.low_rank_summary
        ],
    )
