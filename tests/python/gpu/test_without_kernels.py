"""The transformer on a CUDA device in a build without kernels: torch does the work.

Against the CPU, where the core does it, which test_transformer.py checks against diffusers.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import zimage_mxfp8 as zm
from helpers.commands import Run
from helpers.cuda_model import EQUAL, RAGGED, load, on_device
from helpers.cuda_sync import no_waiting
from helpers.diffusers_reference import random_inputs, relative_error
from helpers.images import levels
from helpers.matrices import encoded_of, equal_but_for_nan, matrix_of
from zimage_mxfp8.analysis.sensitivity.settings import MEASURED_MODES
from zimage_mxfp8.ops import gemm as matmul
from zimage_mxfp8.system import devices
from zimage_mxfp8.transformer.arithmetic import scaled_mm, tiles, torch_codec
from zimage_mxfp8.transformer.compute import modes_of, supported, unsupported

pytestmark = pytest.mark.gpu(kernels=False)

# Against the same numbers in float32: what rounding to BF16 and quantising activations costs.
TOLERANCE = {"weight-only": 0.02, "fp8": 0.15, "int8": 0.05, "mxfp8-emulated": 0.15}
DTYPES = [torch.bfloat16, torch.float32]


# ---- The codec, with the bytes of the core on the CPU


def to_cuda(array: zm.MXFP8Array) -> zm.MXFP8Array:
    return zm.MXFP8Array(array.codes.cuda(), array.scales.cuda(), array.shape)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codec_gives_the_bytes_of_the_core(
    seed: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "TILE", 20_000)
    shape = (1 + 37 * seed % 300, 1 + 53 * seed % 400)
    array = encoded_of(shape, seed, special=True)
    found = torch_codec.dequantize(to_cuda(array), dtype).cpu()
    assert equal_but_for_nan(found, zm.dequantize(array, dtype))
    matrix = matrix_of(shape, seed, dtype, special=seed % 2 == 1)
    by_block, want = torch_codec.quantize(matrix.cuda()), zm.quantize(matrix, nonfinite="encode")
    assert torch.equal(by_block.scales.cpu(), want.scales)
    assert torch.equal(by_block.codes.view(torch.uint8).cpu(), want.codes.view(torch.uint8))
    by_row, rows_want = torch_codec.quantize_rows(matrix.cuda()), zm.quantize_rows(matrix)
    assert equal_but_for_nan(by_row.scales.cpu(), rows_want.scales)
    assert torch.equal(by_row.codes.view(torch.uint8).cpu(), rows_want.codes.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_maximum_of_a_row(dtype: torch.dtype) -> None:
    """Quotients by 448 and of 448 are rounded once, for a great many divisors."""
    amax = torch.rand(1 << 20, generator=torch.manual_seed(0)) + 0.5
    matrix = torch.stack((amax, amax * torch.rand(1 << 20)), dim=1).to(dtype)
    found, want = torch_codec.quantize_rows(matrix.cuda()), zm.quantize_rows(matrix)
    assert torch.equal(found.scales.cpu(), want.scales)
    assert torch.equal(found.codes.view(torch.uint8).cpu(), want.codes.view(torch.uint8))


@pytest.mark.parametrize("seed", range(20))
def test_folding_gives_the_bytes_of_the_core(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE", 20_000)
    array = encoded_of((1 + 37 * seed % 300, 1 + 53 * seed % 400), seed, special=False)
    found, statistics = torch_codec.fold(to_cuda(array))
    want, stats = zm.fold(array, bound=float("inf"))
    assert torch.equal(found.scales.cpu(), want.scales)
    assert torch.equal(found.codes.view(torch.uint8).cpu(), want.codes.view(torch.uint8))
    told = matmul.fold_stats(statistics, bound=float("inf"))
    assert told.changed == stats.changed
    assert told.relative_error == pytest.approx(stats.relative_error, rel=1e-9)


@pytest.mark.parametrize(("m", "n", "k"), [(32, 32, 32), (96, 1152, 384), (4224, 3840, 3840)])
def test_fp8_products(m: int, n: int, k: int) -> None:
    if why := scaled_mm.unsupported(torch.cuda.current_device()):
        pytest.skip(why)
    generator = torch.manual_seed(0)
    x = torch_codec.quantize_rows(torch.randn(m, k, generator=generator).cuda())
    weights = torch_codec.quantize_rows(torch.randn(n, k, generator=generator).cuda())
    found = scaled_mm.multiply(x, weights, torch.bfloat16)
    want = scaled_mm.multiply_decoded(x, weights, torch.float32)
    assert ((found - want).norm() / want.norm()).item() < 5e-3


# ---- The transformer


def test_modes_are_those_of_the_rule() -> None:
    index = torch.cuda.current_device()
    assert not devices.has_kernels(index)
    # Torch's own version decides of "fp8" too.
    modes = set(modes_of(torch.cuda.get_device_capability(index), kernels=False))
    assert modes - {"fp8"} <= set(supported(index)) <= modes


@pytest.mark.parametrize("batch", [RAGGED, EQUAL], ids=["ragged", "equal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("compute", TOLERANCE)
def test_modes_agree_with_the_cpu(compute: str, dtype, batch, quantized: Path) -> None:
    model = load(quantized, compute, dtype)
    inputs = random_inputs(*batch)
    exact = zm.ZImageTransformer.from_checkpoint(quantized, "cpu", "weight-only", torch.float32)
    found, want = model(*on_device(inputs)).sample, exact(*inputs).sample
    assert relative_error(found, want) < TOLERANCE[compute]
    # The same mode on the CPU has the same steps of E4M3, but for ties; so it is closer.
    same = zm.ZImageTransformer.from_checkpoint(quantized, "cpu", compute, dtype)(*inputs).sample
    closer = 1e-5 if compute == "weight-only" and dtype == torch.float32 else 0.1
    assert relative_error(found, same) < closer


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plain_checkpoints(dtype: torch.dtype, folder: Path) -> None:
    inputs = random_inputs(*RAGGED)
    want = zm.ZImageTransformer.from_checkpoint(folder, "cpu", "auto", torch.float32)(*inputs)
    found = load(folder, "auto", dtype)(*on_device(inputs)).sample
    assert relative_error(found, want.sample) < (0.02 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("compute", TOLERANCE)
def test_graphs_and_runs_give_the_same_bytes(compute: str, dtype, quantized: Path) -> None:
    """The first call launches operations, the second captures a graph, the third replays it."""
    model = load(quantized, compute, dtype)
    inputs, others = on_device(random_inputs(*RAGGED)), on_device(random_inputs(*RAGGED, seed=7))
    first = model(*inputs).sample
    for _ in range(2):
        model(*others)  # the graph's inputs are replaced, and its outputs are not ours
        assert all(torch.equal(a, b) for a, b in zip(model(*inputs).sample, first, strict=True))
    again = load(quantized, compute, dtype)(*inputs).sample
    assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


@pytest.mark.parametrize("compute", TOLERANCE)
def test_a_forward_does_not_wait_for_the_device(compute: str, quantized: Path) -> None:
    model = load(quantized, compute)
    inputs = on_device(random_inputs(*EQUAL))
    model(*inputs)  # the layout of these sizes is made on the CPU
    model.to("cuda")  # without a graph again
    with no_waiting():
        model(*inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("compute", TOLERANCE)
def test_memory_of_a_forward(compute: str, dtype: torch.dtype, quantized: Path) -> None:
    """What is told where memory runs out, against what is taken where it does not."""
    model = load(quantized, compute, dtype)
    inputs = on_device(random_inputs([(256, 256)] * 4, [32] * 4))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model(*inputs)
    taken = torch.cuda.max_memory_allocated() - before
    told = model._working_nbytes([((1, 256, 256), 32)] * 4)
    assert told == pytest.approx(taken, rel=0.25)


def test_it_moves_to_the_cpu_and_back(quantized: Path) -> None:
    """To the core's kernels, and back to torch."""
    inputs = random_inputs(*EQUAL)
    model = load(quantized)
    first = model(*on_device(inputs)).sample
    assert relative_error(model.to("cpu")(*inputs).sample, first) < 0.1
    again = model.to("cuda")(*on_device(inputs)).sample
    assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


def test_the_mode_that_needs_kernels_is_refused(quantized: Path) -> None:
    with pytest.raises(
        zm.UnsupportedError, match=r"compute mode mxfp8: it needs CUDA kernels, and"
    ):
        zm.ZImageTransformer.from_checkpoint(quantized, "cuda", "mxfp8")


def test_functions_for_tensors_refuse() -> None:
    x = torch.ones(32, 32, device="cuda")
    for call in (lambda: zm.quantize(x), lambda: zm.quantize_rows(x)):
        with pytest.raises(zm.UnsupportedError, match=r"no CUDA kernels: install nvcc 12\.8"):
            call()


# ---- What users see


def test_it_is_told_once(quantized: Path) -> None:
    """In a process of its own: this one may have been told."""
    program = f"""
import warnings
import zimage_mxfp8 as zm
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        model = zm.ZImageTransformer.from_checkpoint({str(quantized)!r})
assert model.device.type == "cuda", model.device
told = [w for w in caught if w.category is zm.DeviceWarning]
assert len(told) == 1, told
assert "works through torch, without CUDA kernels" in str(told[0].message), told
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("compute", TOLERANCE)
def test_images(compute: str, zimage_folder: Path, zimage_quantized: Path) -> None:
    if why := unsupported(compute, torch.cuda.current_device()):  # type: ignore[arg-type]
        pytest.skip(why)
    settings = zm.GenerationSettings("a cat", height=48, width=64, seed=7, batch=2)
    made = zm.ZImageGenerator(zimage_folder, zimage_quantized, "cuda", compute).generate(settings)
    exact = zm.ZImageGenerator(zimage_folder, zimage_quantized, "cpu", "weight-only", "float32")
    for found, want in zip(made.images, exact.generate(settings).images, strict=True):
        difference = levels(found) - levels(want)
        assert np.sqrt(np.mean(difference**2)) < 0.3 * levels(want).std()
    assert (made.compute, made.device) == (compute, f"cuda:{torch.cuda.current_device()}")


def test_the_command(cli: Run, zimage_folder: Path, zimage_quantized: Path, tmp_path: Path) -> None:
    """Without a device named, it takes the GPU and says in one line what is missing."""
    options = ("--model-dir", zimage_folder, "--transformer", zimage_quantized)
    ran = cli("generate", *options, "--prompt", "a", "-o", "o.png", "--height", 48, "--width", 64)
    assert ran.returncode == 0, ran.stderr
    assert "on cuda:0" in ran.stdout and (tmp_path / "o.png").stat().st_size > 0
    lines = [line for line in ran.stderr.splitlines() if "kernels" in line]
    (line,) = lines
    assert line.startswith("zimage-mxfp8: warning: cuda:0 works through torch, without CUDA")


@pytest.mark.parametrize("compute", MEASURED_MODES)
def test_sensitivity(compute: str, folder: Path) -> None:
    settings = {"size": (32, 32), "timesteps": 1, "dtype": torch.float32, "compute": compute}
    found = zm.analyse_sensitivity(folder, device="cuda", **settings)
    want = zm.analyse_sensitivity(folder, device="cpu", **settings)
    errors = {layer.name: layer.error.total for layer in want.layers}
    assert {layer.name for layer in found.layers} == set(errors)
    for layer in found.layers:
        assert layer.error.total == pytest.approx(errors[layer.name], rel=0.05)


def test_doctor(cli: Run) -> None:
    found = json.loads(cli("doctor", "--json").stdout)
    assert [device["name"] for device in found["devices"]] == [
        torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
    ]
    for index, device in enumerate(found["devices"]):
        major, minor = torch.cuda.get_device_capability(index)
        assert device["capability"] == f"{major}.{minor}"
        assert device["memory"] == torch.cuda.get_device_properties(index).total_memory
        assert device["paths"]["compute"] == supported(index)
        assert not device["kernels"]
    assert found["torch_cuda"] == torch.version.cuda
