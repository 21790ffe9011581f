"""Our blocks in place of the forward of ComfyUI's Z-Image, on the same weights.

Nothing of ComfyUI is imported: its objects are used through the attributes that they have in 0.33
(`_forward` of NextDiT, QuantizedTensor of comfy-kitchen).
"""

from __future__ import annotations

import logging
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from ..errors import Error
from ..system.devices import core_index
from ..transformer.adoption import adopt
from ..transformer.compute import IN_PLACE_MODES, Weights, choose
from ..transformer.floating_dtype import DTYPES, name_of
from ..transformer.model import ZImageTransformer
from ..zimage.constants import PATCH_SIZE
from .branches import Branches
from .controls import ControlNets, control_patches, encode_images
from .patches import AdapterTensors
from .watch import Watch
from .weights import check_formats, put_together, tensors_of

_log = logging.getLogger(__name__)
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
        self._watch = Watch(module)
        self._transformer: ZImageTransformer | None = None
        self._last: ZImageTransformer | None = None  # what the last call could use
        self._branches: Branches | None = None
        self._nets = ControlNets()
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
        patches = control_patches((options.get("transformer_options") or {}).get("patches") or {})
        reason = self._reason(x, options, patches)
        if not reason:
            encode_images(patches, _padded(x))  # first, because it may move weights
            try:
                found, reason = self._computed(
                    x, lambda transformer: self._run(transformer, x, timesteps, context, patches)
                )
            except Error as error:
                reason = str(error)
            else:
                if found is not None:
                    self.native_calls += 1
                    return found
        if not self.fallback_calls[reason]:
            _log.warning("Z-Image MXFP8: ComfyUI's own forward runs, because %s", reason)
        self.fallback_calls[reason] += 1
        own: Forward = type(self.module)._forward
        with self._adapted():
            return own(self.module, x, timesteps, context, num_tokens, attention_mask, **options)

    def forget(self) -> None:
        """Drop everything on the device: the model, references to weights, copies of adapters."""
        self._transformer, self._last, self._made_of = None, None, ()
        self._watch.forget()
        self.forget_controls()
        if self._branches is not None:
            self._branches.forget()

    def forget_controls(self) -> None:
        """Drop the ControlNets, of whose weights ComfyUI does not say when it moves them."""
        self._nets.forget()

    def _computed(
        self, x: torch.Tensor, compute: Callable[[ZImageTransformer], torch.Tensor]
    ) -> tuple[torch.Tensor | None, str]:
        """Compute with the weights as they are now; None, and why, if they cannot be used.

        To look at all weights takes a millisecond or two, while a GPU can compute. So what the last
        call used is run first, and its result counts if that is still current. It refers to its
        weights, so their memory is there until then.
        """
        found, failure = None, None
        if self._last is not None and (x.device, x.dtype) == (self._last.device, self._last.dtype):
            try:
                found = compute(self._last)
            except Exception as error:
                failure = error.with_traceback(None)  # its frames hold the model
        # No reference, so that the memory of what is replaced is free before its successor is made.
        before = None if self._last is None else weakref.ref(self._last)
        self._last, reason = self._current(x)
        if self._last is None:
            return None, reason
        if before is not None and before() is self._last:
            if failure is not None:
                raise failure
            if found is not None:
                return found, ""
        return compute(self._last), ""

    def _run(
        self,
        transformer: ZImageTransformer,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor,
        patches: Sequence[Any],
    ) -> torch.Tensor:
        height, width = x.shape[-2:]
        x = _padded(x)
        captions = [each.to(x.dtype) for each in context]
        samples = transformer(
            [image[:, None] for image in x],
            1 - timesteps.float(),
            captions,
            return_dict=False,
            controlnet_block_samples=self._nets.controls(patches, x),
        )[0]
        return -torch.stack([sample[:, 0] for sample in samples])[..., :height, :width]

    def _reason(self, x: torch.Tensor, options: Mapping[str, Any], known: Sequence[Any]) -> str:
        """Return why a call cannot run here, as a clause; "" if it can.

        Args:
            x: the latents.
            options: other arguments of the call.
            known: its patches, if they are all known; empty if not.
        """
        hooks = options.get("transformer_options") or {}
        given = {} if known else hooks.get("patches") or {}
        patches = [name for name, each in given.items() if each]
        patches += [name for name in _HOOKED if hooks.get(name)]
        if patches:
            return f'a node patches "{patches[0]}"'
        for name in _EXTRA_INPUTS:
            if len(options.get(name) or ()):
                return f"the input {name} is not supported"
        if options.get("control"):
            return "a ControlNet of this kind is not supported"
        if x.dtype not in DTYPES.values():
            return f"it computes in {name_of(x.dtype)}"
        return ""

    def _current(self, x: torch.Tensor) -> tuple[ZImageTransformer | None, str]:
        """Return the transformer of the weights as they are now, or why there is none."""
        state = self._watch.state()
        if state.patched:
            return None, f'a node patches "{state.patched}"'
        if elsewhere := state.devices - {x.device}:
            self.forget()  # so that the memory of weights that were moved away is free
            return None, f"a part of the weights is on {next(iter(elsewhere))} (low VRAM)"
        made_of = (x.dtype, state.names, state.addresses)
        if self._refused[0] == made_of:
            return None, self._refused[1]
        if self._transformer is None or made_of != self._made_of:
            self.forget()
            try:
                self._transformer, reason = self._make(x.dtype), ""
            except Exception as error:  # of any kind: ComfyUI's own forward still works
                reason = str(error) if isinstance(error, Error) else repr(error)
            # Making it may have moved w1 and w3 together.
            state = self._watch.state()
            made_of = (x.dtype, state.names, state.addresses)
            if self._transformer is None:
                self._refused = (made_of, reason)
                return None, reason
            self._made_of = made_of
        return self._transformer, ""

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
        check_formats(self.module, "its")
        stacks = (self.module.noise_refiner, self.module.context_refiner, self.module.layers)
        put_together(block for stack in stacks for block in stack)
        plain, layers = tensors_of(self.module)
        weights: Weights = "mxfp8" if layers else "plain"
        device = core_index(next(iter(plain.values())).device)
        mode = choose(self.compute, device, weights, IN_PLACE_MODES)
        transformer = adopt(plain, layers, mode, dtype)
        for name, adapter in self.adapters.items():
            transformer.load_lora(adapter.tensors, name, adapter.strength)
        return transformer


def _padded(x: torch.Tensor) -> torch.Tensor:
    """Pad latents to whole patches, as ComfyUI does."""
    height, width = x.shape[-2:]
    wrapped = (0, -width % PATCH_SIZE, 0, -height % PATCH_SIZE)
    return F.pad(x, wrapped, mode="circular") if any(wrapped) else x


def _stop_if_cancelled() -> None:
    """Raise ComfyUI's exception if the user has cancelled, as its own operations do."""
    if management := sys.modules.get("comfy.model_management"):
        management.throw_exception_if_processing_interrupted()
