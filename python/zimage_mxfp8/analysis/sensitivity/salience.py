"""Channels that stand out, in weights and in activations, and how they drift.

A channel is a column of a weight and of the activations that it multiplies; its salience is its
largest magnitude (Wu et al., "PTQ4DiT: Post-training Quantization for Diffusion Transformers",
2024). Channels that stand out are the hard ones to quantise per tensor or per token; blocks of 32
confine them. A fixed remedy can only work if they stay the same over timesteps and depth (the
question of HTG).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from ...transformer.model import ZImageTransformer
from ...transformer.ops import PLAIN
from .cases import Case
from .targets import Target

OUTLIER = 5.0  # times the median of a layer's channels
_TOP = 0.01  # of the channels are compared between timesteps and blocks


@dataclass(frozen=True)
class Salience:
    """Salience of the channels of one layer.

    Attributes:
        weight_outliers: share of channels with a salience of the weights over 5 times the median.
        activation_outliers: the same of the activations, mean over timesteps.
        activation_peak: the largest activation channel over the median one, largest of timesteps.
        time_drift: share of the top 1 % of activation channels that differ from one timestep to the
            next; 0 if there is only one.
        depth_drift: the same from the block before, for the same kind of layer; 0 for the first.
    """

    weight_outliers: float
    activation_outliers: float
    activation_peak: float
    time_drift: float
    depth_drift: float


def measure_salience(
    model: ZImageTransformer, targets: Sequence[Target], cases: Sequence[Case]
) -> dict[str, Salience]:
    """Return salience by layer name, except for modulations: their input is one vector."""
    layers = [target for target in targets if target.module]
    modules = {target.module: model.get_submodule(target.module) for target in layers}
    activations: dict[str, list[torch.Tensor]] = {name: [] for name in modules}
    handles = [
        module.register_forward_pre_hook(_recorder(activations[name]))
        for name, module in modules.items()
    ]
    try:
        with torch.no_grad():
            for case in cases:
                case.run(model)
    finally:
        for handle in handles:
            handle.remove()
    result: dict[str, Salience] = {}
    before: dict[tuple[str, str, int], list[set[int]]] = {}
    for target in layers:
        weight = modules[target.module].weight
        assert isinstance(weight, torch.Tensor)
        of_weight = weight[slice(*target.rows)].abs().amax(0).float()
        of_time = activations[target.module]
        tops = [_top(channels) for channels in of_time]
        previous = before.get((target.stack, target.kind, target.block - 1))
        before[target.stack, target.kind, target.block] = tops
        drifts = [_difference(a, b) for a, b in pairwise(tops)]
        depth = [_difference(a, b) for a, b in zip(previous or [], tops, strict=False)]
        result[target.name] = Salience(
            weight_outliers=_outliers(of_weight),
            activation_outliers=_mean([_outliers(channels) for channels in of_time]),
            activation_peak=max(_peak(channels) for channels in of_time),
            time_drift=_mean(drifts),
            depth_drift=_mean(depth),
        )
    return result


def _recorder(into: list[torch.Tensor]) -> Any:
    def hook(_layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        into.append(inputs[0][PLAIN].abs().amax(0).float())

    return hook


def _outliers(channels: torch.Tensor) -> float:
    return (channels > OUTLIER * channels.median()).double().mean().item()


def _peak(channels: torch.Tensor) -> float:
    median = channels.median().item()
    return channels.max().item() / median if median > 0 else 0.0


def _top(channels: torch.Tensor) -> set[int]:
    count = max(round(_TOP * len(channels)), 1)
    return set(channels.topk(count).indices.tolist())


def _difference(a: set[int], b: set[int]) -> float:
    """Return 0 for two equal sets of the same size, 1 if they have nothing in common."""
    return 1.0 - len(a & b) / len(a)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
