"""The page of `sensitivity --html`."""

from __future__ import annotations

import math
from collections.abc import Callable

from ...checkpoint.file_names import base_name
from ...text import plural
from ..pages.block_maps import BlockMap, Metric, by_place
from ..pages.figures import size_plot
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
from .measure import OutputError
from .run import Choice, SensitivityReport
from .salience import Salience

_BANDS: tuple[tuple[str, Callable[[OutputError], float]], ...] = (
    ("all frequencies", lambda error: error.total),
    ("low frequencies", lambda error: error.low),
    ("high frequencies", lambda error: error.high),
)
_PEAK = Metric[Salience]("Activation peak", "peak", 1, lambda s: s.activation_peak)
_TIME_DRIFT = Metric[Salience]("Drift in time", "drift (%)", 0, lambda s: 100 * s.time_drift)
_DEPTH_DRIFT = Metric[Salience]("Drift in depth", "drift (%)", 0, lambda s: 100 * s.depth_drift)


def sensitivity_page(report: SensitivityReport) -> str:
    """Return a page with what was measured, as HTML.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    sections = [
        Section("What to keep", _choices(report)),
        Section("Each layer quantised alone", _errors(report)),
        Section("Channels that stand out", _channels(report)),
        Section("Groups", [_groups(report)]),
        Section("Layers", [_layers(report)]),
    ]
    return render_page(f"Sensitivity of {base_name(report.path)}, measured", sections)


def _choices(report: SensitivityReport) -> list[Block]:
    def point(choice: Choice) -> tuple[float, float, str]:
        return choice.nbytes / 2**30, choice.error, f"{choice.name}: {len(choice.kept)} kept"

    smallest, found = report.smallest, "smallest found within the bound"
    series = {
        "tried": [point(choice) for choice in report.tried],
        "every layer quantised": [point(report.everything)],
        "the model card's exclusions": [point(report.card)],
        found: [point(smallest)],
    }
    blocks: list[Block] = [
        Paragraph(
            f"Keeping {plural(len(smallest.kept), 'layer')} in BF16 holds the relative error of "
            f"the output at {smallest.error:.4f}; the bound was {report.bound:g}. With every layer "
            f"quantised it is {report.everything.error:.4f}, with the model card's exclusions "
            f"{report.card.error:.4f}."
        ),
        Figure("Relative error against size", size_plot(series, "relative error", chosen=found)),
    ]
    if smallest.kept:
        pattern = "|".join(f"{name}." for name in smallest.kept).replace(".", r"\.")
        blocks.append(Copyable("Exclusion list for a conversion:", pattern))
    return blocks


def _errors(report: SensitivityReport) -> list[Block]:
    layers = BlockMap(by_place({m.name: m.error for m in report.layers}))
    return [
        Paragraph(
            "Squared error of the output relative to its energy, in decibels: 10 dB more are ten "
            "times as much. Mean over timesteps. Blocks in the order of their computation: noise "
            "refiner, context refiner, main blocks."
        ),
        *layers.heat_maps(
            [
                Metric(title.capitalize(), "squared error (dB)", 1, _in_decibels(value))
                for title, value in _BANDS
            ]
        ),
    ]


def _channels(report: SensitivityReport) -> list[Block]:
    layers = by_place(report.salience)
    later = {place: salience for place, salience in layers.items() if place.block > 0}
    metrics = [_PEAK]
    if len(report.layers[0].by_step) > 1:
        metrics.append(_TIME_DRIFT)
    return [
        Paragraph(
            "The largest activation channel over the median one, and the share of the top 1 % of "
            "activation channels that differ from one timestep, or one block, to the next. Not for "
            "modulations, whose input is one vector."
        ),
        *BlockMap(layers).heat_maps(metrics),
        *BlockMap(later).heat_maps([_DEPTH_DRIFT]),
    ]


def _in_decibels(value: Callable[[OutputError], float]) -> Callable[[OutputError], float | None]:
    def decibels(error: OutputError) -> float | None:
        return 10 * math.log10(value(error)) if value(error) > 0 else None

    return decibels


def _groups(report: SensitivityReport) -> Table:
    columns = [
        Column("group"),
        Column("layers", 0),
        *(Column(f"squared error, {title}", 7) for title, _ in _BANDS),
    ]
    return Table(
        columns,
        [[m.name, m.layers, *(value(m.error) for _, value in _BANDS)] for m in report.groups],
    )


def _layers(report: SensitivityReport) -> Table:
    kept = set(report.smallest.kept)
    columns = [
        *(Column("layer"), Column("kept"), Column("MiB saved", 2)),
        *(Column(f"squared error, {title}", 7) for title, _ in _BANDS),
        *(Column(f"squared error, step {step}", 7) for step, _ in report.layers[0].by_step),
        *(Column("activation peak", 1), Column("activation outliers (%)", 2)),
        *(Column("weight outliers (%)", 2), Column("drift in time (%)", 0)),
        Column("drift in depth (%)", 0),
    ]
    rows: list[list[Cell]] = []
    for m in report.layers:
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
                *(m.name, "yes" if m.name in kept else "", m.saved / 2**20),
                *(value(m.error) for _, value in _BANDS),
                *(error.total for _, error in m.by_step),
                *salience,
            ]
        )
    return Table(columns, rows)
