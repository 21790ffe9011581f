"""ControlNet and transformer of this package in diffusers' own pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    ZImageControlNetInpaintPipeline,
    ZImageControlNetModel,
    ZImageControlNetPipeline,
    ZImageTransformer2DModel,
)
from PIL import Image

import zimage_mxfp8 as zm
from helpers.control_reference import (
    Controlled,
    Kind,
    authors_forward,
    file_tensors,
    make_controlnet,
    silence_refiner,
    write_controlnet,
)
from helpers.diffusers_reference import CAPTION, make_reference, relative_error
from helpers.model_folder import TEXT_ENCODER, VAE, make_parts

SIZE = 64


@pytest.fixture(scope="module")
def reference() -> ZImageTransformer2DModel:
    return make_reference(layers=4, refiners=2)


@pytest.fixture(scope="module")
def transformer(
    reference: ZImageTransformer2DModel, tmp_path_factory: pytest.TempPathFactory
) -> zm.ZImageTransformer:
    folder = tmp_path_factory.mktemp("base")
    reference.save_pretrained(folder)
    return zm.ZImageTransformer.from_checkpoint(folder, "cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def parts() -> dict[str, object]:
    torch.manual_seed(0)
    return make_parts(TEXT_ENCODER, VAE)


def picture(seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    return Image.fromarray(noise)


def latents_of(pipeline, **inputs: object) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    (latents,) = pipeline(
        prompt_embeds=[torch.randn(5, CAPTION, generator=generator)],
        negative_prompt_embeds=[torch.randn(9, CAPTION, generator=generator)],
        height=SIZE,
        width=SIZE,
        num_inference_steps=2,
        guidance_scale=2.0,
        controlnet_conditioning_scale=0.8,
        generator=generator,
        output_type="latent",
        return_dict=False,
        **inputs,
    )
    return latents


def load(model: ZImageControlNetModel, path: Path, kind: Kind = "1.0") -> zm.ZImageControlNet:
    write_controlnet(path, file_tensors(kind, model))
    return zm.ZImageControlNet.from_checkpoint(path, "cpu", dtype=torch.float32)


@pytest.mark.parametrize("kind", ["1.0", "2.1"])
def test_controlnet_pipeline(
    kind: Kind,
    reference: ZImageTransformer2DModel,
    transformer: zm.ZImageTransformer,
    parts: dict[str, object],
    tmp_path: Path,
) -> None:
    """The pipeline fills the input of a 2.1 net up with zeros."""
    model = make_controlnet(kind, (0, 2))
    if kind == "2.1":
        silence_refiner(model)
    net = load(model, tmp_path / "net.safetensors", kind)
    want = latents_of(
        ZImageControlNetPipeline(**parts, transformer=reference, controlnet=model),
        control_image=picture(1),
    )
    ours = ZImageControlNetPipeline(**parts, transformer=transformer, controlnet=net)
    found = latents_of(ours, control_image=picture(1))
    assert (found - want).norm() / want.norm() < 1e-5
    other = latents_of(ours, control_image=picture(2))
    assert (other - want).norm() / want.norm() > 1e-3


def test_inpaint_pipeline(
    reference: ZImageTransformer2DModel,
    transformer: zm.ZImageTransformer,
    parts: dict[str, object],
    tmp_path: Path,
) -> None:
    model = make_controlnet("2.1", (0, 2))
    silence_refiner(model)
    net = load(model, tmp_path / "net.safetensors", "2.1")
    mask = Image.fromarray(np.repeat(np.uint8([[0], [255]]), SIZE // 2, 0).repeat(SIZE, 1))
    inputs = {"control_image": picture(1), "image": picture(2), "mask_image": mask}
    want = latents_of(
        ZImageControlNetInpaintPipeline(**parts, transformer=reference, controlnet=model), **inputs
    )
    ours = ZImageControlNetInpaintPipeline(**parts, transformer=transformer, controlnet=net)
    found = latents_of(ours, **inputs)
    assert (found - want).norm() / want.norm() < 1e-5


@pytest.mark.parametrize(
    ("kind", "places"), [("1.0", (0, 2)), ("2.0", (0, 2)), ("2.1", (0, 2)), ("2.1", (0,))]
)
def test_the_pipeline_computes_what_the_authors_code_does(
    kind: Kind,
    places: tuple[int, ...],
    reference: ZImageTransformer2DModel,
    transformer: zm.ZImageTransformer,
    parts: dict[str, object],
    tmp_path: Path,
) -> None:
    """With hints of the refiner, which diffusers' class leaves out."""
    model = make_controlnet(kind, places)
    tensors = file_tensors(kind, model)
    net = load(model, tmp_path / "net.safetensors", kind)
    calls = []

    def record(_: object, inputs: tuple, options: dict[str, Any], output: Any) -> None:
        images, times, captions = inputs
        copies = [x.clone() for x in images], times.clone(), [x.clone() for x in captions]
        calls.append((copies, options["controlnet_block_samples"], output))

    hook = transformer.register_forward_hook(record, with_kwargs=True)
    try:
        pipeline = ZImageControlNetPipeline(**parts, transformer=transformer, controlnet=net)
        latents_of(pipeline, control_image=picture(1))
    finally:
        hook.remove()
    assert len(calls) == 2  # steps, each with both prompts
    for inputs, control, output in calls:
        (given,) = control if isinstance(control, list) else [control]
        assert given.strength == 0.8 and len(given.images) == len(inputs[0]) == 2
        controlled = Controlled(kind, tensors, given.images, 0.8)
        want = authors_forward(reference, *inputs, [controlled])
        assert relative_error(output[0], want) < 1e-5


def test_a_folder_takes_both(
    transformer: zm.ZImageTransformer,
    reference: ZImageTransformer2DModel,
    parts: dict[str, object],
    tmp_path: Path,
) -> None:
    model = make_controlnet("1.0", (0, 2))
    net = load(model, tmp_path / "net.safetensors")
    whole = ZImageControlNetPipeline(**parts, transformer=reference, controlnet=model)
    whole.save_pretrained(tmp_path / "folder")
    pipeline = ZImageControlNetPipeline.from_pretrained(
        tmp_path / "folder", transformer=transformer, controlnet=net, dtype=torch.float32
    ).to("cpu")
    assert pipeline.controlnet is net and pipeline.transformer is transformer
    assert latents_of(pipeline, control_image=picture(1)).isfinite().all()


def test_with_diffusers_transformer_it_says_what_to_do(
    reference: ZImageTransformer2DModel, parts: dict[str, object], tmp_path: Path
) -> None:
    net = load(make_controlnet("1.0", (0, 2)), tmp_path / "net.safetensors")
    pipeline = ZImageControlNetPipeline(**parts, transformer=reference, controlnet=net)
    with pytest.raises(zm.UnsupportedError, match="runs inside a ZImageTransformer"):
        latents_of(pipeline, control_image=picture(1))
