"""MXFP8 files that ComfyUI, comfy-kitchen and others write, under any prefix; NaN; provenance."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import zimage_mxfp8 as zm
from helpers.checkpoints import Tensors, change, random_tensors, small_shapes, to_diffusers
from zimage_mxfp8.cli.main import main
from zimage_mxfp8.zimage.layers import zimage_shapes

HEADER = "_quantization_metadata"
PREFIXES = (
    "",
    "model.diffusion_model.",
    "model.",
    "net.",
    "diffusion_model.",
    "transformer.",
    "pipe.dit.",
)


@pytest.fixture(scope="module")
def model() -> Tensors:
    """A model whose feed-forward width, 341, is no multiple of 32, as Z-Image's rule gives it."""
    shapes = zimage_shapes(dim=128, layers=2, caption_dim=48)
    assert shapes["layers.0.feed_forward.w1.weight"] == (341, 128)
    return random_tensors(shapes)


def quantised_by_comfy_kitchen(model: Tensors) -> tuple[Tensors, list[str]]:
    """Tensors as ComfyUI saves them, without markers, and the names of the layers."""
    tensors, layers = {}, []
    for name, tensor in model.items():
        in_block = name.split(".")[0] in ("layers", "noise_refiner", "context_refiner")
        if in_block and tensor.dim() == 2 and "adaLN" not in name:
            encoded = QuantizedTensor.from_float(tensor, "TensorCoreMXFP8Layout")
            tensors |= {n: t.contiguous() for n, t in encoded.state_dict(name).items()}
            layers.append(name.removesuffix(".weight"))
        else:
            tensors[name] = tensor
    return tensors, layers


def as_bytes(tensors: Tensors) -> Tensors:
    """F8_E8M0 scales as U8."""
    return {
        n: t.view(torch.uint8) if t.dtype == torch.float8_e8m0fnu else t for n, t in tensors.items()
    }


def marker(**more: object) -> torch.Tensor:
    return torch.tensor(list(json.dumps({"format": "mxfp8"} | more).encode()), dtype=torch.uint8)


def header(layers: list[str]) -> dict[str, str]:
    return {HEADER: json.dumps({"layers": {layer: {"format": "mxfp8"} for layer in layers}})}


def write(path: Path, model: Tensors, how: str, prefix: str = "") -> Path:
    tensors, layers = quantised_by_comfy_kitchen(model)
    if "U8" in how:
        tensors = as_bytes(tensors)
    if "markers" in how:
        full = {"full_precision_matrix_mult": True} if "full precision" in how else {}
        tensors |= {f"{layer}.comfy_quant": marker(**full) for layer in layers}
    tensors = {prefix + name: tensor for name, tensor in tensors.items()}
    named = layers if "short names" in how else [prefix + layer for layer in layers]
    save_file(tensors, path, header(named) if "header" in how else None)
    return path


def decoded(model: Tensors) -> Tensors:
    """What comfy-kitchen decodes the model's layers to."""
    plain = {}
    for name, tensor in model.items():
        in_block = name.split(".")[0] in ("layers", "noise_refiner", "context_refiner")
        if in_block and tensor.dim() == 2 and "adaLN" not in name:
            plain[name] = QuantizedTensor.from_float(tensor, "TensorCoreMXFP8Layout").dequantize()
        else:
            plain[name] = tensor
    return plain


@pytest.mark.peer
@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize(
    "how",
    [
        "markers, E8M0",
        "header, U8",
        "header with short names, E8M0",
        "markers and header, U8",
        "markers with full precision, U8",
    ],
)
def test_files_of_other_writers(how: str, prefix: str, model: Tensors, tmp_path: Path) -> None:
    path = write(tmp_path / "in.safetensors", model, how, prefix)
    report = zm.validate(path)
    assert report.ok and report.layers == 30, [str(b) for b in report.breaches]
    assert any("without orig_shape" in note for note in report.notes)
    assert any("F8_E8M0" in note for note in report.notes) == ("E8M0" in how)
    found = zm.inspect(path)
    assert found.quantization == "MXFP8" and found.breaches == []
    assert found.kind == "Z-Image, ComfyUI layout" + (f', prefix "{prefix}"' if prefix else "")
    zm.dequantize_checkpoint(path, tmp_path / "out.safetensors")
    plain = load_file(tmp_path / "out.safetensors")
    for name, want in decoded(model).items():
        assert torch.equal(plain[prefix + name], want), name
    assert plain.keys() == {prefix + name for name in model}
    loaded = zm.ZImageTransformer.from_checkpoint(path, "cpu", dtype=torch.float32)
    original = zm.ZImageTransformer.from_checkpoint(
        tmp_path / "out.safetensors", "cpu", dtype=torch.float32
    )
    x, t = torch.randn(16, 1, 8, 8), torch.tensor([0.5])
    caption = torch.randn(9, 48)
    want = original([x], t, [caption]).sample[0]
    assert torch.allclose(loaded([x], t, [caption]).sample[0], want, atol=1e-5, rtol=1e-5)


def test_full_precision_layers_take_exact_activations(model: Tensors, tmp_path: Path) -> None:
    """What ComfyUI multiplies in full precision is exact in the mode that computes as Blackwell."""
    outputs = {}
    for how in ("markers, U8", "markers with full precision, U8"):
        path = write(tmp_path / "in.safetensors", model, how)
        for mode in ("mxfp8-emulated", "weight-only"):
            loaded = zm.ZImageTransformer.from_checkpoint(path, "cpu", mode, torch.float32)
            torch.manual_seed(0)
            x, caption = torch.randn(16, 1, 8, 8), torch.randn(9, 48)
            outputs[how, mode] = loaded([x], torch.tensor([0.5]), [caption]).sample[0]
    plain, full = "markers, U8", "markers with full precision, U8"
    assert torch.equal(outputs[full, "mxfp8-emulated"], outputs[full, "weight-only"])
    assert not torch.equal(outputs[plain, "mxfp8-emulated"], outputs[plain, "weight-only"])


def test_a_marker_that_cannot_be_read_is_named(model: Tensors, tmp_path: Path) -> None:
    path = write(tmp_path / "in.safetensors", model, "markers, U8")
    tensors = load_file(path)
    name = "layers.0.attention.out.comfy_quant"
    tensors[name] = torch.zeros(9, dtype=torch.uint8)
    save_file(tensors, path)
    (breach,) = zm.validate(path).breaches
    assert breach.tensor == name and breach.problem == "is not JSON"
    with pytest.raises(zm.CheckpointError, match=f'"{name}" is not JSON'):
        zm.ZImageTransformer.from_checkpoint(path, "cpu")
    with pytest.raises(zm.CheckpointError, match=f'"{name}" is not JSON'):
        zm.dequantize_checkpoint(path, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


# ---- what convert makes of prefixes, layouts and further models


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("layout", ["ComfyUI", "diffusers"])
def test_prefixes_are_recognised_and_kept(
    prefix: str, layout: str, model: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    tensors = to_diffusers(model) if layout == "diffusers" else model
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, source)
    assert main(["convert", "-i", str(source), "-o", str(output)]) == 0
    told = capsys.readouterr().err
    assert (f'"{prefix}"' in told) == bool(prefix)
    assert ("will not load" in told) == (prefix in PREFIXES[4:])
    save_file(model, source)
    zm.convert(source, tmp_path / "plain.safetensors")
    found, want = load_file(output), load_file(tmp_path / "plain.safetensors")
    assert found.keys() == {prefix + name for name in want}
    for name, tensor in want.items():
        assert torch.equal(found[prefix + name].view(torch.uint8), tensor.view(torch.uint8)), name
    with safe_open(output, "pt") as file:
        metadata = file.metadata()
    # With a prefix ComfyUI warns of layers that the header names; markers are enough for it.
    assert (HEADER in metadata) == (prefix == "")
    assert zm.validate(output).ok
    zm.ZImageTransformer.from_checkpoint(output, "cpu")


def test_only_the_transformer_is_quantised(model: Tensors, tmp_path: Path) -> None:
    others = {
        "text_encoders.qwen3_4b.transformer.model.layers.0.mlp.up_proj.weight": torch.randn(
            128, 64
        ),
        "vae.encoder.quant.weight": torch.randn(8, 8).half(),
        "vision_tower.blocks.0.weight": torch.randn(32, 32).to(torch.float8_e4m3fn),
        "control_layers.0.attention.to_q.weight": torch.randn(64, 64).bfloat16(),
        "model_ema.num_updates": torch.tensor([7]),
        "embed_tokens.weight": torch.randn(64, 64),
    }
    others |= {f"ema.{name}": tensor.clone() for name, tensor in model.items()}
    source, output = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file(model | others, source)
    report = zm.convert(source, output)
    found = load_file(output)
    for name, tensor in others.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert f"{len(others)} tensors outside the transformer copied unchanged" in report.notes[0]
    assert report.notes[1] == 'the copy of the transformer under "ema." is not quantised'
    assert zm.validate(output, source).ok
    zm.ZImageTransformer.from_checkpoint(output, "cpu")


def test_averaged_weights_are_not_taken_for_the_model(model: Tensors, tmp_path: Path) -> None:
    save_file(
        {
            f"{p}{n}": t.clone()
            for n, t in model.items()
            for p in ("ema_model.", "transformer_weights.")
        },
        tmp_path / "in.safetensors",
    )
    assert 'prefix "transformer_weights."' in zm.inspect(tmp_path / "in.safetensors").kind


def test_pad_tokens_of_one_dimension(model: Tensors, tmp_path: Path) -> None:
    flat = model | {name: model[name].reshape(-1) for name in ("x_pad_token", "cap_pad_token")}
    source, output = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file(flat, source)
    zm.convert(source, output)
    assert load_file(output)["x_pad_token"].shape == (1, 128), "as ComfyUI and diffusers have it"
    assert zm.validate(output, source).ok
    for path in (source, output):
        zm.ZImageTransformer.from_checkpoint(path, "cpu")


def test_tensors_that_the_model_does_not_use(model: Tensors, tmp_path: Path) -> None:
    extra = {
        "norm_final.weight": torch.ones(128),
        "steps": torch.tensor([3], dtype=torch.int64),
        "flags": torch.tensor([True]),
        "siglip_embedder.1.weight": torch.randn(128, 8).to(torch.float8_e5m2),
        "layers.0.attention.counter": torch.tensor(3, dtype=torch.int16),
    }
    save_file(model | extra, tmp_path / "in.safetensors")
    zm.ZImageTransformer.from_checkpoint(tmp_path / "in.safetensors", "cpu")


def test_metadata_null(model: Tensors, tmp_path: Path) -> None:
    path = tmp_path / "in.safetensors"
    save_file(model, path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    text = json.dumps({"__metadata__": None} | json.loads(content[8 : 8 + length])).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    assert load_file(path).keys() == model.keys(), "the library reads it"
    zm.convert(path, tmp_path / "out.safetensors")


def test_index_with_a_relative_shard(model: Tensors, tmp_path: Path) -> None:
    folder = tmp_path / "m" / "transformer"
    folder.mkdir(parents=True)
    save_file(model, folder / "s.safetensors")
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(model, "./s.safetensors")}))
    assert zm.convert(tmp_path / "m", tmp_path / "o.safetensors").quantized > 20


# ---- NaN and infinities in what is kept


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("name", "position"),
    [
        ("x_pad_token", "row 0, column 3"),
        ("layers.0.attention_norm1.weight", "row 0, column 3"),
        ("x_embedder.weight", "row 0, column 3"),
        ("layers.0.adaLN_modulation.0.bias", "row 0, column 3"),
        ("layers.0.feed_forward.w2.weight", "row 0, column 3"),
    ],
)
@pytest.mark.parametrize("recipe", ["uniform", "zimage"])
def test_nonfinite_values_anywhere(
    name: str,
    position: str,
    dtype: torch.dtype,
    value: float,
    recipe: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tensors = random_tensors(small_shapes(1), dtype)
    tensors[name].view(-1)[3] = value
    source, output = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file(tensors, source)
    command = ["convert", "-i", str(source), "-o", str(output), "--recipe", recipe]
    assert main(command) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert f'tensor "{name}" has NaN or Inf at {position}; --nonfinite keep' in error
    assert not output.exists()
    assert main([*command, "--nonfinite", "keep"]) == 0
    assert f'"{name}" has NaN or Inf and is kept' in capsys.readouterr().err
    report = zm.validate(output)
    assert [(b.tensor, "has NaN or Inf" in b.problem) for b in report.breaches] == [(name, True)]


def test_nonfinite_values_of_other_models_are_a_note(model: Tensors, tmp_path: Path) -> None:
    mask = torch.full((4, 4), float("-inf"))
    source, output = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file(model | {"text_encoder.causal_mask": mask}, source)
    zm.convert(source, output)
    report = zm.validate(output)
    assert report.ok
    assert '"text_encoder.causal_mask", outside the transformer, has NaN or Inf' in report.notes


def test_biases_at_the_end_of_the_range_keep_their_value(tmp_path: Path) -> None:
    tensors = random_tensors(small_shapes(1), torch.float32)
    name = "layers.0.adaLN_modulation.0.bias"
    tensors[name][0] = torch.finfo(torch.float32).max
    tensors["layers.0.adaLN_modulation.0.weight"] *= 1e34
    tensors["t_embedder.mlp.2.bias"] *= 1e8
    save_file(tensors, tmp_path / "in.safetensors")
    zm.convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors")  # without a warning
    assert torch.isfinite(load_file(tmp_path / "out.safetensors")[name]).all()


# ---- what a file says of its origin


def origin(path: Path) -> dict[str, object] | None:
    return zm.inspect(path).provenance


def test_provenance(model: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = tmp_path / "secret.safetensors", tmp_path / "out.safetensors"
    save_file(model, source)
    report = zm.convert(source, output)
    assert report.quantized
    made = {
        "version": zm.__version__,
        "recipe": "uniform",
        "bias_correction": "timesteps",
        "timesteps": "turbo",
    }
    assert origin(output) == made
    assert b"secret" not in output.read_bytes()
    assert main(["inspect", str(output)]) == 0
    assert "converted by zimage-mxfp8" in capsys.readouterr().out
    options = ["--exclude-layers", "w2", "--timesteps", "20", "--modulation-matmul", "full"]
    command = ["convert", "-i", str(source), "-o", str(output), "--overwrite", *options]
    assert main([*command, "--hash-source"]) == 0
    assert origin(output) == made | {
        "exclude_layers": ["w2"],
        "timesteps": 20,
        "modulation_matmul": "full",
        "source_sha256": [hashlib.sha256(source.read_bytes()).hexdigest()],
    }
    plan = zm.plan_conversion(
        source,
        zm.ConversionOptions(
            exclude_layers=["w2"], timesteps=20, modulation_matmul="full", hash_source=True
        ),
    )
    assert plan.size == output.stat().st_size, "the dry run's size is exact"
    assert zm.validate(output, source).ok
    zm.dequantize_checkpoint(output, tmp_path / "plain.safetensors")
    assert origin(tmp_path / "plain.safetensors") is None


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "3", "null"])
def test_provenance_that_is_none(text: str, model: Tensors, tmp_path: Path) -> None:
    save_file(model, tmp_path / "in.safetensors", {"zimage_mxfp8": text})
    assert origin(tmp_path / "in.safetensors") is None


def test_provenance_of_other_types_is_left_out(model: Tensors, tmp_path: Path) -> None:
    source, output = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file(model, source)
    zm.convert(source, output)
    odd = {"version": [1], "recipe": {}, "exclude_layers": [{}], "loras": [{"sha256": 3}], "x": 1}

    def edit(_: Tensors, metadata: dict[str, str]) -> None:
        metadata["zimage_mxfp8"] = json.dumps(odd)

    file = change(output, tmp_path / "odd.safetensors", edit)
    assert origin(file) == {"x": 1} and "x 1" in str(zm.inspect(file))
    assert zm.validate(file, source).ok


def test_no_provenance_where_convert_to_quant_is_reproduced(
    model: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file(model, source)
    command = ["convert", "-i", str(source), "-o", str(output), "--zimage", "--simple"]
    assert main(command) == 0
    assert origin(output) is None
    for option in (["--hash-source"], ["--modulation-matmul", "full"]):
        capsys.readouterr()
        assert main([*command, "--overwrite", *option]) == 2
        assert f"{option[0]} changes the file" in capsys.readouterr().err


def test_recipe_files_are_not_named(model: Tensors, tmp_path: Path) -> None:
    recipe = tmp_path / "private.toml"
    recipe.write_text('extends = "uniform"\n')
    save_file(model, tmp_path / "in.safetensors")
    zm.convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors", recipe=recipe)
    made = origin(tmp_path / "out.safetensors")
    assert made is not None and made["recipe"] == "custom"


def test_full_precision_modulations(model: Tensors, tmp_path: Path) -> None:
    source, output = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file(model, source)
    zm.convert(source, output, modulation_matmul="full")
    found = load_file(output)
    full = {
        name.removesuffix(".comfy_quant")
        for name, tensor in found.items()
        if name.endswith(".comfy_quant")
        and json.loads(bytes(tensor.tolist())).get("full_precision_matrix_mult") is True
    }
    quantised = {n.removesuffix(".comfy_quant") for n in found if n.endswith(".comfy_quant")}
    assert full == {n for n in quantised if n.endswith("adaLN_modulation.0")} and full
    assert zm.validate(output, source).ok
