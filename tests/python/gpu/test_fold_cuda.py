"""Folding on a CUDA device against folding on the CPU, which test_matmul.py checks.

pytest -m gpu
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import zimage_mxfp8 as zm
from helpers.cuda_sync import no_waiting
from zimage_mxfp8 import _core
from zimage_mxfp8.ops.gemm import fold_async, fold_stats

pytestmark = pytest.mark.gpu


def on_device(array: zm.MXFP8Array) -> zm.MXFP8Array:
    return zm.MXFP8Array(array.codes.cuda(), array.scales.cuda(), array.shape)


def check(host: zm.MXFP8Array) -> zm.FoldStats:
    """Bytes and statistics of both, with memory that holds other bytes before."""
    torch.full((1 << 23,), 0xAA, dtype=torch.uint8, device="cuda")  # freed, and taken again
    folded, stats = zm.fold(on_device(host), bound=1e9)
    want, want_stats = zm.fold(host, bound=1e9)
    assert folded.codes.is_cuda and folded.codes.dtype == torch.float8_e4m3fn
    assert torch.equal(folded.codes.view(torch.uint8).cpu(), want.codes.view(torch.uint8))
    assert torch.equal(folded.scales.cpu(), want.scales)
    assert stats.changed == want_stats.changed
    assert stats.relative_error == pytest.approx(want_stats.relative_error, rel=1e-12, abs=0)
    return stats


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 300),
    cols=st.integers(1, 700),
    spread=st.integers(0, 60),
    seed=st.integers(0, 1000),
)
def test_ragged_shapes(rows: int, cols: int, spread: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, cols, generator=generator)
    matrix *= torch.exp2(
        torch.randint(-spread, spread + 1, matrix.shape, generator=generator).float()
    )
    matrix[rows // 2] = 0
    check(zm.quantize(matrix))


@pytest.mark.parametrize("shape", [(11520, 3840), (3840, 10240), (15360, 256)])
def test_model_shapes(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    stats = check(zm.quantize(torch.randn(shape, generator=generator).bfloat16() * 0.02))
    assert stats.relative_error < 1e-3


def test_every_code_under_every_shift() -> None:
    codes = torch.zeros(256, 64, dtype=torch.uint8)
    codes[:, :32] = torch.arange(256).to(torch.uint8)[:, None]
    codes[codes & 0x7F == 0x7F] -= 1  # no NaN
    codes[:, 32] = 0x7E  # 448 in the second block sets the row's scale
    for shift in range(-20, 30):
        scales = torch.tensor([[100 - shift, 100]], dtype=torch.uint8).repeat(256, 1)
        check(zm.MXFP8Array(codes, zm.to_blocked(scales), (256, 64)))


@pytest.mark.parametrize("byte", [0, 1, 2, 16, 17, 18, 126, 253, 254])
def test_ends_of_the_scales(byte: int) -> None:
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(0, 256, (64, 96), dtype=torch.uint8, generator=generator)
    codes[codes & 0x7F == 0x7F] = 0x80
    codes[::3] &= 0x87  # subnormal codes only
    codes[::5, 32:] &= 0x80  # blocks of zeros
    scales = torch.full((64, 3), byte, dtype=torch.uint8)
    scales[:, 1] = 127
    check(zm.MXFP8Array(codes, zm.to_blocked(scales), (64, 96)))


def test_names_the_first_nan() -> None:
    encoded = zm.quantize(torch.ones(130, 70))
    codes = encoded.codes.view(torch.uint8)
    for row, column, value in ((129, 3, 0x7F), (100, 69, 0xFF), (100, 40, 0x7F)):
        codes[row, column] = value
        first = f"NaN in row {row}, columns {column // 32 * 32} to "
        for array in (encoded, on_device(encoded)):
            with pytest.raises(zm.InvalidArgumentError, match=first):
                zm.fold(array)
    scales = zm.quantize(torch.ones(5, 64)).scales.clone()
    scales.view(-1)[2 * 16 + 1] = 255  # row 2, block 1
    array = zm.MXFP8Array(torch.ones(32, 64, dtype=torch.uint8).cuda(), scales.cuda(), (5, 64))
    with pytest.raises(zm.InvalidArgumentError, match="row 2, columns 32 to 63"):
        zm.fold(array)


def test_the_bound() -> None:
    matrix = torch.ones(4, 64)
    matrix[:, :32] *= 2.0**-15 * torch.linspace(1, 2, 32)
    array = on_device(zm.quantize(matrix))
    assert zm.fold(array)[1].changed > 0
    with pytest.raises(zm.PrecisionLossError, match="more than the bound"):
        zm.fold(array, bound=1e-9)


def test_many_matrices_are_read_once() -> None:
    arrays = [zm.quantize(torch.randn(64, 96 * i, device="cuda")) for i in range(1, 6)]
    fold_async(arrays[0])  # loads the kernel
    torch.cuda.synchronize()
    with no_waiting():
        torch.cuda._sleep(200_000_000)  # about 0.1 s of work that is in front
        folded = [fold_async(array) for array in arrays]
        assert not torch.cuda.current_stream().query()  # returned while the device still sleeps
    statistics = torch.cat([stats for _, stats in folded]).cpu().split(64)
    for array, stats in zip(arrays, statistics, strict=True):
        assert fold_stats(stats) == zm.fold(array)[1]


def test_in_a_graph() -> None:
    array = zm.quantize(torch.randn(200, 333, device="cuda"))
    want, want_stats = zm.fold(array)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        folded, statistics = fold_async(array)
    graph.replay()
    assert torch.equal(folded.codes.view(torch.uint8), want.codes.view(torch.uint8))
    assert fold_stats(statistics) == want_stats


def test_misuse_is_a_typed_error() -> None:
    array = zm.quantize(torch.ones(32, 64, device="cuda"))
    codes, scales = array.codes.view(torch.uint8), array.scales
    out = torch.zeros(32, 64, dtype=torch.uint8, device="cuda")
    out_scales = torch.zeros(32, device="cuda")
    stats = torch.zeros(32, 3, dtype=torch.float64, device="cuda")
    for call, sentence in (
        (
            lambda: zm.fold(zm.MXFP8Array(array.codes, scales.cpu(), (32, 64))),
            "codes is on CUDA device 0 but scales is on the CPU",
        ),
        (
            lambda: fold_async(zm.quantize(torch.ones(32, 64))),
            "is not in the memory of a CUDA device",
        ),
        (
            lambda: _core.fold_async(codes, scales, 32, 64, codes, out_scales, stats),
            "the target's codes overlaps with the source's codes",
        ),
        (
            lambda: _core.fold_async(codes, scales, 32, 64, out, out_scales, stats[:31]),
            "the statistics must have 768 bytes, not 744",
        ),
        (lambda: fold_stats(stats.float()), r"float64 \[N, 3\], not float32"),
    ):
        with pytest.raises(zm.InvalidArgumentError, match=sentence):
            call()
