"""`export`: layouts there and back, and row-wise FP8."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from safetensors.torch import load_file, save_file

import zimage_mxfp8 as zm
from helpers.checkpoints import (
    PREFIX,
    Tensors,
    change,
    metadata_of,
    sha256,
    tensor_bytes,
    to_diffusers,
)
from helpers.commands import Run
from helpers.diffusers_reference import make_reference, save_in_bfloat16
from zimage_mxfp8.conversion import export_formats
from zimage_mxfp8.diffusers import ZImageMXFP8Config

WEIGHTS = "diffusion_pytorch_model.safetensors"
HEADER = "_quantization_metadata"
LAYER = "layers.0.attention.qkv"
load = ZImageTransformer2DModel.from_pretrained


def assert_same(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert (tensor.dtype, tensor.shape) == (wanted[name].dtype, wanted[name].shape), name
        assert tensor_bytes(tensor) == tensor_bytes(wanted[name]), name


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformer's folder in BF16, with feed-forward layers that need padding."""
    return save_in_bfloat16(make_reference(), tmp_path_factory.mktemp("export") / "plain")


@pytest.fixture(scope="module")
def converted(plain: Path) -> Path:
    """It in MXFP8, in ComfyUI's layout."""
    file = plain.parent / "converted.safetensors"
    zm.convert(plain, file)
    return file


@pytest.fixture(scope="module")
def folder(converted: Path) -> Path:
    """The same in diffusers' layout."""
    folder = converted.parent / "folder"
    zm.export(converted, folder, "diffusers")
    return folder


# ---- Layouts


@pytest.mark.parametrize(
    "options",
    [{}, {"recipe": "zimage"}, {"modulation_matmul": "full", "exclude_layers": ["w2"]}],
    ids=["default", "convert_to_quant", "full precision"],
)
def test_converted_files_come_back_byte_for_byte(
    options: dict[str, object], plain: Path, tmp_path: Path
) -> None:
    first, again = tmp_path / "first.safetensors", tmp_path / "again.safetensors"
    zm.convert(plain, first, **options)
    zm.export(first, tmp_path / "folder", "diffusers")
    zm.export(tmp_path / "folder", again, "comfyui")
    assert sha256(again) == sha256(first)


def test_folders_come_back_byte_for_byte(folder: Path, tmp_path: Path) -> None:
    zm.export(folder, tmp_path / "file.safetensors", "comfyui")
    zm.export(tmp_path / "file.safetensors", tmp_path / "again", "diffusers")
    assert {x.name for x in (tmp_path / "again").iterdir()} == {"config.json", WEIGHTS}
    for file in folder.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_codes_and_scales_are_split_by_rows(converted: Path, folder: Path) -> None:
    source = {k: x for k, x in load_file(converted).items() if not k.endswith("comfy_quant")}
    wanted = to_diffusers(source)
    for name in [name for name in wanted if name.endswith("qkv.weight_scale")]:
        for part, scales in zip("qkv", wanted.pop(name).chunk(3), strict=True):
            wanted[name.replace("qkv", f"to_{part}")] = scales
    assert_same(load_file(folder / WEIGHTS), wanted)
    described = json.loads(metadata_of(folder / WEIGHTS)[HEADER])["layers"]
    assert {f"{name}.weight_scale" for name in described} == {
        name for name in wanted if name.endswith("_scale")
    }
    assert described["layers.0.attention.to_k"]["orig_shape"] == [256, 256]
    assert described["layers.0.feed_forward.w1"]["orig_shape"] == [682, 256]


def test_diffusers_loads_the_folder_with_the_quantizer(folder: Path, tmp_path: Path) -> None:
    load(folder).save_pretrained(tmp_path)
    assert_same(load_file(tmp_path / WEIGHTS), load_file(folder / WEIGHTS))


def test_folder_that_diffusers_quantised_becomes_the_file_of_convert(
    plain: Path, tmp_path: Path
) -> None:
    model = load(plain, quantization_config=ZImageMXFP8Config())
    model.save_pretrained(tmp_path / "shards", max_shard_size="1MB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    zm.export(tmp_path / "shards", tmp_path / "exported.safetensors", "comfyui")
    zm.convert(plain, tmp_path / "converted.safetensors", bias_correction="none")
    exported, converted = (
        load_file(tmp_path / f"{x}ed.safetensors") for x in ("export", "convert")
    )
    assert_same(exported, converted)
    assert zm.validate(tmp_path / "exported.safetensors", plain).ok


def test_plain_checkpoints_change_their_layout_too(plain: Path, tmp_path: Path) -> None:
    report = zm.export(plain, tmp_path / "plain.safetensors", "comfyui")
    assert report.layers == 0
    zm.export(tmp_path / "plain.safetensors", tmp_path / "again", "diffusers")
    assert_same(load_file(tmp_path / "again" / WEIGHTS), load_file(plain / WEIGHTS))
    assert not hasattr(load(tmp_path / "again"), "hf_quantizer")
    config = json.loads((plain / "config.json").read_text())
    ours = json.loads((tmp_path / "again" / "config.json").read_text())
    assert all(config[key] == value for key, value in ours.items())


def test_folder_is_read_like_the_file(converted: Path, plain: Path, folder: Path) -> None:
    assert zm.validate(folder).notes == []
    report = zm.validate(folder, plain)
    assert report.ok
    assert report.layers == zm.validate(converted, plain).layers
    inspection = zm.inspect(folder)
    assert (inspection.kind, inspection.quantization) == ("Z-Image, diffusers layout", "MXFP8")
    states = [
        zm.ZImageTransformer.from_checkpoint(path, "cpu").state_dict()
        for path in (folder, converted)
    ]
    assert_same(*states)


def test_only_the_transformer_of_an_all_in_one_file(converted: Path, tmp_path: Path) -> None:
    def add_parts(tensors: Tensors, metadata: dict[str, str]) -> None:
        for name in list(tensors):
            tensors[PREFIX + name] = tensors.pop(name)
        tensors["vae.decoder.conv_in.weight"] = torch.zeros(2, 2)
        metadata.pop(HEADER)

    whole = change(converted, tmp_path / "whole.safetensors", add_parts)
    report = zm.export(whole, tmp_path / "folder", "diffusers")
    assert report.notes == ["1 tensor outside the transformer left out"]
    zm.export(converted, tmp_path / "wanted", "diffusers")
    assert_same(load_file(tmp_path / "folder" / WEIGHTS), load_file(tmp_path / "wanted" / WEIGHTS))


def test_scales_of_other_writers_become_bytes(
    converted: Path, folder: Path, tmp_path: Path
) -> None:
    def as_comfyui_saves(tensors: Tensors, metadata: dict[str, str]) -> None:
        for name, tensor in tensors.items():
            if name.endswith("_scale"):
                tensors[name] = tensor.view(torch.float8_e8m0fnu)
        metadata.pop(HEADER)

    other = change(converted, tmp_path / "other.safetensors", as_comfyui_saves)
    zm.export(other, tmp_path / "folder", "diffusers")
    assert_same(load_file(tmp_path / "folder" / WEIGHTS), load_file(folder / WEIGHTS))


# ---- Row-wise FP8


def test_rowwise_file_has_the_folded_weights(converted: Path, folder: Path, tmp_path: Path) -> None:
    report = zm.export(converted, tmp_path / "a.safetensors", "fp8-rowwise")
    source, found = load_file(converted), load_file(tmp_path / "a.safetensors")
    described = json.loads(metadata_of(converted)[HEADER])["layers"]
    assert report.layers == len(described) > 20
    wanted = dict(source)
    for name, entry in described.items():
        shape = tuple(entry["orig_shape"])
        array = zm.MXFP8Array(source[f"{name}.weight"], source[f"{name}.weight_scale"], shape)
        folded, _ = zm.fold(array)
        wanted |= {f"{name}.weight": folded.codes, f"{name}.weight_scale": folded.scales}
        marker = json.dumps({"format": "float8_e4m3fn_rowwise", "orig_dtype": "torch.bfloat16"})
        wanted[f"{name}.comfy_quant"] = torch.tensor(list(marker.encode()), dtype=torch.uint8)
    assert_same(found, wanted)
    assert zm.inspect(tmp_path / "a.safetensors").quantization == "FP8 with one scale per row"
    zm.export(folder, tmp_path / "b.safetensors", "fp8-rowwise")
    assert_same(load_file(tmp_path / "b.safetensors"), found)


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_convert_to_quant_decodes_the_rowwise_file(converted: Path, tmp_path: Path) -> None:
    quant_ops = pytest.importorskip("convert_to_quant.comfy.quant_ops")
    utils = pytest.importorskip("convert_to_quant.utils.comfy_quant")
    zm.export(converted, tmp_path / "rows.safetensors", "fp8-rowwise")
    zm.dequantize_checkpoint(converted, tmp_path / "plain.safetensors")
    rows, plain = (
        load_file(tmp_path / "rows.safetensors"),
        load_file(tmp_path / "plain.safetensors"),
    )
    codes = [name for name, x in rows.items() if x.dtype == torch.float8_e4m3fn]
    assert len(codes) > 20
    for name in codes:
        layer = name.removesuffix(".weight")
        marker = utils.tensor_to_dict(rows[f"{layer}.comfy_quant"])
        layout = quant_ops.LAYOUTS[quant_ops.QUANT_ALGOS[marker["format"]]["comfy_tensor_layout"]]
        decoded = layout.dequantize(rows[name], rows[f"{layer}.weight_scale"], torch.float32)
        wanted = plain[name].float()
        assert ((decoded - wanted).norm() / wanted.norm()).item() < 1e-3, name


def test_layer_that_would_change_too_much_is_named(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def widen(tensors: Tensors, _: dict[str, str]) -> None:
        scales = zm.from_blocked(tensors[f"{LAYER}.weight_scale"], 768, 8)
        scales[:, ::2] -= 15
        tensors[f"{LAYER}.weight_scale"] = zm.to_blocked(scales)

    wide = change(converted, tmp_path / "wide.safetensors", widen)
    monkeypatch.setattr(export_formats, "_FOLD_BOUND", 1e-7)
    with pytest.raises(zm.PrecisionLossError, match=f'layer "{LAYER}" cannot be folded: '):
        zm.export(wide, tmp_path / "rows.safetensors", "fp8-rowwise")
    assert sorted(x.name for x in tmp_path.iterdir()) == ["wide.safetensors"]


@pytest.mark.parametrize(
    ("tensor", "value", "problem"),
    [("weight", 0x7F, "NaN codes"), ("weight_scale", 255, "NaN scales")],
)
def test_damaged_layer_is_named(
    tensor: str, value: int, problem: str, converted: Path, folder: Path, tmp_path: Path
) -> None:
    def damage(tensors: Tensors, _: dict[str, str]) -> None:
        name = next(x for x in tensors if x.endswith(f"{attention}.{tensor}"))
        tensors[name].view(torch.uint8)[3, 5] = value

    attention = LAYER
    bad = change(converted, tmp_path / "bad.safetensors", damage)
    attention, bad_folder = "layers.0.attention.to_v", tmp_path / "bad"
    shutil.copytree(folder, bad_folder)
    change(folder / WEIGHTS, bad_folder / WEIGHTS, damage)
    before = sorted(tmp_path.rglob("*"))
    for source, to in (
        (bad, "fp8-rowwise"),
        (bad, "int8-convrot"),
        (bad, "diffusers"),
        (bad_folder, "comfyui"),
    ):
        with pytest.raises(zm.CheckpointError, match=rf'layer "{LAYER}" is damaged: ') as caught:
            zm.export(source, tmp_path / "x.safetensors", to)
        assert to == "fp8-rowwise" or f"it has {problem}; " in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


# ---- Errors


def test_wrong_uses(converted: Path, plain: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    with pytest.raises(
        zm.UsageError, match="to must be diffusers, comfyui, fp8-rowwise, int8-convrot, not 'x'"
    ):
        zm.export(converted, out, "x")
    with pytest.raises(zm.UsageError, match="has that layout already"):
        zm.export(converted, out, "comfyui")
    with pytest.raises(zm.UsageError, match="has that layout already"):
        zm.export(folder, tmp_path / "x", "diffusers")
    with pytest.raises(zm.WrongKindError, match="has no MXFP8 layers"):
        zm.export(plain, out, "fp8-rowwise")
    with pytest.raises(zm.UsageError, match="is the input"):
        zm.export(converted, converted, "fp8-rowwise", overwrite=True)
    zm.export(converted, out, "fp8-rowwise")
    with pytest.raises(zm.WrongKindError, match="is quantised already"):
        zm.export(out, tmp_path / "x", "diffusers")
    with pytest.raises(zm.OutputError, match="exists"):
        zm.export(converted, out, "fp8-rowwise")
    assert sorted(x.name for x in tmp_path.iterdir()) == ["out.safetensors"]


def test_folders_are_replaced_whole_or_not_at_all(converted: Path, tmp_path: Path) -> None:
    out = tmp_path / "folder"
    zm.export(converted, out, "diffusers")
    with pytest.raises(zm.OutputError, match="exists"):
        zm.export(converted, out, "diffusers")
    (out / "config.json").write_text("{}")
    zm.export(converted, out, "diffusers", overwrite=True)
    assert json.loads((out / "config.json").read_text())["dim"] == 256
    (out / "notes.txt").touch()
    with pytest.raises(zm.OutputError, match=r"has other content \(notes.txt\)"):
        zm.export(converted, out, "diffusers", overwrite=True)
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / WEIGHTS).write_bytes(converted.read_bytes())
    (tmp_path / "link").symlink_to(inside)
    (tmp_path / "link.safetensors").symlink_to(inside / WEIGHTS)
    for source, target in (
        (inside / WEIGHTS, inside),
        (inside / WEIGHTS, tmp_path / "link"),
        (inside / WEIGHTS, inside / ".." / "inside"),
        (tmp_path / "link.safetensors", inside),
        (tmp_path / "link" / WEIGHTS, inside),
    ):
        with pytest.raises(zm.UsageError, match=r"output .* holds the input"):
            zm.export(source, target, "diffusers", overwrite=True)
        assert sha256(inside / WEIGHTS) == sha256(converted)


def test_a_full_disk_names_the_output(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(zm.OutputError) as caught:
        zm.export(converted, tmp_path / "out", "diffusers")
    assert str(caught.value).startswith(f"{tmp_path / 'out'} needs ")
    assert f"but {tmp_path} has 1,000 free; free some space" in str(caught.value)
    assert not list(tmp_path.glob("*out*"))


def test_models_that_diffusers_cannot_have(small_file: Path, tmp_path: Path) -> None:
    with pytest.raises(zm.CheckpointError, match="is 40 wide with feed-forward layers of 75"):
        zm.export(small_file, tmp_path / "x", "diffusers")
    zm.convert(small_file, tmp_path / "q.safetensors")
    with pytest.raises(zm.CheckpointError, match="at multiples of 128 rows only"):
        zm.export(tmp_path / "q.safetensors", tmp_path / "x", "diffusers")
    zm.export(tmp_path / "q.safetensors", tmp_path / "rows.safetensors", "fp8-rowwise")
    rows = load_file(tmp_path / "rows.safetensors")
    assert rows["layers.1.feed_forward.w1.weight"].shape == (75, 40)
    assert not (tmp_path / "x").exists()


def damaged_folder(
    folder: Path, target: Path, edit: Callable[[Tensors, dict[str, object]], object]
) -> Path:
    target.mkdir()
    tensors, metadata = load_file(folder / WEIGHTS), metadata_of(folder / WEIGHTS)
    document = json.loads(metadata[HEADER])
    edit(tensors, document["layers"])
    save_file(tensors, target / WEIGHTS, metadata | {HEADER: json.dumps(document)})
    return target


QUERY = "layers.0.attention.to_q"


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (
            lambda _, layers: layers[QUERY].update(full_precision_matrix_mult=True),
            "otherwise than the layers that ComfyUI stacks it with",
        ),
        (
            lambda _, layers: layers.pop(QUERY),
            "otherwise than the layers that ComfyUI stacks it with",
        ),
        (lambda tensors, _: tensors.pop(f"{QUERY}.weight_scale"), "lacks tensor"),
        (
            lambda tensors, _: tensors.update({f"{QUERY}.weight": torch.zeros(256, 256)}),
            "has tensors that cannot be stacked",
        ),
        (
            lambda tensors, _: tensors.update(
                {f"{QUERY}.comfy_quant": torch.zeros(2, dtype=torch.uint8)}
            ),
            "has diffusers names and quantised layers",
        ),
    ],
    ids=["flags differ", "not described", "no scales", "one plain", "with a marker"],
)
def test_folders_that_cannot_be_stacked(
    edit: Callable[[Tensors, dict[str, object]], object],
    sentence: str,
    folder: Path,
    tmp_path: Path,
) -> None:
    damaged = damaged_folder(folder, tmp_path / "damaged", edit)
    with pytest.raises(zm.CheckpointError, match=sentence):
        zm.export(damaged, tmp_path / "x.safetensors", "comfyui")
    assert not (tmp_path / "x.safetensors").exists()


# ---- The command


def test_command(in_process: Run, converted: Path, tmp_path: Path) -> None:
    planned = in_process("export", converted, "--to", "diffusers", "-o", "folder", "--dry-run")
    assert planned.returncode == 0
    assert not (tmp_path / "folder").exists()
    done = in_process("export", converted, "--to", "diffusers", "-o", "folder")
    size = (tmp_path / "folder" / WEIGHTS).stat().st_size
    assert done.stdout == f"wrote folder: 29 layers in MXFP8, {size:,} bytes\n"
    assert f"folder would have exactly {size:,} bytes" in planned.stdout
    result = in_process(
        "export", "folder", "--to", "fp8-rowwise", "-o", "rows.safetensors", "--json"
    )
    report = json.loads(result.stdout)
    assert report["file_bytes"] == (tmp_path / "rows.safetensors").stat().st_size
    assert report["seconds"] > 0
    again = ("export", "folder", "--to", "fp8-rowwise", "-o", "rows.safetensors")
    planned = json.loads(in_process(*again, "--dry-run", "--json").stdout)
    assert planned.items() <= report.items()
    refused = in_process(*again)
    assert refused.returncode == 1
    assert "exists" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--to", "comfyui", "-o", "x.gguf"], "x.gguf does not end in .safetensors"),
        (["--to", "comfyui", "-o", "x.safetensors"], "--to is comfyui, and"),
        (["--to", "gguf", "-o", "x.safetensors"], 'argument --to: invalid choice "gguf"'),
        (["-o", "x.safetensors"], "the following arguments are required: --to"),
    ],
)
def test_wrong_command_lines(
    arguments: list[str], sentence: str, in_process: Run, converted: Path, tmp_path: Path
) -> None:
    result = in_process("export", converted, *arguments)
    assert result.returncode == 2
    assert sentence in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_report_is_short(converted: Path, tmp_path: Path) -> None:
    report = zm.export(converted, tmp_path / "folder", "diffusers")
    assert repr(report).endswith(f"diffusers, 29 layers, {report.file_bytes:,} bytes)")
    assert math.isfinite(report.seconds)
