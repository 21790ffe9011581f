"""The page of `sensitivity --html`."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

from ...checkpoint.file_names import base_name
from ...checkpoint.quantization import WEIGHT_SUFFIX
from ...printing.screen import size_text
from ...text import natural_order, plural
from ..pages.blocks import Cell, Column, Paragraph, Table
from ..pages.chart import NamedSet, SizeChart
from ..pages.keep import KeepOrder
from ..pages.network import Metric, NetworkMap
from ..pages.page import FROM_PROGRAM, Fact, Origin, Page, Section, Tile, render_page
from ..pages.units import fitting_unit
from .measure import OutputError
from .run import Choice, Measured, SensitivityReport
from .salience import Salience

_BANDS: tuple[tuple[str, str, Callable[[OutputError], float]], ...] = (
    ("all frequencies", "Error", lambda error: error.total),
    ("low frequencies", "Content", lambda error: error.low),
    ("high frequencies", "Detail", lambda error: error.high),
)
_AROUND = 10.0  # dB on either side of a fair share of the bound that colours cover

_Layer = tuple[Measured, Salience | None]


def sensitivity_page(report: SensitivityReport, origin: Origin = FROM_PROGRAM) -> str:
    """Return a page with what was measured, as HTML.

    Args:
        report: what was measured.
        origin: how the page came to be.
    """
    keep = _keep(report)
    sections = [
        Section("The network", [Paragraph(_HOW_TO_READ), _network(report, keep)]),
        Section("Size against error", [Paragraph(_SIZES), _chart(report, keep)]),
        Section("Groups", [Paragraph(_GROUPS), _groups(report)]),
        Section("Layers", [Paragraph(_LAYERS), _layers(report)]),
    ]
    if len(report.layers[0].by_step) > 1:
        sections.append(Section("Steps", [Paragraph(_STEPS), _steps(report)]))
    return render_page(
        Page(
            report="sensitivity",
            title=f"Sensitivity of {base_name(report.path)}, measured",
            question="Which layers have to stay in BF16 so that the output of the transformer "
            "stays within the bound?",
            facts=_facts(report),
            tiles=_tiles(report),
            sections=sections,
            origin=origin,
        )
    )


_HOW_TO_READ = (
    "Each layer was quantised alone. Blocks stand in the order of their computation: noise "
    "refiner, context refiner, main blocks. The slider keeps the layers that cost most for the "
    "bytes they save; embedders and the final layer always stay in BF16."
)
_SIZES = (
    "Dots are sets of layers that were measured as a whole. Between them the line is an estimate: "
    "each layer has a share of the difference, in proportion to what it costs alone."
)
_GROUPS = (
    "Squared error of the output relative to its energy, with the group quantised and nothing "
    "else: of all frequencies, of low ones (content) and of high ones (detail)."
)

_LAYERS = (
    "Each layer quantised alone. Figures of channels are missing for modulations, whose input is "
    "one vector."
)
_STEPS = "The squared error (%) of each layer quantised alone, at each step."


def _facts(report: SensitivityReport) -> list[Fact]:
    found = report.conditions
    steps = [str(step) for step, _ in report.layers[0].by_step]
    height, width = found.size
    return [
        Fact("checkpoint", base_name(report.path)),
        Fact("size in BF16", size_text(_nbytes_in_bf16(report))),
        Fact("bound", f"{report.bound:g}"),
        Fact("compute mode", found.compute),
        Fact("image", f"{width:,} x {height:,} pixels"),
        Fact("captions", f"{found.captions:,}"),
        Fact("steps", f"{', '.join(steps)} of 0 to 7"),
        Fact("seed", str(found.seed)),
        Fact("device", f"{found.device}, {found.dtype}"),
    ]


def _nbytes_in_bf16(report: SensitivityReport) -> int:
    return report.everything.nbytes + sum(layer.saved for layer in report.layers)


def _tiles(report: SensitivityReport) -> list[Tile]:
    smallest, everything, card = report.smallest, report.everything, report.card
    kept, count = len(smallest.kept), len(report.layers)
    worst = max(report.layers, key=lambda layer: layer.error.total)
    total = sum(layer.error.total for layer in report.layers)
    share = worst.error.total / total if total else 0.0
    return [
        Tile(
            "Keep in BF16",
            f"{kept:,} of {count:,}",
            f"layers hold the bound: {smallest.error:.4f} of {report.bound:g}",
        ),
        Tile(
            "File with the recipe",
            size_text(smallest.nbytes),
            f"{100 * smallest.nbytes / _nbytes_in_bf16(report):.0f} % of BF16",
        ),
        _error_tile("Every layer quantised", everything, report.bound),
        _error_tile("The model card's layers kept", card, report.bound),
        Tile(
            "Most harmful layer",
            f"{100 * share:.1f} %",
            f"of what all cost alone: {worst.name}",
        ),
    ]


def _error_tile(label: str, choice: Choice, bound: float) -> Tile:
    holds = choice.error <= bound
    return Tile(
        label,
        f"{choice.error:.4f}",
        f"relative error, {'within' if holds else 'above'} the bound; {size_text(choice.nbytes)}",
        "good" if holds else "bad",
    )


def _keep(report: SensitivityReport) -> KeepOrder:
    """Return the order of the search; errors of layers are scaled to the measured sets."""
    count = len(report.layers)
    squares = {len(choice.kept): choice.error**2 for choice in report.tried}
    squares |= {0: report.everything.error**2, count: 0.0}
    alone = [layer.error.total for layer in report.layers]
    parts: list[float] = []
    for begin, end in pairwise(sorted(squares)):
        difference, total = squares[begin] - squares[end], sum(alone[begin:end])
        for error in alone[begin:end]:
            share = error / total if total > 0 else 1 / (end - begin)
            parts.append(difference * share)
    return KeepOrder(
        names=[layer.name + WEIGHT_SUFFIX for layer in report.layers],
        smallest=report.everything.nbytes,
        added=[layer.saved for layer in report.layers],
        parts=parts,
        chosen=len(report.smallest.kept),
        error="relative error of the output",
        root=True,
        measured=sorted(squares),
    )


def _network(report: SensitivityReport, keep: KeepOrder) -> NetworkMap[_Layer]:
    layers = {layer.name: (layer, report.salience.get(layer.name)) for layer in report.layers}
    fair = 10 * math.log10(report.bound**2 / len(report.layers))
    metrics = [_error_metric(title, band, value, fair) for band, title, value in _BANDS]
    metrics.append(
        _salience_metric(
            "Activation peak",
            lambda found: found.activation_peak,
            "The largest activation channel over the median one.",
            lambda value: f"{value:.1f}",
            (1, 10),
        )
    )
    if len(report.layers[0].by_step) > 1:
        metrics.append(
            _salience_metric(
                "Drift in time",
                lambda found: 100 * found.time_drift,
                "The share of the top 1 % of activation channels that differ from one timestep to "
                "the next.",
            )
        )
    if any(salience.depth_drift for salience in report.salience.values()):
        metrics.append(
            _salience_metric(
                "Drift in depth",
                lambda found: 100 * found.depth_drift,
                "The share of the top 1 % of activation channels that differ from the block "
                "before; 0 in the first.",
            )
        )
    return NetworkMap(layers, metrics, keep)


def _error_metric(
    title: str, band: str, value: Callable[[OutputError], float], fair: float
) -> Metric[_Layer]:
    def decibels(layer: _Layer) -> float | None:
        error = value(layer[0].error)
        return 10 * math.log10(error) if error > 0 else fair - _AROUND

    return Metric(
        title,
        decibels,
        lambda decibel: f"{10 ** (decibel / 10):.1e}",
        fair - _AROUND,
        fair + _AROUND,
        f"Squared error of the output relative to its energy, {band}. With an equal "
        f"share of the bound each layer would have {10 ** (fair / 10):.1e}.",
    )


def _salience_metric(
    title: str,
    value: Callable[[Salience], float],
    note: str,
    words: Callable[[float], str] = lambda value: f"{value:.0f} %",
    ends: tuple[float, float] = (0, 100),
) -> Metric[_Layer]:
    def found(layer: _Layer) -> float | None:
        return None if layer[1] is None else value(layer[1])

    note += " Empty for modulations, whose input is one vector."
    return Metric(title, found, words, *ends, note)


def _chart(report: SensitivityReport, keep: KeepOrder) -> SizeChart:
    choices = [
        NamedSet(f"{name} ({plural(len(choice.kept), 'layer')} kept)", choice.nbytes, choice.error)
        for name, choice in (("model card", report.card), ("recommended", report.smallest))
    ]
    return SizeChart(keep, choices, report.bound)


def _groups(report: SensitivityReport) -> Table:
    columns = [
        *(Column("group"), Column("layers", 0)),
        *(
            Column(f"squared error (%), {band}", 5, dots=i == 0)
            for i, (band, _, _) in enumerate(_BANDS)
        ),
    ]
    rows: list[list[Cell]] = [
        [m.name, m.layers, *(100 * value(m.error) for _, _, value in _BANDS)]
        for m in sorted(report.groups, key=lambda group: -group.error.total)
    ]
    return Table(columns, rows, "groups")


def _layers(report: SensitivityReport) -> Table:
    kept = set(report.smallest.kept)
    divisor, unit = fitting_unit(max(layer.saved for layer in report.layers))
    columns = [
        *(Column("layer"), Column("kept"), Column(f"saved ({unit})", 2)),
        *(Column(f"squared error (%), {band}", 5) for band, _, _ in _BANDS),
        *(Column("activation peak", 1), Column("activation outliers (%)", 2)),
        *(Column("weight outliers (%)", 2), Column("drift in time (%)", 0)),
        Column("drift in depth (%)", 0),
    ]
    rows: list[list[Cell]] = []
    for m in _in_order(report):
        found = report.salience.get(m.name)
        salience: list[Cell] = [None] * 5
        if found is not None:
            salience = [
                found.activation_peak,
                *(100 * share for share in (found.activation_outliers, found.weight_outliers)),
                *(100 * share for share in (found.time_drift, found.depth_drift)),
            ]
        rows.append(
            [
                *(m.name, "yes" if m.name in kept else "no", m.saved / divisor),
                *(100 * value(m.error) for _, _, value in _BANDS),
                *salience,
            ]
        )
    return Table(columns, rows, "layers")


def _steps(report: SensitivityReport) -> Table:
    steps = [step for step, _ in report.layers[0].by_step]
    columns = [Column("layer"), *(Column(f"step {step}", 5) for step in steps)]
    rows: list[list[Cell]] = [
        [m.name, *(100 * error.total for _, error in m.by_step)] for m in _in_order(report)
    ]
    return Table(columns, rows, "steps")


def _in_order(report: SensitivityReport) -> list[Measured]:
    return sorted(report.layers, key=lambda layer: natural_order(layer.name))
