"""Tensors on two CUDA devices, and calls from a current device that is not the tensors'.

pytest -m gpu
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import zimage_mxfp8 as zm
from helpers.diffusers_reference import make_reference, random_inputs
from zimage_mxfp8 import _core
from zimage_mxfp8.ops import fused

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device or none"),
]

FIRST, SECOND = "cuda:0", "cuda:1"
OPERANDS = {
    "reference": ("mxfp8", "row-scaled"),
    "dequantize": ("bfloat16", "mxfp8"),
    "fp8_rowwise": ("row-scaled", "row-scaled"),
    "mixed_sm90": ("bfloat16", "mxfp8"),
    "mxfp8_sm100": ("mxfp8", "mxfp8"),
    "mxfp8_sm120": ("mxfp8", "mxfp8"),
}


@pytest.fixture(autouse=True)
def first_is_current() -> Iterator[None]:
    """Calls are made with cuda:0 as the current device, and leave it."""
    with torch.cuda.device(FIRST):
        yield
        assert torch.cuda.current_device() == 0


def random(rows: int, cols: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def to(array: Any, device: str) -> Any:
    if isinstance(array, zm.MXFP8Array):
        return zm.MXFP8Array(array.codes.to(device), array.scales.to(device), array.shape)
    if isinstance(array, zm.RowScaledArray):
        return zm.RowScaledArray(array.codes.to(device), array.scales.to(device))
    return array.to(device)


def operand(kind: str, matrix: torch.Tensor) -> Any:
    if kind == "bfloat16":
        return matrix.bfloat16()
    return zm.quantize(matrix) if kind == "mxfp8" else zm.quantize_rows(matrix)


def assert_same_bytes(found: Any, host: Any) -> None:
    for part in ("codes", "scales"):
        on_device, want = getattr(found, part), getattr(host, part)
        assert on_device.device == torch.device(SECOND)
        assert torch.equal(on_device.cpu().view(torch.uint8), want.view(torch.uint8))


def test_the_codec_works_on_the_device_of_its_tensors() -> None:
    matrix = random(300, 333, 1)
    host = zm.quantize(matrix)
    encoded = zm.quantize(matrix.to(SECOND))
    assert_same_bytes(encoded, host)
    decoded = zm.dequantize(encoded)
    assert decoded.device == torch.device(SECOND)
    assert torch.equal(decoded.cpu(), zm.dequantize(host))
    assert_same_bytes(zm.quantize_rows(matrix.to(SECOND)), zm.quantize_rows(matrix))
    folded, stats = zm.fold(encoded, bound=1)
    want, want_stats = zm.fold(host, bound=1)
    assert_same_bytes(folded, want)
    assert stats.changed == want_stats.changed


@pytest.mark.parametrize("kernel", list(OPERANDS))
@pytest.mark.parametrize("m", [40, 4200])
def test_products_are_computed_on_the_device_of_their_tensors(kernel: Any, m: int) -> None:
    kinds = OPERANDS[kernel]
    if why := _core.gemm_unsupported(
        kernel, _core.GemmProblem(m, 72, 288, *kinds, "bfloat16", True), 1
    ):
        pytest.skip(why)
    a, b = operand(kinds[0], random(m, 288, 2)), operand(kinds[1], random(72, 288, 3))
    bias = random(1, 72, 4)[0].bfloat16()
    want = zm.gemm(a, b, bias, dtype=torch.float32)
    for device in (FIRST, SECOND):  # what a kernel looks up once must not be the first device's
        result = zm.gemm(to(a, device), to(b, device), bias.to(device), kernel=kernel)
        assert result.device == torch.device(device)
        assert (result.cpu().float() - want).norm() <= 8e-3 * want.norm()


def test_fused_kernels_run_on_the_device_of_their_tensors() -> None:
    gate, up = random(77, 384, 5).bfloat16(), random(77, 384, 6).bfloat16()
    found = fused.silu_multiply(gate.to(SECOND), up.to(SECOND), "mxfp8")
    on_first = fused.silu_multiply(gate.to(FIRST), up.to(FIRST), "mxfp8")
    assert_same_bytes(found, to(on_first, "cpu"))


def test_work_is_put_on_the_stream_of_the_device_of_its_tensors() -> None:
    source = random(4096, 4096, 7).to(SECOND)
    matrix, stream = torch.zeros_like(source), torch.cuda.Stream(SECOND)
    torch.cuda.synchronize(SECOND)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # about 0.1 s of work that is in front
        matrix.copy_(source)
        with torch.cuda.device(FIRST):
            encoded = zm.quantize(matrix)
    stream.synchronize()
    assert_same_bytes(encoded, zm.quantize(source.cpu()))


@pytest.mark.parametrize("kind", ["mxfp8", "row-scaled", "bfloat16"])
def test_operands_on_two_devices_are_refused(kind: str) -> None:
    a, b = operand(kind, random(16, 64, 8)), operand(kind, random(16, 64, 9))
    bias = torch.zeros(16).bfloat16()
    for one, other in ((0, 1), (1, 0)):
        first, second = f"cuda:{one}", f"cuda:{other}"
        sentence = f"A is on CUDA device {one} but {{}} is on CUDA device {other}"
        with pytest.raises(zm.InvalidArgumentError, match=sentence.format("B")):
            zm.gemm(to(a, first), to(b, second), kernel="reference")
        with pytest.raises(zm.InvalidArgumentError, match=sentence.format("the bias")):
            zm.gemm(to(a, first), to(b, first), bias.to(second), kernel="reference")


def test_parts_on_two_devices_are_refused() -> None:
    encoded = zm.quantize(random(128, 128, 10).to(FIRST))
    torn = zm.MXFP8Array(encoded.codes, encoded.scales.to(SECOND), encoded.shape)
    gate = random(16, 64, 11).bfloat16()
    for call, sentence in (
        (lambda: zm.dequantize(torn), "codes is on CUDA device 0 but scales is on CUDA device 1"),
        (lambda: zm.fold(torn), "codes is on CUDA device 0 but scales is on CUDA device 1"),
        (lambda: zm.gemm(encoded, torn), "A is on CUDA device 0 but B is on CUDA device 1"),
        (
            lambda: zm.gemm(torn, encoded),
            "A is partly on CUDA device 0 and partly on CUDA device 1",
        ),
        (
            lambda: fused.silu_multiply(gate.to(SECOND), gate.to(FIRST)),
            "gate is on CUDA device 1 but up is on CUDA device 0",
        ),
    ):
        with pytest.raises(zm.InvalidArgumentError, match=sentence):
            call()


def test_models_on_both_devices(tmp_path: Path) -> None:
    """Each captures and replays graphs of its own device."""
    make_reference(dim=384).save_pretrained(tmp_path / "transformer")
    zm.convert(tmp_path / "transformer", tmp_path / "model.safetensors")
    models = [
        zm.ZImageTransformer.from_checkpoint(tmp_path / "model.safetensors", device)
        for device in (FIRST, SECOND)
    ]
    images, times, captions = random_inputs([(8, 12)], [32])
    others, _, _ = random_inputs([(8, 12)], [32], seed=7)

    def run(model: zm.ZImageTransformer, images: list[torch.Tensor]) -> torch.Tensor:
        place = model.device
        result = model([x.to(place) for x in images], times, [c.to(place) for c in captions])
        assert result.sample[0].device == place
        return result.sample[0].cpu()

    for model in models:
        first = run(model, images)
        for _ in range(2):  # the first captures, the second replays
            assert not torch.equal(run(model, others), first)
            assert torch.equal(run(model, images), first)
