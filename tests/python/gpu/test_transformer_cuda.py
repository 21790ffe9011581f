"""The transformer on a CUDA device, against itself on the CPU, which test_transformer.py checks
against diffusers. The sizes are small but not ragged: products take the paths of the full model.
"""

from __future__ import annotations

import gc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import zimage_mxfp8 as zm
from helpers.cuda_model import EQUAL, RAGGED, load, on_device
from helpers.diffusers_reference import make_reference, random_inputs, relative_error
from zimage_mxfp8.ops import gemm_epilogues
from zimage_mxfp8.transformer import attention
from zimage_mxfp8.transformer.compute import COMPUTE_MODES, supported

pytestmark = pytest.mark.gpu

# Against the same numbers in float32: what rounding to BF16 and quantising activations costs.
TOLERANCE = {"weight-only": 0.02, "fp8": 0.15, "mxfp8-emulated": 0.15, "mxfp8": 0.15, "int8": 0.05}


@pytest.mark.parametrize("batch", [RAGGED, EQUAL], ids=["ragged", "equal"])
@pytest.mark.parametrize("compute", COMPUTE_MODES)
def test_modes_agree_with_the_cpu(compute: str, batch, quantized: Path) -> None:
    model = load(quantized, compute)
    inputs = random_inputs(*batch)
    exact = zm.ZImageTransformer.from_checkpoint(quantized, "cpu", "weight-only", torch.float32)
    want = exact(*inputs).sample
    assert relative_error(model(*on_device(inputs)).sample, want) < TOLERANCE[compute]
    # The same mode on the CPU has the same steps of E4M3, but for ties; so it is closer.
    if compute in ("fp8", "mxfp8-emulated"):
        same = zm.ZImageTransformer.from_checkpoint(quantized, "cpu", compute)(*inputs).sample
        assert relative_error(model(*on_device(inputs)).sample, same) < 0.1


@pytest.mark.parametrize("compute", COMPUTE_MODES)
def test_an_inner_width_that_is_no_multiple_of_8(compute: str, tmp_path: Path) -> None:
    """341 for 128 channels: GEMMs run on 352 columns, the last of which are zeros."""
    make_reference(dim=128).save_pretrained(tmp_path / "transformer")
    zm.convert(tmp_path / "transformer", tmp_path / "quantized.safetensors")
    model = load(tmp_path / "quantized.safetensors", compute)
    inputs = random_inputs(*RAGGED)
    exact = zm.ZImageTransformer.from_checkpoint(
        tmp_path / "quantized.safetensors", "cpu", "weight-only", torch.float32
    )
    want = exact(*inputs).sample
    assert relative_error(model(*on_device(inputs)).sample, want) < TOLERANCE[compute]


@pytest.mark.parametrize("batch", [RAGGED, EQUAL], ids=["ragged", "equal"])
def test_fused_epilogues(batch, quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With few tokens they are not the faster ones, so they are not taken by themselves."""
    inputs = on_device(random_inputs(*batch))
    kernels: Counter[str] = Counter()
    choose = gemm_epilogues.choose

    def forced(kernel: str):
        def choose_that(problem, like, _kernel=None):
            kernels[kernel] += 1
            return choose(problem, like, kernel)

        return choose_that

    monkeypatch.setattr(gemm_epilogues, "choose", forced("fp8_rowwise"))
    apart = load(quantized, "fp8")(*inputs).sample
    if not kernels:
        pytest.skip("the core has no FP8 GEMM for this device")
    monkeypatch.setattr(gemm_epilogues, "choose", forced("fp8_sm90"))
    result = load(quantized, "fp8")(*inputs).sample
    assert kernels["fp8_sm90"] == kernels["fp8_rowwise"] > 0
    # The same numbers, but for the order of sums and roundings, and so for ties in E4M3.
    assert relative_error(result, apart) < 0.1


@pytest.mark.parametrize("source", ["plain", "weight-only"])
def test_float32_is_as_exact_as_on_the_cpu(source: str, folder: Path, quantized: Path) -> None:
    path = folder if source == "plain" else quantized
    inputs = random_inputs(*RAGGED)
    compute = "auto" if source == "plain" else "weight-only"
    want = zm.ZImageTransformer.from_checkpoint(path, "cpu", compute, torch.float32)(*inputs)
    found = load(path, compute, torch.float32)(*on_device(inputs))
    assert relative_error(found.sample, want.sample) < 1e-5


@pytest.mark.parametrize("compute", COMPUTE_MODES)
def test_graphs_and_runs_give_the_same_bytes(compute: str, quantized: Path) -> None:
    """The first call launches kernels, the second captures a graph, the third replays it."""
    model = load(quantized, compute)
    inputs, others = on_device(random_inputs(*RAGGED)), on_device(random_inputs(*RAGGED, seed=7))
    first = model(*inputs).sample
    for _ in range(2):
        model(*others)  # the graph's inputs are replaced, and its outputs are not ours
        assert all(torch.equal(a, b) for a, b in zip(model(*inputs).sample, first, strict=True))
    again = load(quantized, compute)(*inputs).sample
    assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


def test_a_graph_of_inference_mode_runs_outside_it(quantized: Path) -> None:
    model = load(quantized)
    inputs = on_device(random_inputs(*EQUAL))
    with torch.inference_mode():
        for _ in range(2):  # the second call captures
            want = [x.clone() for x in model(*inputs).sample]
    assert all(torch.equal(a, b) for a, b in zip(model(*inputs).sample, want, strict=True))


def test_garbage_with_graphs_does_not_end_a_capture(quantized: Path) -> None:
    model, inputs = load(quantized), on_device(random_inputs(*EQUAL))
    want = model(*inputs).sample
    cycle: list[Any] = [load(quantized)]
    for _ in range(2):  # the second call captures
        cycle[0](*inputs)
    cycle.append(cycle)
    garbage = [cycle]
    del cycle

    def drop(*_: Any) -> None:
        if torch.cuda.is_current_stream_capturing():
            garbage.clear()
            _ = [[] for _ in range(10_000)]  # enough for Python to look for cycles

    model.layers[0].register_forward_pre_hook(drop)
    thresholds = gc.get_threshold()
    gc.set_threshold(100, 1, 1)
    try:
        assert all(torch.equal(*pair) for pair in zip(model(*inputs).sample, want, strict=True))
    finally:
        gc.set_threshold(*thresholds)
    assert not garbage


def test_more_shapes_than_graphs_are_kept(quantized: Path) -> None:
    model = load(quantized)
    wanted = {}
    for turn in range(2):
        for side in range(2, 16, 2):
            inputs = on_device(random_inputs([(side, 4)], [side]))
            result = [model(*inputs).sample[0] for _ in range(3)][-1]
            assert torch.equal(wanted.setdefault(side, result), result), turn
    assert len(model._graphs._seen) <= 4


def test_auto_is_the_first_mode_of_the_device(quantized: Path) -> None:
    model = load(quantized)
    assert model.compute == supported(torch.cuda.current_device())[0]
    assert f"compute={model.compute}" in repr(model)


def test_it_moves_to_the_cpu_and_back(quantized: Path) -> None:
    inputs = random_inputs(*EQUAL)
    model = load(quantized)
    first = model(*on_device(inputs)).sample
    model.to("cpu")
    assert model.device == torch.device("cpu")
    with pytest.raises(zm.InvalidArgumentError, match="on cpu"):
        model(*on_device(inputs))
    again = model.to("cuda")(*on_device(inputs)).sample
    assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


def test_inputs_of_another_device(quantized: Path) -> None:
    with pytest.raises(
        zm.InvalidArgumentError, match=r"x\[0\] is on cpu, but the model is on cuda"
    ):
        load(quantized)(*random_inputs(*EQUAL))


def test_too_little_memory_to_load(quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.cuda.empty_cache()  # what earlier tests left counts as free
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 20, 1 << 30))
    with pytest.raises(zm.CudaError, match=r"needs 1\.0 GiB on cuda:0 .*GiB are free; close other"):
        zm.ZImageTransformer.from_checkpoint(quantized, "cuda")


def test_too_little_memory_for_a_forward(quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(quantized)

    def no_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model, "_compute", no_memory)
    with pytest.raises(
        zm.CudaError,
        match=r"ran out of memory in a forward over 112 tokens, which needs about 0\.1 GiB: \S+ of "
        r"\S+ GiB are free, and .* use a smaller size or batch$",
    ):
        model(*on_device(random_inputs(*EQUAL)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("compute", COMPUTE_MODES)
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


def test_attention_takes_cudnn_where_it_can() -> None:
    index = torch.cuda.current_device()
    if torch.cuda.get_device_capability(index)[0] < 9:
        pytest.skip("cuDNN's attention is for compute capability 9.0 and newer")
    assert attention.has_cudnn_attention(torch.device("cuda", index))


def test_a_missing_cudnn_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", refuse)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    attention.has_cudnn_attention.cache_clear()
    device = torch.device("cuda", torch.cuda.current_device())
    try:
        with pytest.warns(UserWarning, match="cannot use cuDNN's attention here"):
            assert not attention.has_cudnn_attention(device)
        assert not attention.has_cudnn_attention(device)  # without a second warning
    finally:
        attention.has_cudnn_attention.cache_clear()
