"""Conversion: equality with convert_to_quant, inputs of every kind, and the shape of the output."""

from __future__ import annotations

import json
import threading
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import zimage_mxfp8 as zm
from helpers.checkpoints import (
    PREFIX,
    Tensors,
    metadata_of,
    random_tensors,
    sha256,
    small_shapes,
    tensor_bytes,
    to_diffusers,
    write_shards,
)
from helpers.commands import Run
from helpers.convert_to_quant import CARD_EXCLUSIONS, card_command, run_convert_to_quant
from helpers.peak_memory import peak_memory, write_zeros
from zimage_mxfp8 import _core
from zimage_mxfp8.conversion.options import ConversionKeywords
from zimage_mxfp8.zimage.layers import zimage_shapes

# ---- the peer


@pytest.mark.peer
@pytest.mark.parametrize(
    ("dtype", "prefix", "layers"),
    [
        (torch.bfloat16, "", 30),
        (torch.bfloat16, PREFIX, 3),
        (torch.float16, "", 3),
        (torch.float32, PREFIX, 3),
    ],
)
def test_drop_in_equals_convert_to_quant_byte_for_byte(
    in_process: Run, tmp_path: Path, dtype: torch.dtype, prefix: str, layers: int
) -> None:
    tensors = random_tensors(small_shapes(layers), dtype)
    source, ours, peers = (tmp_path / f"{n}.safetensors" for n in ("in", "ours", "peers"))
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, source)
    run_convert_to_quant(card_command(source, peers))
    result = in_process("convert", *card_command(source, ours))
    assert result.returncode == 0, result.stderr
    assert sha256(ours) == sha256(peers)
    assert load_file(peers)[f"{prefix}layers.0.feed_forward.w2.weight"].shape == (64, 96)


@pytest.mark.peer
def test_drop_in_refiner_filter_equals_convert_to_quant(in_process: Run, tmp_path: Path) -> None:
    source, ours, peers = (tmp_path / f"{n}.safetensors" for n in ("in", "ours", "peers"))
    save_file(random_tensors(small_shapes(2)), source)
    run_convert_to_quant(card_command(source, peers, "--zimage_refiner"))
    assert in_process("convert", *card_command(source, ours, "--zimage-refiner")).returncode == 0
    assert sha256(ours) == sha256(peers)


@pytest.mark.peer
def test_uniform_recipe_equals_convert_to_quant_but_for_biases(
    small_file: Path, tmp_path: Path
) -> None:
    """The peer without its filter, given the recipe as exclusions: the same layers and bytes."""
    ours, peers = tmp_path / "ours.safetensors", tmp_path / "peers.safetensors"
    zm.convert(small_file, ours)
    keep = CARD_EXCLUSIONS + "|x_embedder|cap_embedder|t_embedder|final_layer"
    run_convert_to_quant(
        ["-i", str(small_file), "-o", str(peers), "--mxfp8", "--simple", "--calib-samples", "8"]
        + ["--exclude-layers", keep, "--manual_seed", "42"]
    )
    found, want = load_file(ours), load_file(peers)
    assert found.keys() == want.keys()
    corrected = {n.replace("comfy_quant", "bias") for n in found if n.endswith("comfy_quant")}
    for name in want:
        if name not in corrected:
            assert tensor_bytes(found[name]) == tensor_bytes(want[name]), name
    metadata = metadata_of(ours)
    assert json.loads(metadata.pop("zimage_mxfp8"))["recipe"] == "uniform"
    assert metadata == metadata_of(peers)


# ---- recipes on the full model


@pytest.fixture(scope="module")
def full_size_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real model's header over a sparse file: enough for planning, no space on the disk."""
    path = tmp_path_factory.mktemp("full") / "full.safetensors"
    write_zeros(path, zimage_shapes())
    return path


def test_full_model_counts(full_size_file: Path) -> None:
    plan = zm.plan_conversion(full_size_file)
    assert len(plan.tensors) == 453
    assert plan.checkpoint.nbytes == 12_309_817_472
    assert len(plan.quantized) == 185
    markers = sum(i.nbytes for n, i in plan.places.items() if n.endswith(".comfy_quant"))
    assert plan.size - len(plan.header) - markers == 6_671_130_752
    assert not plan.warnings


def test_full_model_with_the_peers_filter(full_size_file: Path) -> None:
    plan = zm.plan_conversion(
        full_size_file, zm.ConversionOptions(recipe="zimage", exclude_layers=[CARD_EXCLUSIONS])
    )
    assert len(plan.quantized) == 161
    assert round((plan.size - len(plan.header)) / 2**30, 3) == 6.298
    assert not plan.warnings


def test_dry_run_tells_the_exact_size(in_process: Run, small_file: Path, tmp_path: Path) -> None:
    planned = json.loads(in_process("convert", "-i", small_file, "--dry-run", "--json").stdout)
    assert not list(tmp_path.iterdir()), "a dry run writes nothing"
    zm.convert(small_file, tmp_path / "out.safetensors")
    assert planned["file_bytes"] == (tmp_path / "out.safetensors").stat().st_size
    assert planned["quantized"] == 185
    kinds = {tensor["becomes"] for tensor in planned["tensors"].values()}
    assert kinds == {"MXFP8", "BF16"}
    text = in_process("convert", "-i", small_file, "--dry-run").stdout
    assert f"exactly {planned['file_bytes']:,} bytes" in text
    assert "layers feed_forward.w1" in text


# ---- inputs


def test_diffusers_names_are_those_of_diffusers() -> None:
    from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel

    shapes = zimage_shapes(dim=256, layers=2, refiner_layers=1, caption_dim=48)
    model = ZImageTransformer2DModel(
        dim=256, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=48
    )
    names = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    ours = to_diffusers({n: torch.zeros(s) for n, s in shapes.items()})
    assert {name: tuple(value.shape) for name, value in ours.items()} == names


@pytest.mark.parametrize("form", ["pipeline folder", "transformer folder", "one file", "no shards"])
def test_diffusers_checkpoints_become_the_single_file(
    small_model: Tensors, small_file: Path, tmp_path: Path, form: str
) -> None:
    tensors = to_diffusers(small_model)
    source = tmp_path / "Z-Image"
    if form == "pipeline folder":
        write_shards(source / "transformer", tensors)
    elif form == "transformer folder":
        write_shards(source, tensors)
    elif form == "no shards":
        source.mkdir()
        save_file(tensors, source / "diffusion_pytorch_model.safetensors")
    else:
        source = tmp_path / "Z-Image.safetensors"
        save_file(tensors, source)
    output, want = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    zm.convert(source, output)
    zm.convert(small_file, want)
    found, expected = load_file(output), load_file(want)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor_bytes(found[name]) == tensor_bytes(tensor), name
    extra = {"format": "pt"} if "folder" in form else {}
    assert metadata_of(output) == metadata_of(want) | extra


def test_all_in_one_file(small_model: Tensors, small_file: Path, tmp_path: Path) -> None:
    others = {
        "text_encoders.qwen3_4b.transformer.model.layers.0.mlp.up_proj.weight": torch.randn(64, 32),
        "text_encoders.qwen3_4b.transformer.fp8.weight": torch.randn(32, 32).to(
            torch.float8_e4m3fn
        ),
        "text_encoders.qwen3_4b.transformer.fp8.weight_scale": torch.tensor(0.5),
        "vae.decoder.conv_in.weight": torch.randn(8, 4, 3, 3).half(),
        "vae.steps": torch.tensor(7),
        "vae.empty": torch.zeros(0, 4),
    }
    encoder_layers = {"text_encoders.qwen3_4b.transformer.fp8": {"format": "float8_e4m3fn"}}
    metadata = {
        "modelspec.title": "Z-Image é",
        "_quantization_metadata": json.dumps({"format_version": "1.0", "layers": encoder_layers}),
    }
    source, output = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file({PREFIX + n: t for n, t in small_model.items()} | others, source, metadata=metadata)
    report = zm.convert(source, output)
    assert report.kept["not part of the transformer"] == len(others)
    found = load_file(output)
    for name, tensor in others.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert tensor_bytes(found[name]) == tensor_bytes(tensor), name
    zm.convert(small_file, tmp_path / "alone.safetensors")
    for name, tensor in load_file(tmp_path / "alone.safetensors").items():
        assert tensor_bytes(found[PREFIX + name]) == tensor_bytes(tensor), name
    written = metadata_of(output)
    assert written["modelspec.title"] == "Z-Image é"
    layers = json.loads(written["_quantization_metadata"])["layers"]
    assert layers == encoder_layers, "with a prefix ComfyUI would warn of the transformer's"
    assert report.notes == [
        'the transformer is under the prefix "model.diffusion_model."',
        "6 tensors outside the transformer copied unchanged: text_encoders (3), vae (3)",
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_wide_sources_are_quantised_directly(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = random_tensors(small_shapes(2), dtype)
    source, output = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file(tensors, source)
    zm.convert(source, output, bias_correction="none")
    found = load_file(output)
    name = "layers.0.feed_forward.w2"
    direct = zm.quantize(tensors[f"{name}.weight"])
    rounded = zm.quantize(tensors[f"{name}.weight"].to(torch.bfloat16))
    codes = tensor_bytes(found[f"{name}.weight"])
    assert codes == tensor_bytes(direct.codes)
    assert codes != tensor_bytes(rounded.codes)
    assert found["x_embedder.weight"].dtype == dtype, "what is kept keeps its type"


def test_output_is_what_the_contract_says(
    small_model: Tensors, small_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.safetensors"
    zm.convert(small_file, output, bias_correction="none")
    found = load_file(output)
    layers = json.loads(metadata_of(output)["_quantization_metadata"])
    assert layers["format_version"] == "1.0"
    assert list(layers["layers"]) == sorted(layers["layers"])
    expected = dict(small_model)
    for layer, described in layers["layers"].items():
        weight = expected.pop(f"{layer}.weight")
        rows, cols = weight.shape
        text = (
            '{"format": "mxfp8", "group_size": 32, "orig_dtype": "torch.bfloat16", '
            f'"orig_shape": [{rows}, {cols}]}}'
        )
        assert tensor_bytes(found.pop(f"{layer}.comfy_quant")).decode() == text
        assert described == json.loads(text)
        encoded = zm.quantize(weight)
        codes, scale = found.pop(f"{layer}.weight"), found.pop(f"{layer}.weight_scale")
        assert codes.dtype == torch.float8_e4m3fn and scale.dtype == torch.uint8
        assert tensor_bytes(codes) == tensor_bytes(encoded.codes)
        assert torch.equal(scale, encoded.scales)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor_bytes(found[name]) == tensor_bytes(tensor), name


def test_file_is_laid_out_as_the_safetensors_library_does(small_file: Path, tmp_path: Path) -> None:
    output, again = tmp_path / "out.safetensors", tmp_path / "again.safetensors"
    zm.convert(
        small_file, output, recipe="zimage"
    )  # one entry of metadata: the library has no order
    save_file(load_file(output), again, metadata=metadata_of(output))
    assert sha256(output) == sha256(again)


def test_same_bytes_whatever_the_threads(tmp_path: Path) -> None:
    # Large enough for several chunks a tensor.
    shapes = small_shapes(2) | {"layers.0.feed_forward.w1.weight": (9000, 2100)}
    source = tmp_path / "in.safetensors"
    save_file(random_tensors(shapes), source)
    results = set()
    for threads in (1, 2, 7, 0):
        output = tmp_path / f"{threads}.safetensors"
        report = zm.convert(
            source,
            output,
            threads=threads,
            error_stats=True,
            any_model=True,
            bias_correction="none",
        )
        document = report.to_dict()
        numbers = json.dumps([document["total"], document["tensors"]])
        results.add((sha256(output), numbers))
    assert len(results) == 1


def test_other_models(tmp_path: Path) -> None:
    tensors = {
        "blocks.0.fc.weight": torch.randn(40, 64).bfloat16(),
        "blocks.0.fc.bias": torch.randn(40).bfloat16(),
        "blocks.1.fc.weight": torch.randn(40, 64).bfloat16(),
        "head.weight": torch.randn(8, 64).bfloat16(),
        "ids.weight": torch.arange(12).reshape(3, 4),
    }
    source, output = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file(tensors, source)
    with pytest.raises(zm.CheckpointError, match=r"is not a Z-Image checkpoint .*`any_model=True`"):
        zm.convert(source, output)
    report = zm.convert(source, output, any_model=True, exclude_layers=[r"^head\.", "nothing"])
    found = load_file(output)
    quantised = {name.removesuffix(".comfy_quant") for name in found if "comfy_quant" in name}
    assert quantised == {"blocks.0.fc", "blocks.1.fc"}
    assert tensor_bytes(found["blocks.0.fc.bias"]) == tensor_bytes(tensors["blocks.0.fc.bias"])
    assert report.warnings == [
        "10 patterns of recipe uniform match nothing in this model",
        'pattern "nothing" matches no tensor',
        "1 bias cannot be corrected, because their layers' inputs do not follow from the "
        'checkpoint ("blocks.0.fc" is one)',
    ]


def test_nonfinite_weights(
    in_process: Run, small_model: Tensors, small_file: Path, tmp_path: Path
) -> None:
    tensors = dict(small_model)
    bad = "layers.3.feed_forward.w2.weight"
    tensors[bad] = tensors[bad].clone()
    tensors[bad][39, 70] = float("nan")
    source, output = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file(tensors, source)
    result = in_process("convert", "-i", source, "-o", output)
    assert result.returncode == 1
    assert f'tensor "{bad}" has NaN or Inf at row 39, column 70' in result.stderr
    assert "--nonfinite keep" in result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.safetensors"]

    result = in_process("convert", "-i", source, "-o", output, "--nonfinite", "keep")
    assert result.returncode == 0 and bad in result.stderr
    found = load_file(output)
    assert found[bad].dtype == torch.bfloat16
    assert tensor_bytes(found[bad]) == tensor_bytes(tensors[bad])
    zm.convert(small_file, tmp_path / "sound.safetensors")
    for name, tensor in load_file(tmp_path / "sound.safetensors").items():
        if not name.startswith(bad.removesuffix("weight")):
            assert tensor_bytes(found[name]) == tensor_bytes(tensor), name


def test_nonfinite_keep_keeps_the_source_type(tmp_path: Path) -> None:
    tensors = random_tensors(small_shapes(2), torch.float32)
    nan, overflow = "layers.0.feed_forward.w2.weight", "layers.1.feed_forward.w2.weight"
    tensors[nan][3, 3] = float("nan")
    tensors[overflow][0, 0] = 3.4e38  # finite in F32, infinite once rounded to BF16
    source, output = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file(tensors, source)
    with pytest.raises(zm.NonFiniteError, match=r"layers\.0\.feed_forward\.w2.* row 3, column 3"):
        zm.convert(source, output, recipe="zimage")
    zm.convert(source, output, recipe="zimage", nonfinite="keep")
    found = load_file(output)
    for name in (nan, overflow):
        assert found[name].dtype == torch.float32
        assert tensor_bytes(found[name]) == tensor_bytes(tensors[name])
    assert found["x_embedder.weight"].dtype == torch.bfloat16, "as convert_to_quant does"
    zm.convert(source, output, nonfinite="keep", overwrite=True)
    assert load_file(output)[overflow].dtype == torch.float8_e4m3fn, "quantised directly"


def test_any_model_changes_nothing_for_zimage(small_model: Tensors, tmp_path: Path) -> None:
    source = tmp_path / "in.safetensors"
    others = {"vae.x.weight": torch.randn(32, 32).bfloat16()}
    save_file({PREFIX + n: t for n, t in small_model.items()} | others, source)
    for any_model in (False, True):
        zm.convert(source, tmp_path / f"{any_model}.safetensors", any_model=any_model)
    assert sha256(tmp_path / "False.safetensors") == sha256(tmp_path / "True.safetensors")


# ---- the function and its report


def test_default_output_name(small_file: Path, tmp_path: Path, in_process: Run) -> None:
    source = tmp_path / "z_image_turbo_bf16.safetensors"
    source.symlink_to(small_file)
    assert in_process("convert", "-i", source).returncode == 0
    assert (tmp_path / "z_image_turbo_bf16-mxfp8.safetensors").exists()
    folder = tmp_path / "Z-Image.v1"
    write_shards(folder / "transformer", to_diffusers(load_file(small_file)))
    assert in_process("convert", "-i", f"{folder}/").returncode == 0
    assert (tmp_path / "Z-Image.v1-mxfp8.safetensors").exists()


def test_report(small_model: Tensors, small_file: Path, tmp_path: Path) -> None:
    seen: list[zm.Progress] = []
    output = tmp_path / "out.safetensors"
    report = zm.convert(small_file, output, error_stats=True, progress=seen.append)
    assert report.quantized == 185 and sum(report.kept.values()) == 453 - 185
    assert report.file_bytes == output.stat().st_size
    assert report.corrected_biases == 24
    assert [p.done for p in seen] == sorted(p.done for p in seen)
    assert seen[-1].done == seen[-1].total
    assert report.errors is not None and len(report.errors) == 185
    name = "layers.5.feed_forward.w2.weight"
    weight = small_model[name].double().numpy()
    encoded = zm.quantize(small_model[name])
    difference = weight - zm.dequantize(encoded, "float32").double().numpy()
    stats = report.errors[name]
    np.testing.assert_allclose(
        stats.relative_squared_error, (difference**2).sum() / (weight**2).sum(), rtol=1e-12
    )
    np.testing.assert_allclose(stats.snr_db, -10 * np.log10(stats.relative_squared_error))
    assert stats.max_error == np.abs(difference).max()
    scales = zm.from_blocked(encoded.scales.numpy(), 40, 3)
    np.testing.assert_array_equal(stats.scale_histogram, np.bincount(scales.ravel(), minlength=256))
    json.dumps(report.to_dict())


def test_report_of_all_zero_weights_is_json(tmp_path: Path) -> None:
    tensors = {name: torch.zeros(t.shape) for name, t in random_tensors(small_shapes(1)).items()}
    source = tmp_path / "in.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, source)
    report = zm.convert(source, tmp_path / "out.safetensors", error_stats=True)
    document = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert document["total"]["relative_squared_error"] == 0


def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    peaks = [
        peak_memory(
            tmp_path / f"{n}.safetensors",
            {f"{i}.weight": (4096, 8192) for i in range(n)},
            any_model=True,
        )
        for n in (2, 10)
    ]
    assert peaks[1] < peaks[0] + 32, peaks
    assert peaks[1] < 300, peaks


@pytest.mark.parametrize("shape", [(20_000_000, 1), (1, 1 << 20)])
def test_memory_of_degenerate_shapes(tmp_path: Path, shape: tuple[int, int]) -> None:
    assert peak_memory(tmp_path / "in.safetensors", {"x.weight": shape}, any_model=True) < 300


def test_absurdly_wide_matrices_are_refused(tmp_path: Path) -> None:
    save_file({"x.weight": torch.zeros(1, (1 << 20) + 1).bfloat16()}, tmp_path / "in.safetensors")
    with pytest.raises(zm.CheckpointError, match=r'"x\.weight" has 1,048,577 columns'):
        zm.convert(tmp_path / "in.safetensors", any_model=True)


# ---- plan, run, report


def test_three_calls_are_what_convert_does(small_file: Path, tmp_path: Path) -> None:
    options = zm.ConversionOptions(exclude_layers=[r"layers\.0\."], hash_source=True)
    plan = zm.plan_conversion(small_file, options)
    report = zm.run_conversion(plan, tmp_path / "a.safetensors", error_stats=True)
    zm.convert(
        small_file,
        tmp_path / "b.safetensors",
        exclude_layers=[r"layers\.0\."],
        hash_source=True,
    )
    a, b = ((tmp_path / name).read_bytes() for name in ("a.safetensors", "b.safetensors"))
    assert a == b and len(a) == plan.size == report.file_bytes
    assert report.quantized == len(plan.quantized) and report.errors is not None
    assert plan.options is options and plan.recipe is options.rules


def test_one_plan_runs_twice(small_file: Path, tmp_path: Path) -> None:
    plan = zm.plan_conversion(small_file, zm.ConversionOptions(bias_correction="none"))
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    zm.run_conversion(plan, first, threads=1)
    zm.run_conversion(plan, second)
    assert first.read_bytes() == second.read_bytes()


def test_options_are_checked_when_they_are_made() -> None:
    for argument, value in (
        ("nonfinite", "drop"),
        ("bias_correction", "exact"),
        ("timesteps", 0),
        ("calibration_samples", 1_000_001),
        ("calibration_samples", 2.5),
        ("seed", -1),
        ("modulation_matmul", "half"),
        ("recipe", "no-such-recipe"),
        ("exclude_layers", "layers"),
        ("exclude_layers", ["("]),
    ):
        with pytest.raises(zm.UsageError) as caught:
            zm.ConversionOptions(**{argument: value})
        assert caught.value.argument == argument
    with pytest.raises(FrozenInstanceError):
        zm.ConversionOptions().seed = 1  # type: ignore[misc]


def test_keywords_of_convert_are_the_fields_of_the_options() -> None:
    names = {field.name for field in fields(zm.ConversionOptions) if field.init}
    assert ConversionKeywords.__annotations__.keys() == names


def test_a_plan_needs_options_of_the_right_class(small_file: Path) -> None:
    with pytest.raises(zm.UsageError, match="options must be ConversionOptions, not dict"):
        zm.plan_conversion(small_file, {"recipe": "zimage"})  # type: ignore[arg-type]


class _StagedOnCpu:
    """Stands for the core's quantizer of a device: encodes on the CPU, counts its users."""

    threads: ClassVar[set[int]] = set()

    def __init__(self, device: int) -> None:
        assert device == 3

    def quantize(self, *arguments: Any) -> None:
        self.threads.add(threading.get_ident())
        _core.quantize(*arguments, 1)


def test_a_device_encodes_with_an_object_for_each_thread(
    small_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_core, "StagedQuantizer", _StagedOnCpu)
    monkeypatch.setattr("zimage_mxfp8.streaming.formats.mxfp8.cuda_index", lambda device: 3)
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    zm.convert(small_file, a, device="cuda:3")
    monkeypatch.undo()
    zm.convert(small_file, b)
    assert a.read_bytes() == b.read_bytes()
    assert _StagedOnCpu.threads
