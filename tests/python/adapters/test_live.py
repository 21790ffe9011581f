"""Adapters on a transformer: its output against diffusers' with the dense change, in float32."""

from __future__ import annotations

import copy
import itertools
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import zimage_mxfp8 as zm
from helpers import adapter_files as af
from helpers.adapter_dialects import NAMES, dialects
from helpers.diffusers_reference import (
    load_reference,
    make_reference,
    random_inputs,
    relative_error,
)
from zimage_mxfp8.transformer import lora

FLOAT32 = 1e-5
INPUTS = random_inputs([(8, 12), (4, 4)], [20, 3])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "transformer"
    make_reference(dim=256).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def quantized(folder: Path) -> Path:
    zm.convert(folder, folder.parent / "quantized.safetensors")
    return folder.parent / "quantized.safetensors"


@pytest.fixture(scope="module")
def reference(quantized: Path):
    """Diffusers' model with the weights that the MXFP8 file stands for."""
    zm.dequantize_checkpoint(quantized, quantized.parent / "plain.safetensors")
    model = make_reference(dim=256)
    load_reference(model, quantized.parent / "plain.safetensors")
    return model


def load(path: Path, compute: str = "weight-only") -> zm.ZImageTransformer:
    return zm.ZImageTransformer.from_checkpoint(path, "cpu", compute, torch.float32)


def changed(reference, *changes: tuple[float, af.Deltas]):
    """Diffusers' model with dense changes, each at a weight."""
    model = copy.deepcopy(reference)
    modules = dict(model.named_modules())
    for weight, deltas in changes:
        for name, delta in deltas.items():
            parameter = modules[name].weight
            parameter.data = (parameter.double() + weight * delta).float()
    return model(*INPUTS, return_dict=False)[0]


@pytest.mark.parametrize("dialect", NAMES)
def test_a_dialect_is_its_dense_change(
    dialect: str, quantized: Path, reference, tmp_path: Path
) -> None:
    written = dialects(reference)[dialect]
    file = tmp_path / "adapter.safetensors"
    save_file(written.tensors, file, written.metadata)
    model = load(quantized)
    before = model(*INPUTS).sample
    loaded = model.load_lora(file)
    assert loaded.unmatched == ()
    assert loaded.layers > 0
    after = model(*INPUTS).sample
    want = changed(reference, (1.0, written.deltas))
    assert relative_error(before, want) > 20 * FLOAT32  # the change is seen
    assert relative_error(after, want) < FLOAT32
    model.unload_lora(loaded.name)
    assert all(torch.equal(x, y) for x, y in zip(model(*INPUTS).sample, before, strict=True))


MODES = ["weight-only", "fp8", "mxfp8-emulated", "int8"]


def some_adapters(reference) -> list[af.Written]:
    """Three that share layers: split and fused qkv, and LoKr as dense matrices."""
    every = af.modules_of(reference)
    return [
        af.write_pairs(every, af.dotted("transformer."), ".lora_A.weight", ".lora_B.weight"),
        af.write_fused_qkv(
            reference, af.underscored("lora_unet_"), ".lora_down.weight", ".lora_up.weight"
        ),
        af.write_lokr(
            {n: x for n, x in every.items() if "attention" in n}, af.dotted(""), "none", 1.0
        ),
    ]


def test_weights_change_in_the_memory_that_graphs_read(
    quantized: Path, reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So they need no new CUDA graph; an adapter that is loaded or unloaded drops them all."""
    model, drops = load(quantized), []
    monkeypatch.setattr(model._graphs, "clear", lambda: drops.append("all"))

    def captured() -> list[Any]:
        adapters = [layer.adapter for layer in model._captured_linears]
        buffers = [x for each in adapters if each is not None for x in each.buffers()]
        return [*adapters, [(x.data_ptr(), x.shape) for x in buffers]]

    first, second, _ = some_adapters(reference)
    model.load_lora(first.tensors, "a", 0.5)
    before, sample = captured(), model(*INPUTS).sample
    assert len(drops) == 1 and any(before[:-1])
    for change in ({"a": -2.0}, {}, {"a": {"attention": 0.25}}):
        model.set_lora(change)
        assert relative_error(model(*INPUTS).sample, sample) > 1e-3
        assert captured() == before and len(drops) == 1
    model.load_lora(second.tensors, "b")
    assert len(drops) == 2
    model.set_lora({"b": 0.5})
    assert {name: each.weight for name, each in model.loras.items()} == {"a": 0.0, "b": 0.5}
    model.unload_lora("a")
    assert len(drops) == 3


def test_adapters_stack_and_weights_change_at_any_time(quantized: Path, reference) -> None:
    written = some_adapters(reference)
    model = load(quantized)
    before = model(*INPUTS).sample
    for i, each in enumerate(written):
        model.load_lora(each.tensors, f"number {i}", 0.5)
    weights = {"number 0": 0.5, "number 1": 0.5, "number 2": 0.5}
    for change in ({}, {"number 0": -0.7}, {"number 1": 2.0}, {"number 2": 0.0}):
        weights |= change
        model.set_lora(weights)
        want = changed(
            reference, *((weights[f"number {i}"], x.deltas) for i, x in enumerate(written))
        )
        assert relative_error(model(*INPUTS).sample, want) < FLOAT32
    model.set_lora({"number 1": 1.0})
    want = changed(reference, (1.0, written[1].deltas))
    assert relative_error(model(*INPUTS).sample, want) < FLOAT32
    model.unload_lora("number 1")
    model.set_lora({"number 0": 1.0})
    want = changed(reference, (1.0, written[0].deltas))
    assert relative_error(model(*INPUTS).sample, want) < FLOAT32
    model.set_lora({})
    assert relative_error(model(*INPUTS).sample, before) < 1e-6
    for name in list(model.loras):
        model.unload_lora(name)
    assert all(torch.equal(x, y) for x, y in zip(model(*INPUTS).sample, before, strict=True))


@pytest.mark.parametrize("compute", MODES)
def test_every_mode_takes_adapters(compute: str, quantized: Path, reference) -> None:
    """Encoded activations are those without the adapter, so ties of E4M3 can differ."""
    written = some_adapters(reference)[0]
    model = load(quantized, compute)
    before = model(*INPUTS).sample
    model.load_lora(written.tensors)
    plain = load(quantized)
    exact_before = plain(*INPUTS).sample
    plain.load_lora(written.tensors)
    error = relative_error(before, exact_before)
    effect = relative_error(exact_before, plain(*INPUTS).sample)
    assert relative_error(model(*INPUTS).sample, plain(*INPUTS).sample) < 1.3 * error + 1e-6
    assert effect > 0.05


def test_plain_checkpoints_take_adapters(folder: Path) -> None:
    reference = make_reference(dim=256)
    written = some_adapters(reference)[0]
    model = load(folder)
    model.load_lora(written.tensors, weight=0.25)
    want = changed(reference, (0.25, written.deltas))
    assert relative_error(model(*INPUTS).sample, want) < FLOAT32


def test_weights_by_block(quantized: Path, reference) -> None:
    written = some_adapters(reference)[0]
    model = load(quantized)
    model.load_lora(written.tensors, weight={"layers.0.": 0.25, "refiner": 0.0})
    scaled = {
        name: delta * (0.25 if "layers.0." in name else 0.0 if "refiner" in name else 1.0)
        for name, delta in written.deltas.items()
    }
    want = changed(reference, (1.0, scaled))
    assert relative_error(model(*INPUTS).sample, want) < FLOAT32


@pytest.mark.parametrize("weight", [0.5, -1.0, 0.0])
def test_dora_at_a_weight(weight: float, quantized: Path, reference) -> None:
    """m (W + w dW) / |W + w dW|, as PEFT."""
    written = af.write_dora(reference, af.dotted("transformer."), ".dora_scale")
    model = load(quantized)
    model.load_lora(written.tensors, "dora", weight)
    want = changed(reference, (1.0, dora_deltas(reference, written, weight)))
    assert relative_error(model(*INPUTS).sample, want) < FLOAT32
    model.set_lora({})
    assert relative_error(model(*INPUTS).sample, reference(*INPUTS, return_dict=False)[0]) < FLOAT32


def dora_deltas(reference, written: af.Written, weight: float) -> af.Deltas:
    """The dense changes of `write_dora`'s adapter at a weight."""
    deltas, modules = {}, dict(reference.named_modules())
    for name in written.deltas:
        stem = f"transformer.{name}"
        a, b = (written.tensors[f"{stem}.lora_{x}.weight"].double() for x in "AB")
        before = modules[name].weight.double()
        after = before + weight * (b @ a)
        magnitude = written.tensors[f"{stem}.dora_scale"].double()
        deltas[name] = after * magnitude / after.norm(dim=1, keepdim=True) - before
    return deltas


def test_dora_stacks_with_other_adapters(quantized: Path, reference) -> None:
    """On every linear layer, with biases too; each DoRA changes the original weight."""
    every = af.modules_of(reference)
    assert any(layer.bias is not None for layer in every.values())
    plain = some_adapters(reference)[:2]
    doras = [
        af.write_dora(reference, af.dotted("transformer."), ".dora_scale", modules=every, rank=rank)
        for rank in (4, 6)
    ]
    model = load(quantized)
    for i, each in enumerate([doras[0], *plain, doras[1]]):
        model.load_lora(each.tensors, f"number {i}")
    for weights in ((0.5, -0.7, 1.0, 1.0), (1.0, 0.5, 0.0, -0.5), (-0.3, 0.0, 2.0, 0.0)):
        model.set_lora({f"number {i}": weight for i, weight in enumerate(weights)})
        first, second = (
            dora_deltas(reference, written, weight)
            for written, weight in zip(doras, weights[::3], strict=True)
        )
        lora = ((w, x.deltas) for w, x in zip(weights[1:3], plain, strict=True))
        want = changed(reference, (1.0, first), (1.0, second), *lora)
        assert relative_error(model(*INPUTS).sample, want) < FLOAT32
    model.set_lora({"number 3": 0.5})
    want = changed(reference, (1.0, dora_deltas(reference, doras[1], 0.5)))
    assert relative_error(model(*INPUTS).sample, want) < FLOAT32


def test_dora_per_column_is_refused(quantized: Path, reference, tmp_path: Path) -> None:
    written = af.write_dora(reference, af.dotted("transformer."), ".dora_scale", column=True)
    save_file(written.tensors, tmp_path / "adapter.safetensors")
    model = load(quantized)
    before = model(*INPUTS).sample
    with pytest.raises(zm.CheckpointError) as caught:
        model.load_lora(tmp_path / "adapter.safetensors")
    module = f"transformer.{min(written.deltas)}"  # as the file sorts them
    assert str(caught.value) == (
        f'{tmp_path / "adapter.safetensors"}: the adapter of "{module}" is DoRA with a magnitude '
        "per column, which works merged into the weights alone; merge it into the checkpoint"
    )
    assert model.loras == {}
    assert all(torch.equal(x, y) for x, y in zip(model(*INPUTS).sample, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("in_file", [True, False])
def test_adapters_of_any_dtype(
    dtype: torch.dtype, in_file: bool, quantized: Path, reference, tmp_path: Path
) -> None:
    written = some_adapters(reference)[0]
    tensors = {name: tensor.to(dtype) for name, tensor in written.tensors.items()}
    save_file(tensors, tmp_path / "adapter.safetensors")
    model = load(quantized)
    model.load_lora(tmp_path / "adapter.safetensors" if in_file else tensors)
    want = changed(reference, (1.0, written.deltas))
    assert relative_error(model(*INPUTS).sample, want) < FLOAT32


def test_a_bias_of_an_adapter_counts_with_alpha_and_weight(quantized: Path, reference) -> None:
    """As PEFT's, which adds it inside the scaled branch; a layer may have no bias of its own."""
    target = copy.deepcopy(reference)
    names = ("all_x_embedder.2-1", "layers.0.adaLN_modulation.0", "layers.1.attention.to_out.0")
    modules = {name: layer for name, layer in af.modules_of(target).items() if name in names}
    written = af.write_pairs(
        modules, af.dotted("transformer."), ".lora_A.weight", ".lora_B.weight", 6.0
    )
    without = changed(reference, (0.5, written.deltas))
    for i, (name, layer) in enumerate(modules.items()):
        bias = 8 * af.random(layer.out_features, seed=i)
        written.tensors[f"transformer.{name}.lora_B.bias"] = bias
        own = torch.zeros(layer.out_features) if layer.bias is None else layer.bias.data
        layer.bias = torch.nn.Parameter(own + 0.5 * (6.0 / 4) * bias)
    want = changed(target, (0.5, written.deltas))
    assert relative_error(without, want) > 20 * FLOAT32
    model = load(quantized)
    model.load_lora(written.tensors, "a", 0.5)
    assert relative_error(model(*INPUTS).sample, want) < FLOAT32


def test_differences_of_weights_biases_and_norms(quantized: Path, reference) -> None:
    names = {
        "layers.0.feed_forward.w1": ".diff",
        "noise_refiner.0.adaLN_modulation.0": ".diff",
        "layers.1.attention.norm_q": ".diff",
        "context_refiner.0.ffn_norm2": ".w_norm",
        "cap_embedder.0": ".diff",
    }
    model, target = load(quantized), copy.deepcopy(reference)
    modules, tensors = dict(target.named_modules()), {}
    for i, (name, ending) in enumerate(names.items()):
        weight = modules[name].weight
        delta = af.random(*weight.shape, seed=i)
        tensors[f"diffusion_model.{name}{ending}"] = delta
        weight.data = weight + 0.5 * delta
    for i, name in enumerate(("all_x_embedder.2-1", "layers.1.adaLN_modulation.0")):
        delta = af.random(*modules[name].bias.shape, seed=i)
        tensors[f"diffusion_model.{name}.diff_b"] = delta
        modules[name].bias.data = modules[name].bias + 0.5 * delta
    before = model(*INPUTS).sample
    loaded = model.load_lora(tensors, weight=0.5)
    assert len(loaded.dense) == 2
    want = target(*INPUTS, return_dict=False)[0]
    assert relative_error(model(*INPUTS).sample, want) < FLOAT32
    model.unload_lora(loaded.name)
    assert all(torch.equal(x, y) for x, y in zip(model(*INPUTS).sample, before, strict=True))


def test_a_layer_in_two_spellings_counts_once(quantized: Path, reference) -> None:
    modules = af.modules_of(reference, "to_out.0")
    written = af.write_pairs(modules, af.dotted(""), ".lora_A.weight", ".lora_B.weight")
    twice = written.tensors | {
        name.replace("to_out.0", "out"): tensor for name, tensor in written.tensors.items()
    }
    fused = af.write_fused_qkv(reference, af.dotted(""), ".lora_A.weight", ".lora_B.weight")
    split = af.write_pairs(
        {n: x for k in "qkv" for n, x in af.modules_of(reference, f"to_{k}").items()},
        af.dotted("transformer."),
        ".lora_A.weight",
        ".lora_B.weight",
    )
    twice |= {name: x for name, x in fused.tensors.items() if "qkv" in name} | split.tensors
    model = load(quantized)
    loaded = model.load_lora(twice)
    assert len(loaded.redundant) == 2 * len(modules)
    want = changed(reference, (1.0, written.deltas), (1.0, split.deltas))
    assert relative_error(model(*INPUTS).sample, want) < FLOAT32


def test_one_file_may_mix_dialects(quantized: Path, reference) -> None:
    modules = af.modules_of(reference, "feed_forward.w2")
    first = af.write_pairs(modules, af.dotted("transformer."), ".lora_A.weight", ".lora_B.weight")
    second = af.write_loha(af.modules_of(reference, "to_q"), "lora_unet_", 2, 1.0)
    third = af.write_lokr(af.modules_of(reference, "to_v"), af.dotted(""), "second", 1.0)
    model = load(quantized)
    loaded = model.load_lora(first.tensors | second.tensors | third.tensors)
    assert loaded.kinds == {"LoRA": len(modules), "LoHa": len(modules), "LoKr": len(modules)}
    changes = ((1.0, each.deltas) for each in (first, second, third))
    assert relative_error(model(*INPUTS).sample, changed(reference, *changes)) < FLOAT32


def test_unknown_and_text_encoder_tensors_are_listed(quantized: Path, reference) -> None:
    modules = af.modules_of(reference, "to_q")
    written = af.write_pairs(modules, af.dotted("transformer."), ".lora_A.weight", ".lora_B.weight")
    others = {
        "transformer.layers.77.attention.to_q.lora_A.weight": torch.ones(4, 256),
        "something.else": torch.ones(1),
        "lora_te_layers_0_self_attn_q_proj.lora_down.weight": torch.ones(4, 96),
    }
    layer = "layers.0.self_attn.q_proj.lora_A.weight"
    for prefix in (
        "text_encoder.model.",
        "text_encoders.qwen3_4b.transformer.model.",
        "base_model.model.text_encoder.model.",
    ):
        others[prefix + layer] = torch.ones(4, 96)
    loaded = load(quantized).load_lora(written.tensors | others)
    assert set(loaded.unmatched) == set(list(others)[:2])
    assert loaded.text_encoder == tuple(list(others)[2:])


def test_an_adapter_survives_copies_and_other_dtypes(quantized: Path, reference) -> None:
    written = some_adapters(reference)[0]
    model = load(quantized)
    model.load_lora(written.tensors, "a", 0.7)
    want = model(*INPUTS).sample
    twin = copy.deepcopy(model)
    twin.set_lora({"a": 0.0})
    assert relative_error(model(*INPUTS).sample, want) == 0
    twin.set_lora({"a": 0.7})
    assert relative_error(twin(*INPUTS).sample, want) == 0
    there_and_back = model.to(torch.bfloat16)
    assert relative_error(there_and_back(*INPUTS).sample, want) < 0.03
    assert relative_error(model.to(torch.float32)(*INPUTS).sample, want) < 0.03


def test_weights_by_part_of_either_spelling(quantized: Path, reference) -> None:
    written = some_adapters(reference)[0]
    model = load(quantized)
    model.load_lora(written.tensors, "a", {"attention.to_q": 0.0, "all_x_embedder": 0.5})
    scaled = {
        name: delta * (0.0 if "to_q" in name else 0.5 if "x_embedder" in name else 1.0)
        for name, delta in written.deltas.items()
    }
    want = changed(reference, (1.0, scaled))
    assert relative_error(model(*INPUTS).sample, want) < FLOAT32
    for call in (
        lambda: model.set_lora({"a": {"layer.0.": 0.0}}),
        lambda: model.load_lora(written.tensors, "b", {"layer.0.": 0.0}),
    ):
        with pytest.raises(
            zm.UsageError, match=r'weight has the part "layer\.0\.", which is in no'
        ):
            call()
    assert list(model.loras) == ["a"]
    assert relative_error(model(*INPUTS).sample, want) < FLOAT32


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda m: m.set_lora(None), "weights must be a dict such as {.style.: 0.8}, not None"),
        (
            lambda m: m.set_lora({"a": 1e39}),
            r'weights\["a"\] must be within 1,000,000 of 0',
        ),
        (lambda m: m.set_lora({"b": 1.0}), r'name "b" is no adapter that is loaded \("a"\)'),
        (lambda m: m.unload_lora("b"), r'name "b" is no adapter that is loaded \("a"\)'),
        (lambda m: m.unload_lora(["a"]), "name must be a text"),
        (lambda m: m.load_lora({}, "a"), 'name "a" is taken by another adapter'),
    ],
)
def test_arguments_are_named(call, sentence: str, quantized: Path, reference) -> None:
    written = af.write_pairs(
        af.modules_of(reference, "to_q"), af.dotted(""), ".lora_A.weight", ".lora_B.weight"
    )
    model = load(quantized)
    model.load_lora(written.tensors, "a", 0.5)
    before = model(*INPUTS).sample
    with pytest.raises(zm.UsageError, match=f"^{sentence}"):
        call(model)
    assert all(torch.equal(x, y) for x, y in zip(model(*INPUTS).sample, before, strict=True))


def test_a_failed_replacement_leaves_the_old_adapter(
    quantized: Path, reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = some_adapters(reference)[:2]
    model = load(quantized)
    model.load_lora(first.tensors, "a", 0.5)
    before = model(*INPUTS).sample
    make, calls = lora._branch, []

    def failing(linear, addends):
        calls.append(linear)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("full")
        return make(linear, addends)

    monkeypatch.setattr(lora, "_branch", failing)
    with pytest.raises(zm.CudaError, match="does not fit into the device's memory"):
        model.load_lora_adapter(second.tensors, hotswap=True, adapter_name="a")
    assert all(torch.equal(x, y) for x, y in zip(model(*INPUTS).sample, before, strict=True))


def test_threads_with_different_scales(quantized: Path, reference) -> None:
    """The second begins while the first is inside, and neither sees the other's weights."""
    model = load(quantized)
    model.load_lora(some_adapters(reference)[0].tensors)
    scales = (0.5, -1.0, 1.0)
    wanted = {scale: sample_at(model, scale) for scale in scales}
    for scale, other in itertools.permutations(scales, 2):
        for sample, each in zip(overlapping(model, scale, other), (scale, other), strict=True):
            assert all(torch.equal(x, y) for x, y in zip(sample, wanted[each], strict=True))
    last = model(*INPUTS).sample
    assert all(torch.equal(x, y) for x, y in zip(last, wanted[1.0], strict=True))


def overlapping(
    model: zm.ZImageTransformer, scale: float, other: float
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The samples of two threads, of which the second begins after the first's embedder."""
    second: list[Future[list[torch.Tensor]]] = []
    second_is_inside = threading.Event()

    def begin_second(*_: object) -> None:
        if second:
            second_is_inside.set()
            return
        second.append(pool.submit(sample_at, model, other))
        second_is_inside.wait(0.2)  # it never is, unless calls disturb each other

    with ThreadPoolExecutor(1) as pool:
        handle = model.x_embedder.register_forward_hook(begin_second)
        samples = sample_at(model, scale), second[0].result()
        handle.remove()
    return samples


def test_threads_with_the_same_scale_run_together(quantized: Path, reference) -> None:
    model = load(quantized)
    model.load_lora(some_adapters(reference)[0].tensors)
    meeting = threading.Barrier(2, timeout=60)

    def meet(*_: object) -> None:
        meeting.wait()

    model.layers[0].register_forward_pre_hook(meet)
    with ThreadPoolExecutor(2) as pool:
        samples = list(pool.map(lambda scale: sample_at(model, scale), (0.5, 0.5)))
    assert all(torch.equal(x, y) for x, y in zip(*samples, strict=True))


def sample_at(model: zm.ZImageTransformer, scale: float) -> list[torch.Tensor]:
    sample: list[torch.Tensor] = model(*INPUTS, joint_attention_kwargs={"scale": scale}).sample
    return sample


def test_an_adapter_of_inference_mode_can_be_changed_outside_it(quantized: Path, reference) -> None:
    written = some_adapters(reference)[0]
    model = load(quantized)
    with torch.inference_mode():
        model.load_lora(written.tensors, "a")
    model.set_lora({"a": 0.5})
    want = changed(reference, (0.5, written.deltas))
    assert relative_error(model(*INPUTS).sample, want) < FLOAT32


def test_an_adapter_does_not_share_memory_with_the_tensors(quantized: Path, reference) -> None:
    written = some_adapters(reference)[0]
    model = load(quantized)
    model.load_lora(written.tensors)
    before = model(*INPUTS).sample
    for tensor in written.tensors.values():
        tensor.fill_(3.0)
    model.to(torch.float32)  # builds the branches anew
    assert all(torch.equal(x, y) for x, y in zip(model(*INPUTS).sample, before, strict=True))
