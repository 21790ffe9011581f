"""INT8 arithmetic with rotations, against SciPy's Hadamard matrices and NumPy's integers."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import hadamard as scipy_hadamard

import zimage_mxfp8 as zm
from zimage_mxfp8.transformer.arithmetic import int8
from zimage_mxfp8.transformer.linear import Int8Linear, WeightOnlyLinear


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("columns", "block"), [(3840, 256), (10240, 256), (128, 128), (352, 32), (32, 32), (960, 64)]
)
def test_blocks(columns: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert int8.rotation_block(columns) == 32
    monkeypatch.setattr(int8, "MAX_BLOCK", 256)
    assert int8.rotation_block(columns) == block


@settings(deadline=None)
@given(st.sampled_from([1, 32, 64, 128, 256]), st.integers(1, 3), st.integers(0, 2**31))
def test_rotations_are_orthonormal(block: int, blocks: int, seed: int) -> None:
    matrix = random(3, block * blocks, seed=seed % 1000)
    with mock.patch.object(int8, "MAX_BLOCK", block):
        rotated = int8.rotate_columns(matrix)
        again = int8.rotate_columns(rotated)
    width = min(block * blocks & -block * blocks, block)
    parts = matrix.double().numpy().reshape(3, -1, width)
    exact = parts @ scipy_hadamard(width) / width**0.5
    assert np.allclose(rotated.numpy(), exact.reshape(3, -1), atol=1e-5)
    assert torch.allclose(again, matrix, atol=1e-5)
    assert torch.allclose(rotated.norm(dim=1), matrix.norm(dim=1), rtol=1e-5)


def test_codes_are_of_the_rotated_row() -> None:
    """By SciPy's matrix in float64; a code may be the next one where a tie is near."""
    matrix = random(40, 96)
    matrix[3] = 0
    matrix[:, 5] *= 50
    found = int8.quantize_rotated(matrix)
    rotated = (matrix.double().numpy().reshape(40, 3, 32) @ scipy_hadamard(32)).reshape(40, 96)
    largest = np.abs(rotated).max(axis=1)
    assert np.allclose(found.scales.numpy(), largest / 127 / 32**0.5, rtol=1e-6)
    largest[3] = 1
    exact = rotated * (127 / largest)[:, None]
    assert np.abs(found.codes.numpy() - exact).max() < 0.5001
    assert found.scales[3] == 0 and not found.codes[3].any()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("tokens", [1, 31, 33, 200])
@pytest.mark.parametrize(("rows", "columns"), [(8, 32), (96, 352), (256, 3840)])
def test_sums_are_exact(tokens: int, rows: int, columns: int, device: str) -> None:
    generator = np.random.default_rng(0)
    a, b = (generator.integers(-127, 128, size=(n, columns), dtype=np.int8) for n in (tokens, rows))
    a[0], b[0] = 127, -127  # the largest sum
    sums = int8.integer_sums(*(torch.from_numpy(x).to(device) for x in (a, b)))
    assert sums.dtype == torch.int32
    assert np.array_equal(sums.cpu().numpy(), a.astype(np.int64) @ b.astype(np.int64).T)


def test_codes_are_of_the_row() -> None:
    matrix = random(6, 64)
    matrix[1] = 0
    matrix[2] *= 1e30
    matrix[3, 5] = -20.0
    found = int8.quantize(matrix)
    scales = matrix.abs().double().amax(1) / 127
    want = torch.where(scales[:, None] > 0, matrix.double() / scales[:, None], 0.0).round()
    assert torch.equal(found.codes.double(), want)
    assert found.codes.min() >= -127 and found.codes[3, 5] == -127
    assert found.scales[1] == 0 and not found.codes[1].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(bad: float) -> None:
    weights = zm.quantize(random(32, 64))
    layer = Int8Linear.from_mxfp8(weights, 32, torch.float32)
    x = random(3, 64, seed=1)
    want = layer(layer.encode(x))
    x[1, 7] = bad
    found = layer(layer.encode(x))
    assert not found[1].isfinite().any()
    assert torch.equal(found[[0, 2]], want[[0, 2]])


@pytest.mark.parametrize(("n", "k"), [(96, 256), (40, 341), (200, 96)])
def test_a_layer_is_close_to_the_decoded_weights(n: int, k: int) -> None:
    matrix, x = random(n, k), random(50, k, seed=1)
    padded = torch.nn.functional.pad(matrix, (0, -k % 32, 0, -n % 32))
    weights = zm.quantize(padded)
    layer = Int8Linear.from_mxfp8(weights, n, torch.float32)
    exact = WeightOnlyLinear(weights.codes, weights.scales, n, torch.float32)
    assert layer.decode().shape == (n, padded.shape[1])
    error = (layer.decode() - exact.decode()).norm() / exact.decode().norm()
    assert error < 0.012  # a step is 1/127 of the largest of a row
    want = exact({"bfloat16": x})
    assert (layer(layer.encode(x)) - want).norm() / want.norm() < 0.017


def test_rotations_win_where_channels_stand_out() -> None:
    weights = zm.quantize(random(256, 256))
    x = random(50, 256, seed=1)
    x[:, 17] *= 100
    exact = WeightOnlyLinear(weights.codes, weights.scales, 256, torch.float32)({"bfloat16": x})

    def error(block: int) -> float:
        with mock.patch.object(int8, "MAX_BLOCK", block):
            a, b = map(int8.quantize_rotated, (x, zm.dequantize(weights, torch.float32)))
        difference = int8.multiply(a, b, torch.float32) - exact
        return float(difference.norm() / exact.norm())

    assert error(256) < error(32) < 0.5 * error(1)


def test_a_tile_of_rows_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Int8Linear.from_mxfp8(zm.quantize(random(256, 128)), 256, torch.bfloat16)
    x = random(300, 128, seed=1).bfloat16()
    want = layer(layer.encode(x))
    monkeypatch.setattr(int8.tiles, "TILE", 5000)
    again = Int8Linear.from_mxfp8(zm.quantize(random(256, 128)), 256, torch.bfloat16)
    assert torch.equal(again.codes, layer.codes)
    assert torch.equal(again(again.encode(x)), want)
