"""ControlNets that ComfyUI's node "Apply Z-Image Fun ControlNet" puts on a model, on our blocks.

The node adds one patch object, of ComfyUI's class ZImageControlPatch, to two lists of patches. The
object has the ControlNet (`model_patch.model`, a ZImage_Control), its encoded input
(`encoded_image`, [images, 16 or 33, H, W]) and `strength`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..errors import UnsupportedError
from ..text import plural
from ..transformer.adoption import adopt_control
from ..transformer.control import Control, ZImageControlNet
from .watch import Watch
from .weights import check_formats, put_together, tensors_of

_CLASS = "ZImageControlPatch"
_LISTS = {"noise_refiner", "double_block"}
_BEHIND_ALL = 1 << 20  # number of a block


def control_patches(patches: Mapping[str, Sequence[Any]]) -> list[Any]:
    """Return the ControlNets of a call, if it has no other patches; else an empty list.

    Args:
        patches: the patches of the call, by where they are run.
    """
    present = {name: list(each) for name, each in patches.items() if each}
    if present.keys() != _LISTS:
        return []
    first, second = present.values()
    same = len(first) == len(second) and all(a is b for a, b in zip(first, second, strict=True))
    return first if same and all(type(each).__name__ == _CLASS for each in first) else []


def encode_images(patches: Sequence[Any], x: torch.Tensor) -> None:
    """Have ComfyUI encode the images of ControlNets for latents x [items, 16, H, W].

    It does so where a patch is called, if their size is another one. A block behind the last one
    that the ControlNet knows gets no hint, so nothing else is computed. The VAE may take the memory
    of models, whose weights ComfyUI then moves.
    """
    for patch in patches:
        patch(
            {
                **{"x": x, "img": None, "img_input": None, "txt": None, "pe": None, "vec": None},
                **{"block_index": _BEHIND_ALL, "block_type": "double"},
            }
        )


class ControlNets:
    """The ControlNets of the latest call, on the weights that ComfyUI has loaded."""

    def __init__(self) -> None:
        self._made: dict[tuple[Any, ...], ZImageControlNet] = {}
        self._watches: dict[Any, Watch] = {}  # by module

    def controls(self, patches: Sequence[Any], x: torch.Tensor) -> list[Control]:
        """Return what the transformer's forward takes, for latents x [items, 16, H, W].

        Raises:
            UnsupportedError: a ControlNet cannot be run here, with the reason as a clause.
        """
        made: dict[tuple[Any, ...], ZImageControlNet] = {}
        watches: dict[Any, Watch] = {}
        controls = []
        for patch in patches:
            module = patch.model_patch.model
            watch = watches[module] = self._watches.get(module) or Watch(module)
            state = watch.state()
            if state.patched:
                raise UnsupportedError(f'a node patches "{state.patched}" of the ControlNet')
            if elsewhere := state.devices - {x.device}:
                where = next(iter(elsewhere))
                raise UnsupportedError(f"a part of the ControlNet is on {where} (low VRAM)")
            key = (module, x.dtype, state.names, state.addresses)
            net = made[key] = made.get(key) or self._made.get(key) or _adopted(module, x.dtype)
            images = _images(patch.encoded_image, x)
            controls.append(Control(net, images, float(patch.strength), image_only=True))
        self._made, self._watches = made, watches
        return controls

    def forget(self) -> None:
        """Drop the ControlNets, and with them the references to the weights."""
        self._made, self._watches = {}, {}


def _adopted(module: Any, dtype: torch.dtype) -> ZImageControlNet:
    check_formats(module, "the ControlNet's")
    try:
        stacks = (*module.control_noise_refiner, *module.control_layers)
        is_broken = module.broken
    except AttributeError as error:
        raise UnsupportedError(f"the ControlNet is of an unknown kind: {error}") from None
    put_together(stacks)
    plain, layers = tensors_of(module)
    if layers:
        raise UnsupportedError("a ControlNet in MXFP8 is not supported")
    return adopt_control(plain, dtype, trained_refiner=not is_broken)


def _images(encoded: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the input of a ControlNet for each item; one image is for all."""
    if len(encoded) not in (1, len(x)):
        raise UnsupportedError(
            f"the ControlNet has {plural(len(encoded), 'image')} for {plural(len(x), 'latent')}"
        )
    return tuple(encoded.to(x)[:, :, None].expand(len(x), -1, -1, -1, -1))
