"""Whole samplings with the speed-up: masks, caches, hooks, and devices without memory."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import zimage_mxfp8 as zm
from helpers.adapter_files import random
from helpers.comfyui import error, forward_of, inputs, load, run
from helpers.comfyui_sizes import CAPTION, DIM, LAYERS
from zimage_mxfp8.comfy.native import NativeForward
from zimage_mxfp8.comfy.nodes import speed_up

pytestmark = pytest.mark.filterwarnings("ignore")

SIZE = (1, 16, 8, 12)


@pytest.fixture(scope="module")
def plain(comfy: SimpleNamespace, original: Path) -> Any:
    """Weights that are not quantised, to which ComfyUI adds adapters exactly."""
    return load(comfy, original)


def noise() -> torch.Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(0))


def caption(tokens: int = 21) -> Any:
    return [[random(1, tokens, CAPTION, seed=tokens), {}]]


def draw(
    comfy: SimpleNamespace, model: Any, positive: Any, steps: int = 4, **options: Any
) -> torch.Tensor:
    settings = (steps, 2.0, "euler", "simple", positive, caption(33))
    latents = options.pop("latents", torch.zeros(SIZE))
    found = comfy.sample.sample(model, noise(), *settings, latents, seed=1, **options)
    return found.float()


@pytest.mark.comfyui
def test_image_to_image_with_a_mask(comfy: SimpleNamespace, plain: Any) -> None:
    latents = torch.randn(SIZE, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(1, 1, 64, 96)
    mask[..., 40:] = 1
    options = {"latents": latents, "denoise": 0.5, "noise_mask": mask}
    fast = speed_up(plain)
    wanted = draw(comfy, plain, caption(), **options)
    found = draw(comfy, fast, caption(), **options)
    assert error(found, wanted) < 1e-3
    assert torch.allclose(found[..., :4], latents[..., :4], atol=1e-5)  # what the mask keeps
    assert error(found[..., 6:], latents[..., 6:]) > 0.1
    assert forward_of(fast).native_calls == 8 and not forward_of(fast).fallback_calls


@pytest.mark.comfyui
def test_easy_cache(comfy: SimpleNamespace, plain: Any) -> None:
    """It skips the same steps as without the speed-up."""
    from comfy_extras.nodes_easycache import EasyCacheNode

    def cached(model: Any) -> Any:
        return EasyCacheNode.execute(model, 0.6, 0.1, 0.95, False).result[0]

    fast = speed_up(plain)
    wanted = draw(comfy, cached(plain), caption(), steps=8)
    found = draw(comfy, cached(fast), caption(), steps=8)
    assert error(found, wanted) < 1e-3
    assert 2 < forward_of(fast).native_calls < 16 and not forward_of(fast).fallback_calls


@pytest.mark.comfyui
def test_loras_of_hooks(comfy: SimpleNamespace, plain: Any) -> None:
    """A LoRA on one prompt alone, weaker in the second half of the steps."""
    import comfy.hooks

    file = {}
    for layer in range(LAYERS):
        name = f"diffusion_model.layers.{layer}.attention.out.lora_"
        file[f"{name}A.weight"] = random(4, DIM, seed=layer) * 8
        file[f"{name}B.weight"] = random(DIM, 4, seed=layer + 100) * 8

    def hooked() -> Any:
        hooks = comfy.hooks.create_hook_lora(file, 1.0, 0.0)
        frames = comfy.hooks.HookKeyframeGroup()
        frames.add(comfy.hooks.HookKeyframe(strength=1.0))
        frames.add(comfy.hooks.HookKeyframe(strength=0.3, start_percent=0.5))
        hooks.set_keyframes_on_hooks(frames)
        return comfy.hooks.set_hooks_for_conditioning(caption(), hooks)

    fast = speed_up(plain)
    wanted = draw(comfy, plain, hooked())
    assert error(draw(comfy, plain, caption()), wanted) > 0.02
    assert error(draw(comfy, fast, hooked()), wanted) < 1e-3
    assert forward_of(fast).native_calls == 8 and not forward_of(fast).fallback_calls
    assert error(draw(comfy, fast, caption()), draw(comfy, plain, caption())) < 1e-3


@pytest.mark.comfyui
def test_too_little_memory_for_a_call(
    comfy: SimpleNamespace, plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ComfyUI's forward takes this call, and ours the next one."""
    given, fast = inputs(8, 8), speed_up(plain)
    wanted = run(comfy, plain, given)

    def no_memory(*_: Any, **__: Any) -> None:
        raise zm.CudaError("cuda:0 ran out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(zm.ZImageTransformer, "forward", no_memory)
        assert torch.equal(run(comfy, fast, given), wanted)
    assert forward_of(fast).fallback_calls == {"cuda:0 ran out of memory": 1}
    assert error(run(comfy, fast, given), wanted) < 5e-5
    assert forward_of(fast).native_calls == 1


class Offloaded(torch.nn.Module):
    """A model of ComfyUI's with a part of its weights on another device."""

    def __init__(self) -> None:
        super().__init__()
        self.here = torch.nn.Linear(2, 2)
        self.there = torch.nn.Linear(2, 2, device="meta")

    def _forward(self, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return 2 * x


def test_weights_that_are_offloaded_in_part(caplog: pytest.LogCaptureFixture) -> None:
    forward, x = NativeForward(Offloaded(), "auto", {}), torch.ones(SIZE)
    for _ in range(2):
        found = forward(x, torch.ones(1), torch.ones(1, 21, CAPTION), 21)
        assert torch.equal(found, 2 * x)
    reason = "a part of the weights is on meta (low VRAM)"
    assert forward.fallback_calls == {reason: 2} and forward.native_calls == 0
    assert len([record for record in caplog.records if reason in record.message]) == 1
