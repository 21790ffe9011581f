"""Tables of `sensitivity`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .screen import Screen, size_text

if TYPE_CHECKING:
    from ..analysis.sensitivity.run import Choice, Measured, SensitivityReport

_SHOWN = 15  # layers of the ranking


def print_sensitivity(report: SensitivityReport, screen: Screen) -> None:
    """Print the measurements and the set to keep."""
    columns = ["squared error>", "low>", "high>", "first step>", "last step>"]

    def row(measured: Measured) -> list[str]:
        e, steps = measured.error, [error.total for _, error in measured.by_step]
        return [f"{x:.2e}" for x in (e.total, e.low, e.high, steps[0], steps[-1])]

    screen.table(
        "Squared error of the output relative to its energy, each group quantised alone for "
        f"compute mode {report.conditions.compute}: of all frequencies, of low and of high ones, "
        "of all at the first and the last timestep",
        ["group", "layers>", *columns],
        [[m.name, str(m.layers), *row(m)] for m in report.groups],
        spare=2,
    )
    screen.table(
        f"The {min(_SHOWN, len(report.layers))} layers that cost most for the bytes they save: "
        "the same figures, each quantised alone",
        ["layer", *columns],
        [[m.name, *row(m)] for m in report.layers[:_SHOWN]],
        spare=2,
    )
    drifting = sorted(report.salience.items(), key=lambda item: -item[1].activation_peak)[:_SHOWN]
    screen.table(
        "Channels that stand out: the largest over the median, and the share over 5 medians",
        ["layer", "peak>", "activations>", "weights>", "drift in time>", "in depth>"],
        [
            [
                name,
                f"{s.activation_peak:.1f}",
                f"{s.activation_outliers:.2%}",
                f"{s.weight_outliers:.2%}",
                f"{s.time_drift:.0%}",
                f"{s.depth_drift:.0%}",
            ]
            for name, s in drifting
        ],
        spare=2,
    )

    def choice(what: str, chosen: Choice) -> list[str]:
        size = size_text(chosen.nbytes)
        return [what, str(len(chosen.kept)), size, f"{chosen.error:.4f}"]

    screen.table(
        "Choices: relative error of the output (norm of the difference over that of the output) "
        "with all layers quantised but the kept ones",
        ["choice", "kept layers>", "size>", "relative error>"],
        [
            choice("every layer quantised", report.everything),
            choice("the model card's exclusions", report.card),
            choice(f"smallest for a bound of {report.bound:g}", report.smallest),
        ],
    )
    if report.smallest.kept:
        screen.line()
        screen.line("To hold the bound, keep")
        for name in report.smallest.kept:
            screen.line(name)
