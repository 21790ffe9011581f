"""INT8 ConvRot files: equality with convert_to_quant, exact sums, readers and the loader."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import zimage_mxfp8 as zm
from helpers.checkpoints import (
    PREFIX,
    Tensors,
    change,
    metadata_of,
    random_tensors,
    tensor_bytes,
)
from helpers.commands import Run
from helpers.convrot_peer import adds_in_order, product_in_order, run_convert_to_quant
from helpers.diffusers_reference import (
    load_reference,
    make_reference,
    random_inputs,
    relative_error,
    save_in_bfloat16,
)
from zimage_mxfp8 import _core
from zimage_mxfp8.checkpoint.source import open_checkpoint
from zimage_mxfp8.conversion.bias_correction import embedder_outputs
from zimage_mxfp8.conversion.export_layouts import LAYOUTS
from zimage_mxfp8.streaming.formats import FORMAT_NAMES
from zimage_mxfp8.transformer.compute import COMPUTE_MODES
from zimage_mxfp8.zimage.layers import zimage_shapes
from zimage_mxfp8.zimage.sampling import sampler_timesteps

HEADER = "_quantization_metadata"
QKV, W2 = "layers.0.attention.qkv", "layers.0.feed_forward.w2"
OUTSIDE_BLOCKS = "x_embedder|cap_embedder|t_embedder|final_layer"
NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


# ---- The core


def rotation(group: int) -> np.ndarray:
    """The Kronecker power of the paper's 4x4 matrix, times the square root of its size."""
    base = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]])
    matrix = np.ones((1, 1), int)
    while len(matrix) < group:
        matrix = np.kron(matrix, base)
    return matrix


def encode(matrix: torch.Tensor, group: int, threads: int = 1) -> tuple[np.ndarray, np.ndarray]:
    bits = matrix.view(torch.int32 if matrix.dtype == torch.float32 else torch.int16).numpy()
    codes, scales = np.empty(bits.shape, np.int8), np.empty(len(bits), np.float32)
    _core.quantize_convrot(bits, NAMES[matrix.dtype], group, codes, scales, threads)
    return codes, scales


def decode(codes: np.ndarray, scales: np.ndarray, group: int) -> np.ndarray:
    target = np.empty(codes.shape, np.uint32)
    _core.dequantize_convrot(codes, scales, group, target, "float32", 1)
    return target.view(np.float32)


def random(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows + columns)
    spread = torch.exp(2 * torch.randn(1, columns, generator=generator))  # of the channels
    return (0.02 * spread * torch.randn(rows, columns, generator=generator)).to(dtype)


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize(
    ("rows", "columns"), [(1024, 256), (96, 3840), (40, 10240), (96, 2560), (1024, 64)]
)
def test_real_shapes_equal_convert_to_quant(
    rows: int, columns: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounding = pytest.importorskip("convert_to_quant.converters.learned_rounding")
    from convert_to_quant.utils import convrot

    if not adds_in_order():
        own = SimpleNamespace(**{**vars(torch), "matmul": product_in_order})
        monkeypatch.setattr(convrot, "torch", own)
    converter = rounding.LearnedRoundingConverter(
        scaling_mode="row",
        target_format="int8",
        no_learned_rounding=True,
        convrot=True,
        primary_int8_convrot_compat=True,
        device="cpu",
    )
    matrix = random(rows, columns, dtype)
    matrix[7] = 0
    codes, scales, _, _ = converter.convert(
        matrix, has_bias=False, calibration_data=torch.zeros(1, columns)
    )
    group = converter.last_primary_convrot_group_size
    assert group == (64 if columns == 64 else 256)
    ours = encode(matrix, group)
    assert np.array_equal(ours[0], codes.numpy())
    assert scales.shape == (rows, 1)
    assert tensor_bytes(torch.from_numpy(ours[1])) == tensor_bytes(scales)


@pytest.mark.parametrize("group", [4, 16, 64, 256, 1024])
@pytest.mark.parametrize("dtype", NAMES)
def test_sums_add_the_columns_in_order(cpu_target: str, group: int, dtype: torch.dtype) -> None:
    """As a loop in float32 does, on every CPU target, for any number of rows and threads."""
    matrix = random(37, 2 * group, dtype)
    blocks = matrix.float().numpy().reshape(37, 2, group)
    signs = (rotation(group) / group**0.5).astype(np.float32)
    sums = np.zeros(blocks.shape, np.float32)
    for column in range(group):
        sums += blocks[:, :, column, None] * signs[column]
    rotated = sums.reshape(37, -1)
    scales = np.maximum(np.abs(rotated).max(1) / np.float32(127), np.float32(1e-30))
    codes = np.rint(rotated / scales[:, None]).astype(np.int8)
    for threads in (1, 3):
        found = encode(matrix, group, threads)
        assert np.array_equal(found[0], codes)
        assert np.array_equal(found[1], scales)
    numbers = (codes * scales[:, None]).reshape(blocks.shape)
    back = np.zeros(blocks.shape, np.float32)
    for column in range(group):
        back += numbers[:, :, column, None] * signs[column]
    assert np.array_equal(decode(codes, scales, group), back.reshape(37, -1))


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from([1, 4, 16, 64, 256]),
    st.integers(1, 20),
    st.integers(1, 3),
    st.floats(-30, 30),
)
def test_decoding_gives_the_matrix_up_to_half_a_step(
    group: int, rows: int, blocks: int, exponent: float
) -> None:
    matrix = random(rows, group * blocks, torch.float32) * 2.0**exponent
    codes, scales = encode(matrix, group)
    # The encoder takes 1e-12 for a smaller maximum of a row that is not rotated, as the peer does.
    is_small = (matrix.abs().amax(1) < 1e-12).numpy()
    assert ((np.abs(codes.astype(int)).max(1) == 127) | is_small).all()
    signs = rotation(group) / group**0.5
    change = matrix.double().numpy() - decode(codes, scales, group)
    rotated = np.abs(change.reshape(rows, blocks, group) @ signs).reshape(rows, -1)
    assert (rotated <= 0.501 * scales[:, None]).all()


def test_rows_of_zeros_and_bad_arguments() -> None:
    codes, scales = encode(torch.zeros(2, 64), 64)
    assert not codes.any() and (scales == np.float32(1e-30)).all()
    matrix = random(3, 64, torch.float32)
    matrix[1, 5] = float("inf")
    with pytest.raises(zm.NonFiniteError, match="row 1, column 5"):
        encode(matrix, 64)
    with pytest.raises(zm.InvalidArgumentError, match="too large to be rotated"):
        encode(torch.full((1, 64), 3e38), 64)
    for group, problem in ((32, "no power of 4"), (4096, "no power of 4"), (256, "do not divide")):
        with pytest.raises(zm.InvalidArgumentError, match=problem):
            encode(random(3, 64), group)


# ---- Files of convert_to_quant


def data_of(file: Path) -> bytes:
    """The bytes after the header."""
    content = file.read_bytes()
    return content[8 + struct.unpack("<Q", content[:8])[0] :]


def peer_command(source: Path, output: Path, keep: str) -> list[str]:
    return [
        *("-i", str(source), "-o", str(output), "--int8", "--convrot", "--scaling-mode", "row"),
        *("--simple", "--comfy_quant", "--save-quant-metadata", "--low-memory"),
        *("--calib-samples", "8", "--exclude-layers", keep),
    ]


@pytest.mark.peer
def test_files_equal_convert_to_quant(tmp_path: Path) -> None:
    """All but w2, with 682 columns, is rotated."""
    shapes = zimage_shapes(dim=256, layers=2, caption_dim=64, hidden=682)
    source, ours, peers = (tmp_path / f"{n}.safetensors" for n in ("in", "ours", "peers"))
    save_file(random_tensors(shapes), source, {"author": "somebody"})
    keep = f"{OUTSIDE_BLOCKS}|adaLN_modulation"  # with biases, which the peer changes at random
    run_convert_to_quant(peer_command(source, peers, keep))
    zm.convert(source, ours, format="int8-convrot", recipe=recipe_that_keeps(keep, tmp_path))
    assert data_of(ours) == data_of(peers)
    metadata, theirs = metadata_of(ours), metadata_of(peers)
    assert json.loads(metadata.pop("zimage_mxfp8"))["format"] == "int8-convrot"
    assert metadata == theirs
    found, wanted = load_file(ours), load_file(peers)
    for name, tensor in wanted.items():
        assert tensor_bytes(found[name]) == tensor_bytes(tensor), name
    assert wanted[f"{QKV}.weight"].dtype == wanted[f"{W2}.weight"].dtype == torch.int8
    assert zm.validate(peers, source).ok


@pytest.mark.peer
def test_float32_and_a_prefix(tmp_path: Path) -> None:
    source, ours, peers = (tmp_path / f"{n}.safetensors" for n in ("in", "ours", "peers"))
    shapes = zimage_shapes(dim=256, layers=1, caption_dim=64, hidden=640)
    tensors = random_tensors(shapes, torch.float32)
    save_file({PREFIX + name: tensor for name, tensor in tensors.items()}, source)
    run_convert_to_quant(peer_command(source, peers, OUTSIDE_BLOCKS))
    zm.convert(
        source, ours, format="int8-convrot", recipe=recipe_that_keeps(OUTSIDE_BLOCKS, tmp_path)
    )
    found, wanted = load_file(ours), load_file(peers)
    assert found.keys() == wanted.keys()
    layers = [name.removesuffix(".comfy_quant") for name in wanted if name.endswith("comfy_quant")]
    assert f"{PREFIX}layers.0.adaLN_modulation.0" in layers and len(layers) > 20
    for layer in layers:
        for part in ("weight", "weight_scale", "comfy_quant"):
            name = f"{layer}.{part}"
            assert tensor_bytes(found[name]) == tensor_bytes(wanted[name]), name


def recipe_that_keeps(pattern: str, folder: Path) -> Path:
    file = folder / "recipe.toml"
    file.write_text(f"[[keep]]\nname = 'some'\npattern = '{pattern}'\nreason = 'a test'\n")
    return file


# ---- Conversion


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformer's folder in BF16; its w2 has 682 columns, which are not rotated."""
    return save_in_bfloat16(make_reference(), tmp_path_factory.mktemp("int8") / "plain")


@pytest.fixture(scope="module")
def converted(plain: Path) -> Path:
    file = plain.parent / "converted.safetensors"
    zm.convert(plain, file, format="int8-convrot")
    return file


def decoded_weight(tensors: Tensors, layer: str) -> torch.Tensor:
    """A layer's weight in float64, decoded as comfy-kitchen's formula says."""
    marker = json.loads(bytes(tensors[f"{layer}.comfy_quant"].tolist()))
    group = marker.get("convrot_groupsize", 1)
    numbers = tensors[f"{layer}.weight"].double() * tensors[f"{layer}.weight_scale"].double()
    signs = torch.from_numpy(rotation(group)).double() / group**0.5
    return (numbers.unflatten(1, (-1, group)) @ signs).flatten(1)


def test_markers_and_layers_of_a_file(converted: Path, plain: Path) -> None:
    tensors = load_file(converted)
    marker = json.loads(bytes(tensors[f"{QKV}.comfy_quant"].tolist()))
    assert marker == {
        "format": "int8_tensorwise",
        "orig_dtype": "torch.bfloat16",
        "convrot": True,
        "convrot_groupsize": 256,
        "per_row": True,
    }
    assert "convrot" not in json.loads(bytes(tensors[f"{W2}.comfy_quant"].tolist()))
    described = json.loads(metadata_of(converted)[HEADER])["layers"]
    marker.pop("per_row")
    assert described[QKV] == marker
    mxfp8 = zm.plan_conversion(plain)
    assert described.keys() == mxfp8.layers.keys()


def test_biases_keep_the_mean_output(converted: Path, plain: Path, tmp_path: Path) -> None:
    zm.convert(plain, tmp_path / "none", format="int8-convrot", bias_correction="none")
    layer = "layers.0.adaLN_modulation.0"
    original = load_file(plain / "diffusion_pytorch_model.safetensors")
    outputs = embedder_outputs(open_checkpoint(tmp_path / "none"), "", sampler_timesteps("turbo"))
    mean = torch.from_numpy(outputs).mean(0)
    errors = []
    for file in (tmp_path / "none", converted):
        found = load_file(file)
        moved = (decoded_weight(found, layer) - original[f"{layer}.weight"].double()) @ mean
        errors.append(
            moved + (found[f"{layer}.bias"].double() - original[f"{layer}.bias"].double())
        )
    assert errors[1].norm() < errors[0].norm()
    half_a_step = load_file(converted)[f"{layer}.bias"].double().abs() * 2.0**-8 + 1e-6
    assert (errors[1].abs() <= half_a_step).all()


def test_errors_are_measured(plain: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    report = zm.convert(plain, output, format="int8-convrot", error_stats=True)
    assert report.errors is not None and report.to_dict()["format"] == "int8-convrot"
    assert "in INT8 ConvRot" in repr(report)
    tensors, original = load_file(output), load_file(plain / "diffusion_pytorch_model.safetensors")
    weight = original["layers.0.attention.to_out.0.weight"].double()
    error = weight - decoded_weight(tensors, "layers.0.attention.out")
    stats = report.errors["layers.0.attention.out.weight"]
    assert stats.squared_error == pytest.approx(float((error**2).sum()), rel=1e-5)
    assert stats.squared_signal == pytest.approx(float((weight**2).sum()), rel=1e-5)
    assert stats.max_error == pytest.approx(float(error.abs().max()), rel=1e-5)
    exponents = torch.log2(tensors["layers.0.attention.out.weight_scale"]).floor().int() + 127
    assert (
        stats.scale_histogram.tolist()
        == torch.bincount(exponents.flatten(), minlength=256).tolist()
    )


def test_numbers_that_cannot_be_rotated_are_named(
    plain: Path, tmp_path: Path, in_process: Run
) -> None:
    tensors = load_file(plain / "diffusion_pytorch_model.safetensors")
    name = "layers.0.feed_forward.w1.weight"
    assert tensors[name].shape[1] % 64 == 0, "rotated"
    tensors[name] = tensors[name].clone()
    tensors[name][5] = 3e38
    save_file(tensors, tmp_path / "large.safetensors")
    result = in_process("convert", "large.safetensors", "--format", "int8-convrot")
    assert result.returncode == 1
    line = result.stderr.splitlines()[-1]
    for part in ("large.safetensors", f'"{name}" cannot be encoded in INT8 ConvRot: ', "exclude"):
        assert part in line, line
    assert [path.name for path in tmp_path.iterdir()] == ["large.safetensors"]


def test_default_name_and_dry_run(small_file: Path, tmp_path: Path, in_process: Run) -> None:
    source = tmp_path / "model.safetensors"
    source.symlink_to(small_file)
    shown = in_process("convert", source, "--format", "int8-convrot", "--dry-run")
    assert "become INT8 ConvRot" in " ".join(shown.stdout.split())
    result = in_process("convert", source, "--format", "int8-convrot")
    assert "in INT8 ConvRot" in result.stderr + result.stdout
    size = (tmp_path / "model-int8-convrot.safetensors").stat().st_size
    assert f"exactly {size:,} bytes" in " ".join(shown.stdout.split())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"format": "int8"}, "format must be mxfp8 or int8-convrot, not 'int8'"),
        ({"recipe": "zimage"}, "recipe zimage reproduces convert_to_quant's MXFP8 files, and the"),
        ({"bias_correction": "synthetic"}, "bias_correction synthetic reproduces"),
    ],
)
def test_options_of_mxfp8_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(zm.UsageError, match=sentence):
        zm.ConversionOptions(**{"format": "int8-convrot", **options})


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--zimage", "--simple"), "--zimage reproduces convert_to_quant's MXFP8 files, and the"),
        (("--mxfp8", "--simple"), "--mxfp8 reproduces convert_to_quant's MXFP8 files, and the"),
        (("--recipe", "zimage"), "--recipe zimage reproduces convert_to_quant's MXFP8 files"),
        (("--bias-correction", "synthetic"), "choose --bias-correction timesteps, or none"),
        (("--int8",), "--format int8-convrot writes INT8 with rotated weights"),
    ],
)
def test_options_of_mxfp8_are_refused_as_they_were_typed(
    options: tuple[str, ...], sentence: str, small_file: Path, in_process: Run
) -> None:
    result = in_process("convert", small_file, "--format", "int8-convrot", *options)
    assert result.returncode == 2
    assert sentence in " ".join(result.stderr.split())


def test_the_command_line_names_every_format(small_file: Path, in_process: Run) -> None:
    result = in_process("convert", small_file, "--format", "nvfp4")
    assert result.returncode == 2
    for names, option in (
        (FORMAT_NAMES, result),
        (LAYOUTS, in_process("export", "x", "--to", "x")),
    ):
        assert all(name in option.stderr for name in names)


def test_gpus_do_not_encode_it(plain: Path, tmp_path: Path, in_process: Run) -> None:
    """Whether or not this machine has one."""
    with pytest.raises(zm.UsageError, match="device must be cpu for int8-convrot"):
        zm.convert(plain, tmp_path / "x.safetensors", format="int8-convrot", device="cuda")
    result = in_process("convert", plain, "--format", "int8-convrot", "--device", "cuda")
    assert result.returncode == 2 and result.stderr.endswith("; leave out --device\n")


def test_nan_is_named_and_can_be_kept(plain: Path, tmp_path: Path) -> None:
    def damage(tensors: Tensors, _: dict[str, str]) -> None:
        tensors["layers.1.feed_forward.w1.weight"][130, 7] = float("nan")

    zm.export(plain, tmp_path / "single.safetensors", "comfyui")
    source = change(tmp_path / "single.safetensors", tmp_path / "nan.safetensors", damage)
    output = tmp_path / "out.safetensors"
    with pytest.raises(zm.NonFiniteError, match="row 130, column 7"):
        zm.convert(source, output, format="int8-convrot")
    assert not output.exists()
    zm.convert(source, output, format="int8-convrot", nonfinite="keep")
    assert load_file(output)["layers.1.feed_forward.w1.weight"].dtype == torch.bfloat16


# ---- Export


def test_export_encodes_the_decoded_weights(plain: Path, tmp_path: Path) -> None:
    mxfp8, exported, decoded, wanted = (tmp_path / f"{x}.safetensors" for x in "abcd")
    zm.convert(plain, mxfp8, modulation_matmul="full")
    report = zm.export(mxfp8, exported, "int8-convrot")
    zm.dequantize_checkpoint(mxfp8, decoded)
    zm.convert(
        decoded,
        wanted,
        format="int8-convrot",
        bias_correction="none",
        modulation_matmul="full",
    )
    assert data_of(exported) == data_of(wanted)
    assert metadata_of(exported)[HEADER] == metadata_of(wanted)[HEADER]
    assert report.layers == len(zm.plan_conversion(plain).quantized)
    assert zm.validate(exported, decoded).ok
    marker = json.loads(
        bytes(load_file(exported)["layers.0.adaLN_modulation.0.comfy_quant"].tolist())
    )
    assert marker["full_precision_matrix_mult"] is True


def test_export_of_parts_and_of_folders_gives_the_same_bytes(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zm.convert(plain, tmp_path / "mxfp8.safetensors")
    zm.export(tmp_path / "mxfp8.safetensors", tmp_path / "whole.safetensors", "int8-convrot")
    monkeypatch.setattr("zimage_mxfp8.conversion.export_formats._DECODED", 1)
    zm.export(tmp_path / "mxfp8.safetensors", tmp_path / "parts.safetensors", "int8-convrot")
    zm.export(tmp_path / "mxfp8.safetensors", tmp_path / "folder", "diffusers")
    zm.export(tmp_path / "folder", tmp_path / "stacked.safetensors", "int8-convrot")
    whole, *others = (tmp_path / f"{x}.safetensors" for x in ("whole", "parts", "stacked"))
    assert [other.read_bytes() == whole.read_bytes() for other in others] == [True, True]


def test_wrong_exports(converted: Path, plain: Path, tmp_path: Path) -> None:
    with pytest.raises(zm.WrongKindError, match="has no MXFP8 layers"):
        zm.export(plain, tmp_path / "x.safetensors", "int8-convrot")
    for layout in ("int8-convrot", "diffusers", "comfyui", "fp8-rowwise"):
        with pytest.raises(zm.WrongKindError, match=r"is quantised already \(INT8 ConvRot"):
            zm.export(converted, tmp_path / "x.safetensors", layout)
    with pytest.raises(zm.WrongKindError, match="is quantised already"):
        zm.convert(converted, tmp_path / "x.safetensors", format="int8-convrot")

    def damage(tensors: Tensors, _: dict[str, str]) -> None:
        tensors[f"{QKV}.weight"].view(torch.uint8)[3, 5] = 0x7F

    zm.convert(plain, tmp_path / "mxfp8.safetensors")
    bad = change(tmp_path / "mxfp8.safetensors", tmp_path / "bad.safetensors", damage)
    with pytest.raises(zm.CheckpointError, match=f'layer "{QKV}" is damaged: it has NaN codes'):
        zm.export(bad, tmp_path / "x.safetensors", "int8-convrot")
    assert not (tmp_path / "x.safetensors").exists()


# ---- Readers


def test_inspection_and_validation(converted: Path, plain: Path, in_process: Run) -> None:
    found = zm.inspect(converted)
    assert found.quantization == "INT8 ConvRot" and not found.breaches
    assert found.parameters == zm.inspect(plain).parameters
    assert sum(group.formats.get("INT8 ConvRot", 0) for group in found.groups) > 20
    assert "validate" in found.accepted_by and "export" not in found.accepted_by
    report = zm.validate(converted, plain)
    assert report.ok and not [note for note in report.notes if "bias" not in note]
    assert report.layers == len(zm.plan_conversion(plain).quantized)
    assert 0 < report.errors[f"{QKV}.weight"].relative_squared_error < 3e-4
    result = in_process("validate", converted)
    assert f"sound, {report.layers} INT8 ConvRot layers" in " ".join(result.stdout.split())


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_comfy_kitchen_decodes_the_same(converted: Path, tmp_path: Path) -> None:
    int8 = pytest.importorskip("comfy_kitchen.tensor.int8")
    zm.dequantize_checkpoint(converted, tmp_path / "plain.safetensors")
    ours, tensors = load_file(tmp_path / "plain.safetensors"), load_file(converted)
    assert "zimage_mxfp8" not in metadata_of(tmp_path / "plain.safetensors")
    assert not [name for name in ours if name.endswith(("_scale", "comfy_quant"))]
    for name in (n.removesuffix(".comfy_quant") for n in tensors if n.endswith("comfy_quant")):
        marker = json.loads(bytes(tensors[f"{name}.comfy_quant"].tolist()))
        codes = tensors[f"{name}.weight"]
        params = int8.TensorWiseINT8Layout.Params(
            scale=tensors[f"{name}.weight_scale"],
            orig_dtype=torch.bfloat16,
            orig_shape=tuple(codes.shape),
            convrot=marker.get("convrot", False),
            convrot_groupsize=marker.get("convrot_groupsize", 256),
        )
        theirs = int8.TensorWiseINT8Layout.dequantize(codes, params)
        found = ours[f"{name}.weight"]
        assert found.dtype == torch.bfloat16
        # Its sums may be in another order, which moves some numbers to a neighbour.
        assert torch.allclose(found.float(), theirs.float(), rtol=2**-7, atol=1e-6), name
        assert (found == theirs).float().mean() > 0.999


Edit = Callable[[Tensors, dict[str, str]], object]


def set_marker(tensors: Tensors, metadata: dict[str, str], layer: str, **entries: Any) -> None:
    document = json.loads(metadata[HEADER])
    document["layers"][layer] |= entries
    metadata[HEADER] = json.dumps(document)
    marker = json.loads(bytes(tensors[f"{layer}.comfy_quant"].tolist())) | entries
    tensors[f"{layer}.comfy_quant"] = torch.tensor(
        list(json.dumps(marker).encode()), dtype=torch.uint8
    )


def put(name: str, index: Any, value: float) -> Edit:
    def edit(tensors: Tensors, _: dict[str, str]) -> None:
        tensors[name][index] = value

    return edit


STRUCTURAL: dict[str, tuple[Edit, str]] = {
    "scales of another shape": (
        lambda t, _: t.update({f"{QKV}.weight_scale": t[f"{QKV}.weight_scale"].flatten()}),
        rf'"{QKV}.weight_scale" is F32 \[768\], but one scale per row is F32 \[768, 1\]',
    ),
    "one scale": (
        lambda t, _: t.update({f"{QKV}.weight_scale": torch.tensor(0.1)}),
        rf'"{QKV}.weight_scale" is F32 \[\], but one scale per row is F32',
    ),
    "no scales": (
        lambda t, _: t.pop(f"{QKV}.weight_scale"),
        rf'"{QKV}.weight_scale" is missing',
    ),
    "scales of another type": (
        lambda t, _: t.update({f"{QKV}.weight_scale": t[f"{QKV}.weight_scale"].bfloat16()}),
        rf'"{QKV}.weight_scale" is BF16 \[768, 1\], but one scale per row is F32',
    ),
    "codes of another type": (
        lambda t, _: t.update({f"{QKV}.weight": t[f"{QKV}.weight"].view(torch.uint8)}),
        rf'"{QKV}.weight" is U8 \[768, 256\], not an I8 matrix',
    ),
    "an unknown group": (
        lambda t, m: set_marker(t, m, QKV, convrot_groupsize=512),
        rf'"{QKV}.weight" is rotated in groups of 512 columns, which are no power of 4 up to 1024',
    ),
    "a group that is no number": (
        lambda t, m: set_marker(t, m, QKV, convrot_groupsize="256"),
        r"groups of 256 columns, which are no power of 4 up to 1024",
    ),
    "a group that does not divide": (
        lambda t, m: set_marker(t, m, W2, convrot=True, convrot_groupsize=64),
        rf'"{W2}.weight" is rotated in groups of 64 columns, which do not divide 682',
    ),
    "no marker": (
        lambda t, m: (t.pop(f"{QKV}.comfy_quant"), m.pop(HEADER)),
        rf'"{QKV}.comfy_quant" is missing, and the header does not describe the layer',
    ),
    "header and tensor disagree": (
        lambda _, m: m.update({HEADER: m[HEADER].replace('groupsize": 256', 'groupsize": 64', 1)}),
        r"disagrees about layer .* \(convrot_groupsize\), and ComfyUI believes the header",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", STRUCTURAL)
def test_broken_structure_is_one_sentence(case: str, converted: Path, tmp_path: Path) -> None:
    edit, sentence = STRUCTURAL[case]
    bad = change(converted, tmp_path / "bad.safetensors", edit)
    (breach,) = zm.validate(bad).breaches
    assert re.search(sentence, str(breach))
    for read in (
        lambda: zm.dequantize_checkpoint(bad, tmp_path / "x.safetensors"),
        lambda: zm.ZImageTransformer.from_checkpoint(bad, "cpu"),
    ):
        with pytest.raises(zm.CheckpointError, match=sentence):
            read()
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (put(f"{QKV}.weight_scale", (3, 0), float("nan")), "has NaN or infinite scales"),
        (put(f"{W2}.weight_scale", (3, 0), float("inf")), "has NaN or infinite scales"),
        (put(f"{W2}.weight_scale", (3, 0), float("-inf")), "has NaN or infinite scales"),
        (put(f"{QKV}.weight_scale", (3, 0), -1.0), "has scales of 0 or less"),
        (put(f"{QKV}.weight_scale", (3, 0), 0.0), "has scales of 0 or less"),
        (put("layers.0.adaLN_modulation.0.weight_scale", (3, 0), -1.0), "has scales of 0 or less"),
        (put(f"{QKV}.weight", (3, 5), -128), "has codes of -128"),
    ],
)
def test_bad_data_is_found(edit: Edit, problem: str, converted: Path, tmp_path: Path) -> None:
    bad = change(converted, tmp_path / "bad.safetensors", edit)
    (breach,) = zm.validate(bad).breaches
    assert breach.problem.startswith(problem) and breach.problem.endswith(" (1)")
    layer = re.escape(breach.tensor.partition(".weight")[0])
    with pytest.raises(zm.CheckpointError, match=f'layer "{layer}" is damaged: it {problem}'):
        zm.dequantize_checkpoint(bad, tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()
    if "codes" in problem:  # the loader does not read them for that
        return
    with pytest.raises(
        zm.CheckpointError, match=f'{layer}" is damaged: it has scales that are not'
    ):
        zm.ZImageTransformer.from_checkpoint(bad, "cpu")


def test_changed_codes_and_scales_are_compared(
    converted: Path, plain: Path, tmp_path: Path
) -> None:
    def damage(tensors: Tensors, _: dict[str, str]) -> None:
        tensors[f"{QKV}.weight"][5, :3] = 1
        tensors[f"{W2}.weight_scale"][7] *= 2

    breaches = zm.validate(change(converted, tmp_path / "bad.safetensors", damage), plain).breaches
    found = {breach.tensor: breach.problem for breach in breaches}
    assert found.keys() == {f"{QKV}.weight", f"{W2}.weight_scale"}
    assert "not the original's rounded to nearest" in found[f"{QKV}.weight"]
    assert found[f"{W2}.weight_scale"] == "has scales that differ from the original's (1)"


def test_truncated_file(converted: Path, tmp_path: Path, in_process: Run) -> None:
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(converted.read_bytes()[:-1000])
    for command in (("validate", bad), ("dequantize", bad, "-o", tmp_path / "x.safetensors")):
        result = in_process(*command)
        assert result.returncode == 1
        assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "x.safetensors").exists()


# ---- The loader


def float32(path: Path, compute: str) -> zm.ZImageTransformer:
    return zm.ZImageTransformer.from_checkpoint(path, "cpu", compute=compute, dtype=torch.float32)


@pytest.fixture(scope="module")
def wanted(converted: Path) -> tuple[Any, torch.Tensor]:
    """Inputs, and diffusers' output with the decoded weights."""
    file = converted.parent / "decoded.safetensors"
    zm.dequantize_checkpoint(converted, file)
    reference = make_reference()
    load_reference(reference, file)
    inputs = random_inputs([(16, 16), (4, 30)], [33, 1])
    with torch.no_grad():
        return inputs, reference(*inputs, return_dict=False)[0]


def test_modes_of_int8_files(converted: Path, wanted: tuple[Any, Any]) -> None:
    inputs, want = wanted
    assert relative_error(float32(converted, "weight-only")(*inputs).sample, want) < 0.005
    assert relative_error(float32(converted, "int8")(*inputs).sample, want) < 0.03
    assert zm.ZImageTransformer.from_checkpoint(converted, "cpu").compute == "weight-only"
    for mode in set(COMPUTE_MODES) - {"int8", "weight-only"}:
        with pytest.raises(
            zm.UsageError, match=f"compute {mode} is for MXFP8 checkpoints, and this one is INT8"
        ):
            float32(converted, mode)


def test_stored_integers_are_multiplied(converted: Path) -> None:
    tensors, state = load_file(converted), float32(converted, "int8").state_dict()
    assert torch.equal(state["layers.0.qkv.codes"], tensors[f"{QKV}.weight"])
    scales = tensors[f"{QKV}.weight_scale"].flatten().view(torch.int32)
    assert torch.equal(state["layers.0.qkv.scale_bits"], scales)
    assert state["layers.0.qkv.rotation"].shape == (256, 256)
    assert state["layers.0.ffn_out.rotation"].shape == (1, 1)


@pytest.mark.parametrize("compute", ["int8", "weight-only"])
def test_layers_of_full_precision(compute: str, plain: Path, tmp_path: Path) -> None:
    def mark(tensors: Tensors, metadata: dict[str, str]) -> None:
        set_marker(tensors, metadata, QKV, full_precision_matrix_mult=True)

    zm.convert(plain, tmp_path / "a.safetensors", format="int8-convrot")
    marked = change(tmp_path / "a.safetensors", tmp_path / "b.safetensors", mark)
    model = float32(marked, compute)
    assert model.layers[0].qkv.weight_format == "int8 (weight-only)"
    other = "int8 (rotated)" if compute == "int8" else "int8 (weight-only)"
    assert model.layers[1].qkv.weight_format == other
