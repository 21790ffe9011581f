"""The page of `compare --html`."""

from __future__ import annotations

import re

from ...checkpoint.file_names import base_name
from ...conversion.recipes import DEFAULT, load_recipe
from ...text import plural
from ..pages.block_maps import BlockMap, Metric, by_place
from ..pages.figures import SizePoint, size_plot
from ..pages.page import (
    Block,
    Cell,
    Column,
    Copyable,
    Figure,
    Paragraph,
    Section,
    Table,
    render_page,
)
from .formats import BASE_FORMATS, FORMATS
from .report import MXFP8, CompareReport, LayerComparison, gain_db

_SNR_COLUMNS = [Column(f"{name} (dB)", 2) for name in BASE_FORMATS]


def compare_page(report: CompareReport, bound: float) -> str:
    """Return a page with what every format costs, as HTML.

    Args:
        report: what was measured.
        bound: relative squared error in MXFP8 above which a layer is worth keeping.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    sections = [
        Section("What is said about 8 bits", [_answers(report)]),
        Section("Formats", _formats(report, bound)),
        Section("What to keep", [_exclusions(report, bound)]),
        *_maps(report),
        Section("Groups", [_groups(report)]),
        Section("Layers", [_layers(report)]),
    ]
    if report.low_rank_summary:
        sections.append(Section("Low-rank branches", [_low_rank(report)]))
    return render_page(f"What formats cost on {base_name(report.input)}", sections)


def _answers(report: CompareReport) -> Table:
    words = {True: "yes", False: "no", None: "not measured"}
    return Table(
        [Column("claim"), Column("holds"), Column("measured")],
        [[answer.claim, words[answer.holds], answer.finding] for answer in report.answers],
    )


def _formats(report: CompareReport, bound: float) -> list[Block]:
    mxfp8, others, chosen = "MXFP8 E4M3", "other formats", f"layers above {bound:g} kept"
    card = load_recipe(DEFAULT)
    kept = {
        f"recipe {DEFAULT}": [
            x.name for x in report.layers if any(rule.matches(x.name, "") for rule in card.keep)
        ],
        chosen: [layer.name for layer in report.above(bound)],
    }
    # Keeping nothing is MXFP8 itself, and keeping everything has no error to plot.
    mixes = {
        series: report.keeping(names)
        for series, names in kept.items()
        if 0 < len(names) < len(report.layers)
    }
    entries = [
        (
            *(mxfp8 if name == MXFP8 else others, kind.title),
            *(report.total.formats[name], report.sizes[name]),
        )
        for name, kind in FORMATS.items()
    ]
    entries += [
        (series, f"{mxfp8}, {series} ({plural(mix.kept, 'layer')} in BF16)", mix.error, mix.size)
        for series, mix in mixes.items()
    ]
    all_in_mxfp8 = report.total.formats[MXFP8].relative_squared_error
    # Several formats have MXFP8's size: its point is drawn over theirs.
    points: dict[str, list[SizePoint]] = {others: [], mxfp8: [], **{name: [] for name in mixes}}
    rows: list[list[Cell]] = []
    for series, title, error, size in entries:
        gib = size.model_bytes / 2**30
        points[series].append((gib, error.snr_db, title))
        rows.append(
            [
                *(title, size.bits_per_weight, gib, error.relative_squared_error),
                *(error.standard_error, error.snr_db),
                gain_db(all_in_mxfp8, error.relative_squared_error),
            ]
        )
    columns = [
        *(Column("format"), Column("bits a weight", 2), Column("model (GiB)", 3)),
        *(
            Column("relative squared error", 7),
            Column("standard error of it", 7),
            Column("SNR (dB)", 2),
        ),
        Column(f"gain over {mxfp8} (dB)", 2),
    ]
    return [
        Paragraph(
            "Relative squared error of the weights of all linears together, and the size of a "
            f"transformer with all of them in the format. {mxfp8} was measured on every row, "
            f"the others on {report.sampled:.1%}. Where layers are kept, they count 16 bits a "
            "weight and no error. What weights lose does not tell how sensitive a layer is."
        ),
        Figure("SNR against size", size_plot(points, "SNR (dB)", chosen=chosen)),
        Table(columns, rows),
    ]


def _exclusions(report: CompareReport, bound: float) -> Block:
    above = report.above(bound)
    if not above:
        return Paragraph(f"No layer has a relative squared error above {bound:g} in MXFP8 E4M3.")
    names = "|".join(re.escape(layer.tensor) for layer in above)
    label = f"Exclusion list for a conversion: layers above a relative squared error of {bound:g}:"
    return Copyable(label, f"^({names})$")


def _maps(report: CompareReport) -> list[Section]:
    layers = BlockMap(by_place({layer.name: layer for layer in report.layers}))
    maps = layers.heat_maps([_snr(name) for name in BASE_FORMATS])
    if not maps:  # a model of another kind
        return []
    text = Paragraph(
        "Blocks in the order of their computation: noise refiner, context refiner, main blocks. "
        "Colours end where a few extreme layers would hide the differences of all others, and "
        "each map has its own."
    )
    return [Section("Where formats lose most", [text, *maps])]


def _snr(name: str) -> Metric[LayerComparison]:
    title = f"SNR in {FORMATS[name].title}"
    return Metric(title, "SNR (dB)", 2, lambda layer: layer.formats[name].snr_db)


def _groups(report: CompareReport) -> Table:
    columns = [Column("group"), Column("layers", 0), Column("weights", 0), *_SNR_COLUMNS]
    rows: list[list[Cell]] = [
        [
            *(group.name, group.layers, group.parameters),
            *(group.formats[name].snr_db for name in BASE_FORMATS),
        ]
        for group in [report.total, *report.groups]
    ]
    return Table(columns, rows)


def _layers(report: CompareReport) -> Table:
    columns = [
        *(Column("tensor"), Column("group"), Column("rows", 0), Column("columns", 0)),
        *_SNR_COLUMNS,
    ]
    rows: list[list[Cell]] = [
        [
            *(layer.tensor, layer.group, *layer.shape),
            *(layer.formats[name].snr_db for name in BASE_FORMATS),
        ]
        for layer in report.layers
    ]
    return Table(columns, rows)


def _low_rank(report: CompareReport) -> Table:
    columns = [
        *(Column("format"), Column("rank", 0), Column("bits a weight", 2)),
        *(Column("relative squared error without", 7), Column("gain on the residual (dB)", 3)),
        Column("gain SVDQuant's way (dB)", 3),
    ]
    rows: list[list[Cell]] = [
        [
            *(summary.format, summary.rank, summary.bits_per_weight, summary.plain),
            *(summary.residual_gain_db, summary.svdquant_gain_db),
        ]
        for summary in report.low_rank_summary
    ]
    return Table(columns, rows)
