"""What `probe` recommends to keep, as an exclusion pattern and as a recipe for `convert`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ...conversion.recipes import KeepRule, Recipe, rules_outside_blocks
from ...text import plural, printable
from ..exclusions import merged_pattern
from .grouping import ProbedTensor
from .scoring import ProbeRules, Thresholds


def _kept(tensors: Sequence[ProbedTensor]) -> list[ProbedTensor]:
    return [tensor for tensor in tensors if tensor.effective == "*KEEP*"]


def _short_type(tensor: ProbedTensor) -> str:
    return tensor.layer_type.removeprefix(f"{tensor.stack}.")


def exclusion_regex(tensors: Sequence[ProbedTensor]) -> str | None:
    """Return a pattern that finds the names of the weights to keep; None if there are none."""
    return merged_pattern(
        f"{tensor.stack}.{tensor.block}.{_short_type(tensor)}.weight" for tensor in _kept(tensors)
    )


def reason_text(tensor: ProbedTensor, limits: Thresholds, rules: ProbeRules) -> str:
    """Why a weight is kept, with the figure that decided."""
    if tensor.reason == "kurtosis_floor":
        kurtosis = tensor.metrics.excess_kurtosis
        return f"kurtosis_floor: excess kurtosis {kurtosis:.4f}, from {rules.kurtosis_keep:g} on"
    return (
        f"{tensor.reason}: score {tensor.score:.4f}, from {limits.keep:.4f} on "
        f"(percentile {rules.keep_percentile:g})"
    )


def probe_recipe(
    tensors: Sequence[ProbedTensor], limits: Thresholds, rules: ProbeRules, file_name: str
) -> Recipe:
    """The recipe that keeps them, one rule a weight, and the embedders and the final layer."""
    kept = _kept(tensors)
    layers = [f"{tensor.stack}.{tensor.block}.{_short_type(tensor)}" for tensor in kept]
    keep = [
        KeepRule(layer, re.compile(rf"^{re.escape(layer)}\."), reason_text(tensor, limits, rules))
        for layer, tensor in zip(layers, kept, strict=True)
    ]
    title = f"From zimage-mxfp8 probe of {printable(file_name)}"
    description = (
        f"{plural(len(kept), 'weight')} of {len(tensors):,} that were probed "
        f"{'stays as it is' if len(kept) == 1 else 'stay as they are'}."
    )
    return Recipe(title, title, description, (*keep, *rules_outside_blocks()))
