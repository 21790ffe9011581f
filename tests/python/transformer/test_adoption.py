"""A transformer around tensors in memory: the same as from the file, without copies."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import zimage_mxfp8 as zm
from helpers.diffusers_reference import make_reference, random_inputs, relative_error
from zimage_mxfp8.transformer.adoption import AdoptedLayer, adopt
from zimage_mxfp8.transformer.linear import Linear

SCALE = ".weight_scale"
INPUTS = random_inputs([(8, 12), (10, 6)], [7, 20])
Parts = tuple[dict[str, torch.Tensor], dict[str, AdoptedLayer]]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adopted")
    make_reference(dim=256, layers=3).save_pretrained(folder / "transformer")
    zm.convert(folder / "transformer", folder / "z.safetensors")
    return folder / "z.safetensors"


def tensors_of(file: Path) -> Parts:
    """Read with another library; shapes of the layers are those of the codes, or stated."""
    tensors = load_file(file)
    names = [name.removesuffix(SCALE) for name in tensors if name.endswith(SCALE)]
    layers = {}
    for name in names:
        codes, scales = tensors.pop(f"{name}.weight"), tensors.pop(name + SCALE)
        rows, columns = codes.shape
        if ".w2" in name:
            columns = 682
        elif ".w1" in name or ".w3" in name:
            rows = 682
        layers[name] = AdoptedLayer(codes, scales, (rows, columns))
    plain = {name: x for name, x in tensors.items() if not name.endswith(".comfy_quant")}
    return plain, layers


def assert_same(found: zm.ZImageTransformer, wanted: zm.ZImageTransformer) -> None:
    """Of the same weights. On some CPUs float32 sums depend on where these are in memory."""
    pairs = zip(linears(found), linears(wanted), strict=True)
    assert all(torch.equal(a.decode(), b.decode()) for a, b in pairs)
    assert relative_error(found(*INPUTS).sample, wanted(*INPUTS).sample) < 2e-6


def linears(model: zm.ZImageTransformer) -> list[Linear]:
    return [module for module in model.modules() if isinstance(module, Linear)]


@pytest.mark.parametrize("compute", ["weight-only", "fp8", "mxfp8-emulated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_as_from_the_file(file: Path, compute: str, dtype: torch.dtype) -> None:
    plain, layers = tensors_of(file)
    wanted = zm.ZImageTransformer.from_checkpoint(file, "cpu", compute, dtype)
    assert_same(adopt(plain, layers, compute, dtype), wanted)


def test_nothing_of_8_bits_is_copied_and_stacks_are_views(file: Path) -> None:
    plain, layers = tensors_of(file)
    together = {}
    for name, layer in layers.items():  # w1 and w3 of a block in one piece of memory
        other = layers.get(name.replace(".w1", ".w3"))
        if name.endswith(".w1") and other is not None:
            pair = [layer, other]
            codes = torch.cat([x.codes.view(torch.uint8) for x in pair])
            scales = torch.cat([x.scale for x in pair])
            halves = zip(codes.chunk(2), scales.chunk(2), ("w1", "w3"), strict=True)
            for half, half_scales, part in halves:
                key = name.replace(".w1", f".{part}")
                together[key] = AdoptedLayer(half, half_scales, layer.shape)
    assert len(together) >= 6
    layers |= together
    adopted = adopt(plain, layers, "weight-only", torch.float32)
    theirs = {layer.codes.untyped_storage().data_ptr() for layer in layers.values()}
    ours = [buffer for name, buffer in adopted.named_buffers() if name.endswith("codes")]
    assert ours and {x.untyped_storage().data_ptr() for x in ours} <= theirs
    assert_same(adopted, zm.ZImageTransformer.from_checkpoint(file, "cpu", dtype=torch.float32))


def test_folding_in_place_leaves_valid_mxfp8(file: Path) -> None:
    """The changed codes and scales decode to the folded weights, and folding them changes none."""
    plain, layers = tensors_of(file)
    before = {name: layer.codes.view(torch.uint8).clone() for name, layer in layers.items()}
    adopted = adopt(plain, layers, "fp8", torch.float32)
    assert any(
        not torch.equal(layer.codes.view(torch.uint8), before[name])
        for name, layer in layers.items()
    )
    linear = adopted.layers[0].qkv
    layer = layers["layers.0.attention.qkv"]
    padded = (layer.codes.shape[0], layer.codes.shape[1])
    decoded = zm.dequantize(zm.MXFP8Array(layer.codes, layer.scale, padded), "float32")
    assert torch.equal(decoded[: len(linear.decode())], linear.decode())
    kept = {name: layer.codes.view(torch.uint8).clone() for name, layer in layers.items()}
    again = adopt(plain, layers, "fp8", torch.float32)
    assert all(
        torch.equal(layer.codes.view(torch.uint8), kept[name]) for name, layer in layers.items()
    )
    assert_same(again, adopted)


def test_a_missing_tensor_is_named(file: Path) -> None:
    plain, layers = tensors_of(file)
    del plain["layers.1.ffn_norm1.weight"]
    with pytest.raises(zm.CheckpointError, match=re.escape('has no "layers.1.ffn_norm1.weight"')):
        adopt(plain, layers, "weight-only", torch.float32)
