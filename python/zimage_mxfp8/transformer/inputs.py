"""The inputs of a forward, and checks of its arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import InvalidArgumentError
from ..text import plural
from ..zimage.config import ZImageConfig
from ..zimage.constants import PATCH_SIZE
from .sequence import MAX_LATENTS, Shape, max_caption_tokens


@dataclass(frozen=True, eq=False)
class ControlInputs:
    """The tensors of one ControlNet that differ from call to call.

    Attributes:
        images: its input for each item, [16 or 33, F, H, W].
        strength: of its hints, float32 [].
        image_only: as of `Control`; the same in every call of a CUDA graph.
    """

    images: tuple[torch.Tensor, ...]
    strength: torch.Tensor
    image_only: bool = False

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All of them."""
        return (*self.images, self.strength)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> ControlInputs:
        """Apply a function to each tensor."""
        return ControlInputs(
            tuple(map(function, self.images)), function(self.strength), self.image_only
        )


@dataclass(frozen=True, eq=False)
class ForwardInputs:
    """The tensors that a forward reads and that differ from call to call.

    Attributes:
        images: latent image of each item, [16, F, H, W].
        times: float32 [items], 0 for noise to 1 for an image.
        captions: caption features of each item, [tokens, cap_feat_dim].
        controls: of each ControlNet.
    """

    images: tuple[torch.Tensor, ...]
    times: torch.Tensor
    captions: tuple[torch.Tensor, ...]
    controls: tuple[ControlInputs, ...] = ()

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The shape of each item."""
        return tuple(
            ((image.shape[1], image.shape[2], image.shape[3]), len(caption))
            for image, caption in zip(self.images, self.captions, strict=True)
        )

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All tensors, in one order for all inputs of the same shapes."""
        controls = (tensor for control in self.controls for tensor in control.tensors)
        return (*self.images, self.times, *self.captions, *controls)

    def of_items(self, items: slice) -> ForwardInputs:
        """Return the inputs of some items."""
        return ForwardInputs(
            self.images[items],
            self.times[items],
            self.captions[items],
            tuple(replace(x, images=x.images[items]) for x in self.controls),
        )

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> ForwardInputs:
        """Apply a function to each tensor."""
        return ForwardInputs(
            tuple(map(function, self.images)),
            function(self.times),
            tuple(map(function, self.captions)),
            tuple(control.map(function) for control in self.controls),
        )

    def copy_(self, others: ForwardInputs) -> None:
        """Copy inputs of the same shapes to this memory, without waiting for the device."""
        for target, source in zip(self.tensors, others.tensors, strict=True):
            target.copy_(source, non_blocking=True)


def lora_scale(others: dict[str, Any]) -> Any:
    """Return the factor of adapters' weights among the arguments of diffusers' model."""
    settings = others.get("joint_attention_kwargs") or {}
    if not isinstance(settings, dict):
        raise InvalidArgumentError("joint_attention_kwargs must be a dict or None")
    return settings.get("scale", 1.0)


def check_arguments(
    x: Sequence[torch.Tensor],
    t: torch.Tensor,
    cap_feats: Sequence[torch.Tensor],
    others: dict[str, Any],
    config: ZImageConfig,
    device: torch.device,
) -> None:
    """Check the arguments of `ZImageTransformer.forward`.

    Raises:
        InvalidArgumentError: if an argument has another shape, type or device; the message names
            it.
    """
    for name, value in others.items():
        expected = {"patch_size": PATCH_SIZE, "f_patch_size": 1}.get(name)
        is_expected = value is None or (isinstance(value, int) and value == expected)
        if name != "joint_attention_kwargs" and not is_expected:
            raise InvalidArgumentError(
                f"{name} is not supported by this transformer", "leave it out"
            )
    if not isinstance(x, (list, tuple)) or not x:
        raise InvalidArgumentError("x must be a list of latent images, [16, 1, H, W] each")
    channels, features = config.in_channels, config.cap_feat_dim
    if not isinstance(cap_feats, (list, tuple)) or len(cap_feats) != len(x):
        raise InvalidArgumentError(
            f"cap_feats must be a list of {len(x)} captions, as many as x has images"
        )
    if not isinstance(t, torch.Tensor) or tuple(t.shape) != (len(x),):
        found = list(t.shape) if isinstance(t, torch.Tensor) else type(t).__name__
        raise InvalidArgumentError(f"t must be a tensor [{len(x)}], a time per image, not {found}")
    if t.device.type not in ("cpu", device.type) or t.layout != torch.strided:
        raise InvalidArgumentError(f"t must be a dense tensor on {device}")
    for i, (image, caption) in enumerate(zip(x, cap_feats, strict=True)):
        _check_tensor(image, f"x[{i}]", device)
        _check_tensor(caption, f"cap_feats[{i}]", device)
        size = tuple(image.shape)
        if len(size) != 4 or size[0] != channels or 0 in size or any(n % 2 for n in size[2:]):
            raise InvalidArgumentError(
                f"x[{i}] must be [{channels}, 1, H, W] with H and W even, not {list(size)}"
            )
        if max(size[2:]) > MAX_LATENTS:
            raise InvalidArgumentError(
                f"x[{i}] must have H and W of {MAX_LATENTS} at most, because the model has no "
                f"more positions, not {list(size)}"
            )
        if caption.dim() != 2 or caption.shape[1] != features or not len(caption):
            raise InvalidArgumentError(
                f"cap_feats[{i}] must be [tokens, {features}] with one token at least, not "
                f"{list(caption.shape)}"
            )
        if len(caption) > (limit := max_caption_tokens(size[1])):
            raise InvalidArgumentError(
                f"cap_feats[{i}] must have {limit} tokens at most, because the model has no more "
                f"positions with {plural(size[1], 'frame')} of x[{i}], not {len(caption)}"
            )


def _check_tensor(tensor: Any, name: str, device: torch.device) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise InvalidArgumentError(f"{name} must be a torch tensor, not {type(tensor).__name__}")
    if tensor.device != device:
        raise InvalidArgumentError(
            f"{name} is on {tensor.device}, but the model is on {device}", "move it there"
        )
    if tensor.layout != torch.strided:
        raise InvalidArgumentError(f"{name} must be a dense tensor")
    if not tensor.is_floating_point():
        raise InvalidArgumentError(f"{name} must be floating-point, not {tensor.dtype}")
