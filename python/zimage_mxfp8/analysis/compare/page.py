"""The page of `compare --html`."""

from __future__ import annotations

from functools import partial

from ...checkpoint.file_names import base_name
from ...conversion.recipes import DEFAULT, load_recipe
from ...printing.screen import size_text
from ...streaming.error_stats import snr_text
from ...text import natural_order, plural
from ...zimage.layers import ZIMAGE
from ..pages.blocks import Cell, Column, Paragraph, Table
from ..pages.chart import NamedSet, SizeChart
from ..pages.keep import KeepOrder
from ..pages.network import NetworkMap
from ..pages.page import FROM_PROGRAM, Fact, Origin, Page, Section, Tile, render_page
from ..pages.units import fitting_unit
from ..pages.weight_error import weight_error
from .formats import BASE_FORMATS, FORMATS
from .report import MXFP8, CompareReport, FormatError, LayerComparison, gain_db

_SHORT_TITLES = {
    "mxfp8-e4m3": "MXFP8 E4M3",
    "mxfp8-e5m2": "MXFP8 E5M2",
    "fp8-tensor": "FP8 per tensor",
    "fp8-row": "FP8 per row",
    "int8-row": "INT8 per row",
    "mxfp4": "MXFP4",
    "nvfp4": "NVFP4",
}
_SNR_COLUMNS = [Column(f"{_SHORT_TITLES[name]} (dB)", 2) for name in BASE_FORMATS]


def compare_page(report: CompareReport, bound: float, origin: Origin = FROM_PROGRAM) -> str:
    """Return a page with what every format costs, as HTML.

    Args:
        report: what was measured.
        bound: relative squared error in MXFP8 above which a layer is worth keeping.
        origin: how the page came to be.
    """
    keep = _keep(report, bound)
    how_to_read = _HOW_TO_READ if any(map(_in_block, report.layers)) else _WITHOUT_BLOCKS
    sections = [
        Section("The network", [Paragraph(how_to_read), _network(report, keep, bound)]),
        Section("Formats", [Paragraph(_formats_text(report)), _formats(report)]),
        Section("Size against error", [Paragraph(_SIZES), SizeChart(keep, _choices(report))]),
        Section("What is said about 8 bits", [_answers(report)]),
        Section("Groups", [Paragraph(_SNR), _groups(report)]),
        Section("Layers", [_layers(report)]),
    ]
    if report.low_rank_summary:
        sections.append(Section("Low-rank branches", [_low_rank(report)]))
    return render_page(
        Page(
            report="compare",
            title=f"What formats cost on {base_name(report.input)}",
            question="How much do the weights lose in MXFP8, and in the other number formats? What "
            "weights lose does not tell how sensitive a layer is.",
            facts=_facts(report, bound),
            tiles=_tiles(report, bound),
            sections=sections,
            origin=origin,
        )
    )


_HOW_TO_READ = (
    "Blocks stand in the order of their computation: noise refiner, context refiner, main blocks. "
    "All formats share one range of colours, around the bound. The slider keeps the layers that "
    "lose most in MXFP8; layers outside the blocks are always kept, as in every recipe."
)
_WITHOUT_BLOCKS = "The slider keeps the layers that lose most in MXFP8."
_SIZES = (
    "The relative squared error of all weights, with kept layers counted as 16 bits a weight and "
    "no error."
)
_SNR = "Signal-to-noise ratio of each format in dB: 3 dB more are half the squared error."


def _facts(report: CompareReport, bound: float) -> list[Fact]:
    return [
        Fact("checkpoint", base_name(report.input)),
        Fact("size in BF16", size_text(report.sizes["bf16"].model_bytes)),
        Fact("layers", f"{len(report.layers):,}"),
        Fact("rows measured", f"{100 * report.sampled:.1f} %, in MXFP8 E4M3 all"),
        Fact("bound", f"{bound:g}"),
    ]


def _tiles(report: CompareReport, bound: float) -> list[Tile]:
    error, nvfp4 = (report.total.formats[name] for name in (MXFP8, "nvfp4"))
    eight = [name for name in FORMATS if FORMATS[name].element_bits == 8]
    best = min(eight, key=lambda name: report.total.formats[name].relative_squared_error)
    measured = [answer for answer in report.answers if answer.holds is not None]
    above = report.above(bound)
    gain = gain_db(error.relative_squared_error, report.total.formats[best].relative_squared_error)
    return [
        Tile(
            "MXFP8 loses",
            f"{100 * error.relative_squared_error:.4f} %",
            f"of the squared weights; SNR {snr_text(error.snr_db, 1, ' dB')}",
        ),
        Tile(
            "Layers above the bound",
            f"{len(above):,} of {len(report.layers):,}",
            f"lose more than {bound:g}",
            "bad" if above else "good",
        ),
        Tile(
            "File in MXFP8",
            size_text(report.sizes[MXFP8].model_bytes),
            f"{report.sizes[MXFP8].bits_per_weight:.2f} bits a weight",
        ),
        Tile(
            "Best in 8 bits",
            snr_text(report.total.formats[best].snr_db, 1, " dB"),
            f"{FORMATS[best].title}: {gain:+.1f} dB; NVFP4: {snr_text(nvfp4.snr_db, 1, ' dB')}",
        ),
        Tile(
            "Claims that hold",
            f"{sum(bool(answer.holds) for answer in measured)} of {len(measured)}",
            "about 8-bit quantisation, see below",
        ),
    ]


def _keep(report: CompareReport, bound: float) -> KeepOrder:
    """Layers by what they lose; of Z-Image those of the blocks only, the others are kept."""
    movable = [layer for layer in report.layers if _in_block(layer)] or report.layers
    fixed = {layer.name for layer in report.layers} - {layer.name for layer in movable}
    order = sorted(movable, key=lambda layer: -_error(layer))
    signal = report.total.squared_signal or 1.0
    prefix = order[0].tensor.removesuffix(order[0].name)
    return KeepOrder(
        names=[layer.name for layer in order],
        smallest=report.keeping(fixed).size.model_bytes,
        added=[2 * layer.parameters - -(-FORMATS[MXFP8].bits(layer.shape) // 8) for layer in order],
        parts=[layer.squared_signal * _error(layer) / signal for layer in order],
        chosen=sum(_error(layer) > bound for layer in order),
        error="relative squared error of the weights",
        percent=True,
        whole=True,
        prefix=prefix,
    )


def _in_block(layer: LayerComparison) -> bool:
    return ZIMAGE.split(layer.name) is not None


def _error(layer: LayerComparison) -> float:
    return _error_in(MXFP8, layer)


def _error_in(name: str, layer: LayerComparison) -> float:
    return layer.formats[name].relative_squared_error


def _network(report: CompareReport, keep: KeepOrder, bound: float) -> NetworkMap[LayerComparison]:
    errors = [_error_in(name, layer) for layer in report.layers for name in BASE_FORMATS]
    metrics = [
        weight_error(
            _SHORT_TITLES[name],
            partial(_error_in, name),
            bound,
            f"SNR in {FORMATS[name].title}.",
            others=errors,
        )
        for name in BASE_FORMATS
    ]
    return NetworkMap({layer.name: layer for layer in report.layers}, metrics, keep)


def _choices(report: CompareReport) -> list[NamedSet]:
    card = load_recipe(DEFAULT)
    kept = [x.name for x in report.layers if any(rule.matches(x.name, "") for rule in card.keep)]
    if not 0 < len(kept) < len(report.layers):
        return []
    mix = report.keeping(kept)
    name = f"recipe {DEFAULT} ({plural(mix.kept, 'layer')})"
    return [NamedSet(name, mix.size.model_bytes, mix.error.relative_squared_error)]


def _formats_text(report: CompareReport) -> str:
    return (
        "Relative squared error of the weights of all linears together, the smallest first, and "
        "the size of a transformer with all of them in the format. MXFP8 E4M3 was measured on "
        f"every row, the others on {100 * report.sampled:.1f} %."
    )


def _formats(report: CompareReport) -> Table:
    order = sorted(FORMATS, key=lambda name: report.total.formats[name].relative_squared_error)
    divisor, unit = fitting_unit(max(size.model_bytes for size in report.sizes.values()))
    all_in_mxfp8 = report.total.formats[MXFP8].relative_squared_error
    rows: list[list[Cell]] = []
    for name in order:
        error, size = report.total.formats[name], report.sizes[name]
        rows.append(
            [
                *(FORMATS[name].title, 100 * error.relative_squared_error),
                *(100 * error.standard_error, _snr(error)),
                gain_db(all_in_mxfp8, error.relative_squared_error),
                *(size.bits_per_weight, size.model_bytes / divisor),
            ]
        )
    columns = [
        *(Column("format"), Column("relative squared error (%)", 4, dots=True)),
        *(Column("standard error (%)", 5), Column("SNR (dB)", 2)),
        *(Column("gain over MXFP8 E4M3 (dB)", 2), Column("bits a weight", 2)),
        Column(f"size ({unit})", 2),
    ]
    return Table(columns, rows, "formats", [order.index(MXFP8)])


def _answers(report: CompareReport) -> Table:
    words = {True: "yes", False: "no", None: "not measured"}
    return Table(
        [Column("claim"), Column("holds"), Column("measured")],
        [[answer.claim, words[answer.holds], answer.finding] for answer in report.answers],
        "claims",
    )


def _snr(error: FormatError) -> Cell:
    """Return a cell with a signal-to-noise ratio, which is infinite without an error."""
    return error.snr_db if error.relative_squared_error else snr_text(error.snr_db, 2)


def _groups(report: CompareReport) -> Table:
    columns = [Column("group"), Column("layers", 0), Column("weights", 0), *_SNR_COLUMNS]
    groups = sorted(report.groups, key=lambda group: natural_order(group.name))
    rows: list[list[Cell]] = [
        [
            *(group.name, group.layers, group.parameters),
            *(_snr(group.formats[name]) for name in BASE_FORMATS),
        ]
        for group in [report.total, *groups]
    ]
    return Table(columns, rows, "groups", [0])


def _layers(report: CompareReport) -> Table:
    columns = [
        *(Column("tensor"), Column("rows", 0), Column("columns", 0)),
        *(Column("error in MXFP8 (%)", 4), *_SNR_COLUMNS),
    ]
    rows: list[list[Cell]] = [
        [
            *(layer.tensor, *layer.shape, 100 * _error(layer)),
            *(_snr(layer.formats[name]) for name in BASE_FORMATS),
        ]
        for layer in report.layers
    ]
    return Table(columns, rows, "layers")


def _low_rank(report: CompareReport) -> Table:
    columns = [
        *(Column("format"), Column("rank", 0), Column("bits a weight", 2)),
        *(Column("error without a branch (%)", 5), Column("gain on the residual (dB)", 3)),
        Column("gain SVDQuant's way (dB)", 3),
    ]
    rows: list[list[Cell]] = [
        [
            *(summary.format, summary.rank, summary.bits_per_weight, 100 * summary.plain),
            *(summary.residual_gain_db, summary.svdquant_gain_db),
        ]
        for summary in report.low_rank_summary
    ]
    return Table(columns, rows, "low-rank")
