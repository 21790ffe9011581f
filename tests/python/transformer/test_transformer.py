"""The transformer against diffusers' own, on the CPU."""

from __future__ import annotations

import copy
import json
import pickle
import re
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import zimage_mxfp8 as zm
from helpers.checkpoints import change
from helpers.diffusers_reference import (
    CAPTION,
    load_reference,
    make_reference,
    quantize_inputs,
    random_inputs,
    relative_error,
)
from helpers.live_bytes import LiveBytes
from zimage_mxfp8.system import devices
from zimage_mxfp8.transformer import compute as compute_module
from zimage_mxfp8.transformer.compute import (
    COMPUTE_MODES,
    IN_PLACE_MODES,
    choose,
    unsupported,
)
from zimage_mxfp8.transformer.linear import Linear
from zimage_mxfp8.transformer.model_file import open_model
from zimage_mxfp8.transformer.sequence import layout_of

SINGLE_FILE_PREFIX = "model.diffusion_model."
BATCHES = {
    "one image": ([(16, 16)], [32]),
    "pads on both sides": ([(10, 14)], [5]),
    "a caption of one token": ([(2, 2)], [1]),
    "equal items": ([(8, 12), (8, 12)], [32, 32]),
    "ragged items": ([(16, 16), (4, 30), (2, 2)], [33, 1, 64]),
}
# Rounding of float32 in sums of different order.
FLOAT32 = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder with float32 weights; the hidden size is ragged (682)."""
    path = tmp_path_factory.mktemp("model") / "transformer"
    make_reference(dim=256).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def quantized(folder: Path) -> Path:
    """The same in MXFP8: two of its layers stay plain in the recipe `uniform`."""
    path = folder.parent / "quantized.safetensors"
    zm.convert(folder, path)
    return path


def reference_on(file: Path, tmp_path: Path):
    """Diffusers' model with the weights that an MXFP8 file stands for."""
    zm.dequantize_checkpoint(file, tmp_path / "plain.safetensors")
    reference = make_reference(dim=256)
    load_reference(reference, tmp_path / "plain.safetensors")
    return reference


def float32(path: Path, compute: str = "auto") -> zm.ZImageTransformer:
    return zm.ZImageTransformer.from_checkpoint(path, "cpu", compute, torch.float32)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(
    ("dim", "layers", "refiners"),
    [(128, 1, 2), (256, 2, 1), (384, 0, 1), (128, 2, 0), (128, 0, 0)],
    ids=str,
)
def test_plain_weights_give_what_diffusers_gives(
    batch: str, dim: int, layers: int, refiners: int, tmp_path: Path
) -> None:
    reference = make_reference(dim, layers, refiners)
    reference.save_pretrained(tmp_path)
    model = float32(tmp_path)
    inputs = random_inputs(*BATCHES[batch])
    want = reference(*inputs, return_dict=False)[0]
    found = model(*inputs, return_dict=False)[0]
    assert [x.shape for x in found] == [x.shape for x in want]
    assert relative_error(found, want) < FLOAT32
    assert model.config.n_layers == layers
    assert model.config.n_refiner_layers == refiners
    assert f"{layers} layers, dim {dim}" in repr(model)


@pytest.mark.parametrize("batch", BATCHES)
def test_exact_is_diffusers_with_the_decoded_weights(
    batch: str, quantized: Path, tmp_path: Path
) -> None:
    inputs = random_inputs(*BATCHES[batch])
    want = reference_on(quantized, tmp_path)(*inputs, return_dict=False)[0]
    assert relative_error(float32(quantized, "weight-only")(*inputs).sample, want) < FLOAT32


def test_quantised_layers_without_refiners(tmp_path: Path) -> None:
    """Which ComfyUI does not recognise as Z-Image, so `convert` takes it for another model."""
    reference = make_reference(layers=2, refiners=0)
    reference.save_pretrained(tmp_path / "transformer")
    zm.convert(tmp_path / "transformer", tmp_path / "quantized.safetensors", any_model=True)
    assert "layers.1.feed_forward.w2" in open_model(tmp_path / "quantized.safetensors").layers
    zm.dequantize_checkpoint(tmp_path / "quantized.safetensors", tmp_path / "plain.safetensors")
    load_reference(reference, tmp_path / "plain.safetensors")
    inputs = random_inputs(*BATCHES["ragged items"])
    want = reference(*inputs, return_dict=False)[0]
    found = float32(tmp_path / "quantized.safetensors", "weight-only")(*inputs).sample
    assert relative_error(found, want) < FLOAT32


def assert_equal_but_for_ties(model: zm.ZImageTransformer, reference) -> None:
    """Sums in another order differ by 1e-7, and where that decides a rounding, by a step of E4M3.

    So some images are equal to float32's precision, and the others nearly so.
    """
    errors = []
    for seed in range(9):
        inputs = random_inputs([(4, 4)], [3], seed)
        errors.append(relative_error(model(*inputs).sample, reference(*inputs).sample))
    assert min(errors) < FLOAT32, errors
    assert max(errors) < 0.06, errors


@pytest.mark.peer
def test_emulated_rounds_activations_to_mxfp8(quantized: Path, tmp_path: Path) -> None:
    from comfy_kitchen.backends.eager import quantization as comfy

    def encode(x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, -2)
        columns = flat.shape[1]
        flat = torch.nn.functional.pad(flat, (0, -columns % 32, 0, -flat.shape[0] % 32))
        codes, scales = comfy.quantize_mxfp8(flat, True)
        plain = zm.dequantize(
            zm.MXFP8Array(codes, scales.view(torch.uint8), tuple(flat.shape)), torch.float32
        )
        return plain[: x.flatten(0, -2).shape[0], :columns].reshape(x.shape)

    reference = reference_on(quantized, tmp_path)
    quantize_inputs(reference, set(open_model(quantized).layers), encode)
    assert_equal_but_for_ties(float32(quantized, "mxfp8-emulated"), reference)


def test_folded_rounds_activations_per_token(quantized: Path, tmp_path: Path) -> None:
    def encode(x: torch.Tensor) -> torch.Tensor:
        amax = x.abs().amax(-1, keepdim=True)
        codes = (x * (448 / amax)).to(torch.float8_e4m3fn)
        return codes.float() * (amax / 448)

    reference = reference_on(quantized, tmp_path)
    quantize_inputs(reference, set(open_model(quantized).layers), encode)
    model = float32(quantized, "fp8")
    assert_equal_but_for_ties(model, reference)
    assert 0 <= model.max_fold_error < 1e-6


@pytest.mark.parametrize("compute", ["weight-only", "fp8", "mxfp8-emulated"])
def test_bfloat16_is_close_to_float32(compute: str, quantized: Path) -> None:
    inputs = random_inputs(*BATCHES["ragged items"])
    model = zm.ZImageTransformer.from_checkpoint(quantized, "cpu", compute)
    found = model(*inputs).sample
    assert {x.dtype for x in found} == {torch.bfloat16}
    want = float32(quantized, "weight-only")(*inputs).sample
    assert relative_error(found, want) < (0.02 if compute == "weight-only" else 0.15)


@pytest.mark.parametrize("compute", ["weight-only", "fp8", "mxfp8-emulated"])
def test_two_runs_give_the_same_bytes(compute: str, quantized: Path) -> None:
    inputs = random_inputs(*BATCHES["ragged items"])
    first, second = (
        zm.ZImageTransformer.from_checkpoint(quantized, "cpu", compute)(*inputs).sample
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("source", ["single file", "all-in-one file", "float16"])
def test_other_plain_checkpoints(source: str, quantized: Path, tmp_path: Path) -> None:
    zm.dequantize_checkpoint(quantized, tmp_path / "plain.safetensors")
    tensors = load_file(tmp_path / "plain.safetensors")
    if source == "all-in-one file":
        tensors = {SINGLE_FILE_PREFIX + name: tensor for name, tensor in tensors.items()}
        tensors["vae.decoder.weight"] = torch.zeros(3)
    if source == "float16":
        tensors = {name: tensor.half() for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "other.safetensors")
    inputs = random_inputs(*BATCHES["one image"])
    found = float32(tmp_path / "other.safetensors")(*inputs).sample
    want = float32(quantized, "weight-only")(*inputs).sample
    assert relative_error(found, want) < (1e-3 if source == "float16" else FLOAT32)


def test_a_file_of_convert_to_quant(folder: Path, quantized: Path, tmp_path: Path) -> None:
    """Recipe `zimage` writes that program's bytes (test_convert.py): modulations stay plain."""
    zm.convert(folder, tmp_path / "peer.safetensors", recipe="zimage")
    inputs = random_inputs(*BATCHES["one image"])
    reference = reference_on(tmp_path / "peer.safetensors", tmp_path)
    want = reference(*inputs, return_dict=False)[0]
    assert relative_error(float32(tmp_path / "peer.safetensors")(*inputs).sample, want) < FLOAT32


def test_any_quantised_layer_can_be_run(folder: Path, tmp_path: Path) -> None:
    """Also embedders and the final layer, which no recipe of this package touches."""
    recipe = tmp_path / "all.toml"
    recipe.write_text(
        'title = "every matrix"\n\n[[keep]]\nname = "vectors"\npattern = "norm|pad_token"\n'
        'reason = "no matrices"\n'
    )
    zm.convert(folder, tmp_path / "all.safetensors", recipe=recipe)
    assert {"x_embedder", "t_embedder.mlp.0"} <= set(
        open_model(tmp_path / "all.safetensors").layers
    )
    inputs = random_inputs(*BATCHES["pads on both sides"])
    want = reference_on(tmp_path / "all.safetensors", tmp_path)(*inputs, return_dict=False)[0]
    # Decoded weights of these layers are rounded to nothing: float32 holds them.
    assert relative_error(float32(tmp_path / "all.safetensors")(*inputs).sample, want) < FLOAT32


def test_a_layer_that_cannot_be_folded_stays_exact(
    quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fold = zm.fold

    def refuse_squares(array: zm.MXFP8Array):
        if array.shape[0] == array.shape[1]:
            raise zm.PrecisionLossError("too much", 1.0)
        return fold(array)

    monkeypatch.setattr("zimage_mxfp8.transformer.arithmetic.by_core.fold", refuse_squares)
    model = float32(quantized, "fp8")
    formats = {n: m.weight_format for n, m in model.named_modules() if isinstance(m, Linear)}
    assert formats["layers.0.qkv"] == "fp8"
    assert formats["layers.0.out"] == "mxfp8 (weight-only)"
    inputs = random_inputs(*BATCHES["one image"])
    exact = float32(quantized, "weight-only")(*inputs).sample
    assert relative_error(model(*inputs).sample, exact) < 0.1


def test_progress_ends_at_the_total(quantized: Path) -> None:
    seen: list[zm.Progress] = []
    zm.ZImageTransformer.from_checkpoint(quantized, "cpu", progress=seen.append)
    assert [p.done for p in seen] == sorted(p.done for p in seen)
    assert seen[-1].done <= seen[-1].total
    assert seen[-1].done > 0.99 * seen[-1].total  # markers are not loaded


def test_it_says_what_it_is(quantized: Path) -> None:
    model = zm.ZImageTransformer.from_checkpoint(quantized, "cpu")
    assert "compute=weight-only" in repr(model)
    assert "2 layers, dim 256, cpu, bfloat16" in repr(model)
    assert model.dtype == torch.bfloat16
    assert model.device == torch.device("cpu")
    assert model.to(torch.float32).dtype == torch.float32
    inputs = random_inputs(*BATCHES["one image"])
    want = float32(quantized)(*inputs).sample
    # Weights that were rounded to BF16 on loading stay so.
    assert relative_error(model(*inputs).sample, want) < 5e-3


def test_it_is_diffusers_model_without_its_import(quantized: Path) -> None:
    """Its pipelines take it, and a process that does without them does not pay for them."""
    from diffusers import ModelMixin

    model = zm.ZImageTransformer.from_checkpoint(quantized, "cpu")
    assert isinstance(model, ModelMixin)
    assert isinstance(model, zm.ZImageTransformer)
    assert issubclass(model.__class__, ModelMixin)
    assert model.__class__.__name__ == type(model).__name__ == "ZImageTransformer"
    program = f"""
import sys
import zimage_mxfp8 as zm
model = zm.ZImageTransformer.from_checkpoint({str(quantized)!r}, "cpu")
assert "diffusers" not in sys.modules
assert model.__class__ is zm.ZImageTransformer
from diffusers import ModelMixin  # late
assert isinstance(model, ModelMixin)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_pickles_and_copies(quantized: Path) -> None:
    import diffusers  # noqa: F401 - its base class shows in __class__

    model = zm.ZImageTransformer.from_checkpoint(quantized, "cpu")
    inputs = random_inputs(*BATCHES["one image"])
    want = model(*inputs).sample[0]
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(other(*inputs).sample[0], want)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.double(),
        lambda model: model.to(torch.float64),
        lambda model: model.type(torch.bfloat16),
    ],
)
def test_dtypes_that_it_cannot_have_leave_it_as_it_was(change, quantized: Path) -> None:
    model = float32(quantized)
    inputs = random_inputs(*BATCHES["one image"])
    want = model(*inputs).sample[0]
    with pytest.raises(
        zm.UsageError,
        match=r"dtype must be bfloat16, float16 or float32, not torch.float64|"
        r"use .to\(dtype\)",
    ):
        change(model)
    assert model.dtype == torch.float32
    assert torch.equal(model(*inputs).sample[0], want)


def test_autocast_changes_nothing(model: zm.ZImageTransformer) -> None:
    inputs = random_inputs(*BATCHES["one image"])
    want = model(*inputs).sample[0]
    with torch.autocast("cpu", torch.float16):
        found = model(*inputs).sample[0]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, want)


def test_too_little_memory_is_told(
    quantized: Path, model: zm.ZImageTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't")

    monkeypatch.setattr(type(model), "_compute", no_memory)
    with pytest.raises(
        zm.UnsupportedError, match=r"not enough memory for a forward over 96 tokens"
    ):
        model(*random_inputs(*BATCHES["one image"]))
    monkeypatch.setattr("zimage_mxfp8.transformer.loading.TensorStream.start", no_memory)
    with pytest.raises(zm.UnsupportedError, match=r"needs 0\.0 GiB of memory, which this machine"):
        zm.ZImageTransformer.from_checkpoint(quantized, "cpu")


@pytest.mark.parametrize("compute", ["weight-only", "fp8", "mxfp8-emulated"])
def test_too_little_memory_of_a_device_is_told_with_what_is_needed(
    compute: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, where the CPU does what CUDA does: so much a token, of so many tokens."""
    make_reference(dim=384).save_pretrained(tmp_path / "transformer")
    zm.convert(tmp_path / "transformer", tmp_path / "quantized.safetensors")
    model = float32(tmp_path / "quantized.safetensors", compute)
    layout_of.cache_clear()  # it holds tensors
    peaks = {}
    for side in (32, 64):
        with LiveBytes() as live:
            model(*random_inputs([(side, side)], [32]))
        peaks[side**2 // 4 + 32] = live.peak
    (few, less), (many, more) = peaks.items()

    made: list[weakref.ref[torch.Tensor]] = []

    def no_memory(*_: object) -> None:
        half_done = torch.zeros(1)
        made.append(weakref.ref(half_done))
        raise torch.OutOfMemoryError("CUDA out of memory")

    def memory(device: torch.device) -> tuple[int, int]:
        assert made[0]() is None  # what is free is more than what was left when it failed
        return 1 << 30, 80 << 30

    monkeypatch.setattr(type(model), "_compute", no_memory)
    monkeypatch.setattr(torch.cuda, "mem_get_info", memory)
    with pytest.raises(zm.CudaError) as e:
        model(*random_inputs([(1024, 1024)], [20]))
    found = re.fullmatch(
        r"cpu ran out of memory in a forward over 262164 tokens, which needs about (\d\.\d) GiB: "
        r"1\.0 of 80\.0 GiB are free, and the transformer's weights take 0\.0; use a smaller "
        "size or batch",
        str(e.value),
    )
    assert found, e.value
    needed = (more - less) / (many - few) * (512**2 + 32)
    assert float(found[1]) * 2**30 == pytest.approx(needed, rel=0.05)


def test_offloading_finds_its_device(quantized: Path) -> None:
    """As accelerate's hooks look for it; diffusers' `enable_model_cpu_offload` uses them."""
    model = zm.ZImageTransformer.from_checkpoint(quantized, "cpu")
    assert next(model.parameters()).device == model.device
    assert not any(parameter.requires_grad for parameter in model.parameters())


# ---- Modes


def test_auto_is_exact_on_the_cpu(quantized: Path) -> None:
    for weights in ("plain", "mxfp8", "int8-convrot"):
        assert choose("auto", -1, weights) == "weight-only"


@pytest.mark.parametrize(
    ("capability", "kernels", "mode"),
    [
        *(((8, 6), False, "int8"), ((8, 9), True, "int8"), ((9, 0), True, "int8")),
        *(((9, 0), False, "fp8"), ((12, 0), True, "fp8")),
    ],
)
def test_auto_on_a_gpu(
    capability: tuple[int, int], kernels: bool, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the device has no mode `mxfp8`."""
    monkeypatch.setattr(devices, "capability", lambda _: capability)
    monkeypatch.setattr(devices, "has_kernels", lambda _: kernels)
    monkeypatch.setattr(
        compute_module, "unsupported", lambda mode, _: {"mxfp8": "no"}.get(mode, "")
    )
    for weights, wanted in (("plain", "weight-only"), ("mxfp8", mode), ("int8-convrot", "int8")):
        assert choose("auto", 0, weights) == wanted
    in_place = "fp8" if mode == "int8" else mode
    assert choose("auto", 0, "mxfp8", IN_PLACE_MODES) == in_place


@pytest.mark.parametrize("compute", COMPUTE_MODES)
def test_modes_of_plain_checkpoints(compute: str, folder: Path) -> None:
    if compute == "weight-only":
        assert float32(folder, compute).compute == "weight-only"
        return
    with pytest.raises(zm.UsageError, match=f"^compute {compute} .*not quantised; convert"):
        float32(folder, compute)


def test_native_mxfp8_needs_its_device(quantized: Path) -> None:
    assert unsupported("mxfp8", -1)
    with pytest.raises(
        zm.UnsupportedError, match=r"compute mode mxfp8: .*the CPU has fp8, weight-only, int8, mx"
    ):
        float32(quantized, "mxfp8")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"path": None}, "path must be the path of a file or folder, not None"),
        ({"path": 3}, "path must be the path of a file or folder, not 3"),
        (
            {"path": b"model.safetensors"},
            "path must be the path of a file or folder, not b'model.safetensors'",
        ),
        (
            {"compute": "fp4"},
            "compute must be auto, mxfp8, fp8, weight-only, int8, mxfp8-emulated, not 'fp4'",
        ),
        ({"compute": None}, "compute must be auto, .*, not None"),
        ({"compute": ["weight-only"]}, r"compute must be auto, .*, not \['weight-only'\]"),
        ({"dtype": torch.float64}, "float16 or float32, not torch.float64"),
        ({"dtype": "half"}, "dtype must be bfloat16, float16 or float32, not 'half'"),
        ({"dtype": torch.zeros(2)}, r"dtype must be .*, not tensor\(\[0., 0.\]\)"),
        ({"dtype": np.zeros(2)}, r"dtype must be .*, not array\(\[0., 0.\]\)"),
        ({"device": "tpu"}, "device must be"),
        ({"device": "mps"}, "device must be"),
        ({"device": "cpu:1"}, "device must be"),
    ],
)
def test_options_that_do_not_exist(
    arguments: dict[str, object], sentence: str, quantized: Path
) -> None:
    with pytest.raises(zm.UsageError, match=sentence):
        zm.ZImageTransformer.from_checkpoint(**({"path": quantized} | arguments))


@pytest.mark.parametrize("device", ["cpu:0", torch.device("cpu", 0)], ids=repr)
def test_the_cpu_may_have_a_number(device: str | torch.device, quantized: Path) -> None:
    model = zm.ZImageTransformer.from_checkpoint(quantized, device)
    assert model.device == torch.device("cpu")
    x, t, cap_feats = random_inputs(*BATCHES["one image"])
    found = model([x[0].to(device)], t.to(device), [cap_feats[0].to(device)]).sample[0]
    want = zm.ZImageTransformer.from_checkpoint(quantized, "cpu")(x, t, cap_feats).sample[0]
    assert torch.equal(found, want)


# ---- Checkpoints that cannot be run


def other_format(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    name = "layers.0.attention.out.comfy_quant"
    marker = json.loads(bytes(tensors[name].tolist()))
    marker["format"] = "nvfp4"
    tensors[name] = torch.tensor(list(json.dumps(marker).encode()), dtype=torch.uint8)
    metadata.pop("_quantization_metadata")


def contradiction(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    header = metadata.copy()
    other_format(tensors, metadata)
    metadata.update(header)


def other_shape(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    tensors["layers.1.ffn_norm1.weight"] = torch.ones(7)


BROKEN = {
    "lacks a norm": (
        lambda t, m: t.pop("layers.1.attention.q_norm.weight"),
        r'"layers.1.attention.q_norm.weight" is missing',
    ),
    "lacks a scale": (
        lambda t, m: t.pop("layers.0.feed_forward.w1.weight_scale"),
        r'"layers.0.feed_forward.w1.weight_scale" is missing',
    ),
    "lacks a description": (
        lambda t, m: (t.pop("layers.0.feed_forward.w1.comfy_quant"), m.clear()),
        r'"layers.0.feed_forward.w1.comfy_quant" is missing.*noise',
    ),
    "another format": (other_format, r"quantised already \(MXFP8 and other formats"),
    "marker and header contradict each other": (
        contradiction,
        r'"_quantization_metadata" disagrees about layer "layers.0.attention.out"',
    ),
    "another shape": (other_shape, r'"layers.1.ffn_norm1.weight" is \[7\], not \[256\]'),
    "not Z-Image": (
        lambda t, m: (t.clear(), t.update(a=torch.ones(2)), m.clear()),
        'is not a Z-Image checkpoint .its first tensor is "a"',
    ),
    "lacks its signature": (
        lambda t, m: t.pop("cap_pad_token"),
        'is not a whole Z-Image transformer: "cap_pad_token" is missing',
    ),
    "lacks a tensor by which ComfyUI recognises it": (
        lambda t, m: t.pop("noise_refiner.0.attention.k_norm.weight"),
        r'"noise_refiner.0.attention.k_norm.weight" is missing; download',
    ),
    "a bias": (
        lambda t, m: t.update({"layers.0.attention.qkv.bias": torch.ones(768)}),
        r'"layers.0.attention.qkv.bias" is not part of a Z-Image transformer.*merge adapters',
    ),
    "a stray block": (
        lambda t, m: t.update({"layers.x.attention_norm1.weight": torch.ones(256)}),
        r'"layers.x.attention_norm1.weight" is not part of|"layers.2',
    ),
    "one wrong width among others": (
        lambda t, m: t.update({"layers.29.feed_forward.w1.weight": torch.ones(7, 256)}),
        "layers.29|layers.2",
    ),
    "integers": (
        lambda t, m: t.update({"x_pad_token": torch.ones(1, 256, dtype=torch.int8)}),
        '"x_pad_token" is I8, which this package cannot run',
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_checkpoints_are_named(
    what: str, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit, sentence = BROKEN[what]
    file = change(quantized, tmp_path / "broken.safetensors", edit)
    # Nothing is loaded before the checks are done.
    monkeypatch.setattr("zimage_mxfp8.transformer.model.load_parts", lambda *a: pytest.fail("late"))
    with pytest.raises(zm.CheckpointError, match=sentence):
        zm.ZImageTransformer.from_checkpoint(file, "cpu")


@pytest.mark.parametrize("part", ["weight", "weight_scale"])
def test_only_modes_that_encode_look_for_nan(part: str, quantized: Path, tmp_path: Path) -> None:
    def damage(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        tensors[f"layers.1.attention.out.{part}"].view(torch.uint8)[3, 5] = 255  # NaN in both types

    file = change(quantized, tmp_path / "damaged.safetensors", damage)
    float32(file, "weight-only")
    for mode in ("fp8", "int8"):
        sentence = r'layer "layers.1.attention.out" is damaged.*NaN'
        with pytest.raises(zm.CheckpointError, match=sentence):
            float32(file, mode)


def test_a_width_without_whole_heads(small_file: Path) -> None:
    with pytest.raises(zm.CheckpointError, match=r'"cap_embedder.1.weight" is .* multiple of 128'):
        zm.ZImageTransformer.from_checkpoint(small_file, "cpu")


# ---- Arguments of forward


@pytest.fixture(scope="module")
def model(quantized: Path) -> zm.ZImageTransformer:
    return zm.ZImageTransformer.from_checkpoint(quantized, "cpu")


IMAGE, TIME, WORDS = torch.zeros(16, 1, 4, 4), torch.zeros(1), torch.zeros(3, CAPTION)


@pytest.mark.parametrize(
    ("x", "t", "cap_feats", "sentence"),
    [
        (IMAGE, TIME, [WORDS], "x must be a list"),
        ([], TIME, [], "x must be a list"),
        ([IMAGE[:4]], TIME, [WORDS], r"x\[0\] must be \[16, 1, H, W\].* not \[4, 1, 4, 4\]"),
        ([IMAGE[..., :3]], TIME, [WORDS], r"x\[0\] must be .* even, not \[16, 1, 4, 3\]"),
        ([IMAGE[:, 0]], TIME, [WORDS], r"x\[0\] must be"),
        ([IMAGE.numpy()], TIME, [WORDS], r"x\[0\] must be a torch tensor"),
        ([IMAGE.int()], TIME, [WORDS], r"x\[0\] must be floating-point"),
        ([[IMAGE]], TIME, [WORDS], r"x\[0\] must be a torch tensor, not list"),
        ([IMAGE], TIME, [WORDS, WORDS], "cap_feats must be a list of 1"),
        ([IMAGE], TIME, [WORDS[:0]], r"cap_feats\[0\] must be \[tokens, 96\] with one token"),
        ([IMAGE], TIME, [WORDS[:, :5]], r"cap_feats\[0\] must be .* not \[3, 5\]"),
        ([IMAGE], torch.zeros(2), [WORDS], r"t must be a tensor \[1\]"),
        ([IMAGE], 0.5, [WORDS], r"t must be a tensor \[1\], a time per image, not float"),
        ([IMAGE], TIME.to("meta"), [WORDS], "t must be a dense tensor on cpu"),
        ([IMAGE.to_sparse()], TIME, [WORDS], r"x\[0\] must be a dense tensor"),
        ([IMAGE.to("meta")], TIME, [WORDS], r"x\[0\] is on meta, but the model is on cpu"),
    ],
)
def test_arguments_are_named(
    x: object, t: object, cap_feats: object, sentence: str, model: zm.ZImageTransformer
) -> None:
    with pytest.raises(zm.InvalidArgumentError, match=sentence):
        model(x, t, cap_feats)


# An image of so many frames, height and width, and tokens of its caption: the last that has
# positions, and the first that has not.
LIMITS = {
    "height": (((1, 1024, 2), 5), ((1, 1026, 2), 5), r"x\[0\] must have H and W of 1024 at most"),
    "width": (((1, 2, 1024), 5), ((1, 2, 1026), 5), r"x\[0\] must .* not \[16, 1, 2, 1026\]"),
    "caption": (
        ((1, 2, 2), 1504),
        ((1, 2, 2), 1505),
        r"cap_feats\[0\] must have 1504 tokens at most, .* with 1 frame of x\[0\], not 1505",
    ),
    "caption beside frames": (
        ((63, 2, 2), 1472),
        ((63, 2, 2), 1473),
        r"cap_feats\[0\] must have 1472 tokens at most, .* with 63 frames of x\[0\], not 1473",
    ),
    "frames": (((1503, 2, 2), 1), ((1504, 2, 2), 1), r"cap_feats\[0\] must have 0 tokens at most"),
}


@pytest.mark.parametrize("limit", LIMITS)
def test_positions_end_where_those_of_diffusers_end(limit: str, tmp_path: Path) -> None:
    last, first_beyond, sentence = LIMITS[limit]
    reference = make_reference(128, 0, 1)
    reference.save_pretrained(tmp_path)
    model = float32(tmp_path)

    def inputs(size: tuple[int, int, int], tokens: int):
        _, t, cap_feats = random_inputs([(2, 2)], [tokens])
        return [torch.randn(16, *size, generator=torch.Generator().manual_seed(0))], t, cap_feats

    want = reference(*inputs(*last), return_dict=False)[0]
    assert relative_error(model(*inputs(*last)).sample, want) < FLOAT32
    with pytest.raises(IndexError):
        reference(*inputs(*first_beyond))
    with pytest.raises(zm.InvalidArgumentError, match=sentence):
        model(*inputs(*first_beyond))


def test_what_diffusers_has_and_this_has_not(model: zm.ZImageTransformer) -> None:
    inputs = ([IMAGE], TIME, [WORDS])
    model(*inputs, joint_attention_kwargs=None, patch_size=2, controlnet_block_samples=None)
    with pytest.raises(zm.InvalidArgumentError, match="siglip_feats is not supported"):
        model(*inputs, siglip_feats=IMAGE)
    with pytest.raises(zm.InvalidArgumentError, match="controlnet_block_samples is not supported"):
        model(*inputs, controlnet_block_samples={0: IMAGE})


def test_features_of_diffusers_say_what_to_do_instead(model: zm.ZImageTransformer) -> None:
    from diffusers.models.attention import AttentionMixin
    from diffusers.models.cache_utils import CacheMixin

    mixins = {AttentionMixin: "leave", CacheMixin: "leave"}
    features = {
        name: advice
        for mixin, advice in mixins.items()
        for name in vars(mixin)
        if not name.startswith("_")
    }
    features |= {
        "add_adapter": "loaded with load_lora",
        "save_lora_adapter": "loaded with load_lora",
        "save_pretrained": "set its transformer to None",
        "push_to_hub": "set its transformer to None",
        "enable_gradient_checkpointing": "train diffusers' model",
        "enable_layerwise_casting": "convert the checkpoint",
        "set_attention_backend": "leave the call out",
        "enable_xformers_memory_efficient_attention": "leave the call out",
        "enable_group_offload": "enable_model_cpu_offload",
        "compile_repeated_blocks": "leave the call out",
    }
    assert {"enable_cache", "set_attn_processor"} <= set(features)
    for name, advice in features.items():
        assert not hasattr(model, name)  # how diffusers asks
        with pytest.raises(zm.MissingFeatureError, match=f"^the transformer has no {name}: ") as e:
            getattr(model, name)
        assert advice in str(e.value)
    with pytest.raises(AttributeError, match="has no attribute 'colour'") as e:
        model.colour  # noqa: B018
    assert not isinstance(e.value, zm.Error)


def test_weights_that_are_loaded_in_inference_mode_are_ordinary(quantized: Path) -> None:
    """So that threads can write them, and programs change them afterwards."""
    with torch.inference_mode():
        models = [
            zm.ZImageTransformer.from_checkpoint(quantized, "cpu", compute)
            for compute in ("weight-only", "fp8", "int8")
        ]
    for model in models:
        tensors = [*model.parameters(), *model.buffers()]
        assert tensors and not any(tensor.is_inference() for tensor in tensors)
