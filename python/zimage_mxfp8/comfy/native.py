"""Our blocks in place of the forward of ComfyUI's Z-Image, on the same weights.

Nothing of ComfyUI is imported: its objects are used through the attributes that they have in 0.33
(`_forward` of NextDiT, QuantizedTensor of comfy-kitchen).
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from ..errors import Error, UnsupportedError
from ..system.devices import core_index
from ..transformer.adoption import AdoptedLayer, adopt, follow
from ..transformer.compute import Weights, choose
from ..transformer.model import ZImageTransformer
from ..zimage.constants import PATCH_SIZE
from .branches import Branches
from .patches import AdapterTensors

_log = logging.getLogger(__name__)
_LAYOUT = "TensorCoreMXFP8Layout"
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# What nodes put on single modules of the model.
_ON_MODULES = ("_forward_hooks", "_forward_pre_hooks", "weight_function", "bias_function")
# Values of transformer_options that change what happens between the layers.
_HOOKED = ("patches_replace", "optimized_attention_override", "rope_options")
_EXTRA_INPUTS = ("ref_latents", "ref_contexts", "siglip_feats")

Forward = Callable[..., torch.Tensor]


class NativeForward:
    """A `_forward` for ComfyUI's NextDiT that runs a `ZImageTransformer` on its weights.

    A call that this package does not compute goes to ComfyUI's own forward, with the adapters
    beside its layers; the reason is logged once.

    Attributes:
        module: ComfyUI's NextDiT.
        compute: a compute mode, or "auto".
        adapters: by name.
        native_calls: how many calls ran here.
        fallback_calls: how many went to ComfyUI's forward, by reason.
    """

    def __init__(self, module: Any, compute: str, adapters: Mapping[str, AdapterTensors]) -> None:
        """Take the model, see the attributes."""
        self.module, self.compute, self.adapters = module, compute, dict(adapters)
        self._transformer: ZImageTransformer | None = None
        self._branches: Branches | None = None
        self._made_of: tuple[Any, ...] = ()
        self._refused: tuple[tuple[Any, ...], str] = ((), "")
        self.native_calls = 0
        self.fallback_calls: Counter[str] = Counter()

    def __call__(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor,
        num_tokens: int,
        attention_mask: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Compute the velocity, with NextDiT's arguments and sign.

        Like NextDiT it does not look at `attention_mask`.
        """
        _stop_if_cancelled()
        reason = self._reason(x, options)
        transformer = None
        if not reason:
            transformer, reason = self._current(x)
        if transformer is not None:
            try:
                found = _run(transformer, x, timesteps, context)
            except Error as error:
                reason = str(error)
            else:
                self.native_calls += 1
                return found
        if not self.fallback_calls[reason]:
            _log.warning("Z-Image MXFP8: ComfyUI's own forward runs, because %s", reason)
        self.fallback_calls[reason] += 1
        own: Forward = type(self.module)._forward
        with self._adapted():
            return own(self.module, x, timesteps, context, num_tokens, attention_mask, **options)

    def forget(self) -> None:
        """Drop the transformer, and with it the references to the weights."""
        self._transformer, self._made_of = None, ()

    def _reason(self, x: torch.Tensor, options: Mapping[str, Any]) -> str:
        """Return why a call cannot run here, as a clause; "" if it can."""
        hooks = options.get("transformer_options") or {}
        patches = [name for name, each in (hooks.get("patches") or {}).items() if each]
        patches += [name for name in _HOOKED if hooks.get(name)]
        patches += [name for name, each in self.module.named_modules() if name and _changed(each)]
        if patches:
            return f'a node patches "{patches[0]}"'
        for name in _EXTRA_INPUTS:
            if len(options.get(name) or ()):
                return f"the input {name} is not supported"
        if options.get("control"):
            return "a ControlNet of this kind is not supported"
        if x.dtype not in (torch.bfloat16, torch.float32):
            return f"it computes in {str(x.dtype).removeprefix('torch.')}"
        return ""

    def _current(self, x: torch.Tensor) -> tuple[ZImageTransformer | None, str]:
        """Return the transformer of the weights as they are now, or why there is none."""
        made_of, elsewhere = self._made_of_now(x)
        if elsewhere is not None:
            self.forget()  # so that the memory of weights that were moved away is free
            return None, f"a part of the weights is on {elsewhere} (low VRAM)"
        if self._refused[0] == made_of:
            return None, self._refused[1]
        if self._transformer is None or made_of != self._made_of:
            self.forget()
            try:
                self._transformer, reason = self._make(x.dtype), ""
            except Exception as error:  # of any kind: ComfyUI's own forward still works
                reason = str(error) if isinstance(error, Error) else repr(error)
            made_of, _ = self._made_of_now(x)  # making it may have moved w1 and w3 together
            if self._transformer is None:
                self._refused = (made_of, reason)
                return None, reason
            self._made_of = made_of
        return self._transformer, ""

    def _made_of_now(self, x: torch.Tensor) -> tuple[tuple[Any, ...], torch.device | None]:
        """Return what a transformer for x depends on, and where weights are that are not with x.

        Every step asks for it, so it looks at each weight once.
        """
        addresses, elsewhere = [], None
        for parameter in self.module.parameters():
            weight = parameter._qdata if _is_mxfp8(parameter) else parameter
            addresses.append(weight.data_ptr())
            if weight.device != x.device:
                elsewhere = weight.device
        return (x.dtype, *addresses), elsewhere

    @contextmanager
    def _adapted(self) -> Iterator[None]:
        """Run ComfyUI's forward with the adapters."""
        if not self.adapters:
            yield
            return
        if self._branches is None:
            shapes = {
                name: tuple(getattr(getattr(each, "_params", each), "orig_shape", each.shape))
                for name, each in self.module.named_parameters()
            }
            self._branches = Branches(self.adapters, shapes)
        with self._branches.beside(self.module):
            yield

    def _make(self, dtype: torch.dtype) -> ZImageTransformer:
        for parameter in self.module.parameters():
            layout = getattr(parameter, "_layout_cls", None)
            if layout not in (None, _LAYOUT):
                raise UnsupportedError(f"its weights are in {layout}, not in MXFP8")
            if layout is None and parameter.dtype not in _FLOATS:
                name = str(parameter.dtype).removeprefix("torch.")
                raise UnsupportedError(f"its weights are in {name}")
        for block in self._blocks():
            _put_together(block.feed_forward.w1, block.feed_forward.w3)
        plain, layers = _tensors_of(self.module)
        weights: Weights = "mxfp8" if layers else "plain"
        mode = choose(self.compute, core_index(next(iter(plain.values())).device), weights)
        transformer = adopt(plain, layers, mode, dtype)
        for name, adapter in self.adapters.items():
            transformer.load_lora(adapter.tensors, name, adapter.strength)
        return transformer

    def _blocks(self) -> Iterator[Any]:
        for stack in ("noise_refiner", "context_refiner", "layers"):
            yield from getattr(self.module, stack)


def _run(
    transformer: ZImageTransformer,
    x: torch.Tensor,
    timesteps: torch.Tensor,
    context: torch.Tensor,
) -> torch.Tensor:
    height, width = x.shape[-2:]
    wrapped = (0, -width % PATCH_SIZE, 0, -height % PATCH_SIZE)
    if any(wrapped):  # as ComfyUI pads odd sizes
        x = F.pad(x, wrapped, mode="circular")
    captions = [each.to(x.dtype) for each in context]
    samples = transformer(
        [image[:, None] for image in x], 1 - timesteps.float(), captions, return_dict=False
    )[0]
    return -torch.stack([sample[:, 0] for sample in samples])[..., :height, :width]


def _changed(module: Any) -> bool:
    """Return whether a node has put something on a module."""
    own = vars(module)
    return "forward" in own or any(own.get(name) for name in _ON_MODULES)


def _stop_if_cancelled() -> None:
    """Raise ComfyUI's exception if the user has cancelled, as its own operations do."""
    if management := sys.modules.get("comfy.model_management"):
        management.throw_exception_if_processing_interrupted()


def _is_mxfp8(weight: Any) -> bool:
    return getattr(weight, "_layout_cls", None) == _LAYOUT


def _tensors_of(module: Any) -> tuple[dict[str, torch.Tensor], dict[str, AdoptedLayer]]:
    """Return a NextDiT's tensors and its MXFP8 layers by name."""
    plain, layers = {}, {}
    for name, parameter in module.named_parameters():
        if _is_mxfp8(parameter):
            layer = name.removesuffix(".weight")
            marked = getattr(module.get_submodule(layer), "_full_precision_mm_config", False)
            params = parameter._params
            layers[layer] = AdoptedLayer(
                parameter._qdata, params.scale, tuple(params.orig_shape), bool(marked)
            )
        else:
            plain[name] = parameter.detach()
    return plain, layers


def _put_together(first: Any, second: Any) -> None:
    """Move two MXFP8 weights into one piece of memory, first before second.

    Codes that follow one another stay where they are, also if ComfyUI has moved the scales, which
    it does in every load.
    """
    pair = [first.weight, second.weight]
    if not all(map(_is_mxfp8, pair)) or first.weight._qdata.device != second.weight._qdata.device:
        return
    codes = _following([x._qdata for x in pair])
    scales = _following([x._params.scale for x in pair])
    for weight, new_codes, new_scales in zip(pair, codes, scales, strict=True):
        weight._qdata = new_codes
        weight._params = dataclasses.replace(weight._params, scale=new_scales)


def _following(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return tensors of one dtype each behind the one before; the same ones if they are so."""
    if follow(tensors):
        return tensors
    whole = torch.cat([tensor.view(torch.uint8) for tensor in tensors])
    parts = whole.split([len(tensor) for tensor in tensors])
    return [part.view(tensors[0].dtype) for part in parts]
