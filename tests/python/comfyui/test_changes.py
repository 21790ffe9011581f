"""What changes in the real ComfyUI between calls of the speed-up, against its own forward."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.adapter_files import random
from helpers.comfyui import error, forward_of, inputs, load, run
from helpers.comfyui_sizes import DIM
from zimage_mxfp8.comfy.nodes import speed_up

pytestmark = [pytest.mark.comfyui, pytest.mark.filterwarnings("ignore")]

LAYER = "layers.0.feed_forward"


@pytest.fixture
def model(comfy: SimpleNamespace, quantized: Path) -> Any:
    return load(comfy, quantized)


def test_an_object_patch_comes_and_goes(comfy: SimpleNamespace, model: Any) -> None:
    """ComfyUI leaves the class's own method on the module where it undoes the patch."""
    given, layer = inputs(), model.model.diffusion_model.get_submodule(LAYER)
    fast = speed_up(model, "weight-only")
    before = run(comfy, fast, given)
    patched = fast.clone()
    patched.add_object_patch(
        f"diffusion_model.{LAYER}.forward", lambda x: type(layer).forward(layer, x) + x
    )
    assert error(run(comfy, patched, given), before) > 0.01
    assert forward_of(fast).fallback_calls == {f'a node patches "{LAYER}"': 1}
    assert torch.equal(run(comfy, fast, given), before)
    assert "forward" in vars(layer) and forward_of(fast).native_calls == 2


def test_a_layer_replaced(comfy: SimpleNamespace, model: Any, quantized: Path) -> None:
    given, name = inputs(), f"diffusion_model.{LAYER}.w2"
    fast = speed_up(model, "weight-only")
    before = run(comfy, fast, given)
    other = load(comfy, quantized).model.diffusion_model.layers[1].feed_forward.w2
    stock, patched = model.clone(), fast.clone()
    for each in (stock, patched):
        each.add_object_patch(name, other)
    wanted = run(comfy, stock, given)
    assert error(wanted, before) > 0.01
    assert error(run(comfy, patched, given), wanted) < 5e-5
    assert torch.equal(run(comfy, fast, given), before)
    assert forward_of(fast).native_calls == 3


class Negated(torch.nn.Module):
    """Another node's module around a layer, on the same weights."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *given: Any, **options: Any) -> torch.Tensor:
        return -self.inner(*given, **options)


def test_a_layer_wrapped(comfy: SimpleNamespace, model: Any) -> None:
    """Between two calls of a sampling, without an event."""
    fast = speed_up(model, "weight-only")
    before = run(comfy, fast, inputs())
    module = model.model.diffusion_model
    block, layer = module.layers[0], module.layers[0].attention
    x, times, context = inputs()
    given = x, times, context, context.shape[1]
    block.attention = Negated(layer)
    with torch.inference_mode():
        found, wanted = module(*given), type(module)._forward(module, *given)
        assert torch.equal(found, wanted) and error(wanted, before) > 0.01
        block.attention = layer
        assert torch.equal(module(*given), before)
    (reason,) = forward_of(fast).fallback_calls
    assert 'has no "layers.0.attention.' in reason and forward_of(fast).native_calls == 2


def test_weights_patched_by_another_workflow(comfy: SimpleNamespace, model: Any) -> None:
    """ComfyUI computes new weights, and sets the old ones back."""
    given = inputs()
    fast = speed_up(model, "weight-only")
    before = run(comfy, fast, given)
    stock = model.clone()
    change = ("diff", (random(DIM, DIM, seed=3) * 0.05,))
    stock.add_patches({"diffusion_model.layers.0.attention.out.weight": change}, 1.0)
    assert error(run(comfy, stock, given), before) > 0.01
    assert torch.equal(run(comfy, fast, given), before)
    assert forward_of(fast).native_calls == 2


def test_a_hook_comes_and_goes(comfy: SimpleNamespace, model: Any) -> None:
    given = inputs()
    fast = speed_up(model, "weight-only")
    before = run(comfy, fast, given)
    layer = model.model.diffusion_model.get_submodule(LAYER)
    hook = layer.register_forward_hook(lambda module, given, result: -result)
    wanted = run(comfy, model, given)
    assert torch.equal(run(comfy, fast, given), wanted) and error(wanted, before) > 0.01
    hook.remove()
    assert torch.equal(run(comfy, fast, given), before)
    assert forward_of(fast).native_calls == 2


def test_weights_cast_in_place(comfy: SimpleNamespace, original: Path) -> None:
    model, given = load(comfy, original), inputs()
    fast = speed_up(model)
    before = run(comfy, fast, given)
    module = model.model.diffusion_model
    x, times, context = given
    with torch.inference_mode():
        for name, weight in module.named_parameters():
            if name.endswith("w2.weight"):
                weight.data = weight.to(torch.float8_e4m3fn).to(weight.dtype)
        found = module(x, times, context, context.shape[1], transformer_options={})
        wanted = type(module)._forward(module, x, times, context, context.shape[1])
    assert error(found, wanted) < 5e-5 and error(found, before) > 1e-3
    assert forward_of(fast).native_calls == 2
