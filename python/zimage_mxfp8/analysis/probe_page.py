"""The page of `probe --html`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..text import plural
from .figures import Grid, category_map, heat_map, line_plot
from .grouping import ProbedTensor, Stack
from .page import Block, Column, Copyable, Figure, Paragraph, Section, Table, render_page
from .probe import ProbeReport
from .scoring import MAIN_TYPES, Recommendation

_STACKS: tuple[tuple[Stack, str], ...] = (
    ("noise_refiner", "noise "),
    ("context_refiner", "context "),
    ("layers", ""),
)
_RECOMMENDATIONS: tuple[Recommendation, ...] = ("NVFP4", "FP8", "*KEEP*")

_GROUPS = (
    "Main blocks are split by position. A group's figures are means, and its recommendation "
    "overrules that of its weights; but refiners, and the layer types that are exempt from the "
    "spread filter, are decided weight by weight."
)

# Title, decimals and value of what has a heat map of its own.
_MAPS: tuple[tuple[str, int, Callable[[ProbedTensor], float]], ...] = (
    ("score", 4, lambda tensor: tensor.score),
    ("excess kurtosis", 4, lambda tensor: tensor.metrics.excess_kurtosis),
    ("dynamic range", 4, lambda tensor: tensor.metrics.dynamic_range),
    ("std", 6, lambda tensor: tensor.metrics.std),
    ("outliers (%)", 2, lambda tensor: tensor.metrics.outlier_pct),
    ("aspect ratio", 2, lambda tensor: tensor.metrics.aspect_ratio),
)


def probe_page(report: ProbeReport) -> str:
    """A page with the figures of every weight, in heat maps and in a table, as HTML.

    Raises:
        UnsupportedError: plotly is not installed.
    """
    sections = [
        Section("What to keep", _summary(report)),
        Section("Where the sensitive weights are", _figures(report)),
        Section("Groups", [Paragraph(_GROUPS), _groups(report)]),
        Section("Weights", [_weights(report)]),
    ]
    return render_page(f"Sensitivity of {Path(report.path).name}", sections)


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
    label = f"Exclusion list, for zimage-mxfp8 convert --exclude-layers ({result}):"
    return [*blocks, Copyable(label, report.exclude_layers)]


def _figures(report: ProbeReport) -> list[Block]:
    at = {(t.stack, t.block, _short_type(t)): t for t in report.tensors}
    columns = {
        (stack, block): f"{prefix}{block}"
        for stack, prefix in _STACKS
        for block in sorted({t.block for t in report.tensors if t.stack == stack})
    }
    kinds = [kind for kind in MAIN_TYPES if any(key[2] == kind for key in at)]
    grid = Grid(list(columns.values()), kinds)

    def cells(value: Callable[[ProbedTensor], float]) -> list[list[float | None]]:
        found = [[at.get((*column, kind)) for column in columns] for kind in kinds]
        return [[None if t is None else value(t) for t in row] for row in found]

    effective = cells(lambda tensor: _RECOMMENDATIONS.index(tensor.effective))
    names, marks = ("NVFP4", "FP8", "KEEP"), ("4", "8", "K")
    lines = dict(zip(kinds, cells(lambda tensor: tensor.score), strict=True))
    limits = {"kept": report.thresholds.keep, "FP8": report.thresholds.fp8}
    return [
        Paragraph(
            "Blocks in the order of their computation: noise refiner, context refiner, main "
            "blocks. Colours end where a few extreme weights would hide the differences of all "
            "others; pointing at a cell shows its figure."
        ),
        Figure("Effective recommendation", category_map(grid, effective, names, marks)),
        Figure("Score by block", line_plot(grid.columns, lines, limits, "score")),
        *(
            Figure(title.capitalize(), heat_map(grid, cells(value), title, digits))
            for title, digits, value in _MAPS
        ),
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
    rows: list[list[str | float]] = [
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
        *(Column(title, digits) for title, digits, _ in _MAPS),
        *(Column("recommendation"), Column("effective"), Column("reason")),
    ]
    rows: list[list[str | float]] = [
        [
            *(tensor.name, *tensor.shape),
            *(value(tensor) for _, _, value in _MAPS),
            *(tensor.recommendation, tensor.effective, tensor.reason),
        ]
        for tensor in report.tensors
    ]
    return Table(columns, rows)
