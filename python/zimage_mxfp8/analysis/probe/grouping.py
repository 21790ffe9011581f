"""Groups of weights by layer type and position, and what they decide for their weights.

Rules of quant_probe: a weight alone may be sensitive by chance, a group of neighbours is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ...zimage.layers import ZIMAGE
from ...zimage.table import LayerTable
from .scoring import (
    ProbeRules,
    Reason,
    Recommendation,
    Thresholds,
    recommend,
)
from .weight_metrics import WeightMetrics

Position = Literal["extreme low", "middle", "extreme high", "all"]


@dataclass(frozen=True)
class ProbedTensor:
    """One weight and what becomes of it.

    Attributes:
        name: the tensor's name in the ComfyUI layout, with its prefix.
        layer_type: "attention.qkv", ...; with the stack before it for refiners.
        block: number of the block in its stack.
        stack: name of its stack of blocks.
        shape: [rows, columns].
        saved: bytes that MXFP8 saves, against the checkpoint's type.
        metrics: its statistics.
        score: 0 to 1, the more sensitive the higher.
        recommendation: by its own figures.
        effective: after its group had its say.
        reason: why `effective` is what it is.
    """

    name: str
    layer_type: str
    block: int
    stack: str
    shape: tuple[int, int]
    saved: int
    metrics: WeightMetrics
    score: float
    recommendation: Recommendation
    effective: Recommendation
    reason: Reason


@dataclass(frozen=True)
class ProbedGroup:
    """Weights of one layer type at one end, or in the middle, of their stack.

    Attributes:
        layer_type: theirs.
        position: where in the stack; "all" for refiners, which are not split.
        first_block: the first of their blocks.
        last_block: the last.
        count: number of weights.
        metrics: means.
        largest_kurtosis: the one that the floor looks at.
        score: mean.
        recommendation: by these figures.
        reason: why.
        spread_filtered: demoted, because the scores of its layer type differ too little by
            position: FP8 becomes NVFP4, `*KEEP*` becomes FP8.
    """

    layer_type: str
    position: Position
    first_block: int
    last_block: int
    count: int
    metrics: WeightMetrics
    largest_kurtosis: float
    score: float
    recommendation: Recommendation
    reason: Reason
    spread_filtered: bool

    @property
    def effective(self) -> Recommendation:
        """The recommendation after the spread filter."""
        if not self.spread_filtered:
            return self.recommendation
        return "NVFP4" if self.recommendation == "FP8" else "FP8"


@dataclass(frozen=True)
class Weight:
    """A weight before groups are looked at; fields as in `ProbedTensor`."""

    name: str
    layer_type: str
    block: int
    stack: str
    shape: tuple[int, int]
    saved: int
    metrics: WeightMetrics
    score: float


def decide(
    weights: Sequence[Weight],
    limits: Thresholds,
    rules: ProbeRules,
    table: LayerTable = ZIMAGE,
) -> tuple[list[ProbedTensor], list[ProbedGroup]]:
    """Recommendations for weights and groups, in the order of `weights` and of the layer types."""
    blocks = max((w.block + 1 for w in weights if w.stack == table.main.name), default=0)
    extreme = max(1, round(blocks * rules.extreme_pct / 100))

    def position(weight: Weight) -> Position:
        if weight.stack != table.main.name:
            return "all"
        if weight.block < extreme:
            return "extreme low"
        return "extreme high" if weight.block >= blocks - extreme else "middle"

    members: dict[tuple[str, Position], list[Weight]] = {}
    for weight in weights:
        members.setdefault((weight.layer_type, position(weight)), []).append(weight)
    group_scores: dict[str, list[float]] = {}
    for (kind, _), found in members.items():
        group_scores.setdefault(kind, []).append(_mean([w.score for w in found]))
    by_weight = {*table.refiner_types(), *rules.spread_filter_exempt}
    low_spread = {
        kind
        for kind, found in group_scores.items()
        if kind not in by_weight and max(found) - min(found) < rules.min_group_spread
    }
    groups = {
        key: _group(*key, found, limits, rules, key[0] in low_spread)
        for key, found in members.items()
    }
    tensors = []
    for weight in weights:
        own, reason = recommend(weight.score, weight.metrics.excess_kurtosis, limits, rules)
        effective = own
        if weight.layer_type not in by_weight:
            group = groups[weight.layer_type, position(weight)]
            effective, reason = _overruled(group, own, reason)
        tensors.append(
            ProbedTensor(**vars(weight), recommendation=own, effective=effective, reason=reason)
        )
    types = table.layer_types()
    order = ("extreme low", "middle", "extreme high", "all")
    in_order = sorted(groups, key=lambda key: (types.index(key[0]), order.index(key[1])))
    return tensors, [groups[key] for key in in_order]


def _overruled(
    group: ProbedGroup, own: Recommendation, reason: Reason
) -> tuple[Recommendation, Reason]:
    """Return what a group makes of the recommendation of one of its weights."""
    if group.spread_filtered:
        return group.effective, "spread_demotion"
    if group.recommendation == "*KEEP*":
        return own, (reason if own == "*KEEP*" else "group_keep_resolved")
    if own == group.recommendation:
        return own, reason
    promoted = own == "NVFP4"
    return group.recommendation, "group_fp8_promotion" if promoted else "group_spread_demotion"


def _group(
    kind: str,
    position: Position,
    weights: Sequence[Weight],
    limits: Thresholds,
    rules: ProbeRules,
    low_spread: bool,
) -> ProbedGroup:
    found = [w.metrics for w in weights]
    metrics = WeightMetrics(
        _mean([m.excess_kurtosis for m in found]),
        _mean([m.dynamic_range for m in found]),
        _mean([m.std for m in found]),
        _mean([m.outlier_pct for m in found]),
        _mean([m.aspect_ratio for m in found]),
    )
    score, kurtosis = _mean([w.score for w in weights]), max(m.excess_kurtosis for m in found)
    recommendation, reason = recommend(score, kurtosis, limits, rules)
    blocks = [w.block for w in weights]
    return ProbedGroup(
        kind,
        position,
        min(blocks),
        max(blocks),
        len(weights),
        metrics,
        kurtosis,
        score,
        recommendation,
        reason,
        low_spread and recommendation != "NVFP4",
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
