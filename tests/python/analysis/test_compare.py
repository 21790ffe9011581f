"""`compare`: every format against an independent implementation, and the answers on checkpoints
made so that they are known."""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import comfy_kitchen
import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import tomllib
import torch
from comfy_kitchen.backends.eager import quantization as eager
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.torch import load_file, save_file

import zimage_mxfp8 as zm
from helpers.checkpoints import PREFIX, random_tensors, small_shapes, to_diffusers, write_shards
from helpers.commands import Run, fails, only
from helpers.terminal import first_column, run_in_terminal, tables_in_terminal
from zimage_mxfp8.analysis.compare import formats
from zimage_mxfp8.analysis.compare import low_rank as compare_low_rank
from zimage_mxfp8.analysis.compare.page import compare_page
from zimage_mxfp8.analysis.compare.report import LayerComparison
from zimage_mxfp8.analysis.compare.run import _ratio
from zimage_mxfp8.checkpoint.synthetic import write_synthetic_checkpoint
from zimage_mxfp8.zimage.layers import zimage_shapes

Floats = npt.NDArray[np.float32]
WEIGHT = "layers.0.feed_forward.w1.weight"


def weights(rows: int = 40, cols: int = 96, seed: int = 0) -> Floats:
    """Rows of very different size, outliers, a row and a block of zeros; BF16 values."""
    random = np.random.default_rng(seed)
    values = random.standard_normal((rows, cols)) * np.exp2(random.integers(-12, 8, (rows, 1)))
    values[random.random(values.shape) < 0.01] *= 50
    values[3] = 0
    values[5, :32] = 0
    return values.astype(ml_dtypes.bfloat16).astype(np.float32)


# ---- element types


@pytest.mark.parametrize("name", [formats.E4M3, formats.E5M2, formats.E2M1])
def test_rounding_equals_ml_dtypes_on_every_bfloat16(name: str) -> None:
    values = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    values = values[np.isfinite(values)]
    check_rounding(name, values)


@settings(deadline=None)
@given(
    st.sampled_from([formats.E4M3, formats.E5M2, formats.E2M1]),
    arrays.arrays(np.float32, 64, elements=st.floats(-(2.0**126), 2.0**126, width=32)),
)
def test_rounding_equals_ml_dtypes_on_any_float(name: str, values: Floats) -> None:
    check_rounding(name, values)


def check_rounding(name: str, values: Floats) -> None:
    kind = getattr(ml_dtypes, name)
    largest = float(ml_dtypes.finfo(kind).max)
    expected = np.clip(values, -largest, largest).astype(kind).astype(np.float32)
    rounded = np.empty_like(values)
    formats.element(name).round(values, rounded, np.empty_like(values))
    np.testing.assert_array_equal(rounded, expected)


# ---- formats


def nearest(value: float, grid: list[float]) -> float:
    """The nearest number of a grid, the one with an even index between two: in float64."""
    best = min(range(len(grid)), key=lambda i: (abs(abs(value) - grid[i]), i % 2))
    return grid[best] if value >= 0 else -grid[best]


def grid_of(kind: type) -> list[float]:
    codes = np.arange(8 if kind is ml_dtypes.float4_e2m1fn else 128, dtype=np.uint8)
    values = codes.view(kind).astype(np.float64)
    return [float(value) for value in values if np.isfinite(value)]


GRIDS = {
    "mxfp8-e4m3": grid_of(ml_dtypes.float8_e4m3fn),
    "mxfp8-e5m2": grid_of(ml_dtypes.float8_e5m2),
    "mxfp4": grid_of(ml_dtypes.float4_e2m1fn),
}


def block_error(block: npt.NDArray[np.float64], grid: list[float], exponent: int) -> float:
    scale = 2.0 ** min(max(exponent, -127), 127)
    return float(sum((value - nearest(value / scale, grid) * scale) ** 2 for value in block))


def exponents(block: npt.NDArray[np.float64], grid: list[float]) -> tuple[int, int]:
    """Floor and round-up, by searching."""
    largest = float(np.abs(block).max())
    power = max(k for k in range(-20, 20) if 2.0**k <= grid[-1])
    floor = max(k for k in range(-300, 300) if 2.0**k <= largest) - power
    return floor, min(k for k in range(-300, 300) if grid[-1] * 2.0**k >= largest)


def blocks_of(matrix: Floats, size: int = 32) -> list[npt.NDArray[np.float64]]:
    cut = [row[i : i + size] for row in matrix.astype(np.float64) for i in range(0, len(row), size)]
    return [block for block in cut if block.any()]


@pytest.mark.parametrize("cols", [96, 75])
@pytest.mark.parametrize("name", list(GRIDS))
def test_mx_formats_equal_plain_loops(name: str, cols: int) -> None:
    matrix, grid = weights(16, cols), GRIDS[name]
    up, floor, search = 0.0, 0.0, 0.0
    for block in blocks_of(matrix):
        at_floor, at_up = exponents(block, grid)
        up += block_error(block, grid, at_up)
        floor += block_error(block, grid, at_floor)
        # far around, so that nothing relies on where the best scale can be
        search += min(block_error(block, grid, at_up + k) for k in range(-4, 4))
    found = formats.measure(matrix, float(np.abs(matrix).max()))
    assert found[name] == pytest.approx(up, rel=1e-6)
    assert found[f"{name}-floor"] == pytest.approx(floor, rel=1e-6)
    assert found[f"{name}-search"] == pytest.approx(search, rel=1e-6)


def test_best_element_type_equals_plain_loops() -> None:
    matrix, best = weights(16), 0.0
    matrix[7] = np.exp2(np.arange(96) % 32 - 40)  # a range that only E5M2 has
    for block in blocks_of(matrix):
        kinds = [GRIDS["mxfp8-e4m3"], GRIDS["mxfp8-e5m2"]]
        best += min(block_error(block, grid, exponents(block, grid)[1]) for grid in kinds)
    found = formats.measure(matrix, float(np.abs(matrix).max()))
    assert found["mxfp8-best"] == pytest.approx(best, rel=1e-6)


def squared_error(matrix: Floats, decoded: torch.Tensor | Floats) -> float:
    other = decoded.double().numpy() if isinstance(decoded, torch.Tensor) else decoded
    return float(np.square(matrix.astype(np.float64) - other).sum())


def test_mxfp8_equals_this_packages_codec() -> None:
    matrix = weights(64, 160)
    found = formats.measure(matrix, float(np.abs(matrix).max()))["mxfp8-e4m3"]
    assert found == pytest.approx(
        squared_error(matrix, zm.dequantize(zm.quantize(matrix))), rel=1e-6
    )


@pytest.mark.peer
def test_mxfp8_equals_comfy_kitchen() -> None:
    matrix = weights(128, 128)
    with comfy_kitchen.use_backend("eager"):
        codes, scales = comfy_kitchen.quantize_mxfp8(torch.from_numpy(matrix).bfloat16())
        decoded = comfy_kitchen.dequantize_mxfp8(codes, scales, torch.float32)
    found = formats.measure(matrix, float(np.abs(matrix).max()))["mxfp8-e4m3"]
    assert found == pytest.approx(squared_error(matrix, decoded), rel=1e-6)


@pytest.mark.peer
def test_nvfp4_equals_comfy_kitchen() -> None:
    matrix = weights(128, 128)
    largest = float(np.abs(matrix).max())
    scale = torch.tensor(largest / (448 * 6), dtype=torch.float32)
    codes, scales = eager.quantize_nvfp4(torch.from_numpy(matrix), scale)
    decoded = eager.dequantize_nvfp4(codes, scale, scales, torch.float32)
    assert formats.measure(matrix, largest)["nvfp4"] == pytest.approx(
        squared_error(matrix, decoded), rel=1e-5
    )


@pytest.mark.parametrize("name", ["fp8-tensor", "fp8-row", "int8-row"])
def test_row_and_tensor_formats_equal_torch(name: str) -> None:
    matrix = weights()
    largest = float(np.abs(matrix).max()) * 1.5  # of the whole tensor, in other rows
    values = torch.from_numpy(matrix)
    top = values.abs().amax(1, keepdim=True)
    if name == "fp8-tensor":
        top = torch.tensor(largest, dtype=torch.float32)
    scale = top / (127 if name == "int8-row" else 448)
    scaled = torch.where(scale > 0, values / scale, 0.0)
    codes = scaled.round() if name == "int8-row" else scaled.to(torch.float8_e4m3fn).float()
    expected = squared_error(matrix, codes.double() * scale.double())
    assert formats.measure(matrix, largest)[name] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("cols", [96, 75])
@pytest.mark.parametrize("name", formats.BASE_FORMATS)
def test_residual_is_what_measure_measures(name: str, cols: int) -> None:
    matrix = weights(3000, cols)  # more than are worked on at once
    largest = float(np.abs(matrix).max())
    out = np.empty_like(matrix)
    found = formats.residual(matrix, name, largest, out)
    total = float(np.square(out, dtype=np.float64).sum())
    assert total == pytest.approx(found, rel=1e-6)
    assert total == pytest.approx(formats.measure(matrix, largest)[name], rel=1e-6)
    assert formats.measure_base(matrix, largest)[name] == pytest.approx(total, rel=1e-6)
    if name == "mxfp8-e4m3":
        np.testing.assert_array_equal(matrix - out, zm.dequantize(zm.quantize(matrix)))


@settings(deadline=None)
@given(
    arrays.arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.integers(1, 70)),
        elements=st.floats(-(2.0**100), 2.0**100, width=32),
    )
)
def test_choosing_never_loses(matrix: Floats) -> None:
    found = formats.measure(matrix, float(np.abs(matrix).max()))
    assert all(np.isfinite(error) and error >= 0 for error in found.values())
    for name in GRIDS:
        assert found[f"{name}-search"] <= found[name]
        assert found[f"{name}-search"] <= found[f"{name}-floor"]
    assert found["mxfp8-best"] <= min(found["mxfp8-e4m3"], found["mxfp8-e5m2"])


def test_zeros_and_extremes() -> None:
    zeros = np.zeros((3, 40), np.float32)
    assert set(formats.measure(zeros, 0.0).values()) == {0.0}
    huge = np.full((2, 32), 3.38e38, np.float32)
    assert all(np.isfinite(error) for error in formats.measure(huge, 3.38e38).values())
    smallest = float(np.float32(1e-45))
    errors = formats.measure(np.full((2, 32), smallest, np.float32), smallest)
    assert all(error <= 64 * smallest**2 for error in errors.values())


def test_bits() -> None:
    shape = (128, 64)
    per_weight = {name: kind.bits(shape) / (128 * 64) for name, kind in formats.FORMATS.items()}
    assert per_weight["mxfp8-e4m3"] == per_weight["mxfp8-e5m2-search"] == 8.25
    assert per_weight["mxfp8-best"] == 8 + 9 / 32
    assert per_weight["mxfp4-floor"] == 4.25
    assert per_weight["nvfp4"] == 4.5 + 32 / (128 * 64)
    assert per_weight["fp8-tensor"] == 8 + 32 / (128 * 64)
    assert per_weight["fp8-row"] == per_weight["int8-row"] == 8.5
    assert formats.FORMATS["mxfp4"].bits((3, 33)) == 3 * (33 * 4 + 2 * 8)
    assert formats.FORMATS["nvfp4"].bits((3, 33)) == 3 * (33 * 4 + 3 * 8) + 32


# ---- low rank


def decaying(rows: int, cols: int, seed: int = 0) -> Floats:
    random = np.random.default_rng(seed)
    left = np.linalg.qr(random.standard_normal((rows, cols))).Q
    right = np.linalg.qr(random.standard_normal((cols, cols))).Q
    return ((left * 0.8 ** np.arange(cols)) @ right).astype(np.float32)


@pytest.mark.parametrize("blas_threads", ["1", "2"])
def test_singular_values_equal_numpy(monkeypatch: pytest.MonkeyPatch, blas_threads: str) -> None:
    """With both ways to multiply; the rows are enough for several jobs."""
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", blas_threads)
    matrix = decaying(2500, 90)
    scaled, values, vt = compare_low_rank.leading_triplets(matrix, 32)
    exact = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    np.testing.assert_allclose(np.square(values).sum(), np.square(exact[:32]).sum(), rtol=1e-5)
    np.testing.assert_allclose(values[:16], exact[:16], rtol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(scaled, axis=0), values, atol=1e-6)
    np.testing.assert_allclose(vt @ vt.T, np.eye(32), atol=1e-5)
    rest = np.square(matrix - scaled @ vt).sum()
    assert rest == pytest.approx(np.square(exact[32:]).sum(), rel=0.05, abs=1e-9)


@pytest.mark.parametrize(
    "spectrum",
    [
        np.ones(300),
        np.where(np.arange(300) < 40, 1.0, 0.0),
        np.where(np.arange(300) < 3, 1.0, 0.0),
        np.where(np.arange(300) < 1, 1e6, 1.0),
        1e30 * 0.9 ** np.arange(300),
        1e-30 * 0.9 ** np.arange(300),
    ],
)
def test_singular_values_that_make_krylov_bases_degenerate(spectrum: Floats) -> None:
    """Alike, few, far apart, near the ends of float32."""
    random = np.random.default_rng(0)
    left = np.linalg.qr(random.standard_normal((400, 300))).Q
    right = np.linalg.qr(random.standard_normal((300, 300))).Q
    matrix = ((left * spectrum) @ right).astype(np.float32)
    _, values, vt = compare_low_rank.leading_triplets(matrix, 32)
    exact = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)[:32]
    energy = np.square(exact).sum()
    assert np.square(values).sum() == pytest.approx(energy, rel=1e-5)
    np.testing.assert_allclose(vt @ vt.T, np.eye(32), atol=1e-5)


def test_singular_values_of_noise_are_a_close_lower_bound() -> None:
    matrix = np.random.default_rng(0).standard_normal((700, 500)).astype(np.float32)
    _, values, _ = compare_low_rank.leading_triplets(matrix, 32)
    exact = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)[:32]
    assert 0.95 < np.square(values).sum() / np.square(exact).sum() <= 1 + 1e-6


@pytest.mark.parametrize("shape", [(5, 40), (40, 5), (1, 1)])
def test_singular_values_of_small_and_zero_matrices(shape: tuple[int, int]) -> None:
    matrix = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    scaled, _, vt = compare_low_rank.leading_triplets(matrix, min(shape))
    np.testing.assert_allclose(scaled @ vt, matrix, atol=1e-5)
    scaled, values, vt = compare_low_rank.leading_triplets(np.zeros(shape, np.float32), 1)
    assert not values.any() and not (scaled @ vt).any()


def test_low_rank_errors_equal_numpys_svd(tmp_path: Path) -> None:
    """Small enough that the iteration sees the whole matrix: then it is exact."""
    matrix = weights(90, 40)
    save_file({"a.weight": torch.from_numpy(matrix)}, tmp_path / "a.safetensors")
    report = zm.compare(tmp_path / "a.safetensors", any_model=True, low_rank="all")
    signal = np.square(matrix, dtype=np.float64).sum()
    largest = float(np.abs(matrix).max())
    u, values, vt = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    assert [(e.format, e.rank) for e in report.low_rank] == [
        (name, rank) for name in formats.BASE_FORMATS for rank in (16, 32)
    ]
    for error in report.low_rank:
        residual = np.empty_like(matrix)
        formats.residual(matrix, error.format, largest, residual)
        rest = np.linalg.svd(residual.astype(np.float64), compute_uv=False)[error.rank :]
        assert error.plain * signal == pytest.approx(np.square(residual).sum(), rel=1e-5)
        rounding = 1e-5 * error.plain * float(signal)  # of float32
        assert error.residual * signal == pytest.approx(np.square(rest).sum(), abs=rounding)
        branch = (u[:, : error.rank] * values[: error.rank]) @ vt[: error.rank]
        remainder = (matrix - branch).astype(np.float32)
        top = float(np.abs(remainder).max())
        expected = formats.measure(remainder, top)[error.format]
        # the subtraction of a large branch leaves rounding of float32 behind
        assert error.svdquant * signal == pytest.approx(expected, rel=0.02)
        bits = formats.FORMATS[error.format].bits((90, 40)) + 16 * error.rank * (90 + 40)
        assert error.bits_per_weight == pytest.approx(bits / (90 * 40))


# ---- the whole command


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Matrices of several tiles of 128 rows."""
    path = tmp_path_factory.mktemp("compare") / "model.safetensors"
    shapes = small_shapes(2) | {WEIGHT: (1500, 40), "layers.1.feed_forward.w1.weight": (1500, 40)}
    write_synthetic_checkpoint(path, shapes)
    return path


def by_name(report: zm.CompareReport) -> dict[str, LayerComparison]:
    return {layer.tensor: layer for layer in report.layers}


def test_mxfp8_is_what_convert_measures(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "all.toml").write_text("title = 'everything'")
    converted = zm.convert(
        checkpoint,
        tmp_path / "o.safetensors",
        recipe=tmp_path / "all.toml",
        error_stats=True,
        any_model=True,  # its feed-forward layers are wider than their pairs
    )
    report = zm.compare(checkpoint, low_rank="none")
    assert converted.errors is not None
    assert by_name(report).keys() == converted.errors.keys()
    for layer in report.layers:
        exact = converted.errors[layer.tensor]
        error = layer.formats["mxfp8-e4m3"]
        assert error.relative_squared_error == pytest.approx(exact.relative_squared_error, rel=1e-9)
        assert error.standard_error == 0
        assert layer.squared_signal == pytest.approx(exact.squared_signal, rel=1e-9)


def test_full_sample_is_exact(checkpoint: Path) -> None:
    report = zm.compare(checkpoint, sample=1, low_rank="none")
    assert report.sampled == 1
    assert all(e.standard_error == 0 for layer in report.layers for e in layer.formats.values())
    layer = by_name(report)[WEIGHT]
    matrix = load_file(checkpoint)[WEIGHT].float().numpy()
    signal = np.square(matrix, dtype=np.float64).sum()
    errors = formats.measure(matrix, float(np.abs(matrix).max()))
    for name, error in layer.formats.items():
        assert error.relative_squared_error * signal == pytest.approx(errors[name], rel=1e-6)


def test_sample_estimates_what_it_leaves_out(checkpoint: Path) -> None:
    exact = zm.compare(checkpoint, sample=1, low_rank="none")
    sampled = zm.compare(checkpoint, sample=0.3, low_rank="none")
    rows = by_name(sampled)[WEIGHT].sampled_rows
    assert rows == 4 * 128 and by_name(exact)[WEIGHT].sampled_rows == 1500
    assert sampled.sampled < 1
    for name, estimate in sampled.total.formats.items():
        truth = exact.total.formats[name].relative_squared_error
        distance = abs(estimate.relative_squared_error - truth)
        assert distance <= 5 * estimate.standard_error + 1e-9 * truth, name
    assert sampled.total.formats["mxfp4"].standard_error > 0


def test_every_row_counts_for_what_concerns_the_tensor(tmp_path: Path) -> None:
    """The largest weight decides FP8's and NVFP4's scale, in the sample or not."""
    matrix = torch.randn(1280, 64, generator=torch.Generator().manual_seed(0))
    reports = []
    for row in (0, 700):  # the second lies in a tile that is not sampled
        matrix[:, 5] = 0
        matrix[row, 5] = 1e6
        save_file({"a.weight": matrix}, tmp_path / f"{row}.safetensors")
        path = tmp_path / f"{row}.safetensors"
        reports.append(zm.compare(path, any_model=True, sample=1e-6, low_rank="none"))
    for report in reports:
        assert report.layers[0].sampled_rows == 256
        # all but that one weight vanish
        error = report.layers[0].formats["fp8-tensor"].relative_squared_error
        assert error > 10 * report.layers[0].formats["fp8-row"].relative_squared_error


def test_ratio_estimator_is_the_textbooks() -> None:
    values, base = np.array([2.0, 3.0, 7.0]), np.array([1.0, 2.0, 3.0])
    ratio, deviation = _ratio(values, base, 12)
    assert ratio == 2.0
    spread = np.var(values - 2 * base, ddof=1)
    assert deviation == pytest.approx(np.sqrt((1 - 3 / 12) / 3 * spread) / base.mean())
    assert _ratio(values, base, 3) == (2.0, 0.0)
    assert _ratio(values, 0 * base, 12) == (0.0, 0.0)


def test_result_does_not_depend_on_threads(checkpoint: Path) -> None:
    documents = []
    for threads in (1, 3):
        document = zm.compare(checkpoint, threads=threads, low_rank="none").to_dict()
        document.pop("seconds")
        documents.append(document)
    assert documents[0] == documents[1]


def test_totals_and_sizes(checkpoint: Path) -> None:
    report = zm.compare(checkpoint)
    assert sum(group.layers for group in report.groups) == report.total.layers == len(report.layers)
    error = sum(
        layer.squared_signal * layer.formats["nvfp4"].relative_squared_error
        for layer in report.layers
    )
    signal = sum(layer.squared_signal for layer in report.layers)
    assert report.total.formats["nvfp4"].relative_squared_error == pytest.approx(error / signal)
    tensors = load_file(checkpoint)
    everything = sum(t.numel() * t.element_size() for t in tensors.values())
    assert report.sizes["bf16"].model_bytes == everything
    linears = {layer.tensor for layer in report.layers}
    assert linears == {n for n, t in tensors.items() if t.dim() == 2 and n.endswith(".weight")}
    rest = sum(t.numel() * 2 for n, t in tensors.items() if n not in linears)
    size = sum(-(-formats.FORMATS["nvfp4"].bits(layer.shape) // 8) for layer in report.layers)
    assert report.sizes["nvfp4"].model_bytes == rest + size
    assert {error.group for error in report.low_rank} == {group.name for group in report.groups}
    assert len({error.tensor for error in report.low_rank}) == len(report.groups)


def test_keeping_some_layers(small_file: Path, tmp_path: Path) -> None:
    """Against what `convert` writes with the recipe, decoded again."""
    report = zm.compare(small_file, sample=0.01, low_rank="none")
    tensors = load_file(small_file)
    zm.convert(small_file, tmp_path / "card.safetensors", recipe="uniform")
    zm.dequantize_checkpoint(tmp_path / "card.safetensors", tmp_path / "plain.safetensors")
    plain = load_file(tmp_path / "plain.safetensors")
    stored = load_file(tmp_path / "card.safetensors")
    linears = {layer.tensor: layer for layer in report.layers}
    kept = [name for name in linears if stored[name].dtype == torch.bfloat16]
    assert 0 < len(kept) < len(linears)
    mix = report.keeping(kept)
    error = sum((plain[n].double() - tensors[n].double()).square().sum().item() for n in linears)
    signal = sum(tensors[name].double().square().sum().item() for name in linears)
    # Decoded weights are rounded to BF16, which loses nothing but the last digits here.
    assert mix.error.relative_squared_error == pytest.approx(error / signal, rel=1e-2)
    assert mix.error.standard_error == 0
    bits = sum(
        layer.parameters * 16 if name in kept else formats.FORMATS["mxfp8-e4m3"].bits(layer.shape)
        for name, layer in linears.items()
    )
    rest = sum(t.numel() * 2 for name, t in tensors.items() if name not in linears)
    assert mix.size.bits_per_weight == pytest.approx(bits / report.total.parameters)
    assert mix.size.model_bytes == rest + bits // 8
    assert report.keeping([]).error == report.total.formats["mxfp8-e4m3"]
    assert report.keeping([]).size == report.sizes["mxfp8-e4m3"]
    everything = report.keeping(list(linears))
    assert everything.error.relative_squared_error == 0
    assert everything.size.model_bytes == report.sizes["bf16"].model_bytes


def test_layouts_and_dtypes_agree(checkpoint: Path, tmp_path: Path) -> None:
    tensors = load_file(checkpoint)
    expected = zm.compare(checkpoint, low_rank="none")
    write_shards(tmp_path / "folder", to_diffusers(tensors))
    extra = {"vae.weight": torch.ones(64, 64)}
    save_file({PREFIX + n: t for n, t in tensors.items()} | extra, tmp_path / "a.safetensors")
    save_file({n: t.float() for n, t in tensors.items()}, tmp_path / "f32.safetensors")
    for name in ("folder", "a.safetensors", "f32.safetensors"):
        found = zm.compare(tmp_path / name, low_rank="none")
        assert [layer.name for layer in found.layers] == [layer.name for layer in expected.layers]
        assert found.total == expected.total
    # F16 holds these weights but for the smallest
    save_file({n: t.half() for n, t in tensors.items()}, tmp_path / "f16.safetensors")
    half = zm.compare(tmp_path / "f16.safetensors", low_rank="none").total.formats
    for name, error in expected.total.formats.items():
        value = half[name].relative_squared_error
        assert value == pytest.approx(error.relative_squared_error, rel=1e-4)


# ---- answers


def answers(path: Path, matrix: torch.Tensor) -> dict[str, bool | None]:
    save_file({"a.weight": matrix}, path)
    report = zm.compare(path, any_model=True, sample=1)
    return {answer.claim: answer.holds for answer in report.answers}


ERROR, FINER = (
    "the relative squared error of MXFP8 is below 0.1 %",
    "MXFP8 is 16 times finer than NVFP4",
)
BRANCH = "a low-rank branch gains little at 8 bits"
BLOCK = "formats chosen for each block gain little at 8 bits"
LAYER = "a format chosen for each layer gains little at 8 bits"
SEARCH = "searching scales gains little at 8 bits"
ROUND_UP = "round-up scales lose no more than OCP's floor scales"


def test_answers_for_noise(tmp_path: Path) -> None:
    noise = torch.randn(2560, 1280, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert answers(tmp_path / "a.safetensors", noise) == {
        ERROR: True,  # 0.07 %
        FINER: False,  # 3.6 times
        BRANCH: True,
        BLOCK: True,
        LAYER: False,  # INT8 has a grid of 255 evenly spaced numbers, which suits noise
        SEARCH: True,
        ROUND_UP: True,
    }


def test_answers_where_mxfp8_is_exact(tmp_path: Path) -> None:
    eighths = torch.randint(8, 16, (256, 256), generator=torch.Generator().manual_seed(0)) / 8
    found = answers(tmp_path / "a.safetensors", eighths)
    assert found.pop(FINER) is True
    assert found and all(found.values())


def test_answers_where_every_weight_is_half_way(tmp_path: Path) -> None:
    """1 + 1/16 lies between two E4M3 numbers: 0.35 %, and the residual has rank 1."""
    found = answers(tmp_path / "a.safetensors", torch.full((256, 256), 1.0625))
    assert found[ERROR] is False and found[BRANCH] is False


def test_answers_for_blocks_of_wide_range(tmp_path: Path) -> None:
    """Powers of two over 32 binades: E5M2 has nearly all of them, E4M3 has 18."""
    found = answers(tmp_path / "a.safetensors", torch.exp2(-torch.arange(32.0)).repeat(64, 4))
    assert found[BLOCK] is False and found[LAYER] is False


def test_answers_where_the_smaller_scale_is_better(tmp_path: Path) -> None:
    """Round-up doubles the scale for a hair above 448, and with it the subnormal step."""
    matrix = torch.full((64, 64), 2.0**-9)
    matrix[:, ::32] = 448.00003
    found = answers(tmp_path / "a.safetensors", matrix)
    assert found[SEARCH] is False and found[ROUND_UP] is False


def test_unmeasured_claims_have_no_answer(checkpoint: Path) -> None:
    report = zm.compare(checkpoint, low_rank="none")
    assert [a.claim for a in report.answers if a.holds is None] == [BRANCH]


# ---- recipes, CSV and JSON


def test_recipe_keeps_the_layers_above_the_bound(in_process: Run, tmp_path: Path) -> None:
    tensors = random_tensors(small_shapes(1))
    bad = {WEIGHT, "context_refiner.1.attention.out.weight"}
    for name in bad:
        tensors[name] = torch.full_like(tensors[name], 1.0625)
    prefixed = {PREFIX + name: tensor for name, tensor in tensors.items()}
    save_file(prefixed, tmp_path / "in.safetensors")
    arguments = ("compare", "in.safetensors", "--low-rank", "none", "--write-recipe", "own.toml")
    result = in_process(*arguments, "--bound", "0.002")
    assert result.returncode == 0, result.stderr
    document = tomllib.loads((tmp_path / "own.toml").read_text())
    for rule in document["keep"][: len(bad)]:
        assert rule["reason"] == (
            "relative squared error 3.460e-03 in MXFP8 (SNR 24.6 dB), above 0.002"
        )
    plan = zm.plan_conversion(
        tmp_path / "in.safetensors", zm.ConversionOptions(recipe=tmp_path / "own.toml")
    )
    matrices = [
        p for n, p in plan.tensors.items() if n.endswith(".weight") and len(p.source.shape) == 2
    ]
    count = sum(planned.action == "keep" for planned in matrices)
    assert result.stdout.endswith(
        f"wrote own.toml: a recipe that keeps {count} layers, 2 of them for the squared error\n"
    )
    kept = {n for n, p in plan.tensors.items() if "relative squared error" in p.reason}
    assert kept == {PREFIX + name for name in bad}
    done = in_process(
        "convert", "-i", "in.safetensors", "-o", "o.safetensors", "--recipe", "own.toml"
    )
    assert done.returncode == 0 and "matches no tensor" not in done.stderr


def test_recipe_treats_what_is_outside_the_blocks_as_the_default_does(
    small_file: Path, tmp_path: Path
) -> None:
    zm.compare(small_file, low_rank="none", write_recipe=tmp_path / "own.toml")
    own = zm.plan_conversion(small_file, zm.ConversionOptions(recipe=tmp_path / "own.toml")).tensors
    default = zm.plan_conversion(small_file).tensors
    blocks = ("layers.", "noise_refiner.", "context_refiner.")
    outside = {name for name in own if not name.startswith(blocks)}
    assert {"x_embedder.weight", "t_embedder.mlp.0.weight", "final_layer.linear.weight"} <= outside
    for name in outside:
        assert (own[name].action, own[name].reason) == (default[name].action, default[name].reason)
    assert any(own[name].action == "quantize" for name in set(own) - outside)


def test_recipe_for_another_model_has_no_idle_rules(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(32, 32)}, tmp_path / "in.safetensors")
    recipe = tmp_path / "own.toml"
    zm.compare(tmp_path / "in.safetensors", any_model=True, low_rank="none", write_recipe=recipe)
    assert not zm.plan_conversion(
        tmp_path / "in.safetensors", zm.ConversionOptions(recipe=recipe, any_model=True)
    ).warnings


def test_recipe_with_names_that_need_escapes(tmp_path: Path) -> None:
    name = 'a "b"\\c\x7f\u00e9 [x].weight'
    save_file(
        {name: torch.full((32, 32), 1.0625), "b.weight": torch.ones(32, 32)},
        tmp_path / "in.safetensors",
    )
    zm.compare(
        tmp_path / "in.safetensors",
        any_model=True,
        low_rank="none",
        write_recipe=tmp_path / "own.toml",
    )
    plan = zm.plan_conversion(
        tmp_path / "in.safetensors",
        zm.ConversionOptions(recipe=tmp_path / "own.toml", any_model=True),
    )
    assert [planned.source.name for planned in plan.quantized] == ["b.weight"]


def test_recipe_that_keeps_everything_is_announced(tmp_path: Path) -> None:
    save_file({"a.weight": torch.full((32, 32), 1.0625)}, tmp_path / "in.safetensors")
    recipe = tmp_path / "own.toml"
    report = zm.compare(tmp_path / "in.safetensors", any_model=True, write_recipe=recipe)
    assert "for a bound of 0.001 keeps every layer" in report.warnings[0]


def test_csv_and_json(in_process: Run, checkpoint: Path, tmp_path: Path) -> None:
    result = in_process("compare", checkpoint, "--csv", "c.csv", "--json", "--sample", "0.5")
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["sample"] == 0.5 and len(document["answers"]) == 7
    with (tmp_path / "c.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    plain = [row for row in rows if row["branch"] == "none"]
    layers = {layer["tensor"]: layer for layer in document["layers"]}
    assert len(plain) == len(layers) * len(formats.FORMATS)
    for row in plain:
        layer = layers[row["tensor"]]
        error = layer["formats"][row["format"]]
        assert float(row["relative_squared_error"]) == error["relative_squared_error"]
        assert float(row["standard_error"]) == error["standard_error"]
        assert [int(row["rows"]), int(row["columns"])] == layer["shape"]
    branches = [row for row in rows if row["branch"] != "none"]
    assert len(branches) == 2 * len(document["low_rank"])
    assert {row["rank"] for row in branches} == {"16", "32"}


def test_layers_restricts(checkpoint: Path) -> None:
    report = zm.compare(checkpoint, layers=r"w1\.", low_rank="none")
    assert all("w1" in layer.tensor for layer in report.layers) and len(report.layers) == 6


def test_progress_covers_every_stage(checkpoint: Path) -> None:
    seen: dict[str, list[zm.CompareProgress]] = {}
    zm.compare(checkpoint, progress=lambda state: seen.setdefault(state.stage, []).append(state))
    assert list(seen) == ["reading", "sampling", "low rank"]
    for states in seen.values():
        assert states[-1].done == states[-1].total
        assert all(a.done < b.done for a, b in itertools.pairwise(states))


def test_terminal_shows_stages_and_answers(checkpoint: Path) -> None:
    text = run_in_terminal(["compare", str(checkpoint)])
    for part in ("comparing: reading", "comparing: sampling", "comparing: low rank"):
        assert part in text
    for part in ("NVFP4", "Low-rank branches", "whether they hold", "exact"):
        assert part in text


def test_tables_fit_80_columns(
    checkpoint: Path, small_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a small checkpoint with the real one's names."""
    monkeypatch.chdir(small_file.parent)
    tables, text = tables_in_terminal(["compare", small_file.name], 80)
    report = zm.compare(small_file)
    worst = sorted(report.layers, key=lambda x: -x.formats["mxfp8-e4m3"].relative_squared_error)
    titles = ["BF16", *(kind.title for kind in formats.FORMATS.values())]
    groups = ["all layers", *(group.name for group in report.groups)]
    branches = [summary.format for summary in report.low_rank_summary]
    tensors = [layer.tensor for layer in worst[:10]]
    assert [first_column(table) for table in tables] == [titles, groups, branches, tensors]
    assert tables[1][0] == ["group", "mxfp8-e4m3", "fp8-row", "int8-row", "nvfp4"]
    assert "--json and wider terminals also show: gain, standard error." in text
    answers = " ".join(text.split())
    for answer in report.answers:
        assert f"{'yes' if answer.holds else 'no'} {answer.claim}: {answer.finding}" in answers
    wide, text = tables_in_terminal(["compare", small_file.name], 160)
    assert [first_column(table) for table in wide] == [titles, groups, branches, tensors]
    assert wide[0][0][-2:] == ["gain", "standard error"] and "wider terminals" not in text
    document = report.to_dict()  # what --json prints
    for name, error in document["total"]["formats"].items():
        base = document["total"]["formats"]["mxfp8-e4m3"]["snr_db"]
        assert document["gains_db"][name] == error["snr_db"] - base and "standard_error" in error
    assert set(wide[1][0]) == {"group", *formats.BASE_FORMATS, "layers"}


# ---- bad input


def test_bad_checkpoints(in_process: Run, small_file: Path, tmp_path: Path) -> None:
    fails(in_process("compare", "none.safetensors"), 1, "none.safetensors does not exist")
    (tmp_path / "cut.safetensors").write_bytes(small_file.read_bytes()[:100_000])
    fails(in_process("compare", "cut.safetensors"), 1, "cut.safetensors is truncated")
    save_file({"a.weight": torch.zeros(32, 32)}, tmp_path / "other.safetensors")
    fails(in_process("compare", "other.safetensors"), 1, "not a Z-Image checkpoint", "--any-model")
    save_file({"a.weight": torch.zeros(32)}, tmp_path / "other.safetensors")
    fails(in_process("compare", "other.safetensors", "--any-model"), 1, "has no weight matrices")
    zm.convert(small_file, tmp_path / "mxfp8.safetensors")
    fails(in_process("compare", "mxfp8.safetensors"), 1, "is quantised already (MXFP8, see")


def test_bad_weights(in_process: Run, tmp_path: Path) -> None:
    tensors = random_tensors(small_shapes(1))
    save_file(tensors | {WEIGHT: tensors[WEIGHT].double()}, tmp_path / "in.safetensors")
    fails(in_process("compare", "in.safetensors"), 1, f'tensor "{WEIGHT}" is F64', "--layers")
    for value in (float("nan"), float("inf")):
        tensors[WEIGHT][7, 9] = value
        save_file(tensors, tmp_path / "in.safetensors")
        fails(
            in_process("compare", "in.safetensors", "--write-recipe", "r.toml", "--csv", "c.csv"),
            1,
            f'in.safetensors: tensor "{WEIGHT}" has NaN or Inf at row 7, column 9; leave it out '
            "with --layers",
        )
        only(tmp_path, "in.safetensors")


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["--sample", "0"], 2, "fraction above 0 and up to 1"),
        (["--sample", "1.5"], 2, "fraction above 0 and up to 1"),
        (["--sample", "nan"], 2, "fraction above 0 and up to 1"),
        (["--bound", "-1"], 2, "relative squared error"),
        (["--bound", "inf"], 2, "relative squared error"),
        (["--low-rank", "some"], 2, "invalid choice"),
        (["--layers", "("], 2, '--layers "(" is not a regular expression'),
        (["--layers", "nothing"], 2, '--layers "nothing" finds no weight matrix'),
        (["--layers", "w1", "--write-recipe", "r.toml"], 2, "needs the errors of all layers"),
        (["--csv", "x", "--write-recipe", "x"], 2, "are the same file"),
        (["--csv", "gone/x.csv"], 1, "the output folder"),
        (["--csv", "old.csv"], 1, "old.csv exists; --overwrite"),
        (["--write-recipe", "folder/"], 2, "folder/ is a folder"),
        (["--csv", "in.safetensors", "--overwrite"], 2, "is the input"),
        (
            ["--html", "x", "--csv", "x"],
            2,
            "and another output are the same file, x; give each its own",
        ),
        (["--html", "./x", "--write-recipe", "x"], 2, "and another output are the same file"),
        (["--html", ""], 2, "the name is empty"),
    ],
)
def test_wrong_usage(
    in_process: Run,
    small_file: Path,
    tmp_path: Path,
    arguments: list[str],
    code: int,
    sentence: str,
) -> None:
    os.link(small_file, tmp_path / "in.safetensors")
    (tmp_path / "old.csv").write_text("old")
    fails(in_process("compare", "in.safetensors", *arguments), code, sentence)
    only(tmp_path, "in.safetensors", "old.csv")
    assert (tmp_path / "old.csv").read_text() == "old"


@pytest.mark.parametrize("option", ["--csv", "--html", "--write-recipe"])
def test_no_output_replaces_a_shard(in_process: Run, tmp_path: Path, option: str) -> None:
    write_shards(tmp_path / "z", to_diffusers(random_tensors(small_shapes(1))))
    shard = min((tmp_path / "z").glob("*.safetensors"))
    before = shard.read_bytes()
    fails(in_process("compare", "z", option, shard, "--overwrite"), 2, "is the input")
    assert shard.read_bytes() == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_weights_near_the_limit_of_float32(
    in_process: Run, tmp_path: Path, dtype: torch.dtype
) -> None:
    """They round to a code that decodes to infinity."""
    tensors = random_tensors(small_shapes(1), dtype)
    tensors[WEIGHT][7, 9] = -3.38e38
    save_file(tensors, tmp_path / "in.safetensors")
    result = in_process("compare", "in.safetensors")
    fails(
        result, 1, f'tensor "{WEIGHT}" has weights of up to 3.4e+38', "leave it out with --layers"
    )
    assert result.stderr.count("\n") == 1
    tensors[WEIGHT][7, 9] = 2.0**100
    save_file(tensors, tmp_path / "in.safetensors")
    result = in_process("compare", "in.safetensors", "--json")
    assert result.returncode == 0 and result.stderr == ""
    json.loads(result.stdout, parse_constant=pytest.fail)


def test_numbers_in_names_are_of_any_length(tmp_path: Path) -> None:
    digits = "9" * 5000
    names = ["layers.10.a.weight", "layers.9.a.weight", f"layers.{digits}.a.weight"]
    save_file({name: torch.ones(2, 2) for name in names}, tmp_path / "in.safetensors")
    report = zm.compare(tmp_path / "in.safetensors", any_model=True, low_rank="none")
    assert [layer.tensor for layer in report.layers] == [names[1], names[0], names[2]]
    assert digits in compare_page(report, 1e-3)


def test_recipe_of_a_file_whose_name_is_no_text(cli: Run, small_file: Path, tmp_path: Path) -> None:
    name = os.fsdecode(b"a\xff.safetensors")
    (tmp_path / name).symlink_to(small_file)
    result = cli("compare", name, "--low-rank", "none", "--write-recipe", "r.toml", "--bound", 1)
    assert result.returncode == 0, result.stderr
    assert "a\\udcff.safetensors" in zm.load_recipe(tmp_path / "r.toml").description


@pytest.mark.parametrize(
    "options",
    [
        {"sample": 2},
        {"sample": "x"},
        {"low_rank": "x"},
        {"bound": -1},
        {"bound": None},
        {"threads": -1},
        {"layers": 3},
        {"layers": ["w1"]},
    ],
)
def test_wrong_arguments_from_python(small_file: Path, options: dict[str, object]) -> None:
    with pytest.raises(zm.UsageError, match=next(iter(options))):
        zm.compare(small_file, **options)  # type: ignore[arg-type]


def test_missing_ml_dtypes_is_named(small_file: Path) -> None:
    program = (
        "import sys; sys.modules['ml_dtypes'] = None\n"
        "from zimage_mxfp8.cli.main import main\n"
        f"sys.exit(main(['compare', {str(small_file)!r}]))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    fails(result, 1, "comparing formats needs ml-dtypes, which is not", "zimage-mxfp8[analysis]")


def test_failing_callback_stops_the_work(checkpoint: Path, tmp_path: Path) -> None:
    def stop(state: zm.CompareProgress) -> None:
        raise KeyError(state.stage)

    with pytest.raises(KeyError, match="reading"):
        zm.compare(checkpoint, csv=tmp_path / "c.csv", progress=stop)
    only(tmp_path)


def test_weights_without_an_error_are_exact(tmp_path: Path) -> None:
    """Ones are numbers of every format: the ratio of signal and noise is infinite."""
    source, output = tmp_path / "ones.safetensors", tmp_path / "ones-mxfp8.safetensors"
    shapes = zimage_shapes(dim=128, layers=1, caption_dim=64, hidden=128)
    save_file({name: torch.ones(shape).bfloat16() for name, shape in shapes.items()}, source)
    found = zm.compare(source, low_rank="all", layers="layers.0.attention.out")
    zm.convert(source, output)
    page = compare_page(found, 1e-3)
    for text in (str(found), page, str(zm.validate(output, source))):
        assert "exact" in text and not re.search(r"\b400\.0", text)
