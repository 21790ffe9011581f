"""INT8 kernels against NumPy: a butterfly in float32, and sums of integers.

pytest -m gpu
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import zimage_mxfp8 as zm
from helpers.int8_reference import encoded
from zimage_mxfp8 import _core
from zimage_mxfp8.ops import fused
from zimage_mxfp8.ops.gemm_epilogues import gemm_rotate_heads, gemm_silu_multiply
from zimage_mxfp8.transformer.linear import Int8Linear

pytestmark = pytest.mark.gpu

KERNELS = ["reference", "int8_sm80", "int8_sm90"]


def require(kernel: str) -> None:
    problem = _core.GemmProblem(128, 128, 128, "int8", "int8", "bfloat16", False)
    if why := _core.gemm_unsupported(kernel, problem, torch.cuda.current_device()):
        pytest.skip(why)


def rows_of(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """Rows of bfloat16 that differ in size, with outliers."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(shape, generator=generator)
    matrix *= torch.exp2(torch.randint(-40, 40, (shape[0], 1), generator=generator))
    matrix[:, 7] *= 100
    return matrix.bfloat16().cuda()


def assert_encodes(found: zm.Int8Array, matrix: torch.Tensor) -> None:
    codes, scales = encoded(matrix.float().cpu().numpy())
    assert np.array_equal(found.scales.cpu().numpy(), scales, equal_nan=True)
    assert np.array_equal(found.codes.cpu().numpy(), codes)
    assert found.codes.min().item() >= -127


@pytest.mark.parametrize("columns", [32, 96, 352, 3840, 4096, 4128, 10240, 16384])
def test_quantize_rotated(columns: int) -> None:
    matrix = rows_of((37, columns))
    matrix[3] = 0
    matrix[4, 5] = float("nan")
    matrix[5, 9] = float("-inf")
    matrix[6] = 2.0**-110
    assert_encodes(fused.quantize_rotated(matrix), matrix)


def test_rows_that_are_not_aligned() -> None:
    matrix = rows_of((37, 101))[:, 3:99]
    assert_encodes(fused.quantize_rotated(matrix), matrix)


@pytest.mark.parametrize(("rows", "columns"), [(70, 96), (70, 3840), (70, 10240), (1500, 3840)])
def test_fused_kernels_encode_their_result(rows: int, columns: int) -> None:
    x, y = rows_of((rows, columns)), rows_of((rows, columns), 1)
    weight, scale = rows_of((1, columns), 2)[0], rows_of((2, columns), 3) * 0.01
    items = torch.arange(rows, dtype=torch.int32, device="cuda") // 40 % 2
    assert_encodes(fused.silu_multiply(x, y, "int8"), fused.silu_multiply(x, y))
    arguments = (weight, scale, items)
    assert_encodes(fused.norm_modulate(x, *arguments, "int8"), fused.norm_modulate(x, *arguments))
    sums = [x.clone(), x.clone()]
    factor = torch.tensor([0.3], device="cuda")
    for added in ((), (1e-5, rows_of((rows, columns), 4), factor)):
        results = [
            fused.add_norm_modulate(each, y, weight, scale, *arguments, output_format, *added)
            for each, output_format in zip(sums, ("int8", "bfloat16"), strict=True)
        ]
        assert torch.equal(*sums)
        assert_encodes(*results)


def operand(rows: int, columns: int, seed: int) -> zm.Int8Array:
    generator = torch.Generator(device="cuda").manual_seed(seed)
    codes = torch.randint(
        -127, 128, (rows, columns), generator=generator, device="cuda", dtype=torch.int8
    )
    codes[0] = 127  # the largest sums
    scales = torch.rand(rows, generator=generator, device="cuda") + 0.1
    return zm.Int8Array(codes, scales)


def product(a: zm.Int8Array, b: zm.Int8Array) -> np.ndarray:
    """Return the result from sums of integers, as bits of bfloat16."""
    # float64 holds these sums exactly, and NumPy multiplies it fast.
    codes = [x.codes.cpu().numpy().astype(np.float64) for x in (a, b)]
    sums = (codes[0] @ codes[1].T).astype(np.int64).astype(np.float32)
    scaled = sums * a.scales.cpu().numpy()[:, None] * b.scales.cpu().numpy()
    return scaled.astype(ml_dtypes.bfloat16).view(np.uint16)


def bits(result: torch.Tensor) -> np.ndarray:
    return result.view(torch.uint16).cpu().numpy()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("tokens", [1, 63, 129, 300])
@pytest.mark.parametrize(
    ("rows", "columns"), [(8, 32), (72, 160), (200, 128), (520, 96), (3840, 10240), (1024, 352)]
)
def test_sums_are_exact(kernel: str, tokens: int, rows: int, columns: int) -> None:
    require(kernel)
    a, b = operand(tokens, columns, 1), operand(rows, columns, 2)
    assert np.array_equal(bits(zm.gemm(a, b, kernel=kernel)), product(a, b))


@pytest.mark.parametrize("rows", [3840, 11520])  # in tiles of 256 and of 192
def test_half_tiles(rows: int) -> None:
    require("int8_sm90")
    a, b = operand(1088, 352, 1), operand(rows, 352, 2)
    assert np.array_equal(bits(zm.gemm(a, b, kernel="int8_sm90")), product(a, b))


@pytest.mark.parametrize("kernel", ["int8_sm80", "int8_sm90"])
def test_many_tiles(kernel: str) -> None:
    require(kernel)
    a, b = operand(4224, 3840, 3), operand(11520, 3840, 4)
    result = zm.gemm(a, b, kernel=kernel)
    assert torch.equal(result, zm.gemm(a, b, kernel=kernel))
    rows = np.random.default_rng(0).integers(0, 4224, 100)
    some = zm.Int8Array(a.codes[rows], a.scales[rows])
    assert np.array_equal(bits(result[rows]), product(some, b))


@pytest.mark.parametrize("tokens", [1, 129, 576, 1152])
@pytest.mark.parametrize("output_format", ["bfloat16", "int8"])
def test_silu_multiply_is_the_same_fused_and_apart(tokens: int, output_format: Any) -> None:
    for columns, depth in ((1024, 3840), (96, 32), (10240, 128)):
        a, b = operand(tokens, depth, 5), operand(2 * columns, depth, 6)
        b = zm.Int8Array(b.codes, b.scales * 1e-4)
        gate, up = zm.gemm(a, b, kernel="reference").chunk(2, dim=1)
        want = fused.silu_multiply(gate, up, output_format)
        for kernel in ("int8_sm80", "int8_sm90"):
            require(kernel)
            found = gemm_silu_multiply(a, b, output_format, kernel=kernel)
            if output_format == "int8":
                assert torch.equal(found.scales, want.scales)
                found, expected = found.codes, want.codes
            else:
                expected = want
            assert torch.equal(found, expected)


@pytest.mark.parametrize("tokens", [1, 129, 1088, 1152])
@pytest.mark.parametrize(("heads", "depth"), [(30, 3840), (1, 32), (3, 416)])
def test_rotate_heads_is_the_same_fused_and_apart(tokens: int, heads: int, depth: int) -> None:
    a, b = operand(tokens, depth, 7), operand(3 * heads * 128, depth, 8)
    generator = torch.Generator(device="cuda").manual_seed(9)
    angles = torch.rand(tokens, 64, generator=generator, device="cuda") * 6.3
    rotations = torch.stack((angles.cos(), angles.sin()), dim=-1)
    q, k = (torch.rand(128, generator=generator, device="cuda").bfloat16() for _ in range(2))
    want = zm.gemm(a, b, kernel="reference")
    fused.rotate_heads(want, q, k, rotations, heads, heads)
    for kernel in ("int8_sm80", "int8_sm90"):
        require(kernel)
        assert torch.equal(
            gemm_rotate_heads(a, b, q, k, rotations, heads, heads, kernel=kernel), want
        )
        for i, (q_heads, k_heads) in enumerate([(heads, 0), (0, heads), (0, 0)]):
            part = slice(i * heads * 128, (i + 1) * heads * 128)
            of_part = zm.Int8Array(b.codes[part], b.scales[part])
            found = gemm_rotate_heads(a, of_part, q, k, rotations, q_heads, k_heads, kernel=kernel)
            assert torch.equal(found, want[:, part])


def test_weights_are_encoded_from_their_exact_values() -> None:
    matrix = rows_of((300, 352))
    weights = zm.quantize(torch.nn.functional.pad(matrix, (0, 0, 0, 20)))
    layer = Int8Linear.from_mxfp8(weights, 300, torch.bfloat16)
    assert_encodes(layer.weights, zm.dequantize(weights, torch.bfloat16))


@pytest.mark.parametrize(("n", "k"), [(96, 256), (40, 341), (3840, 3840)])
def test_a_layer_gives_the_bits_of_integers(n: int, k: int) -> None:
    matrix = torch.randn(n, k, device="cuda")
    padded = torch.nn.functional.pad(matrix, (0, -k % 32, 0, -n % 32))
    layer = Int8Linear.from_mxfp8(zm.quantize(padded), n, torch.bfloat16)
    x = torch.randn(50, k, device="cuda").bfloat16()
    activation = layer.encode(x)
    want = product(activation["int8"], layer.weights)[:, :n]
    assert np.array_equal(bits(layer(activation).contiguous()), want)


PLANS = {  # the mode that "auto" takes, and the kernel of int8
    "7.5": ("int8", ""),  # no kernels of this package: torch multiplies
    "8.0": ("int8", "int8_sm80"),
    "8.9": ("int8", "int8_sm80"),
    "9.0": ("int8", "int8_sm90"),
}
PLAN = """
import sys
import torch, zimage_mxfp8 as zm
from helpers.diffusers_reference import random_inputs

model = zm.ZImageTransformer.from_checkpoint(sys.argv[1], "cuda", sys.argv[2])
images, times, captions = random_inputs([(32, 48)], [40])
inputs = [x.cuda() for x in images], times.cuda(), [x.cuda() for x in captions]
for _ in range(3):  # eager, captured, replayed
    result = model(*inputs).sample[0]
torch.save((model.compute, result.cpu()), sys.argv[3])
"""


@pytest.mark.parametrize("capability", PLANS)
def test_older_devices_get_the_same_images(
    capability: str, quantized: Path, tmp_path: Path
) -> None:
    """The plan of a capability on this device, whose own kernels give the reference."""
    require("int8_sm90")
    results = {}
    for told, mode in ((capability, "auto"), (capability, "int8"), ("9.0", "int8")):
        environment = {**os.environ, "ZIMAGE_MXFP8_CAPABILITY": told, "ZIMAGE_MXFP8_GEMM_LOG": "1"}
        out = tmp_path / f"{told}-{mode}.pt"
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)
        done = subprocess.run(
            [sys.executable, "-c", PLAN, str(quantized), mode, str(out)],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        results[told, mode] = (*torch.load(out), done.stderr)
    auto, kernel = PLANS[capability]
    assert results[capability, "auto"][0] == auto
    mode, found, log = results[capability, "int8"]
    assert mode == "int8"
    assert found.dtype == (torch.float16 if capability == "7.5" else torch.bfloat16)
    if kernel:
        assert f": {kernel} (cost " in log
        assert torch.equal(found, results["9.0", "int8"][1])
    else:  # rotations and norms by torch, with sums in another order
        assert "int8_sm" not in log
        want = results["9.0", "int8"][1].float()
        assert (found.float() - want).norm() < 0.03 * want.norm()
