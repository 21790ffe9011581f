"""MXFP8 files for ComfyUI, turned into the tensors of SGLang's model.

tests/python/programs/sglang_checkpoint.py asks SGLang's own loader and model.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor, TensorCoreMXFP8Layout
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import zimage_mxfp8 as zm
from helpers.checkpoints import Tensors, random_tensors, tensor_bytes
from helpers.reference import scale_position
from zimage_mxfp8.zimage.layers import zimage_shapes

FILE = Path(__file__).parents[3] / "integrations/sglang/zimage_comfyui_mxfp8.py"
LAYER = "layers.0.feed_forward.w2"
MODULATION = "layers.0.adaLN_modulation.0"
# SGLang's modules that the default recipe quantises in a model of one block, and their layers.
MODULES = {
    "layers.0.attention.to_qkv": ["layers.0.attention.qkv"],
    "layers.0.attention.to_out.0": ["layers.0.attention.out"],
    "layers.0.feed_forward.w13": ["layers.0.feed_forward.w1", "layers.0.feed_forward.w3"],
    "layers.0.feed_forward.w2": ["layers.0.feed_forward.w2"],
    "noise_refiner.0.attention.to_qkv": ["noise_refiner.0.attention.qkv"],
    "noise_refiner.0.attention.to_out.0": ["noise_refiner.0.attention.out"],
    "noise_refiner.0.feed_forward.w2": ["noise_refiner.0.feed_forward.w2"],
    "context_refiner.0.attention.to_qkv": ["context_refiner.0.attention.qkv"],
    "context_refiner.0.feed_forward.w13": [
        "context_refiner.0.feed_forward.w1",
        "context_refiner.0.feed_forward.w3",
    ],
    "context_refiner.0.feed_forward.w2": ["context_refiner.0.feed_forward.w2"],
    "context_refiner.1.attention.to_qkv": ["context_refiner.1.attention.qkv"],
    "context_refiner.1.feed_forward.w13": [
        "context_refiner.1.feed_forward.w1",
        "context_refiner.1.feed_forward.w3",
    ],
}


def load_module() -> ModuleType:
    """Load the file by its path: no package holds it."""
    spec = importlib.util.spec_from_file_location(FILE.stem, FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sglang = load_module()


def by_comfy_kitchen(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """A matrix as ComfyUI decodes it."""
    params = TensorCoreMXFP8Layout.Params(
        scale=scales.view(torch.float8_e8m0fnu),
        orig_dtype=torch.bfloat16,
        orig_shape=tuple(codes.shape),
    )
    return QuantizedTensor(codes, "TensorCoreMXFP8Layout", params).dequantize()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Tensors:
    """A file by the default recipe, which keeps w3 of the noise refiner and quantises its w1."""
    folder = tmp_path_factory.mktemp("sglang")
    shapes = zimage_shapes(dim=256, layers=1, caption_dim=96, hidden=384)
    save_file(random_tensors(shapes), folder / "plain.safetensors")
    zm.convert(folder / "plain.safetensors", folder / "mxfp8.safetensors")
    return load_file(folder / "mxfp8.safetensors")


@pytest.fixture(scope="module")
def converted(file: Tensors) -> Tensors:
    return dict(sglang.convert_weights(file.items()))


def markers_of(file: Tensors) -> dict[str, dict[str, Any]]:
    return {
        name.removesuffix(".comfy_quant"): json.loads(bytes(tensor.tolist()))
        for name, tensor in file.items()
        if name.endswith(".comfy_quant")
    }


def plain_by_comfy_kitchen(file: Tensors) -> Tensors:
    """The weights and biases of a file with its names, decoded."""
    return {
        name: by_comfy_kitchen(tensor, file[f"{name}_scale"])
        if tensor.dtype == torch.float8_e4m3fn
        else tensor
        for name, tensor in file.items()
        if not name.endswith((".weight_scale", ".comfy_quant"))
    }


def test_decoded_modules_hold_the_rows_of_the_layers(file: Tensors, converted: Tensors) -> None:
    plain = plain_by_comfy_kitchen(file)
    for module, layers in MODULES.items():
        codes = converted[f"{module}.weight"]
        scales = converted[f"{module}.weight_scale_inv"]
        assert scales.dtype == torch.uint8
        assert scales.shape == (codes.shape[0], codes.shape[1] // 32)
        want = torch.cat([plain.pop(f"{layer}.weight") for layer in layers])
        assert torch.equal(by_comfy_kitchen(codes, scales), want), module
    others = {n: t for n, t in converted.items() if n.rpartition(".")[0] not in MODULES}
    assert others.keys() == plain.keys()
    assert all(torch.equal(others[name], plain[name]) for name in plain)
    # Quantised in the file:
    assert others["noise_refiner.0.feed_forward.w1.weight"].dtype == torch.bfloat16
    assert others["layers.0.adaLN_modulation.0.weight"].dtype == torch.bfloat16


def test_the_markers_name_the_quantised_modules(file: Tensors) -> None:
    markers = sglang.layer_markers(markers_of(file))
    assert markers.keys() == MODULES.keys()
    assert {marker["format"] for marker in markers.values()} == {"mxfp8"}


def test_the_order_of_the_tensors_and_the_dtype_of_scales(
    file: Tensors, converted: Tensors
) -> None:
    """ComfyUI's own files have scales in F8_E8M0."""
    items = [
        (n, t.view(torch.float8_e8m0fnu) if n.endswith(".weight_scale") else t)
        for n, t in file.items()
    ]
    random.Random(0).shuffle(items)
    found = dict(sglang.convert_weights(items))
    assert found.keys() == converted.keys()
    assert all(tensor_bytes(found[name]) == tensor_bytes(converted[name]) for name in found)


def test_plain_files_pass_unchanged(file: Tensors) -> None:
    plain = plain_by_comfy_kitchen(file)
    found = dict(sglang.convert_weights(plain.items()))
    assert found.keys() == plain.keys()
    assert all(found[name] is plain[name] for name in plain)


CODES = torch.zeros(256, 128).to(torch.float8_e4m3fn)
SCALES = torch.zeros(256, 4, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({f"{LAYER}.weight": CODES}, "w2.weight lacks"),
        ({f"{LAYER}.weight_scale": SCALES}, "w2.weight_scale lacks"),
        ({"layers.0.feed_forward.w1.weight": CODES.bfloat16()}, "w1.weight lacks .* other half"),
        (
            {f"{LAYER}.weight": CODES, f"{LAYER}.weight_scale": torch.ones(())},
            "w2 has scales of torch.float32, and MXFP8's are E8M0 bytes",
        ),
        (
            {f"{LAYER}.weight": CODES, f"{LAYER}.weight_scale": SCALES[:128]},
            r"w2 has scales \[128, 4\], and blocked ones of codes \[256, 128\] are \[256, 4\]",
        ),
        (
            {f"{LAYER}.weight": CODES[:160], f"{LAYER}.weight_scale": SCALES},
            r"w2 has codes \[160, 128\], and SGLang's layer takes multiples of 128",
        ),
        *(
            (
                {f"{layer}.weight": codes, f"{layer}.weight_scale": SCALES},
                f"{layer} has codes .*, which is no matrix of whole blocks of 32 columns",
            )
            for layer in (LAYER, MODULATION)
            for codes in (CODES[0], CODES[None], CODES[:, :33], CODES[:0])
        ),
        *(
            (
                {f"{LAYER}.weight_scale": SCALES, f"{LAYER}.weight": CODES.to(dtype)},
                f"w2 has scales, and codes of {dtype}; MXFP8's are E4M3",
            )
            for dtype in (torch.int8, torch.bfloat16, torch.float8_e5m2)
        ),
        (
            {
                "layers.0.feed_forward.w1.weight": CODES,
                "layers.0.feed_forward.w1.weight_scale": SCALES,
                "layers.0.feed_forward.w3.weight": CODES[:128],
                "layers.0.feed_forward.w3.weight_scale": SCALES[:128],
            },
            r"w1 \[256, 128\] and .*w3 \[128, 128\] become one module, and must have the same",
        ),
    ],
)
def test_other_files_are_refused(tensors: Tensors, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        dict(sglang.convert_weights(tensors.items()))


@functools.cache
def random_blocked(tile_rows: int, tile_columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales in rows, and blocked one byte at a time."""
    rows, blocks = tile_rows * 128, tile_columns * 4
    generator = torch.Generator().manual_seed(rows * blocks)
    in_rows = torch.randint(256, (rows, blocks), dtype=torch.uint8, generator=generator)
    positions = [
        scale_position(row, block, blocks) for row in range(rows) for block in range(blocks)
    ]
    blocked = torch.empty(rows * blocks, dtype=torch.uint8)
    blocked[torch.tensor(positions)] = in_rows.flatten()
    return in_rows, blocked.reshape(rows, blocks)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_parts_of_scales_are_whole_tiles(data: st.DataObject) -> None:
    sizes = [data.draw(st.integers(1, 3)) for _ in range(2)]
    dim = data.draw(st.integers(0, 1))
    start = data.draw(st.integers(0, sizes[dim] - 1))
    length = data.draw(st.integers(1, sizes[dim] - start))
    in_rows, blocked = random_blocked(sizes[0], sizes[1])
    assert torch.equal(sglang.row_order(blocked), in_rows)
    found = sglang.narrow_scales(blocked, dim, start * 128, length * 128)
    unit = 128 if dim == 0 else 4  # rows, or blocks of 32 columns
    assert torch.equal(sglang.row_order(found), in_rows.narrow(dim, start * unit, length * unit))


@pytest.mark.parametrize(("start", "length"), [(64, 128), (0, 96)])
def test_tiles_are_not_cut(start: int, length: int) -> None:
    with pytest.raises(ValueError, match=f"{start} to {start + length} cuts a tile"):
        sglang.narrow_scales(SCALES, 0, start, length)
