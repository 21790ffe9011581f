"""The backend of comfy-kitchen: the eager backend's bits, and the calls that it leaves alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import comfy_kitchen as ck
import hypothesis.strategies as st
import pytest
import torch
from comfy_kitchen.registry import registry
from comfy_kitchen.tensor import QuantizedTensor
from hypothesis import given

from zimage_mxfp8.comfy import register_backend
from zimage_mxfp8.comfy.backend import NAME

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    before = list(registry._priority)
    assert register_backend()
    yield
    registry.set_priority(before)


def chosen(function: str, **arguments: object) -> str:
    return registry.get_capable_backend(function, arguments)


def matrix(rows: int, columns: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    spread = torch.exp2(torch.randint(-20, 12, (rows, 1), generator=random))
    values = torch.randn(rows, columns, generator=random) * spread
    values[:, ::7] = 0
    values[rows // 2] = 0
    return values.to(dtype)


@given(
    rows=st.integers(1, 300),
    blocks=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
    pad=st.booleans(),
    seed=st.integers(0, 999),
)
def test_bits_are_those_of_the_eager_backend(
    rows: int, blocks: int, dtype: torch.dtype, pad: bool, seed: int
) -> None:
    x = matrix(rows, 32 * blocks, dtype, seed)
    assert chosen("quantize_mxfp8", x=x, pad_32x=pad) == NAME
    codes, scales = ck.quantize_mxfp8(x, pad_32x=pad)
    with registry.use_backend("eager"):
        codes_wanted, scales_wanted = ck.quantize_mxfp8(x, pad_32x=pad)
    assert codes.shape == codes_wanted.shape and scales.shape == scales_wanted.shape
    assert torch.equal(codes.view(torch.uint8), codes_wanted.view(torch.uint8))
    assert torch.equal(scales.view(torch.uint8), scales_wanted.view(torch.uint8))
    for target in DTYPES:
        found = ck.dequantize_mxfp8(codes, scales, target)
        with registry.use_backend("eager"):
            wanted = ck.dequantize_mxfp8(codes, scales, target)
        assert found.dtype == target and torch.equal(found, wanted)


def test_quantised_tensors_compute_with_it() -> None:
    weight = QuantizedTensor.from_float(matrix(100, 96, torch.bfloat16, 1), "TensorCoreMXFP8Layout")
    x = torch.randn(5, 96, dtype=torch.bfloat16)
    found = torch.nn.functional.linear(x, weight)
    with registry.use_backend("eager"):
        assert torch.equal(found, torch.nn.functional.linear(x, weight))


def test_other_calls_are_left_to_other_backends() -> None:
    x = matrix(64, 64, torch.float32, 0)
    codes, scales = ck.quantize_mxfp8(x)
    for function, arguments in (
        ("quantize_mxfp8", {"x": x.double(), "pad_32x": False}),
        ("quantize_mxfp8", {"x": x[:, :40], "pad_32x": True}),
        ("quantize_mxfp8", {"x": x[None], "pad_32x": False}),
        ("dequantize_mxfp8", {"qx": codes.view(torch.float8_e5m2), "block_scales": scales}),
        ("dequantize_mxfp8", {"qx": codes[:5], "block_scales": scales}),
        ("quantize_fp8", {"x": x, "scale": torch.ones(1)}),
    ):
        check = registry.validate_backend_for_call(NAME, function, arguments)
        assert not check.success, (function, arguments)
    ragged, _ = ck.quantize_mxfp8(x[:, :40].contiguous(), pad_32x=True)  # the eager one's
    assert ragged.shape == (64, 64)


def test_registering_again_changes_nothing() -> None:
    before = list(registry._priority)
    assert before[0] == NAME and before.count(NAME) == 1
    assert register_backend()
    assert registry._priority == before


def test_the_switch_leaves_everything_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    registry.set_priority(["eager"])
    monkeypatch.setenv("ZIMAGE_MXFP8_COMFY_BACKEND", "0")
    assert not register_backend()
    assert registry._priority == ["eager"]


def test_without_comfy_kitchen() -> None:
    code = (
        "import sys; sys.modules['comfy_kitchen'] = None\n"
        "from zimage_mxfp8.comfy import register_backend\n"
        "from zimage_mxfp8 import MissingExtraError\n"
        "try: register_backend()\n"
        "except MissingExtraError as error: print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == (
        "the backend needs comfy-kitchen, which is not installed; it comes with ComfyUI; run pip "
        "install comfy-kitchen\n"
    ), result.stderr
