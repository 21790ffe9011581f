"""The adapters among the patches of a ComfyUI model, as tensors for `load_lora`.

A patch is (strength, change, strength of the weight, offset, function), by the name of a weight.
The change of a LoRA node is an object with `name` and `weights`, those of comfy.weight_adapter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

_PREFIX = "diffusion_model."
_PARTS = ("attention.to_q", "attention.to_k", "attention.to_v")  # the rows of qkv, in order


@dataclass
class AdapterTensors:
    """An adapter in ComfyUI's names.

    Attributes:
        strength: its weight.
        tensors: by name.
    """

    strength: float
    tensors: dict[str, Any] = field(default_factory=dict)


def take_adapters(
    patches: Mapping[str, list[tuple[Any, ...]]],
) -> tuple[dict[str, AdapterTensors], dict[str, list[tuple[Any, ...]]]]:
    """Split patches into adapters, by name, and those that are left to ComfyUI.

    Patches of one weight belong to different adapters; the first of all weights with the same
    strength are one, and so on. What comes before a merge of models or a replaced weight is left
    with it, because the order matters.
    """
    adapters: dict[str, AdapterTensors] = {}
    left: dict[str, list[tuple[Any, ...]]] = {}
    for key, changes in patches.items():
        begin = 1 + max((i for i, x in enumerate(changes) if _replaces(x)), default=-1)
        rest = list(changes[:begin])
        turns: Counter[tuple[Any, ...]] = Counter()
        for change in changes[begin:]:
            strength, what, _, offset, function = change
            layer, written = _layer(key, offset), _tensors(what)
            if layer is None or written is None or function is not None:
                rest.append(change)
                continue
            turns[strength, layer] += 1
            # A file that names both qkv and its parts would count them once.
            kind = "parts of qkv" if offset is not None else "whole"
            name = f"{strength!r}, {kind}, number {turns[strength, layer]}"
            adapter = adapters.setdefault(name, AdapterTensors(float(strength)))
            adapter.tensors |= {f"{_PREFIX}{layer}.{end}": x for end, x in written.items()}
        if rest:
            left[key] = rest
    return adapters, left


def _replaces(change: tuple[Any, ...]) -> bool:
    """Return whether a patch weighs or replaces what comes before it."""
    _, what, of_weight, *_ = change
    return of_weight != 1.0 or (isinstance(what, tuple) and what[:1] == ("set",))


def _layer(key: str, offset: tuple[int, int, int] | None) -> str | None:
    """Return the layer's name in an adapter file; None for rows that no name stands for."""
    layer = key.removeprefix(_PREFIX).removesuffix(".weight")
    if not key.startswith(_PREFIX) or not key.endswith(".weight"):
        return None
    if offset is None:
        return layer
    dim, start, length = offset
    if dim != 0 or not layer.endswith("attention.qkv") or start % length or start // length > 2:
        return None
    return layer.removesuffix("attention.qkv") + _PARTS[start // length]


def _tensors(change: Any) -> dict[str, torch.Tensor] | None:
    """Return the tensors of a change by the end of their names; None for an unknown kind."""
    kind, weights = getattr(change, "name", None), getattr(change, "weights", None)
    if weights is None:
        return None
    if kind == "lora":
        up, down, alpha, *others = weights  # mid of convolutions, magnitudes, another shape
        named = {"lora_up.weight": up, "lora_down.weight": down}
    elif kind == "loha":
        w1a, w1b, alpha, w2a, w2b, *others = weights
        named = {"hada_w1_a": w1a, "hada_w1_b": w1b, "hada_w2_a": w2a, "hada_w2_b": w2b}
    elif kind == "lokr":
        w1, w2, alpha, w1a, w1b, w2a, w2b, *others = weights
        named = {"lokr_w1": w1, "lokr_w2": w2, "lokr_w1_a": w1a, "lokr_w1_b": w1b}
        named |= {"lokr_w2_a": w2a, "lokr_w2_b": w2b}
    else:
        return None
    # ComfyUI weighs a magnitude (DoRA) differently from PEFT, so those stay its own.
    if any(each is not None for each in others):
        return None
    if alpha is not None:
        named["alpha"] = torch.as_tensor(float(alpha))
    return {end: tensor for end, tensor in named.items() if tensor is not None}
