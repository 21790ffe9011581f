"""Adapters beside ComfyUI's own layers, on a module with the names of Z-Image's."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from zimage_mxfp8.comfy.branches import Branches
from zimage_mxfp8.comfy.patches import AdapterTensors
from zimage_mxfp8.zimage.layers import zimage_shapes

DIM, HIDDEN, LAYER = 256, 96, "layers.0.feed_forward.w1"


class Copies(TorchDispatchMode):
    """Counts conversions and copies between devices."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._to_copy.default
        return func(*args, **(kwargs or {}))


def model() -> torch.nn.Module:
    """A layer at its place."""
    whole = torch.nn.Module()
    inner: Any = whole
    *path, last = LAYER.split(".")
    for name in path:
        inner.add_module(name, torch.nn.Module())
        inner = getattr(inner, name)
    linear = torch.nn.Linear(DIM, HIDDEN, bias=False, dtype=torch.bfloat16)
    inner.add_module(last, linear)
    return whole


def test_matrices_are_copied_once() -> None:
    """To bfloat16, as to a GPU; again after `forget`."""
    generator = torch.Generator().manual_seed(1)
    up, down, x = (
        torch.randn(shape, generator=generator) for shape in ((HIDDEN, 4), (4, DIM), (3, DIM))
    )
    tensors = {"lora_B.weight": up, "lora_A.weight": down}
    adapter = AdapterTensors(0.5, {f"diffusion_model.{LAYER}.{n}": x for n, x in tensors.items()})
    shapes = zimage_shapes(dim=DIM, layers=1, caption_dim=64, hidden=HIDDEN)
    branches, whole = Branches({"one": adapter}, shapes), model()
    layer: Any = whole.get_submodule(LAYER)
    x, counts = x.bfloat16(), []
    with torch.no_grad():
        plain = layer(x).float()
        added = 0.5 * x.float() @ (up @ down).T
    assert added.norm() > plain.norm()
    for call in range(3):
        if call == 2:
            branches.forget()
        with torch.no_grad(), branches.beside(whole), Copies() as copies:
            found = layer(x)
        counts.append(copies.count)
        assert (found.float() - plain - added).norm() < 0.02 * (plain + added).norm()
    assert counts == [2, 0, 2]
    assert torch.equal(layer(x).float(), plain)  # nothing is left on the layer
