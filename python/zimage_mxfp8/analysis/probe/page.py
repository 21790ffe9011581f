"""The page of `probe --html`."""

from __future__ import annotations

from collections.abc import Sequence

from ...checkpoint.file_names import base_name
from ...text import plural
from ..pages.block_maps import BlockMap, Metric, RowRange
from ..pages.figures import SizePoint, category_map, line_plot, size_plot
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
from .grouping import ProbedTensor
from .run import ProbeReport
from .scoring import Recommendation

_RECOMMENDATIONS: tuple[Recommendation, ...] = ("NVFP4", "FP8", "*KEEP*")

_GROUPS = (
    "Main blocks are split by position. A group's figures are means, and its recommendation "
    "overrules that of its weights; but refiners, and the layer types that are exempt from the "
    "spread filter, are decided weight by weight."
)

_METRICS: tuple[Metric[ProbedTensor], ...] = (
    Metric("Score", "score", 4, lambda tensor: tensor.score),
    Metric("Excess kurtosis", "excess kurtosis", 4, lambda tensor: tensor.metrics.excess_kurtosis),
    Metric("Dynamic range", "dynamic range", 4, lambda tensor: tensor.metrics.dynamic_range),
    Metric("Standard deviation", "std", 6, lambda tensor: tensor.metrics.std),
    Metric("Outliers", "outliers (%)", 2, lambda tensor: tensor.metrics.outlier_pct),
    Metric("Aspect ratio", "aspect ratio", 2, lambda tensor: tensor.metrics.aspect_ratio),
)


def probe_page(report: ProbeReport) -> str:
    """Return a page with the figures of every weight, in heat maps and in a table, as HTML.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    sections = [
        Section("What to keep", [*_summary(report), *_sizes(report)]),
        Section("Where the sensitive weights are", _figures(report)),
        Section("Groups", [Paragraph(_GROUPS), _groups(report)]),
        Section("Weights", [_weights(report)]),
    ]
    return render_page(f"Sensitivity of {base_name(report.path)}", sections)


def _summary(report: ProbeReport) -> list[Block]:
    effective = [tensor.effective for tensor in report.tensors]
    counts = ", ".join(f"{effective.count(kind)} {kind}" for kind in reversed(_RECOMMENDATIONS))
    rules, limits = report.rules, report.thresholds
    blocks: list[Block] = [
        Paragraph(
            f"{plural(len(effective), 'weight')} probed: {counts}. Kept are weights with an excess "
            f"kurtosis of {rules.kurtosis_keep:g} or more, or a score of {limits.keep:.4f} or more "
            f"(percentile {rules.keep_percentile:g}); FP8 begins at {limits.fp8:.4f} (percentile "
            f"{rules.fp8_percentile:g}). zimage-mxfp8 convert writes MXFP8 for FP8 and NVFP4 alike."
        )
    ]
    if report.exclude_layers is None:
        return [*blocks, Paragraph("No weight is worth keeping by these rules.")]
    size = report.exclude_layers_bytes
    result = "which convert refuses" if size is None else f"a file of {size:,} bytes"
    label = f"Exclusion list for a conversion ({result}):"
    return [*blocks, Copyable(label, report.exclude_layers)]


def _sizes(report: ProbeReport) -> list[Block]:
    if report.recipe_bytes is None:
        return []
    kept = [tensor for tensor in report.tensors if tensor.effective == "*KEEP*"]
    scores = sum(tensor.score for tensor in report.tensors)
    in_order = sorted(report.tensors, key=lambda tensor: -tensor.score)

    def point(tensors: Sequence[ProbedTensor], size: int) -> SizePoint:
        left = scores - sum(tensor.score for tensor in tensors)
        return size / 2**30, left, f"{plural(len(tensors), 'weight')} kept"

    size = report.recipe_bytes - sum(tensor.saved for tensor in kept)
    path = [point([], size)]
    for count, tensor in enumerate(in_order, 1):
        size += tensor.saved
        path.append(point(in_order[:count], size))
    ordered, recommended = "highest scores kept", "recommended (the recipe)"
    points = {ordered: path, recommended: [point(kept, report.recipe_bytes)]}
    plot = size_plot(points, "scores left", chosen=recommended, path=ordered)
    return [
        Paragraph(
            "The size of the file and the sum of the scores of what is quantised, if the weights "
            "with the highest scores are kept, none to all. Embedders and the final layer are kept "
            "too, as in the recipe. A score is no error of the output; zimage-mxfp8 sensitivity "
            "measures that."
        ),
        Figure("Size against scores", plot),
    ]


def _figures(report: ProbeReport) -> list[Block]:
    layers = BlockMap({RowRange(t.stack, t.block, _short_type(t)): t for t in report.tensors})
    effective = layers.cells(lambda tensor: _RECOMMENDATIONS.index(tensor.effective))
    names, marks = ("NVFP4", "FP8", "KEEP"), ("4", "8", "K")
    scores = layers.cells(lambda tensor: tensor.score)
    lines = dict(zip(layers.grid.rows, scores, strict=True))
    limits = {"kept": report.thresholds.keep, "FP8": report.thresholds.fp8}
    return [
        Paragraph(
            "Blocks in the order of their computation: noise refiner, context refiner, main "
            "blocks. Colours end where a few extreme weights would hide the differences of all "
            "others; pointing at a cell shows its figure."
        ),
        Figure("Effective recommendation", category_map(layers.grid, effective, names, marks)),
        Figure("Score by block", line_plot(layers.grid.columns, lines, limits, "score")),
        *layers.heat_maps(_METRICS),
    ]


def _short_type(tensor: ProbedTensor) -> str:
    return tensor.layer_type.removeprefix(f"{tensor.stack}.")


def _groups(report: ProbeReport) -> Table:
    columns = [
        *(Column("layer type"), Column("position"), Column("blocks"), Column("weights", 0)),
        *(Column("excess kurtosis", 4), Column("largest", 4), Column("dynamic range", 4)),
        *(Column("std", 6), Column("outliers (%)", 2), Column("aspect ratio", 2)),
        *(Column("score", 4), Column("recommendation"), Column("reason"), Column("low spread")),
    ]
    rows: list[list[Cell]] = [
        [
            *(group.layer_type, group.position, f"{group.first_block}-{group.last_block}"),
            *(group.count, group.metrics.excess_kurtosis, group.largest_kurtosis),
            *(group.metrics.dynamic_range, group.metrics.std, group.metrics.outlier_pct),
            *(group.metrics.aspect_ratio, group.score, group.recommendation, group.reason),
            "demoted" if group.spread_filtered else "",
        ]
        for group in report.groups
    ]
    return Table(columns, rows)


def _weights(report: ProbeReport) -> Table:
    columns = [
        *(Column("weight"), Column("rows", 0), Column("columns", 0)),
        *(Column(metric.unit, metric.digits) for metric in _METRICS),
        *(Column("recommendation"), Column("effective"), Column("reason")),
    ]
    rows: list[list[Cell]] = [
        [
            *(tensor.name, *tensor.shape),
            *(metric.value(tensor) for metric in _METRICS),
            *(tensor.recommendation, tensor.effective, tensor.reason),
        ]
        for tensor in report.tensors
    ]
    return Table(columns, rows)
