"""Adapters of a transformer on a CUDA device, against the model in float32 on the CPU.

pytest -m gpu
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import zimage_mxfp8 as zm
from helpers.cuda_model import RAGGED, load, on_device
from helpers.diffusers_reference import random_inputs, relative_error
from zimage_mxfp8.ops.fused import ActivationFormat
from zimage_mxfp8.transformer.adapter import FusedAdapter
from zimage_mxfp8.transformer.arithmetic import by_core
from zimage_mxfp8.transformer.compute import COMPUTE_MODES, Compute
from zimage_mxfp8.transformer.linear import FP8Linear, Int8Linear, Linear, WeightOnlyLinear

pytestmark = pytest.mark.gpu

LINEARS = (
    "attention.qkv",
    "attention.out",
    "feed_forward.w1",
    "feed_forward.w2",
    "feed_forward.w3",
)


def adapter(file: Path, rank: int, seed: int) -> dict[str, torch.Tensor]:
    """An adapter on every linear of the blocks with an effect of a few tenths of the output."""
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    with safe_open(file, "pt") as source:
        for name in source.keys():  # noqa: SIM118 - not a mapping
            layer = name.removesuffix(".weight")
            if layer == name or not layer.endswith(LINEARS):
                continue
            rows, columns = source.get_slice(name).get_shape()
            down = torch.randn(rank, columns, generator=random) * columns**-0.5
            up = torch.randn(rows, rank, generator=random) * 0.25 * rank**-0.5
            tensors[f"diffusion_model.{layer}.lora_A.weight"] = down
            tensors[f"diffusion_model.{layer}.lora_B.weight"] = up
    return tensors


def output(model: zm.ZImageTransformer, weights: Mapping[str, float]) -> list[torch.Tensor]:
    model.set_lora(weights)
    inputs = random_inputs(*RAGGED)
    sample: list[torch.Tensor] = model(*on_device(inputs)).sample
    return [x.clone() for x in sample]


@pytest.mark.parametrize("compute", COMPUTE_MODES)
def test_adapters_agree_with_the_cpu(compute: str, quantized: Path) -> None:
    model = load(quantized, compute)
    exact = zm.ZImageTransformer.from_checkpoint(quantized, "cpu", "weight-only", torch.float32)
    for each in (model, exact):
        each.load_lora(adapter(quantized, 32, 1), "one")
        each.load_lora(adapter(quantized, 24, 2), "two")
    before = output(model, {})
    for weights in ({"one": 1.0}, {"one": 0.5, "two": -1.5}, {"two": 1.0}):
        found = output(model, weights)  # from the second on by the graph of the first
        exact.set_lora(weights)
        want = exact(*random_inputs(*RAGGED)).sample
        tolerance = 0.03 if compute == "weight-only" else 0.15
        assert relative_error(found, want) < tolerance
        assert relative_error(before, want) > 2 * tolerance
    assert all(torch.equal(a, b) for a, b in zip(output(model, {}), before, strict=True))


# In `fp8` and `int8` activations of the branch are in 8 bits too; without the branch roundings
# differ, and with them steps of the codes.
@pytest.mark.parametrize(
    ("compute", "kind", "tolerance"),
    [
        *(("int8", Int8Linear, 0.08), ("fp8", FP8Linear, 0.08)),
        ("weight-only", WeightOnlyLinear, 0.02),
    ],
)
def test_fused_adapters_equal_those_apart(
    quantized: Path,
    monkeypatch: pytest.MonkeyPatch,
    compute: Compute,
    kind: type[Linear],
    tolerance: float,
) -> None:
    formats: dict[str, tuple[ActivationFormat, ActivationFormat]] = {
        "int8": ("int8", "int8"),
        "fp8": ("row-scaled", "row-scaled"),
        "weight-only": ("bfloat16", "mxfp8"),
    }
    if not by_core.takes_addends(torch.cuda.current_device(), *formats[compute]):
        pytest.skip("no kernel of this device adds a low-rank addend")
    fused = load(quantized, compute)
    fused.load_lora(adapter(quantized, 32, 1), "one")
    layers = [x for x in fused.modules() if isinstance(x, kind)]
    assert layers and all(isinstance(x.adapter, FusedAdapter) for x in layers)
    monkeypatch.setattr(kind, "takes_fused_adapters", False)
    apart = load(quantized, compute)
    apart.load_lora(adapter(quantized, 32, 1), "one")
    assert not any(isinstance(x, FusedAdapter) for x in apart.modules())
    with_branch, without = output(apart, {"one": 1.0}), output(apart, {"one": 0.0})
    found = output(fused, {"one": 1.0})
    assert relative_error(found, with_branch) < tolerance
    assert relative_error(without, with_branch) > 0.2
    assert relative_error(output(fused, {"one": 0.0}), without) < tolerance


def test_weights_need_no_new_graph(quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin, captures = torch.cuda.CUDAGraph.capture_begin, []

    def counted(graph: torch.cuda.CUDAGraph, *args: object, **kwargs: object) -> None:
        captures.append(graph)
        begin(graph, *args, **kwargs)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_begin", counted)
    model = load(quantized, "fp8")

    def captured_by(*all_weights: Mapping[str, float]) -> int:
        before = len(captures)
        for weights in all_weights:
            output(model, weights)
        return len(captures) - before

    plain = captured_by({}, {}, {})
    assert plain > 0
    model.load_lora(adapter(quantized, 32, 1), "one")
    assert captured_by({"one": 1.0}, {"one": 1.0}) == plain
    assert captured_by({"one": 0.5}, {}, {"one": -2.0}) == 0
    model.load_lora(adapter(quantized, 24, 2), "two")
    assert captured_by({"one": 0.5, "two": 1.0}, {"two": 2.0}) == plain
    model.unload_lora("one")
    assert captured_by({"two": 2.0}, {"two": 1.0}, {"two": 0.0}) == plain


def test_memory_of_a_forward_with_adapters(quantized: Path) -> None:
    """What is told where memory runs out, against what is taken where it does not."""
    model = load(quantized, "fp8")
    model.load_lora(adapter(quantized, 32, 1), "one")
    inputs = on_device(random_inputs([(256, 256)] * 4, [32] * 4))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model(*inputs)
    taken = torch.cuda.max_memory_allocated() - before
    told = model._working_nbytes([((1, 256, 256), 32)] * 4)
    assert told == pytest.approx(taken, rel=0.25)
