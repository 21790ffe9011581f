"""The page of `compare --html`."""

from __future__ import annotations

import re
from pathlib import Path

from ..checkpoint.quantization import WEIGHT_SUFFIX
from ..checkpoint.zimage import BLOCK_TENSOR
from .compare_report import MXFP8, CompareReport, LayerComparison, gain_db
from .figures import Grid, heat_map, size_plot
from .formats import BASE_FORMATS, FORMATS
from .page import Block, Column, Copyable, Figure, Paragraph, Section, Table, render_page

_STACKS = ("noise_refiner", "context_refiner", "layers")


def compare_page(report: CompareReport, bound: float) -> str:
    """A page with what every format costs, as HTML.

    Args:
        report: what was measured.
        bound: relative squared error in MXFP8 above which a layer is worth keeping.

    Raises:
        UnsupportedError: plotly is not installed.
    """
    sections = [
        Section("What is said about 8 bits", [_answers(report)]),
        Section("Formats", _formats(report)),
        Section("Where MXFP8 loses most", _layers(report, bound)),
    ]
    if report.low_rank_summary:
        sections.append(Section("Low-rank branches", [_low_rank(report)]))
    return render_page(f"What formats cost on {Path(report.input).name}", sections)


def _answers(report: CompareReport) -> Table:
    words = {True: "yes", False: "no", None: "not measured"}
    return Table(
        [Column("claim"), Column("holds"), Column("measured")],
        [[answer.claim, words[answer.holds], answer.finding] for answer in report.answers],
    )


def _formats(report: CompareReport) -> list[Block]:
    mxfp8 = report.total.formats[MXFP8].relative_squared_error
    points: dict[str, list[tuple[float, float, str]]] = {"other formats": [], "MXFP8 E4M3": []}
    rows: list[list[str | float]] = []
    for name, kind in FORMATS.items():
        error, size = report.total.formats[name], report.sizes[name]
        series = "MXFP8 E4M3" if name == MXFP8 else "other formats"
        points[series].append((size.model_bytes / 2**30, error.snr_db, kind.title))
        rows.append(
            [
                *(kind.title, size.bits_per_weight, size.model_bytes / 2**30),
                *(error.relative_squared_error, error.standard_error, error.snr_db),
                gain_db(mxfp8, error.relative_squared_error),
            ]
        )
    columns = [
        *(Column("format"), Column("bits a weight", 2), Column("model (GiB)", 3)),
        *(Column("squared error", 7), Column("standard error", 7), Column("SNR (dB)", 2)),
        Column("gain over MXFP8 E4M3 (dB)", 2),
    ]
    return [
        Paragraph(
            "Relative squared error of the weights of all linears together, and the size of a "
            "transformer with all of them in the format. MXFP8 E4M3 was measured on every row, "
            f"the others on {report.sampled:.1%}. Errors of weights do not tell how sensitive a "
            "layer is."
        ),
        Figure("SNR against size", size_plot(points, "SNR (dB)")),
        Table(columns, rows),
    ]


def _layers(report: CompareReport, bound: float) -> list[Block]:
    blocks: list[Block] = []
    above = report.above(bound)
    if above:
        names = "|".join(re.escape(layer.tensor) for layer in above)
        label = f"Layers above a squared error of {bound:g}, for convert --exclude-layers:"
        blocks.append(Copyable(label, f"^({names})$"))
    else:
        blocks.append(Paragraph(f"No layer has a squared error above {bound:g} in MXFP8 E4M3."))
    places: dict[tuple[str, int, str], LayerComparison] = {}
    for layer in report.layers:
        if match := BLOCK_TENSOR.match(layer.name):
            kind = match["part"].removesuffix(WEIGHT_SUFFIX)
            places[match["stack"], int(match["block"]), kind] = layer
    if places:
        columns = sorted(
            {(stack, block) for stack, block, _ in places},
            key=lambda place: (_STACKS.index(place[0]), place[1]),
        )
        kinds = sorted({kind for _, _, kind in places})
        cells = [
            [
                None
                if (found := places.get((stack, block, kind))) is None
                else found.formats[MXFP8].snr_db
                for stack, block in columns
            ]
            for kind in kinds
        ]
        grid = Grid([f"{stack} {block}" for stack, block in columns], kinds)
        blocks.append(Figure("SNR in MXFP8 E4M3", heat_map(grid, cells, "SNR (dB)", 2)))
    heads = [Column("tensor"), Column("group"), *(Column(f"{n} (dB)", 2) for n in BASE_FORMATS)]
    rows: list[list[str | float]] = [
        [layer.tensor, layer.group, *(layer.formats[name].snr_db for name in BASE_FORMATS)]
        for layer in report.layers
    ]
    return [*blocks, Table(heads, rows)]


def _low_rank(report: CompareReport) -> Table:
    columns = [
        *(Column("format"), Column("rank", 0), Column("bits a weight", 2)),
        *(Column("squared error without", 7), Column("gain on the residual (dB)", 3)),
        Column("gain SVDQuant's way (dB)", 3),
    ]
    rows: list[list[str | float]] = [
        [
            *(summary.format, summary.rank, summary.bits_per_weight, summary.plain),
            *(summary.residual_gain_db, summary.svdquant_gain_db),
        ]
        for summary in report.low_rank_summary
    ]
    return Table(columns, rows)
