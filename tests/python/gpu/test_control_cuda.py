"""ControlNets on a CUDA device, against the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import zimage_mxfp8 as zm
from helpers.control_reference import (
    Kind,
    control_images,
    file_tensors,
    make_controlnet,
    write_controlnet,
)
from helpers.cuda_model import RAGGED, load, on_device
from helpers.diffusers_reference import make_reference, random_inputs, relative_error

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("controlled")
    make_reference(layers=4, refiners=2).save_pretrained(folder / "transformer")
    zm.convert(folder / "transformer", folder / "quantized.safetensors")
    return folder / "quantized.safetensors"


@pytest.mark.parametrize("kind", ["1.0", "2.0", "2.1"])
@pytest.mark.parametrize("compute", ["weight-only", "fp8"])
def test_graphs_follow_strength_and_device(
    kind: Kind, compute: str, base: Path, tmp_path: Path
) -> None:
    """From the second call on a CUDA graph runs, which is to see every change."""
    tensors = file_tensors(kind, make_controlnet(kind, (0, 2)))
    plain = write_controlnet(tmp_path / "net.safetensors", tensors, torch.bfloat16)
    zm.convert(plain, tmp_path / "net-mxfp8.safetensors")
    path = tmp_path / "net-mxfp8.safetensors"
    model, net = load(base, compute), zm.ZImageControlNet.from_checkpoint(path, "cuda", compute)
    exact = zm.ZImageTransformer.from_checkpoint(base, "cpu", "weight-only", torch.float32)
    exact_net = zm.ZImageControlNet.from_checkpoint(path, "cpu", "weight-only", torch.float32)
    inputs = random_inputs(*RAGGED)
    images = control_images(RAGGED[0], net.config.control_in_dim)
    on_cuda = [image.cuda() for image in images]
    tolerance = {"weight-only": 0.03, "fp8": 0.2}[compute]
    for strength in (0.8, 0.8, 0.2, -0.5):
        want = exact(*inputs, controlnet_block_samples=exact_net.control(images, strength)).sample
        control = net.control(on_cuda, strength)
        found = model(*on_device(inputs), controlnet_block_samples=control).sample
        assert relative_error(found, want) < tolerance
    twice = [(model, net, on_device(inputs), on_cuda), (exact, exact_net, inputs, images)]
    found, summed = (
        each(*x, controlnet_block_samples=[of.control(image, s) for s in (0.8, -0.3)]).sample
        for each, of, x, image in twice
    )
    assert relative_error(found, summed) < tolerance
    net.to("cpu")
    net.to("cuda")  # to other addresses, perhaps
    found = model(*on_device(inputs), controlnet_block_samples=net.control(on_cuda, -0.5)).sample
    assert relative_error(found, want) < tolerance
    without = model(*on_device(inputs)).sample
    assert relative_error(without, exact(*inputs).sample) < tolerance
