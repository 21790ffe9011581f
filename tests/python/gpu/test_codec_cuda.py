"""The codec on a CUDA device against the codec on the CPU, which test_codec.py checks.

pytest -m gpu
"""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import zimage_mxfp8 as zm
from helpers.checkpoints import Tensors
from helpers.cuda_sync import no_waiting, on_a_device_alone
from zimage_mxfp8 import _core

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def assert_same_bytes(device: zm.MXFP8Array, host: zm.MXFP8Array) -> None:
    assert device.codes.is_cuda and device.scales.is_cuda
    assert torch.equal(device.codes.view(torch.uint8).cpu(), host.codes.view(torch.uint8))
    assert torch.equal(device.scales.cpu(), host.scales)


def check(matrix: torch.Tensor) -> None:
    """Both directions, with memory that holds other bytes before."""
    torch.full((1 << 23,), 0xAA, dtype=torch.uint8, device="cuda")  # freed, and taken again
    on_device = zm.quantize(matrix.cuda())
    on_host = zm.quantize(matrix, nonfinite="encode")
    assert_same_bytes(on_device, on_host)
    for dtype in DTYPES:
        back, want = zm.dequantize(on_device, dtype), zm.dequantize(on_host, dtype)
        assert back.is_cuda
        assert torch.equal(back.cpu().view(BITS[dtype]), want.view(BITS[dtype]))


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 400),
    cols=st.integers(1, 700),
    offset=st.integers(0, 9),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_ragged_shapes(rows: int, cols: int, offset: int, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(rows, cols + offset, generator=generator)
    base *= torch.exp2(torch.randint(-20, 20, base.shape, generator=generator))
    matrix = base.to(dtype)[:, offset:].nan_to_num(posinf=6e4, neginf=-6e4)
    device = base.cuda().to(dtype).nan_to_num(posinf=6e4, neginf=-6e4)[:, offset:]
    assert_same_bytes(zm.quantize(device), zm.quantize(matrix))
    check(matrix)


@pytest.mark.parametrize(
    "shape", [(11520, 3840), (4224, 3840), (4224, 10240), (3840, 256), (64, 3840)]
)
def test_model_shapes(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    check((torch.randn(shape, generator=generator) * 0.02).to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("position", [0, 13, 31])
def test_every_value_as_maximum(dtype: torch.dtype, position: int) -> None:
    """All 65,536 patterns: zeros, subnormals, infinities and NaN too."""
    values = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    matrix = torch.zeros(65536, 32, dtype=dtype)
    matrix[:, position] = values
    check(matrix)


def test_every_value_beside_a_larger_one() -> None:
    values = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    matrix = values[torch.randperm(65536, generator=torch.Generator().manual_seed(2))]
    check(matrix.reshape(-1, 256))


def test_float32_bit_patterns() -> None:
    random = np.random.default_rng(3)
    bits = random.integers(0, 2**32, (512, 320), dtype=np.uint64).astype(np.uint32)
    # Blocks that keep to a few exponents, down to denormals, round in every place.
    exponents = random.integers(0, 254, (512, 10, 1)) + random.integers(0, 12, (512, 10, 32))
    near = (bits & 0x807FFFFF) | np.minimum(exponents, 254).reshape(512, 320) << 23
    for patterns in (bits, near.astype(np.uint32)):
        check(torch.from_numpy(patterns.view(np.float32).copy()))


def test_decodes_every_code_under_every_scale() -> None:
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).repeat(256, 1)
    scales = torch.arange(256, dtype=torch.int32).to(torch.uint8)[:, None].repeat(1, 8)
    host = zm.MXFP8Array(codes, zm.to_blocked(scales), (256, 256))
    device = zm.MXFP8Array(codes.cuda(), host.scales.cuda(), (256, 256))
    for dtype in DTYPES:
        back, want = zm.dequantize(device, dtype).cpu(), zm.dequantize(host, dtype)
        assert torch.equal(back.view(BITS[dtype]), want.view(BITS[dtype]))


def test_ml_dtypes_agrees() -> None:
    matrix = torch.randn(256, 64, generator=torch.Generator().manual_seed(4)).clamp(-448, 448)
    matrix[:, ::32] = 448  # the scale is then 1
    codes = zm.quantize(matrix.cuda()).codes.view(torch.uint8).cpu().numpy()
    np.testing.assert_array_equal(
        codes, matrix.numpy().astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_values(value: float) -> None:
    matrix = torch.ones(130, 70, device="cuda")
    matrix[129, 66] = value
    encoded = zm.quantize(matrix)
    assert (encoded.scales == 255).sum() == 1
    assert zm.dequantize(encoded).isnan()[129].sum() == 70 - 64
    with pytest.raises(zm.NonFiniteError, match="row 129, column 66"):
        zm.quantize(matrix, nonfinite="error")


def test_works_on_the_current_stream_and_in_a_graph() -> None:
    inputs = [torch.randn(300, 320, device="cuda") for _ in range(3)]
    wants = [zm.dequantize(zm.quantize(x.cpu())) for x in inputs]
    static = torch.zeros(300, 320, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        zm.dequantize(zm.quantize(static))  # loads the kernels
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = zm.dequantize(zm.quantize(static))
    for source, want in zip(inputs, wants, strict=True):
        static.copy_(source)
        graph.replay()
        assert torch.equal(out.cpu(), want)


@on_a_device_alone
def test_neither_waits_nor_allocates() -> None:
    matrix = torch.randn(4096, 4096, device="cuda")
    encoded = zm.quantize(matrix)
    out = zm.dequantize(encoded, "float32")  # from now on both kernels are loaded
    codes = encoded.codes.view(torch.uint8)
    torch.cuda.synchronize()
    free = torch.cuda.mem_get_info()[0]
    stream = torch.cuda.current_stream().cuda_stream
    with no_waiting():
        torch.cuda._sleep(200_000_000)  # about 0.1 s of work that is in front
        _core.quantize(matrix, "float32", codes, encoded.scales, 0, stream)
        _core.dequantize(codes, encoded.scales, out, "float32", 0, stream)
        assert not torch.cuda.current_stream().query()  # returned while the device still sleeps
    torch.cuda.synchronize()
    assert torch.cuda.mem_get_info()[0] == free


def test_staged_quantizer_equals_the_codec() -> None:
    quantizer = _core.StagedQuantizer(0)
    random = np.random.default_rng(5)
    for rows, cols in ((128, 96), (300, 333), (5, 40)):
        matrix = random.standard_normal((rows, cols)).astype(np.float32)
        want = zm.quantize(matrix)
        codes, scales = np.empty_like(want.codes), np.empty_like(want.scales)
        quantizer.quantize(matrix, "float32", codes, scales)
        np.testing.assert_array_equal(codes, want.codes)
        np.testing.assert_array_equal(scales, want.scales)
    matrix[3, 7] = np.inf
    with pytest.raises(zm.NonFiniteError, match="row 3, column 7"):
        quantizer.quantize(matrix, "float32", codes, scales)
    with pytest.raises(zm.UnsupportedError, match="no CUDA device 99"):
        _core.StagedQuantizer(99)


@pytest.mark.parametrize("threads", [1, 5])
def test_convert_writes_the_same_file(small_file: Path, tmp_path: Path, threads: int) -> None:
    zm.convert(small_file, tmp_path / "cpu")
    zm.convert(small_file, tmp_path / "cuda", device="cuda", threads=threads)
    assert (tmp_path / "cpu").read_bytes() == (tmp_path / "cuda").read_bytes()


def test_convert_names_the_nonfinite_value(small_model: Tensors, tmp_path: Path) -> None:
    name = "layers.0.attention.qkv.weight"
    broken = small_model[name].clone()
    broken[100, 33] = torch.inf
    save_file({**small_model, name: broken}, tmp_path / "broken")
    with pytest.raises(zm.NonFiniteError, match=f"{name}.* row 100, column 33"):
        zm.convert(tmp_path / "broken", tmp_path / "out", device="cuda:0")
    with pytest.raises(zm.UnsupportedError, match="CUDA devices found"):
        zm.convert(tmp_path / "broken", tmp_path / "out", device="cuda:99")
    assert not (tmp_path / "out").exists()


def test_misuse_is_a_typed_error() -> None:
    matrix = torch.ones(128, 128, device="cuda")
    codes = torch.zeros(128, 128, dtype=torch.uint8, device="cuda")
    scales = torch.zeros(128, 4, dtype=torch.uint8, device="cuda")
    padded = torch.zeros(128 * 128 + 8, dtype=torch.uint8, device="cuda")
    for call, sentence in (
        (
            lambda: _core.quantize(matrix, "float32", codes.cpu(), scales),
            "source is on CUDA device 0 but codes is on the CPU",
        ),
        (
            lambda: _core.quantize(matrix.cpu(), "float32", codes, scales),
            "source is on the CPU but codes",
        ),
        (
            lambda: _core.quantize(matrix, "float32", padded[8:], scales),
            "codes must be aligned to 16 bytes",
        ),
        (
            lambda: _core.quantize(
                matrix, "float32", matrix.view(torch.uint8).flatten()[: 128 * 128], scales
            ),
            "codes overlaps with the source",
        ),
        (lambda: zm.to_blocked(scales), "move it to the CPU"),
        (lambda: zm.quantize(matrix.double()), "not float64"),
        (lambda: zm.quantize(matrix, nonfinite="ignore"), "nonfinite must be"),  # type: ignore[arg-type]
        (lambda: _core.find_nonfinite(matrix, "float32"), "not in CPU memory"),
        (
            lambda: zm.dequantize(zm.MXFP8Array(codes, scales.cpu(), (128, 128))),
            "codes is on CUDA device 0 but scales is on the CPU",
        ),
    ):
        with pytest.raises(zm.InvalidArgumentError, match=sentence):
            call()
