"""ComfyUI's node for Fun ControlNets before the speed-up, against ComfyUI's own forward."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.adapter_files import random
from helpers.comfyui import error, forward_of, inputs, load, run
from helpers.comfyui_nodes import HIDDEN, SmallVAE, small_controlnet
from helpers.comfyui_sizes import CAPTION, DIM
from zimage_mxfp8.checkpoint.synthetic import write_synthetic_checkpoint
from zimage_mxfp8.comfy.nodes import speed_up
from zimage_mxfp8.zimage.layers import zimage_shapes

pytestmark = [pytest.mark.comfyui, pytest.mark.filterwarnings("ignore")]

LAYERS = 30  # ComfyUI spreads a ControlNet's blocks over 30 in any case
KINDS: dict[str, dict[str, Any]] = {
    "1.0": {"n_control_layers": 6},
    "2.0": {
        "n_control_layers": 3,
        "additional_in_dim": 17,
        "refiner_control": True,
        "broken": True,
    },
    "2.1-lite": {"n_control_layers": 3, "additional_in_dim": 17, "refiner_control": True},
}


@pytest.fixture(scope="module")
def model(comfy: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A Z-Image as deep as the real one."""
    path = tmp_path_factory.mktemp("deep") / "z.safetensors"
    shapes = zimage_shapes(dim=DIM, layers=LAYERS, caption_dim=CAPTION, hidden=HIDDEN)
    write_synthetic_checkpoint(path, shapes)
    return load(comfy, path)


def controlnet(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    return small_controlnet(dtype, **KINDS[kind])


def with_control(model: Any, patch: Any, strength: float = 0.8, **images: Any) -> Any:
    from comfy_extras.nodes_model_patch import ZImageFunControlnet

    return ZImageFunControlnet().diffsynth_controlnet(
        model, patch, SmallVAE(), strength=strength, **images
    )[0]


def picture(height: int, width: int, items: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height)
    return torch.rand(items, height, width, 3, generator=generator)


def outputs(comfy: SimpleNamespace, model: Any, given: tuple[Any, ...]) -> torch.Tensor:
    return run(comfy, model, given, **model.model_options["transformer_options"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_as_comfyuis(comfy: SimpleNamespace, model: Any, kind: str) -> None:
    """Of a picture as large as the latents, whose tokens need fillers, for two items."""
    given = inputs(12, 18)
    patched = with_control(model, controlnet(kind), image=picture(12 * 8, 18 * 8))
    fast = speed_up(patched, "weight-only")
    wanted, found = outputs(comfy, patched, given), outputs(comfy, fast, given)
    effect = float((wanted - run(comfy, model, given)).norm() / wanted.norm())
    assert effect > 0.05
    assert error(found, wanted) < 1e-3 * effect
    assert forward_of(fast).native_calls == 1 and not forward_of(fast).fallback_calls


def test_several_with_mask_and_strength(comfy: SimpleNamespace, model: Any) -> None:
    """Also a picture for each of two items, an inpaint picture, and sizes that are odd."""
    given = inputs(9, 15)
    mask = (picture(72, 120)[..., 0] > 0.5).float()
    patched = with_control(
        model,
        controlnet("2.1-lite"),
        0.5,
        image=picture(64, 64),
        inpaint_image=picture(80, 56),
        mask=mask,
    )
    pictures = picture(64, 64, items=2)
    patched = with_control(patched, controlnet("1.0"), -0.4, image=pictures)
    fast = speed_up(patched, "weight-only")
    # In ComfyUI's first call the second one's pictures are encoded, which resets the first one.
    wanted = [outputs(comfy, patched, given) for _ in range(2)][-1]
    assert error(wanted, run(comfy, model, given)) > 0.05
    assert error(outputs(comfy, fast, given), wanted) < 1e-4
    assert not forward_of(fast).fallback_calls


def test_a_whole_sampling(comfy: SimpleNamespace, model: Any) -> None:
    """With CFG; the picture has another size, so that ComfyUI encodes it in the first step."""
    noise = torch.randn(1, 16, 8, 12, generator=torch.Generator().manual_seed(0))
    positive, negative = ([[random(1, n, CAPTION, seed=n), {}]] for n in (21, 33))
    settings = (2, 2.0, "euler", "simple", positive, negative, torch.zeros_like(noise))
    patch = controlnet("1.0", torch.bfloat16)
    patched = with_control(model, patch, image=picture(96, 136))
    fast = speed_up(patched, "weight-only")
    wanted, found, without = (
        comfy.sample.sample(each, noise, *settings, seed=1).float()
        for each in (patched, fast, model)
    )
    assert error(without, wanted) > 0.05 > 0.01 > error(found, wanted)
    assert forward_of(fast).native_calls == 4 and not forward_of(fast).fallback_calls
    assert not forward_of(fast)._nets._made  # ComfyUI can unload the ControlNet


def test_the_weights_are_not_copied(comfy: SimpleNamespace, model: Any) -> None:
    patch = controlnet("1.0")
    fast = speed_up(with_control(model, patch, image=picture(64, 64)), "weight-only")
    outputs(comfy, fast, inputs(8, 8))
    (net,) = forward_of(fast)._nets._made.values()
    theirs = {x.untyped_storage().data_ptr() for x in patch.model.parameters()}
    own = [x for x in net.state_dict().values() if x.untyped_storage().data_ptr() not in theirs]
    assert sum(x.nbytes for x in own) == net.modulation.weight.nbytes + net.modulation.bias.nbytes


def test_other_patches_fall_back(comfy: SimpleNamespace, model: Any) -> None:
    given = inputs(8, 8)
    patched = with_control(model, controlnet("1.0"), image=picture(64, 64))
    patched.set_model_double_block_patch(lambda given: {"img": given["img"] * 1.01})
    fast = speed_up(patched, "weight-only")
    assert torch.equal(outputs(comfy, fast, given), outputs(comfy, patched, given))
    assert forward_of(fast).native_calls == 0


def test_a_hook_on_the_controlnet_falls_back(comfy: SimpleNamespace, model: Any) -> None:
    given, patch = inputs(8, 8), controlnet("1.0")
    patched = with_control(model, patch, image=picture(64, 64))
    fast = speed_up(patched, "weight-only")
    before, name = outputs(comfy, fast, given), "control_layers.0.feed_forward"
    layer = patch.model.get_submodule(name)
    layer.register_forward_hook(lambda module, given, result: -result)
    wanted = outputs(comfy, patched, given)
    assert torch.equal(outputs(comfy, fast, given), wanted) and error(wanted, before) > 1e-3
    assert list(forward_of(fast).fallback_calls) == [f'a node patches "{name}" of the ControlNet']


def test_too_few_pictures_are_comfyuis_error(comfy: SimpleNamespace, model: Any) -> None:
    pictures = picture(64, 64, items=2)
    fast = speed_up(with_control(model, controlnet("1.0"), image=pictures), "weight-only")
    with pytest.raises(RuntimeError, match="size of tensor"):
        outputs(comfy, fast, inputs(8, 8, items=3))
    assert list(forward_of(fast).fallback_calls) == ["the ControlNet has 2 images for 3 latents"]
