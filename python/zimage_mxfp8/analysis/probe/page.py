"""The page of `probe --html`."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields

from ...checkpoint.file_names import base_name
from ...checkpoint.quantization import WEIGHT_SUFFIX
from ...printing.screen import size_text
from ...text import natural_order, plural
from ..pages.blocks import Cell, Column, Paragraph, Table, Terms
from ..pages.chart import NamedSet, SizeChart
from ..pages.keep import KeepOrder
from ..pages.network import Kinds, Metric, NetworkMap
from ..pages.page import FROM_PROGRAM, Block, Fact, Origin, Page, Section, Tile, render_page
from .grouping import ProbedGroup, ProbedTensor
from .run import ProbeReport
from .scoring import ProbeRules, Reason, Recommendation

_SHOWN: dict[Recommendation, str] = {"NVFP4": "NVFP4", "FP8": "FP8", "*KEEP*": "keep"}

_METRICS: tuple[Metric[ProbedTensor] | Kinds[ProbedTensor], ...] = (
    Metric(
        "Score",
        lambda tensor: tensor.score,
        lambda score: f"{score:.3f}",
        0,
        1,
        "The weighted sum of kurtosis, dynamic range and aspect ratio, 0 to 1.",
    ),
    Kinds(
        "Recommendation",
        lambda tensor: _SHOWN[tensor.effective],
        {"NVFP4": 0, "FP8": 0.5, "keep": 1},
        "After the groups decided. A conversion writes MXFP8 for FP8 and NVFP4 alike.",
    ),
    Metric(
        "Excess kurtosis",
        lambda tensor: tensor.metrics.excess_kurtosis,
        lambda kurtosis: f"{kurtosis:.2f}",
        0,
        8,
        "0 for a normal distribution, more with heavier tails. The lightest colour is at 8, "
        "quant_probe's floor, or beyond.",
    ),
    Metric(
        "Dynamic range",
        lambda tensor: tensor.metrics.dynamic_range,
        lambda value: f"{value:.3f}",
        0,
        0,
        "The largest magnitude of a weight minus the smallest, from zero on.",
    ),
    Metric(
        "Outliers",
        lambda tensor: tensor.metrics.outlier_pct,
        lambda value: f"{value:.2f} %",
        0,
        1,
        "Elements further from the mean than a number of standard deviations, 3 by default.",
    ),
    Metric(
        "Aspect ratio",
        lambda tensor: tensor.metrics.aspect_ratio,
        lambda value: f"{value:.2f}",
        1,
        4,
        "The longer side over the shorter.",
    ),
)


def probe_page(report: ProbeReport, origin: Origin = FROM_PROGRAM) -> str:
    """Return a page with the figures of every weight, on a map and in a table, as HTML.

    Args:
        report: what was found.
        origin: how the page came to be.
    """
    keep = _keep(report)
    sections = [
        Section("The network", [Paragraph(_HOW_TO_READ), _network(report, keep)]),
        *([] if keep is None else [Section("Size against score", _sizes(report, keep))]),
        Section("Reasons", [_reasons(report)]),
        Section("Groups", [Paragraph(_GROUPS), _groups(report)]),
        Section("Weights", [_weights(report)]),
    ]
    return render_page(
        Page(
            report="probe",
            title=f"Weights of {base_name(report.path)} that stand out",
            question="Which weights stand out so much that they are worth keeping in BF16? The "
            "statistics of the weights answer, as in quant_probe; no image was drawn.",
            facts=_facts(report),
            tiles=_tiles(report),
            sections=sections,
            origin=origin,
        )
    )


_HOW_TO_READ = (
    "Blocks stand in the order of their computation: noise refiner, context refiner, main blocks. "
    "The slider keeps more or fewer layers than recommended: first what the rules keep, "
    "then the highest scores. Embedders and the final layer are always kept, as in the recipe; "
    "modulations of refiners are not looked at, as in quant_probe, and quantised."
)
_GROUPS = (
    "Main blocks are split by position. A group's figures are means, and its recommendation "
    "overrules that of its weights; but refiners, and the layer types that are exempt from the "
    "spread filter, are decided weight by weight. An arrow is a step down, because the scores of "
    "the layer type differ too little by position."
)


def _facts(report: ProbeReport) -> list[Fact]:
    defaults = ProbeRules()
    changed = {
        field.name: getattr(report.rules, field.name)
        for field in fields(ProbeRules)
        if getattr(report.rules, field.name) != getattr(defaults, field.name)
    }
    rules = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in changed.items())
    return [
        Fact("checkpoint", base_name(report.path)),
        Fact("size", size_text(report.input_bytes)),
        Fact("weights", f"{len(report.tensors):,}"),
        Fact("rules", rules or "quant_probe's defaults"),
    ]


def _tiles(report: ProbeReport) -> list[Tile]:
    kept, count = _kept(report), len(report.tensors)
    floor = report.rules.kurtosis_keep
    above = [tensor for tensor in kept if tensor.reason == "kurtosis_floor"]
    highest = max(report.tensors, key=lambda tensor: tensor.score)
    size = report.recipe_bytes
    return [
        Tile(
            "Keep in BF16",
            f"{len(kept):,} of {count:,}",
            f"weights, {100 * len(kept) / count:.1f} %",
        ),
        Tile(
            "File with the recipe",
            "refused" if size is None else size_text(size),
            "nothing would be left to quantise"
            if size is None
            else f"{100 * size / report.input_bytes:.0f} % of the checkpoint",
        ),
        Tile(
            "Heavy tails",
            plural(len(above), "weight") if above else "none",
            f"kept for an excess kurtosis of {floor:g} or more"
            if above
            else f"no kurtosis reaches {floor:g}; the percentile decides, which always keeps some",
            "bad" if above else "good",
        ),
        Tile("Highest score", f"{highest.score:.3f}", _layer(highest)),
        Tile(
            "Kept from",
            f"{report.thresholds.keep:.3f}",
            f"score at percentile {report.rules.keep_percentile:g}; FP8 from "
            f"{report.thresholds.fp8:.3f} (percentile {report.rules.fp8_percentile:g})",
        ),
    ]


def _kept(report: ProbeReport) -> list[ProbedTensor]:
    return [tensor for tensor in report.tensors if tensor.effective == "*KEEP*"]


def _layer(tensor: ProbedTensor) -> str:
    kind = tensor.layer_type.removeprefix(f"{tensor.stack}.")
    return f"{tensor.stack}.{tensor.block}.{kind}"


def _keep(report: ProbeReport) -> KeepOrder | None:
    """Return the order of the slider; None if the recipe would be refused."""
    if report.recipe_bytes is None:
        return None
    kept = _kept(report)
    order = sorted(report.tensors, key=lambda tensor: (tensor.effective != "*KEEP*", -tensor.score))
    total = sum(tensor.score for tensor in report.tensors) or 1.0
    return KeepOrder(
        names=[_layer(tensor) + WEIGHT_SUFFIX for tensor in order],
        smallest=report.recipe_bytes - sum(tensor.saved for tensor in kept),
        added=[tensor.saved for tensor in order],
        parts=[tensor.score / total for tensor in order],
        chosen=len(kept),
        error="scores left in quantised weights",
        percent=True,
    )


def _network(report: ProbeReport, keep: KeepOrder | None) -> Block:
    layers = {_layer(tensor): tensor for tensor in report.tensors}
    return NetworkMap(layers, _METRICS, keep, [_layer(tensor) for tensor in _kept(report)])


def _sizes(report: ProbeReport, keep: KeepOrder) -> list[Block]:
    choices = []
    if report.recipe_bytes is not None:
        choices = [NamedSet("recommended", report.recipe_bytes, keep.errors()[keep.chosen])]
    return [
        Paragraph(
            "The share of all scores that quantised weights have. A score is no error of the "
            "output; zimage-mxfp8 sensitivity measures that."
        ),
        SizeChart(keep, choices),
    ]


def _reasons(report: ProbeReport) -> Terms:
    rules, limits = report.rules, report.thresholds
    meanings: dict[Reason, str] = {
        "kurtosis_floor": f"Kept: the excess kurtosis is {rules.kurtosis_keep:g} or more, whatever "
        "the score.",
        "score_percentile": f"By its own score: kept from {limits.keep:.4f} on, FP8 from "
        f"{limits.fp8:.4f} on.",
        "score_below_fp8_min": f"NVFP4: the score is below {rules.fp8_min_score:g}, the least for "
        "FP8.",
        "default": f"NVFP4: the score is below {limits.fp8:.4f}.",
        "group_keep_resolved": "The group is to be kept, but this weight's own figures recommend "
        "less, and they decide.",
        "group_fp8_promotion": "NVFP4 by its own score; the group's figures recommend more.",
        "group_spread_demotion": "The group's figures recommend less than the weight's own.",
        "spread_demotion": "One step less than the group's figures recommend, because the scores "
        f"of its layer type differ by less than {rules.min_group_spread:g} by position.",
    }
    counts = Counter(tensor.reason for tensor in report.tensors)
    found = {
        f"{reason} ({plural(counts[reason], 'weight')})": meaning
        for reason, meaning in meanings.items()
        if counts[reason]
    }
    return Terms(found)


def _groups(report: ProbeReport) -> Table:
    columns = [
        *(Column("layer type"), Column("position"), Column("blocks"), Column("weights", 0)),
        *(Column("excess kurtosis", 4), Column("largest kurtosis", 4), Column("dynamic range", 4)),
        *(Column("std", 6), Column("outliers (%)", 2), Column("aspect ratio", 2)),
        *(Column("score", 4), Column("recommended"), Column("reason")),
    ]
    rows: list[list[Cell]] = [
        [
            *(group.layer_type, group.position, f"{group.first_block}-{group.last_block}"),
            *(group.count, group.metrics.excess_kurtosis, group.largest_kurtosis),
            *(group.metrics.dynamic_range, group.metrics.std, group.metrics.outlier_pct),
            *(group.metrics.aspect_ratio, group.score, _recommended(group), group.reason),
        ]
        for group in report.groups
    ]
    return Table(columns, rows, "groups")


def _recommended(group: ProbedGroup) -> str:
    """Return the recommendation of a group, after the spread filter."""
    words = _SHOWN[group.recommendation]
    if not group.spread_filtered:
        return words
    return f"{words} → {_SHOWN[group.effective]}"


def _weights(report: ProbeReport) -> Table:
    columns = [
        *(Column("weight"), Column("rows", 0), Column("columns", 0), Column("score", 4)),
        *(Column("excess kurtosis", 4), Column("dynamic range", 4), Column("std", 6)),
        *(Column("outliers (%)", 2), Column("aspect ratio", 2)),
        *(Column("by itself"), Column("recommended"), Column("reason")),
    ]
    rows: list[list[Cell]] = [
        [
            *(tensor.name, *tensor.shape, tensor.score),
            *(tensor.metrics.excess_kurtosis, tensor.metrics.dynamic_range, tensor.metrics.std),
            *(tensor.metrics.outlier_pct, tensor.metrics.aspect_ratio),
            *(_SHOWN[tensor.recommendation], _SHOWN[tensor.effective], tensor.reason),
        ]
        for tensor in sorted(report.tensors, key=lambda tensor: natural_order(tensor.name))
    ]
    return Table(columns, rows, "weights")
