"""The weights of ComfyUI's modules: what they are, and in which order."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch

from ..errors import UnsupportedError
from ..transformer.adoption import AdoptedLayer, follow

_LAYOUT = "TensorCoreMXFP8Layout"
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def is_mxfp8(weight: Any) -> bool:
    """Return whether a parameter is a QuantizedTensor of comfy-kitchen in MXFP8."""
    return getattr(weight, "_layout_cls", None) == _LAYOUT


def check_formats(module: Any, whose: str) -> None:
    """Check that all weights are in MXFP8 or plain.

    Args:
        module: has the weights.
        whose: they are, for the error.

    Raises:
        UnsupportedError: some are not.
    """
    for parameter in module.parameters():
        layout = getattr(parameter, "_layout_cls", None)
        if layout not in (None, _LAYOUT):
            raise UnsupportedError(f"{whose} weights are in {layout}, not in MXFP8")
        if layout is None and parameter.dtype not in _FLOATS:
            name = str(parameter.dtype).removeprefix("torch.")
            raise UnsupportedError(f"{whose} weights are in {name}")


def tensors_of(module: Any) -> tuple[dict[str, torch.Tensor], dict[str, AdoptedLayer]]:
    """Return a module's tensors and its MXFP8 layers by name."""
    plain, layers = {}, {}
    for name, parameter in module.named_parameters():
        if is_mxfp8(parameter):
            layer = name.removesuffix(".weight")
            marked = getattr(module.get_submodule(layer), "_full_precision_mm_config", False)
            params = parameter._params
            layers[layer] = AdoptedLayer(
                parameter._qdata, params.scale, tuple(params.orig_shape), bool(marked)
            )
        else:
            plain[name] = parameter.detach()
    return plain, layers


def put_together(blocks: Iterable[Any]) -> None:
    """Move w1 and w3 of each block into one piece of memory, one behind the other.

    Weights that are so stay where they are; of MXFP8, codes also if ComfyUI has moved the scales,
    which it does in every load.
    """
    for block in blocks:
        first, second = block.feed_forward.w1, block.feed_forward.w3
        pair = [first.weight, second.weight]
        if all(map(is_mxfp8, pair)):
            codes = _following(*(weight._qdata for weight in pair))
            scales = _following(*(weight._params.scale for weight in pair))
            for weight, new_codes, new_scales in zip(pair, codes, scales, strict=True):
                weight._qdata = new_codes
                weight._params = dataclasses.replace(weight._params, scale=new_scales)
        elif any(map(is_mxfp8, pair)) or pair[0].dtype != pair[1].dtype or follow(pair):
            continue
        else:
            moved = _following(*(weight.detach() for weight in pair))
            for layer, weight in zip((first, second), moved, strict=True):
                layer.weight = torch.nn.Parameter(weight, requires_grad=False)


def _following(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two tensors of one dtype, one behind the other: the same ones if they are so."""
    if follow((first, second)):
        return first, second
    whole = torch.cat((first.view(torch.uint8), second.view(torch.uint8))).view(first.dtype)
    return whole[: len(first)], whole[len(first) :]
