"""Models in float16: closer than in bfloat16, and finite where activations leave its range."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import zimage_mxfp8 as zm
from helpers.adapter_files import modules_of, write_dora, write_pairs
from helpers.control_reference import (
    control_images,
    file_tensors,
    make_controlnet,
    write_controlnet,
)
from helpers.diffusers_reference import make_reference, random_inputs, relative_error
from helpers.massive_model import MassiveModel, make_massive
from zimage_mxfp8.transformer import floating_dtype
from zimage_mxfp8.transformer.arithmetic import float16
from zimage_mxfp8.transformer.compute import COMPUTE_MODES, unsupported
from zimage_mxfp8.transformer.floating_dtype import default_dtype
from zimage_mxfp8.transformer.linear import Linear

MODES = ("plain", *(mode for mode in COMPUTE_MODES if not unsupported(mode, -1)))
EXACT = ("plain", "weight-only")  # activations are not rounded to 8 bits
RAGGED = ([(4, 6), (2, 4)], [5, 33])
LARGEST = 65504  # of float16
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(scope="module")
def massive(tmp_path_factory: pytest.TempPathFactory) -> MassiveModel:
    return MassiveModel(tmp_path_factory.mktemp("massive"))


def errors(massive: MassiveModel, mode: str, *inputs: Any) -> dict[torch.dtype, float]:
    """The relative error of each dtype, against diffusers' float32 or else ours."""
    found = {}
    for dtype in DTYPES:
        found[dtype] = massive.load(mode, dtype)(*inputs).sample
        assert {sample.dtype for sample in found[dtype]} == {dtype}
    exact = mode in EXACT
    want = massive.reference(*inputs, return_dict=False)[0] if exact else found[torch.float32]
    return {dtype: relative_error(found[dtype], want) for dtype in DTYPES}


@pytest.mark.parametrize("mode", MODES)
def test_it_is_closer_than_bfloat16(mode: str, massive: MassiveModel) -> None:
    found = errors(massive, mode, *random_inputs(*RAGGED))
    if mode in EXACT:  # bits of the mantissa: 11 and 8
        assert found[torch.float16] < 3e-3 and found[torch.float16] < found[torch.bfloat16] / 4
    else:
        assert 0 < found[torch.float16] < found[torch.bfloat16]


def test_only_results_in_range_are_float16(massive: MassiveModel) -> None:
    model = massive.load("int8", torch.float16)
    found: dict[str, torch.dtype] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda _m, _x, result: found.update({name: result.dtype})

    for name, module in model.named_modules():
        if isinstance(module, Linear):
            last = name.rpartition(".")[2]
            if last in ("qkv", "out", "ffn_out", "x_embedder"):
                module.register_forward_hook(note(last))
            is_large = last == "qkv" or "ffn_in" in name
            assert module.result_dtype == (torch.float16 if is_large else torch.float32)
    model(*random_inputs(*RAGGED))
    assert found == {
        "qkv": torch.float16,
        "out": torch.float32,
        "ffn_out": torch.float32,
        "x_embedder": torch.float32,
    }


def test_the_massive_activations_are_beyond_float16(massive: MassiveModel) -> None:
    """What the test above is worth: in float16 alone diffusers' model gives NaN."""
    products: list[float] = []
    sums: list[float] = []

    def note(_: object, given: tuple[torch.Tensor], result: torch.Tensor) -> None:
        products.append(given[0].abs().max().item())
        sums.append(result.abs().max().item())

    for name, module in massive.reference.named_modules():
        if name.endswith("feed_forward.w2"):
            module.register_forward_hook(note)
    x, t, captions = random_inputs(*RAGGED)
    massive.reference(x, t, captions)
    assert max(products) > 2.5e4 and max(sums) > LARGEST
    half = make_massive()
    half.load_state_dict(massive.reference.state_dict())
    half.half()
    (found, _) = half([each.half() for each in x], t, [each.half() for each in captions]).sample
    assert not found.isfinite().all()


@pytest.mark.parametrize("mode", ["plain", "weight-only", "int8"])
def test_captions_beyond_float16(mode: str, massive: MassiveModel) -> None:
    """Of a language model whose hidden states have outliers."""
    x, t, captions = random_inputs(*RAGGED)
    captions = [each * 1e5 for each in captions]
    assert max(each.abs().max() for each in captions) > LARGEST
    found = errors(massive, mode, x, t, captions)
    assert found[torch.float16] < 0.03 and found[torch.float16] < found[torch.bfloat16]


@pytest.mark.parametrize("mode", ["plain", "weight-only", "int8"])
def test_other_dtypes_become_float16(mode: str, massive: MassiveModel) -> None:
    inputs = random_inputs(*RAGGED)
    want = massive.load(mode, torch.float16)(*inputs).sample
    changed = massive.load(mode, torch.float32)
    for back in (torch.float16, torch.float32, torch.float16):
        changed = changed.to(back)
    assert changed.dtype == torch.float16
    for found, sample in zip(changed(*inputs).sample, want, strict=True):
        assert torch.equal(found, sample)


@pytest.mark.parametrize("mode", ["weight-only", "int8"])
@pytest.mark.parametrize("kind", ["low rank", "DoRA"])
def test_adapters(kind: str, mode: str, massive: MassiveModel, tmp_path: Path) -> None:
    if kind == "DoRA":
        written = write_dora(massive.reference, lambda name: name, ".lora_magnitude_vector")
    else:
        modules = modules_of(massive.reference)
        written = write_pairs(modules, lambda name: name, ".lora_A.weight", ".lora_B.weight")
    save_file(written.tensors, tmp_path / "adapter.safetensors")
    found = {}
    inputs = random_inputs(*RAGGED)
    for dtype in DTYPES:
        transformer = massive.load(mode, dtype)
        plain = transformer(*inputs).sample
        transformer.load_lora(tmp_path / "adapter.safetensors", "a", 0.7)
        found[dtype] = transformer(*inputs).sample
        assert relative_error(found[dtype], plain) > 0.03
    wide = found[torch.float32]
    assert relative_error(found[torch.float16], wide) < 0.03
    assert relative_error(found[torch.float16], wide) < relative_error(found[torch.bfloat16], wide)


def test_a_controlnet(tmp_path: Path) -> None:
    base = make_reference(layers=4, refiners=2)
    base.save_pretrained(tmp_path / "base")
    net = make_controlnet("2.1", (0, 2))
    path = write_controlnet(tmp_path / "net.safetensors", file_tensors("2.1", net))
    inputs, images = random_inputs(*RAGGED), control_images(RAGGED[0], 33)
    found = {}
    for dtype in DTYPES:
        transformer = zm.ZImageTransformer.from_checkpoint(tmp_path / "base", "cpu", dtype=dtype)
        control = zm.ZImageControlNet.from_checkpoint(path, "cpu", dtype=dtype)
        controls = control.control(images, 0.8)
        found[dtype] = transformer(*inputs, controlnet_block_samples=controls).sample
    wide = found[torch.float32]
    half = relative_error(found[torch.float16], wide)
    assert half < 3e-3 and half < relative_error(found[torch.bfloat16], wide) / 4


@pytest.mark.parametrize("mode", ["weight-only", "int8"])
def test_int8_convrot_files(mode: str, massive: MassiveModel, tmp_path: Path) -> None:
    file = tmp_path / "convrot.safetensors"
    zm.convert(massive.plain, file, format="int8-convrot")
    found = {}
    for dtype in DTYPES:
        transformer = zm.ZImageTransformer.from_checkpoint(file, "cpu", mode, dtype)
        found[dtype] = transformer(*random_inputs(*RAGGED)).sample
    wide = found[torch.float32]
    half = relative_error(found[torch.float16], wide)
    assert half < 0.03 and half < relative_error(found[torch.bfloat16], wide)


@pytest.mark.parametrize("name", ["layers.0.attention_norm2.weight", "cap_embedder.1.weight"])
def test_weights_beyond_float16(name: str, massive: MassiveModel, tmp_path: Path) -> None:
    tensors = load_file(massive.quantized)
    tensors[name][3] = -1e6
    with safe_open(massive.quantized, "pt") as file:
        save_file(tensors, tmp_path / "m.safetensors", file.metadata())
    for dtype in (torch.bfloat16, torch.float32):
        zm.ZImageTransformer.from_checkpoint(tmp_path / "m.safetensors", "cpu", dtype=dtype)
    with pytest.raises(
        zm.CheckpointError,
        match=rf'm.safetensors: tensor "{name}" has .*, and the largest number of float16 is 65504',
    ) as refused:
        zm.ZImageTransformer.from_checkpoint(tmp_path / "m.safetensors", "cpu", dtype="float16")
    assert refused.value.hint == 'use `dtype="bfloat16"`'


# ---- The GEMM

rows = st.integers(0, 6)
columns = st.integers(1, 40)
exponents = st.integers(-140, 100)


@given(rows, columns, columns, exponents, st.integers(0, 2**32 - 1))
def test_a_gemm_has_the_range_of_float32(m: int, k: int, n: int, exponent: int, seed: int) -> None:
    """Against float64: the error is that of rounding operands and result to 11 bits."""
    generator = np.random.default_rng(seed)
    scales = 2.0 ** generator.integers(-8, 7, (m, 1)) * 2.0**exponent
    x = torch.from_numpy(generator.standard_normal((m, k)) * scales).float()
    w = torch.from_numpy(generator.standard_normal((n, k))).half()
    bias = torch.from_numpy(generator.standard_normal(n)).half()
    found = float16.multiply(x, lambda part: part @ w.T, torch.float32, bias)
    exact = x.double() @ w.double().T
    # Subnormal numbers of float32 have fewer bits.
    magnitude = x.double().abs() @ w.double().abs().T + 2.0**-140
    error = (found.double() - exact - bias.double()).abs()
    assert (error <= 2.0**-9 * magnitude + 2.0**-23 * bias.double().abs() + 2.0**-120).all()


@given(exponents.filter(lambda each: each > -100), st.integers(0, 2**32 - 1))
def test_powers_of_two_change_no_bit(exponent: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, w = torch.randn(3, 32, generator=generator), torch.randn(5, 32, generator=generator).half()
    want = float16.multiply(x, lambda part: part @ w.T, torch.float32)
    found = float16.multiply(x * 2.0**exponent, lambda part: part @ w.T, torch.float32)
    assert torch.equal(found, want * 2.0**exponent)


def test_torchs_default_dtype_does_not_matter() -> None:
    """Loading a part with transformers changes it in all threads."""
    x, w = torch.full((2, 8), 4e4), torch.eye(8).half()
    want = float16.multiply(x, lambda part: part @ w.T, torch.float32)
    torch.set_default_dtype(torch.float16)
    try:
        found = float16.multiply(x, lambda part: part @ w.T, torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, want) and torch.equal(found, x)


def test_rows_that_are_not_finite_leave_the_others_alone() -> None:
    x, w = torch.randn(4, 32), torch.randn(5, 32).half()
    want = float16.multiply(x, lambda part: part @ w.T, torch.float32)
    x[0, 3], x[2, 5], x[3] = torch.nan, torch.inf, 0
    found = float16.multiply(x, lambda part: part @ w.T, torch.float32)
    assert not found[0].isfinite().any() and not found[2].isfinite().any()
    assert torch.equal(found[1], want[1]) and not found[3].any()


# ---- The default


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        ((7, 5), torch.float16),
        ((8, 0), torch.bfloat16),
        ((8, 9), torch.bfloat16),
        ((12, 0), torch.bfloat16),
    ],
)
def test_the_default_follows_the_device(
    capability: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def of_device(index: int) -> tuple[int, int]:
        asked.append(index)
        return capability

    monkeypatch.setattr(floating_dtype.devices, "capability", of_device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert default_dtype(torch.device("cuda", 3)) == dtype
    assert default_dtype(torch.device("cuda")) == dtype
    assert asked == [3, 1]
    assert default_dtype(torch.device("cpu")) == torch.bfloat16
