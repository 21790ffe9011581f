"""Tables of `probe`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..text import plural
from .screen import Screen, size_text

if TYPE_CHECKING:
    from ..analysis.probe.grouping import ProbedGroup
    from ..analysis.probe.run import ProbeReport


def print_probe(report: ProbeReport, screen: Screen) -> None:
    """Print groups, counts and the size of a conversion that follows them."""
    screen.table(
        f"{report.path}: {plural(len(report.tensors), 'weight')} probed",
        [
            *("layer type", "blocks>", "recommended", "score>", "kurtosis>", "largest>"),
            *("range>", "std>", "outliers (%)>"),
        ],
        [
            [
                group.layer_type,
                f"{group.first_block}-{group.last_block}",
                _group_recommendation(group),
                f"{group.score:.3f}",
                f"{group.metrics.excess_kurtosis:.3f}",
                f"{group.largest_kurtosis:.3f}",
                f"{group.metrics.dynamic_range:.3f}",
                f"{group.metrics.std:.4f}",
                f"{group.metrics.outlier_pct:.2f}",
            ]
            for group in report.groups
        ],
        spare=4,
    )
    if any(group.spread_filtered for group in report.groups):
        screen.text(
            '"->" demotes, because the scores of the layer type differ by less than '
            f"{report.rules.min_group_spread:g} by position."
        )
    effective = [tensor.effective for tensor in report.tensors]
    counts = ", ".join(f"{effective.count(kind)} {kind}" for kind in ("*KEEP*", "FP8", "NVFP4"))
    screen.text(
        f"{counts}. Scores from {report.thresholds.fp8:.4f} on mean FP8, from "
        f"{report.thresholds.keep:.4f} on they are kept, unless their layer type is demoted. "
        "Convert writes MXFP8 for FP8 and NVFP4 alike."
    )
    if report.exclude_layers is None:
        screen.line("No weight is worth keeping by these rules: there is nothing to exclude.")
    else:
        screen.line()
        screen.text(
            "A conversion that keeps them in addition to the default recipe "
            + _size(report.exclude_layers_bytes, report.input_bytes)
        )
    screen.line()
    screen.text(
        "A conversion that keeps only them, the embedders and the final layer "
        + _size(report.recipe_bytes, report.input_bytes)
    )


def _group_recommendation(group: ProbedGroup) -> str:
    if not group.spread_filtered:
        return group.recommendation
    return f"{group.recommendation} -> {group.effective}"


def _size(nbytes: int | None, before: int) -> str:
    if nbytes is None:
        return "would be refused."
    share = nbytes / before - 1
    return f"would write exactly {nbytes:,} bytes ({size_text(nbytes)}, {share:+.1%})."
