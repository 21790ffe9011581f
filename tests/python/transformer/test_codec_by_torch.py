"""The codec by torch operations, against the core's bytes, ml_dtypes and a scalar reference."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import zimage_mxfp8 as zm
from helpers import reference
from helpers.matrices import encoded_of, equal_but_for_nan, matrix_of
from zimage_mxfp8.ops import gemm as matmul
from zimage_mxfp8.transformer.arithmetic import scaled_mm, tiles, torch_codec

SIZES = st.tuples(st.integers(1, 140), st.integers(1, 170))
SEEDS = st.integers(0, 2**32 - 1)
DTYPES = st.sampled_from([torch.bfloat16, torch.float32])


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles for matrices that are quick to check."""
    monkeypatch.setattr(tiles, "TILE", 20_000)


@given(SIZES, SEEDS, DTYPES)
@settings(max_examples=150, deadline=None)
def test_dequantize(shape: tuple[int, int], seed: int, dtype: torch.dtype) -> None:
    array = encoded_of(shape, seed, special=True)
    found = torch_codec.dequantize(array, dtype)
    assert equal_but_for_nan(found, zm.dequantize(array, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_code_under_every_scale(dtype: torch.dtype) -> None:
    """Against ml_dtypes: Python floats hold every product, and it rounds them."""
    codes = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    scales = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 8, axis=1)
    array = zm.MXFP8Array(
        torch.from_numpy(codes), torch.from_numpy(zm.to_blocked(scales)), codes.shape
    )
    found = torch_codec.dequantize(array, dtype).float().numpy()
    exact = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    exact = exact * scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)[:, :1]
    with np.errstate(over="ignore"):
        want = exact.astype(ml_dtypes.bfloat16 if dtype == torch.bfloat16 else np.float32)
    assert np.array_equal(found, want.astype(np.float32), equal_nan=True)
    assert np.signbit(found[:255, 0x80]).all()  # minus zero


@given(SIZES, SEEDS, DTYPES, st.booleans())
@settings(max_examples=200, deadline=None)
def test_quantize(shape: tuple[int, int], seed: int, dtype: torch.dtype, special: bool) -> None:
    matrix = matrix_of(shape, seed, dtype, special)
    found, want = torch_codec.quantize(matrix), zm.quantize(matrix, nonfinite="encode")
    assert found.shape == want.shape
    assert torch.equal(found.scales, want.scales)
    assert torch.equal(found.codes.view(torch.uint8), want.codes.view(torch.uint8))


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=32, max_size=32)
)
@settings(max_examples=150, deadline=None)
def test_quantize_a_block_against_the_scalar_reference(values: list[float]) -> None:
    found = torch_codec.quantize(torch.tensor([values]))
    byte, codes = reference.encode_block(values)
    assert found.scales[0, 0] == byte
    assert found.codes[0].view(torch.uint8).tolist() == codes


@given(SIZES, SEEDS, DTYPES, st.booleans())
@settings(max_examples=200, deadline=None)
def test_quantize_rows(
    shape: tuple[int, int], seed: int, dtype: torch.dtype, special: bool
) -> None:
    matrix = matrix_of(shape, seed, dtype, special)
    found, want = torch_codec.quantize_rows(matrix), zm.quantize_rows(matrix)
    assert equal_but_for_nan(found.scales, want.scales)
    assert torch.equal(found.codes.view(torch.uint8), want.codes.view(torch.uint8))


def test_quantize_rows_of_a_part_of_a_wider_matrix() -> None:
    wide = matrix_of((70, 192), 3, torch.bfloat16, special=False)
    found, want = torch_codec.quantize_rows(wide[:, 64:128]), zm.quantize_rows(wide[:, 64:128])
    assert torch.equal(found.codes.view(torch.uint8), want.codes.view(torch.uint8))
    assert torch.equal(found.scales, want.scales)


@given(SIZES, SEEDS)
@example((130, 160), 1)
@settings(max_examples=200, deadline=None)
def test_fold(shape: tuple[int, int], seed: int) -> None:
    array = encoded_of(shape, seed, special=False)
    found, statistics = torch_codec.fold(array)
    want, stats = zm.fold(array, bound=math.inf)
    assert torch.equal(found.scales, want.scales)
    assert torch.equal(found.codes.view(torch.uint8), want.codes.view(torch.uint8))
    told = matmul.fold_stats(statistics, bound=math.inf)
    assert told.changed == stats.changed
    assert told.relative_error == pytest.approx(stats.relative_error, rel=1e-12)


@given(SIZES, SEEDS)
@settings(max_examples=100, deadline=None)
def test_fold_refuses_nan_as_the_core_does(shape: tuple[int, int], seed: int) -> None:
    array = encoded_of(shape, seed, special=True)
    array.codes[np.random.default_rng(seed).integers(shape[0]), shape[1] - 1] = 0xFF
    with pytest.raises(zm.InvalidArgumentError) as want:
        zm.fold(array, bound=math.inf)
    with pytest.raises(zm.InvalidArgumentError) as found:
        matmul.fold_stats(torch_codec.fold(array)[1], bound=math.inf)
    assert str(found.value) == str(want.value)


@given(SIZES, SEEDS)
@settings(max_examples=50, deadline=None)
def test_scale_layout(shape: tuple[int, int], seed: int) -> None:
    rows, blocks = shape
    scales = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8))
    blocked = torch_codec.to_blocked(scales)
    assert torch.equal(blocked, zm.to_blocked(scales))
    assert torch.equal(torch_codec.from_blocked(blocked, rows, blocks), scales)


def test_products_are_tried_before_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, whose torch has the product; the refusals are those of others."""
    cpu = torch.device("cpu")
    assert scaled_mm._try(cpu) == ""
    multiply = scaled_mm._multiply
    monkeypatch.setattr(scaled_mm, "_multiply", lambda a, b: multiply(a, b) + 1)
    assert scaled_mm._try(cpu) == "the result is wrong"

    def refuse(*_: object) -> torch.Tensor:
        raise RuntimeError("Invalid scaling configuration.\nFor RowWise scaling, ...")

    monkeypatch.setattr(scaled_mm, "_multiply", refuse)
    assert scaled_mm._try(cpu) == "Invalid scaling configuration."


def test_why_a_gpu_has_no_fp8_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A40")
    why = scaled_mm.unsupported.__wrapped__
    assert why(0) == (
        "FP8 GEMMs need compute capability 8.9 or newer, and this is NVIDIA A40 (8.6)"
    )
    assert why(1) == f"the torch that is installed ({torch.__version__}) finds no CUDA device 1"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(scaled_mm, "_try", lambda place: "no")
    assert why(0).endswith("has no FP8 GEMM with a scale per row on NVIDIA A40 (8.9): no")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("form", ["row-scaled", "decoded"])
def test_row_scaled_product(form: str, dtype: torch.dtype) -> None:
    """What torch multiplies, and what takes its place, against float64."""
    x = torch_codec.quantize_rows(matrix_of((70, 96), 1, torch.float32, special=False))
    weights = torch_codec.quantize_rows(torch.randn(48, 96, generator=torch.manual_seed(0)))
    multiply = scaled_mm.multiply if form == "row-scaled" else scaled_mm.multiply_decoded
    found = multiply(x, weights, dtype)
    a, b = (m.codes.double() * m.scales.double()[:, None] for m in (x, weights))
    assert found.dtype == dtype
    error = (found.double() - a @ b.t()).norm(dim=1) / (a.norm(dim=1) * b.norm())
    assert error.max() < (2**-9 if dtype == torch.bfloat16 else 1e-6)
