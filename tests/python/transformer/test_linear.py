"""Linear layers and blocks as modules: forward hooks, and adapters that are attached to them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import zimage_mxfp8 as zm
from helpers import int8_reference
from helpers.diffusers_reference import (
    make_reference,
    quantize_inputs,
    random_inputs,
    relative_error,
    to_diffusers_names,
)
from helpers.live_bytes import LiveBytes
from helpers.low_rank_adapter import Branch, LowRankAdapter
from zimage_mxfp8.ops import gemm_epilogues
from zimage_mxfp8.transformer import fused_kernels
from zimage_mxfp8.transformer.block import Block
from zimage_mxfp8.transformer.compute import COMPUTE_MODES, unsupported
from zimage_mxfp8.transformer.epilogue import RotateHeads, SiluMultiply
from zimage_mxfp8.transformer.inputs import ForwardInputs
from zimage_mxfp8.transformer.linear import FP8Linear, Linear
from zimage_mxfp8.transformer.model_file import open_model
from zimage_mxfp8.transformer.ops import PLAIN, rotate_heads, silu_multiply

FLOAT32 = 1e-5  # relative error of sums in another order
TIE = 3e-4  # likewise, if a few codes of INT8 are next to the middle of two
MODES = ("plain", *COMPUTE_MODES)
CPU_MODES = ("plain", *(mode for mode in COMPUTE_MODES if not unsupported(mode, -1)))
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
WIDTHS = {"w1 and w3 stacked": 384, "w1 and w3 apart": 256}  # 256 has a hidden size of 682
RAGGED = ([(4, 6), (2, 2)], [3, 33])
ITEMS = len(RAGGED[0])
RANK, SCALE = 4, 0.75


class Files:
    """A model of 2 blocks in MXFP8, and in BF16 with the weights that the codes stand for."""

    def __init__(self, folder: Path, dim: int) -> None:
        self.dim = dim
        self.quantized, self.plain = folder / "mxfp8.safetensors", folder / "bf16.safetensors"
        make_reference(dim=dim).save_pretrained(folder / "transformer")
        zm.convert(folder / "transformer", self.quantized)
        zm.dequantize_checkpoint(self.quantized, self.plain)
        self.weights = {name: tensor.float() for name, tensor in load_file(self.plain).items()}

    def weights_of(self, mode: str) -> dict[str, torch.Tensor]:
        """The weights of a mode: INT8 rounds them once more."""
        layers = set(open_model(self.quantized).layers)
        return {
            name: rounded(mode, x) if mode == "int8" and is_rounded(name, layers) else x
            for name, x in self.weights.items()
        }

    def load(
        self, mode: str, device: str = "cpu", dtype: torch.dtype = torch.float32, **options: Any
    ) -> zm.ZImageTransformer:
        path, compute = (self.plain, "auto") if mode == "plain" else (self.quantized, mode)
        index = torch.cuda.current_device() if device == "cuda" else -1
        if mode != "plain" and (why := unsupported(mode, index)):  # type: ignore[arg-type]
            pytest.skip(why)
        return zm.ZImageTransformer.from_checkpoint(path, device, compute, dtype, **options)

    def reference(self, deltas: dict[str, torch.Tensor], mode: str = "plain") -> Any:
        """Diffusers' model with a mode's weights and dense deltas, by ComfyUI name."""
        weights = self.weights_of(mode)
        weights |= {name: weights[name] + deltas[name] for name in deltas}
        reference = make_reference(dim=self.dim)
        reference.load_state_dict(to_diffusers_names(weights), strict=True)
        return reference


@pytest.fixture(scope="module", params=WIDTHS)
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("model"), WIDTHS[request.param])


@pytest.fixture(scope="module")
def stacked(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("model"), 384)


def to(device: str, inputs: Any) -> Any:
    images, t, captions = inputs
    return [x.to(device) for x in images], t.to(device), [c.to(device) for c in captions]


def matrices(model: zm.ZImageTransformer) -> dict[str, list[str]]:
    """The matrices in the file that each linear layer of the model multiplies with."""
    found = {
        "x_embedder": ["x_embedder"],
        "cap_embedder": ["cap_embedder.1"],
        "t_embedder_in": ["t_embedder.mlp.0"],
        "t_embedder_out": ["t_embedder.mlp.2"],
        "final_modulation": ["final_layer.adaLN_modulation.1"],
        "final_layer": ["final_layer.linear"],
        "modulation": [
            f"{block}.adaLN_modulation.0" for block in ("noise_refiner.0", "layers.0", "layers.1")
        ],
    }
    for block in ("noise_refiner.0", "context_refiner.0", "layers.0", "layers.1"):
        w1_w3 = [f"{block}.feed_forward.w1", f"{block}.feed_forward.w3"]
        found[f"{block}.qkv"] = [f"{block}.attention.qkv"]
        found[f"{block}.out"] = [f"{block}.attention.out"]
        found[f"{block}.ffn_out"] = [f"{block}.feed_forward.w2"]
        if len(model.get_submodule(f"{block}.ffn_in")) == 1:
            found[f"{block}.ffn_in.0"] = w1_w3
        else:
            found |= {f"{block}.ffn_in.{i}": [w1_w3[i]] for i in range(2)}
    return found


def attach_adapters(
    model: zm.ZImageTransformer, weights: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Attach an adapter to every linear layer; return their dense deltas by ComfyUI name.

    Each matrix has a branch of its own, and q, k and v one each. A delta has about the norm of its
    weight, so that an adapter that does nothing shows.
    """
    generator = torch.Generator().manual_seed(5)
    deltas = {}
    for module, names in matrices(model).items():
        branches, begin = [], 0
        for name in names:
            rows, columns = weights[f"{name}.weight"].shape
            count = 3 if name.endswith("qkv") else 1
            parts = []
            for _ in range(count):
                end = begin + rows // count
                a = torch.randn(RANK, columns, generator=generator) / columns**0.5
                b = torch.randn(rows // count, RANK, generator=generator) / RANK**0.5
                parts.append(Branch(slice(begin, end), a, b, SCALE))
                begin = end
            branches += parts
            deltas[f"{name}.weight"] = torch.cat([part.delta for part in parts])
        layer = model.get_submodule(module)
        layer.adapter = LowRankAdapter(branches).to(model.device, model.dtype)
    return deltas


# ---- Hooks


def force_fusion(device: str, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Fuse epilogues where the device can, for few tokens too; whether it can."""
    if device == "cpu" or torch.cuda.get_device_capability() != (9, 0):
        return False
    choose = gemm_epilogues.choose
    kernels = {"row-scaled": "fp8_sm90", "int8": "int8_sm90"}
    monkeypatch.setattr(
        gemm_epilogues, "choose", lambda p, like, _: choose(p, like, kernels[str(p[3])])
    )
    return True


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", MODES)
def test_hooks_run_on_every_linear_and_block(
    mode: str, device: str, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    fuses = force_fusion(device, monkeypatch)
    model = files.load(mode, device, torch.bfloat16, cuda_graphs=False)
    inputs = to(device, random_inputs(*RAGGED))
    without = model(*inputs).sample
    assert model.layers[0].qkv.takes_epilogues == (fuses and mode in ("fp8", "int8"))
    calls: Counter[str] = Counter()

    def count(name: str) -> Callable[..., None]:
        return lambda *_: calls.update([name])

    modules = {n: m for n, m in model.named_modules() if isinstance(m, (Linear, Block))}
    for name, module in modules.items():
        module.register_forward_hook(count(name))
    for _ in range(2):
        result = model(*inputs).sample
    assert all(torch.equal(a, b) for a, b in zip(result, without, strict=True))
    per_item = {"final_modulation", "final_layer"}
    assert calls == {name: 2 * (ITEMS if name in per_item else 1) for name in modules}
    blocks = {name for name, module in modules.items() if isinstance(module, Block)}
    assert set(modules) - blocks == set(matrices(model))
    assert blocks == {"noise_refiner.0", "context_refiner.0", "layers.0", "layers.1"}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["layers.1.qkv", "layers.0.ffn_out", "x_embedder"])
def test_a_hook_replaces_the_result_of_a_layer(
    name: str, mode: str, device: str, stacked: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    force_fusion(device, monkeypatch)
    model = stacked.load(mode, device, torch.bfloat16, cuda_graphs=False)
    inputs = to(device, random_inputs(*RAGGED))
    before = model(*inputs).sample
    handle = model.get_submodule(name).register_forward_hook(lambda _m, _x, out: out * 0)
    assert relative_error(model(*inputs).sample, before) > 0.01
    handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(model(*inputs).sample, before, strict=True))


# ---- Adapters


def rounded(mode: str, x: torch.Tensor) -> torch.Tensor:
    """The input as the GEMM of a mode for 8-bit activations takes it."""
    if mode == "fp8":
        amax = x.abs().amax(-1, keepdim=True).clamp(min=1e-30)  # diffusers pads with rows of zeros
        return (x * (448 / amax)).to(torch.float8_e4m3fn).float() * (amax / 448)
    flat = x.flatten(0, -2)
    if mode == "int8":
        return torch.from_numpy(int8_reference.rounded(flat.detach().numpy())).reshape(x.shape)
    padded = F.pad(flat, (0, -flat.shape[1] % 32))
    return zm.dequantize(zm.quantize(padded), torch.float32)[:, : x.shape[-1]].reshape(x.shape)


@pytest.mark.parametrize("mode", CPU_MODES)
def test_an_adapter_is_its_dense_delta_in_each_layer(mode: str, files: Files) -> None:
    """In float32, whose sums of up to 1024 products have errors of about sqrt(1024) * 2^-24.

    An 8-bit layer multiplies W with the rounded input, and its adapter reads the input itself.
    """
    model = files.load(mode)
    names = {module: matrices(model)[module] for module in matrices(model) if "layers.0" in module}
    layers = {module: model.get_submodule(module) for module in names}
    inputs, before = {}, {}
    for module, layer in layers.items():
        columns = files.weights[f"{names[module][0]}.weight"].shape[1]
        inputs[module] = torch.randn(40, columns, generator=torch.Generator().manual_seed(columns))
        before[module] = layer(layer.encode(inputs[module]))
    formats = {module: layer.input_formats for module, layer in layers.items()}
    deltas = attach_adapters(model, files.weights)
    weights = files.weights_of(mode)
    for module, layer in layers.items():
        x = inputs[module]
        assert layer.input_formats == formats[module] | {PLAIN}
        found = layer(layer.encode(x))
        weight = torch.cat([weights[f"{name}.weight"] for name in names[module]])
        delta = torch.cat([deltas[f"{name}.weight"] for name in names[module]])
        if formats[module] == {PLAIN}:
            want = x.double() @ (weight + delta).double().T
        else:
            want = rounded(mode, x).double() @ weight.double().T + x.double() @ delta.double().T
        assert relative_error([found], [want]) < (TIE if mode == "int8" else FLOAT32)
        assert relative_error([found], [before[module]]) > 0.3
        layer.adapter = None
        assert layer.input_formats == formats[module]
        assert torch.equal(layer(layer.encode(x)), before[module])


@pytest.mark.parametrize("mode", CPU_MODES)
def test_adapters_on_all_layers_are_diffusers_with_dense_deltas(mode: str, files: Files) -> None:
    model = files.load(mode)
    inputs = random_inputs(*RAGGED)
    before = model(*inputs).sample
    deltas = attach_adapters(model, files.weights)
    assert set(matrices(model)) == {
        name for name, module in model.named_modules() if isinstance(module, Linear)
    }
    found = model(*inputs).sample
    if mode in ("plain", "weight-only"):
        assert relative_error(found, files.reference(deltas)(*inputs).sample) < FLOAT32
    else:
        # Sums in another order that decide a rounding change a step of E4M3; the test of single
        # layers has no such ties.
        want = rounding_reference(mode, files, deltas)(*inputs).sample
        assert relative_error(found, want) < 0.06
    assert relative_error(found, before) > 0.5
    for module in matrices(model):
        model.get_submodule(module).adapter = None
    assert all(torch.equal(a, b) for a, b in zip(model(*inputs).sample, before, strict=True))


def rounding_reference(mode: str, files: Files, deltas: dict[str, torch.Tensor]) -> Any:
    """Diffusers' model with rounded inputs of quantised layers, but not of their deltas."""
    layers = set(open_model(files.quantized).layers)
    reference = files.reference(
        {name: delta for name, delta in deltas.items() if not is_rounded(name, layers)}, mode
    )
    dense = to_diffusers_names({n: d for n, d in deltas.items() if is_rounded(n, layers)})
    unrounded: dict[str, torch.Tensor] = {}
    for name, module in reference.named_modules():
        if f"{name}.weight" in dense:
            module.register_forward_pre_hook(
                lambda _, args, name=name: unrounded.update({name: args[0]})
            )
    quantize_inputs(reference, layers, lambda x: rounded(mode, x))
    for name, module in reference.named_modules():
        if f"{name}.weight" in dense:
            module.register_forward_hook(
                lambda _m, _x, out, name=name: (
                    out + F.linear(unrounded[name], dense[f"{name}.weight"])
                )
            )
    return reference


def is_rounded(name: str, layers: set[str]) -> bool:
    """Whether a mode rounds what a weight is multiplied with."""
    return name.removesuffix(".weight") in layers and "adaLN" not in name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", CPU_MODES)
def test_parts_are_columns_of_the_whole(mode: str, device: str, stacked: Files) -> None:
    model = stacked.load(mode, device, torch.bfloat16)
    qkv = model.layers[0].qkv
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 384, generator=generator).bfloat16().to(device)
    whole = qkv(qkv.encode(x))
    for rows in (slice(384), slice(384, 1152)):
        part = qkv.part(rows)
        assert part is not None
        # GEMMs of another width may sum in another order.
        found = part(part.encode(x))
        torch.testing.assert_close(found, whole[:, rows], rtol=0.02, atol=0.02)
    hook = qkv.register_forward_hook(lambda *_: None)
    assert qkv.part(slice(384)) is None  # the hook would see a part of the result
    hook.remove()
    attach_adapters(model, stacked.weights)
    assert qkv.part(slice(384)) is None


def test_a_layer_with_an_adapter_does_not_fuse(
    stacked: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The choice alone, with kernels that are made up: those of Hopper need the device."""
    model = stacked.load("fp8", dtype=torch.bfloat16)
    qkv, w13 = model.layers[0].qkv, model.layers[0].ffn_in[0]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 384, generator=generator).bfloat16()
    norm = torch.rand(128, generator=generator).bfloat16()
    rotate = RotateHeads(norm, norm, torch.randn(32, 64, 2, generator=generator), 3, 3)
    silu = SiluMultiply(frozenset({PLAIN}))
    fused = torch.zeros(1)
    monkeypatch.setattr(FP8Linear, "_core_takes_epilogues", True)
    monkeypatch.setattr(fused_kernels, "gemm_with_epilogue", lambda *_, **__: fused)
    assert qkv(qkv.encode(x), rotate) is fused
    assert w13(w13.encode(x), silu)[PLAIN] is fused
    attach_adapters(model, stacked.weights)
    want = qkv(qkv.encode(x))
    rotate_heads(want, norm, norm, rotate.rotations, 3, 3)
    assert torch.equal(qkv(qkv.encode(x), rotate), want)
    want = silu_multiply(*w13(w13.encode(x)).chunk(2, dim=1), {PLAIN})[PLAIN]
    assert torch.equal(w13(w13.encode(x), silu)[PLAIN], want)
    qkv.adapter = w13.adapter = None
    assert qkv(qkv.encode(x), rotate) is fused
    assert w13(w13.encode(x), silu)[PLAIN] is fused


def test_memory_of_an_adapter(stacked: Files) -> None:
    model = stacked.load("plain")
    attach_adapters(model, stacked.weights)
    layer, tokens = model.layers[0].qkv, 96
    activation = layer.encode(torch.ones(tokens, 384))
    with LiveBytes() as live:
        result = layer(activation)
    assert live.peak == result.nbytes + layer.workspace_nbytes(tokens)
    assert layer.workspace_nbytes(tokens) == tokens * (384 + RANK) * 4


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_adapters_and_cuda_graphs(mode: str, stacked: Files) -> None:
    """Attaching one after a graph was captured, and detaching it, takes effect in the next call."""
    model = stacked.load(mode, "cuda", torch.bfloat16)
    inputs = to("cuda", random_inputs(*RAGGED))
    without = [model(*inputs).sample for _ in range(3)][-1]
    attach_adapters(model, stacked.weights)
    apart = stacked.load(mode, "cuda", torch.bfloat16, cuda_graphs=False)
    attach_adapters(apart, stacked.weights)
    want = apart(*inputs).sample
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(model(*inputs).sample, want, strict=True))
    assert relative_error(want, without) > 0.5
    exact = stacked.load("plain")
    attach_adapters(exact, stacked.weights)
    # As the modes themselves in test_cuda_transformer.py.
    tolerance = 0.02 if mode in ("plain", "weight-only") else 0.15
    assert relative_error(want, exact(*random_inputs(*RAGGED)).sample) < tolerance
    for module in matrices(model):
        model.get_submodule(module).adapter = None
    assert all(torch.equal(a, b) for a, b in zip(model(*inputs).sample, without, strict=True))


# ---- The inputs of a forward


def test_inputs_are_copied_whole() -> None:
    """Into the same memory, which CUDA graphs read; a field that is left out would show."""

    def make(value: float) -> ForwardInputs:
        images = tuple(torch.full((16, 1, 2, side), value) for side in (2, 4))
        captions = tuple(torch.full((tokens, 96), value) for tokens in (3, 5))
        return ForwardInputs(images, torch.full((2,), value), captions)

    static, others = make(1), make(2)
    addresses = [tensor.data_ptr() for tensor in static.tensors]
    static.copy_(others)
    assert [tensor.data_ptr() for tensor in static.tensors] == addresses
    doubled = static.map(lambda tensor: tensor * 2)
    for field in fields(ForwardInputs):
        for found, expected in ((static, 2), (doubled, 4)):
            value = getattr(found, field.name)
            tensors = value if isinstance(value, tuple) else (value,)
            assert all(bool((tensor == expected).all()) for tensor in tensors), field.name
    assert static.shapes == (((1, 2, 2), 3), ((1, 2, 4), 5))
