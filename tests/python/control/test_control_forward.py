"""What a ControlNet adds, against diffusers' classes and against the original authors' forward."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from diffusers import ZImageControlNetModel, ZImageTransformer2DModel

import zimage_mxfp8 as zm
from helpers.control_reference import (
    Controlled,
    Kind,
    authors_forward,
    control_images,
    file_tensors,
    make_controlnet,
    silence_refiner,
    write_controlnet,
)
from helpers.diffusers_reference import make_reference, random_inputs, relative_error
from zimage_mxfp8.transformer.control import Control

LAYERS, REFINERS = 4, 2
SIZES, CAPTIONS = [(8, 12), (4, 6)], [5, 40]
TOLERANCE = 1e-5  # the order of float32 sums
CHANNELS: dict[Kind, int] = {"1.0": 16, "2.0": 33, "2.1": 33}
EVERY_OTHER = (0, 2)


@pytest.fixture(scope="module")
def reference() -> ZImageTransformer2DModel:
    return make_reference(layers=LAYERS, refiners=REFINERS)


@pytest.fixture(scope="module")
def transformer(
    reference: ZImageTransformer2DModel, tmp_path_factory: pytest.TempPathFactory
) -> zm.ZImageTransformer:
    folder = tmp_path_factory.mktemp("base")
    reference.save_pretrained(folder)
    return zm.ZImageTransformer.from_checkpoint(folder, "cpu", dtype=torch.float32)


def load(
    kind: Kind, model: ZImageControlNetModel, folder: Path
) -> tuple[zm.ZImageControlNet, dict[str, torch.Tensor]]:
    tensors = file_tensors(kind, model)
    path = write_controlnet(folder / f"{kind}.safetensors", tensors)
    return zm.ZImageControlNet.from_checkpoint(path, "cpu", dtype=torch.float32), tensors


@torch.no_grad()
def of_diffusers(
    net: ZImageControlNetModel, base: ZImageTransformer2DModel, inputs, images, strength: float
) -> list[torch.Tensor]:
    net = ZImageControlNetModel.from_transformer(net, base)
    samples = net(*inputs, images, conditioning_scale=strength)
    return base(*inputs, controlnet_block_samples=samples, return_dict=False)[0]


def test_1_0_equals_diffusers(
    reference: ZImageTransformer2DModel, transformer: zm.ZImageTransformer, tmp_path: Path
) -> None:
    model = make_controlnet("1.0", EVERY_OTHER)
    net, _ = load("1.0", model, tmp_path)
    inputs, images = random_inputs(SIZES, CAPTIONS), control_images(SIZES, 16)
    want = of_diffusers(model, reference, inputs, images, 0.75)
    control = net.control(images, 0.75)
    found = transformer(*inputs, controlnet_block_samples=control).sample
    assert relative_error(found, want) < TOLERANCE
    plain = transformer(*inputs).sample
    assert relative_error(plain, want) > 0.1  # the hints count


def test_main_hints_equal_diffusers_where_the_refiner_gives_none(
    reference: ZImageTransformer2DModel, transformer: zm.ZImageTransformer, tmp_path: Path
) -> None:
    model = make_controlnet("2.1", EVERY_OTHER)
    silence_refiner(model)
    net, _ = load("2.1", model, tmp_path)
    inputs, images = random_inputs(SIZES, CAPTIONS), control_images(SIZES, 33)
    want = of_diffusers(model, reference, inputs, images, 0.9)
    found = transformer(*inputs, controlnet_block_samples=net.control(images, 0.9)).sample
    assert relative_error(found, want) < TOLERANCE


@pytest.mark.parametrize("kind", ["1.0", "2.0", "2.1"])
@pytest.mark.parametrize("places", [(0,), EVERY_OTHER, (0, 1, 2, 3)], ids=str)
def test_every_generation_equals_the_authors_forward(
    kind: Kind,
    places: tuple[int, ...],
    reference: ZImageTransformer2DModel,
    transformer: zm.ZImageTransformer,
    tmp_path: Path,
) -> None:
    if kind == "2.0" and len(places) < REFINERS:
        pytest.skip("2.0 has more blocks than the noise refiner")
    net, tensors = load(kind, make_controlnet(kind, places), tmp_path)
    inputs, images = random_inputs(SIZES, CAPTIONS), control_images(SIZES, CHANNELS[kind])
    want = authors_forward(reference, *inputs, [Controlled(kind, tensors, images, 0.8)])
    found = transformer(*inputs, controlnet_block_samples=net.control(images, 0.8)).sample
    assert relative_error(found, want) < TOLERANCE


@pytest.mark.parametrize("kind", ["1.0", "2.0", "2.1"])
def test_the_tokens_of_the_image_alone(
    kind: Kind,
    reference: ZImageTransformer2DModel,
    transformer: zm.ZImageTransformer,
    tmp_path: Path,
) -> None:
    """As ComfyUI computes it; the images need fillers."""
    net, tensors = load(kind, make_controlnet(kind, EVERY_OTHER), tmp_path)
    inputs, images = random_inputs(SIZES, CAPTIONS), control_images(SIZES, CHANNELS[kind])
    alone = Controlled(kind, tensors, images, 0.8, image_only=True)
    want = authors_forward(reference, *inputs, [alone])
    control = Control(net, tuple(images), 0.8, image_only=True)
    found = transformer(*inputs, controlnet_block_samples=control).sample
    assert relative_error(found, want) < TOLERANCE
    whole = transformer(*inputs, controlnet_block_samples=net.control(images, 0.8)).sample
    assert relative_error(whole, want) > 0.01


def test_diffusers_leaves_the_refiner_hints_out(
    reference: ZImageTransformer2DModel, transformer: zm.ZImageTransformer, tmp_path: Path
) -> None:
    """The difference that docs/guide/controlnet.md states; equality would mean to update it."""
    model = make_controlnet("2.1", EVERY_OTHER)
    net, _ = load("2.1", model, tmp_path)
    inputs, images = random_inputs(SIZES, CAPTIONS), control_images(SIZES, 33)
    theirs = of_diffusers(model, reference, inputs, images, 0.9)
    ours = transformer(*inputs, controlnet_block_samples=net.control(images, 0.9)).sample
    assert relative_error(ours, theirs) > 0.01


def test_several_at_once_add_up(
    reference: ZImageTransformer2DModel, transformer: zm.ZImageTransformer, tmp_path: Path
) -> None:
    one, tensors_1 = load("1.0", make_controlnet("1.0", EVERY_OTHER), tmp_path)
    two, tensors_2 = load("2.1", make_controlnet("2.1", (0, 1, 2, 3), seed=8), tmp_path)
    inputs = random_inputs(SIZES, CAPTIONS)
    images_1, images_2 = control_images(SIZES, 16), control_images(SIZES, 33, seed=4)
    want = authors_forward(
        reference,
        *inputs,
        [
            Controlled("1.0", tensors_1, images_1, 0.7),
            Controlled("2.1", tensors_2, images_2, -0.4),
        ],
    )
    controls = [one.control(images_1, 0.7), two.control(images_2, -0.4)]
    found = transformer(*inputs, controlnet_block_samples=controls).sample
    assert relative_error(found, want) < TOLERANCE


def test_strength_zero_changes_nothing(transformer: zm.ZImageTransformer, tmp_path: Path) -> None:
    net, _ = load("2.1", make_controlnet("2.1", EVERY_OTHER), tmp_path)
    inputs, images = random_inputs(SIZES, CAPTIONS), control_images(SIZES, 33)
    found = transformer(*inputs, controlnet_block_samples=net.control(images, 0.0)).sample
    assert relative_error(found, transformer(*inputs).sample) < TOLERANCE


def test_a_file_without_the_unused_refiner_is_2_0(
    transformer: zm.ZImageTransformer, tmp_path: Path
) -> None:
    model = make_controlnet("2.0", EVERY_OTHER)
    whole, _ = load("2.0", model, tmp_path)
    path = write_controlnet(tmp_path / "short.safetensors", dict(model.state_dict()))
    short = zm.ZImageControlNet.from_checkpoint(path, "cpu", dtype=torch.float32)
    assert short.config == whole.config
    inputs, images = random_inputs(SIZES, CAPTIONS), control_images(SIZES, 33)
    samples = [
        transformer(*inputs, controlnet_block_samples=net.control(images)).sample
        for net in (whole, short)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*samples, strict=True))


def test_quantised_layers_equal_their_decoded_weights(
    reference: ZImageTransformer2DModel, transformer: zm.ZImageTransformer, tmp_path: Path
) -> None:
    tensors = file_tensors("2.1", make_controlnet("2.1", EVERY_OTHER))
    plain = write_controlnet(tmp_path / "plain.safetensors", tensors, torch.bfloat16)
    quantized, decoded = tmp_path / "mxfp8.safetensors", tmp_path / "decoded.safetensors"
    zm.convert(plain, quantized)
    zm.dequantize_checkpoint(quantized, decoded)
    nets = [
        zm.ZImageControlNet.from_checkpoint(path, "cpu", dtype=torch.float32)
        for path in (quantized, decoded, plain)
    ]
    inputs, images = random_inputs(SIZES, CAPTIONS), control_images(SIZES, 33)
    found, exact, before = (
        transformer(*inputs, controlnet_block_samples=net.control(images)).sample for net in nets
    )
    assert relative_error(found, exact) < TOLERANCE
    assert 0.001 < relative_error(found, before) < 0.1  # the rounding of MXFP8


def test_a_copy_computes_the_same(transformer: zm.ZImageTransformer, tmp_path: Path) -> None:
    net, _ = load("1.0", make_controlnet("1.0", EVERY_OTHER), tmp_path)
    copied = pickle.loads(pickle.dumps(net))
    assert copied.graph_key != net.graph_key  # a CUDA graph of the one is not for the other
    inputs, images = random_inputs(SIZES, CAPTIONS), control_images(SIZES, 16)
    want, found = (
        transformer(*inputs, controlnet_block_samples=each.control(images)).sample
        for each in (net, copied)
    )
    assert all(torch.equal(a, b) for a, b in zip(want, found, strict=True))


@pytest.mark.parametrize(
    ("form", "compute"),
    [("mxfp8", "fp8"), ("mxfp8", "mxfp8-emulated"), ("int8-convrot", "int8")],
)
def test_other_modes_run(
    form: str, compute: str, transformer: zm.ZImageTransformer, tmp_path: Path
) -> None:
    tensors = file_tensors("2.0", make_controlnet("2.0", EVERY_OTHER))
    plain = write_controlnet(tmp_path / "plain.safetensors", tensors, torch.bfloat16)
    zm.convert(plain, tmp_path / "quantized.safetensors", format=form)
    exact, rounded = (
        zm.ZImageControlNet.from_checkpoint(
            tmp_path / "quantized.safetensors", "cpu", mode, torch.float32
        )
        for mode in ("weight-only", compute)
    )
    inputs, images = random_inputs(SIZES, CAPTIONS), control_images(SIZES, 33)
    want, found = (
        transformer(*inputs, controlnet_block_samples=net.control(images)).sample
        for net in (exact, rounded)
    )
    assert 0 < relative_error(found, want) < 0.2
