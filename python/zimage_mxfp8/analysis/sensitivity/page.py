"""The page of `sensitivity --html`."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from ...text import plural
from ..figures import Grid, heat_map, size_plot
from ..page import Block, Column, Copyable, Figure, Paragraph, Section, Table, render_page
from .measure import OutputError
from .run import Choice, SensitivityReport

_BANDS: tuple[tuple[str, Callable[[OutputError], float]], ...] = (
    ("all frequencies", lambda error: error.total),
    ("low frequencies", lambda error: error.low),
    ("high frequencies", lambda error: error.high),
)


def sensitivity_page(report: SensitivityReport) -> str:
    """A page with what was measured, as HTML.

    Raises:
        UnsupportedError: plotly is not installed.
    """
    sections = [
        Section("What to keep", _choices(report)),
        Section("Each layer quantised alone", _maps(report)),
        Section("Groups", [_groups(report)]),
        Section("Layers", [_layers(report)]),
    ]
    return render_page(f"Sensitivity of {Path(report.path).name}, measured", sections)


def _choices(report: SensitivityReport) -> list[Block]:
    def point(choice: Choice) -> tuple[float, float, str]:
        return choice.nbytes / 2**30, choice.error, f"{choice.name}: {len(choice.kept)} kept"

    smallest = report.smallest
    series = {
        "tried": [point(choice) for choice in report.tried],
        "every layer quantised": [point(report.everything)],
        "the model card's exclusions": [point(report.card)],
        "smallest within the bound": [point(smallest)],
    }
    blocks: list[Block] = [
        Paragraph(
            f"Keeping {plural(len(smallest.kept), 'layer')} in BF16 holds the relative error of "
            f"the output at {smallest.error:.4f}; the bound was {report.bound:g}. With every layer "
            f"quantised it is {report.everything.error:.4f}, with the model card's exclusions "
            f"{report.card.error:.4f}."
        ),
        Figure("Error against size", size_plot(series, "relative error")),
    ]
    if smallest.kept:
        pattern = "|".join(f"{name}." for name in smallest.kept).replace(".", r"\.")
        blocks.append(Copyable("Exclusion list, for convert --exclude-layers:", pattern))
    return blocks


def _maps(report: SensitivityReport) -> list[Block]:
    errors = {m.name: m.error for m in report.layers}
    blocks = sorted({_block_and_kind(name)[0] for name in errors}, key=_order)
    kinds = sorted({_block_and_kind(name)[1] for name in errors})
    grid = Grid([f"{stack} {number}" for stack, number in blocks], kinds)

    def cells(value: Callable[[OutputError], float]) -> list[list[float | None]]:
        names = [[f"{stack}.{number}.{kind}" for stack, number in blocks] for kind in kinds]
        return [
            [_decibels(value(errors[name])) if name in errors else None for name in row]
            for row in names
        ]

    return [
        Paragraph(
            "Squared error of the output relative to its energy, in decibels: 10 more are ten "
            "times the error. Mean over timesteps."
        ),
        *(
            Figure(title.capitalize(), heat_map(grid, cells(value), "error (dB)", 1))
            for title, value in _BANDS
        ),
    ]


def _block_and_kind(name: str) -> tuple[tuple[str, int], str]:
    stack, number, kind = name.split(".", 2)
    return (stack, int(number)), kind


def _order(block: tuple[str, int]) -> tuple[int, int]:
    return ("noise_refiner", "context_refiner", "layers").index(block[0]), block[1]


def _decibels(error: float) -> float | None:
    return 10 * math.log10(error) if error > 0 else None


def _groups(report: SensitivityReport) -> Table:
    columns = [Column("group"), Column("layers", 0), *(Column(title, 7) for title, _ in _BANDS)]
    return Table(
        columns,
        [[m.name, m.layers, *(value(m.error) for _, value in _BANDS)] for m in report.groups],
    )


def _layers(report: SensitivityReport) -> Table:
    kept = set(report.smallest.kept)
    columns = [
        *(Column("layer"), Column("kept"), Column("MiB saved", 2)),
        *(Column(title, 7) for title, _ in _BANDS),
        *(Column(f"step {step}", 7) for step, _ in report.layers[0].by_step),
        *(Column("activation peak", 1), Column("activation outliers (%)", 2)),
        *(Column("weight outliers (%)", 2), Column("drift in time (%)", 0)),
        Column("drift in depth (%)", 0),
    ]
    rows: list[list[str | float]] = []
    for m in report.layers:
        found = report.salience.get(m.name)
        salience: list[str | float] = [""] * 5
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
