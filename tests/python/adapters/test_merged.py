"""Adapters merged while a checkpoint is converted: the bytes of a checkpoint merged by torch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import zimage_mxfp8 as zm
from helpers import adapter_files as af
from helpers.adapter_dialects import NAMES, dialects
from helpers.checkpoints import PREFIX, metadata_of, sha256, tensor_bytes, to_diffusers
from helpers.diffusers_reference import make_reference
from helpers.peak_memory import peak_memory
from zimage_mxfp8.checkpoint.source import TensorReader
from zimage_mxfp8.cli.main import main
from zimage_mxfp8.streaming import jobs
from zimage_mxfp8.zimage.layers import zimage_shapes

Tensors = dict[str, torch.Tensor]
OWN = ("zimage_mxfp8",)  # what the header says of the origin differs


@pytest.fixture(scope="module")
def reference():
    """Diffusers' model with weights that BF16 holds."""
    model = make_reference(dim=256, layers=1)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()
    return model


@pytest.fixture(scope="module")
def plain(reference) -> Tensors:
    """Its tensors in ComfyUI's layout, in BF16."""
    return {name: x.to(torch.bfloat16) for name, x in to_comfyui(reference.state_dict()).items()}


@pytest.fixture(scope="module")
def source(plain: Tensors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("merged") / "plain.safetensors"
    save_file(plain, path)
    return path


def to_comfyui(tensors: Tensors) -> Tensors:
    """Diffusers' names in ComfyUI's layout, spelled out here independently."""
    result: Tensors = {}
    for name, tensor in tensors.items():
        if ".to_k." in name or ".to_v." in name:
            continue
        if ".to_q." in name:
            parts = [tensors[name.replace("to_q", f"to_{part}")] for part in "qkv"]
            result[name.replace("to_q", "qkv")] = torch.cat(parts)
            continue
        for theirs, ours in (
            ("attention.to_out.0", "attention.out"),
            ("attention.norm_q", "attention.q_norm"),
            ("attention.norm_k", "attention.k_norm"),
            ("all_x_embedder.2-1", "x_embedder"),
            ("all_final_layer.2-1", "final_layer"),
        ):
            name = name.replace(theirs, ours)
        result[name] = tensor
    return result


def merged_by_torch(plain: Tensors, quantized: set[str], *changes: tuple[float, af.Deltas]):
    """The checkpoint after adding dense changes: F32 where it will be quantised, else BF16."""
    total = to_diffusers({name: tensor.double() for name, tensor in plain.items()})
    touched = set()
    for weight, deltas in changes:
        for module, delta in deltas.items():
            total[f"{module}.weight"] = total[f"{module}.weight"] + weight * delta.double()
            touched |= set(to_comfyui_names(f"{module}.weight"))
    result = to_comfyui(total)
    return {
        name: result[name].float()
        if name in touched & quantized
        else result[name].float().to(torch.bfloat16)
        for name in plain
    }


def to_comfyui_names(name: str) -> list[str]:
    for part in "qkv":
        name = name.replace(f".to_{part}.", ".to_q.")
    fake = {name.replace("to_q", f"to_{part}"): torch.zeros(1, 1) for part in "qkv"}
    return list(to_comfyui(fake if "to_q" in name else {name: torch.zeros(1)}))


def same_bytes(found: Path, wanted: Path) -> None:
    """Both files hold the same tensors and, but for the origin, the same header."""
    one, other = load_file(found), load_file(wanted)
    assert one.keys() == other.keys()
    different = [n for n in one if tensor_bytes(one[n]) != tensor_bytes(other[n])]
    assert different == []
    metadata = [{k: v for k, v in metadata_of(x).items() if k not in OWN} for x in (found, wanted)]
    assert metadata[0] == metadata[1]


def quantized_names(source: Path) -> set[str]:
    return {planned.source.name for planned in zm.plan_conversion(source).quantized}


def write(tmp_path: Path, name: str, written: af.Written) -> Path:
    save_file(written.tensors, tmp_path / name, written.metadata)
    return tmp_path / name


@pytest.mark.parametrize("dialect", NAMES)
def test_a_dialect_is_its_dense_change(
    dialect: str, source: Path, plain: Tensors, reference, tmp_path: Path
) -> None:
    written = dialects(reference)[dialect]
    adapter = write(tmp_path, "a.safetensors", written)
    report = zm.convert(source, tmp_path / "out.safetensors", loras=[adapter], threads=1)
    assert not [warning for warning in report.warnings if "fit" in warning]
    assert report.loras[0]["layers"] == len(written.deltas) or "qkv" in str(list(written.tensors))
    wanted = merged_by_torch(plain, quantized_names(source), (1.0, written.deltas))
    save_file(wanted, tmp_path / "wanted.safetensors")
    zm.convert(tmp_path / "wanted.safetensors", tmp_path / "converted.safetensors", threads=1)
    same_bytes(tmp_path / "out.safetensors", tmp_path / "converted.safetensors")
    zm.convert(source, tmp_path / "unmerged.safetensors", threads=1)
    unmerged, found = (load_file(tmp_path / f"{x}.safetensors") for x in ("unmerged", "out"))
    assert any(tensor_bytes(unmerged[n]) != tensor_bytes(found[n]) for n in found)


def two_adapters(reference, tmp_path: Path) -> tuple[list[tuple[Path, float]], list[af.Written]]:
    """Fused and split, on the same layers, and DoRA; one weight is negative."""
    names = ("diffusers", "kohya, fused", "DoRA, OneTrainer")
    written = [dialects(reference)[name] for name in names]
    paths = [write(tmp_path, f"{i}.safetensors", each) for i, each in enumerate(written)]
    return list(zip(paths, (0.75, -0.5, 1.0), strict=True)), written


@pytest.fixture
def several(source: Path, plain: Tensors, reference, tmp_path: Path):
    """Adapters with weights, and the file that torch's merge is converted to."""
    loras, written = two_adapters(reference, tmp_path)
    changes = [(w, each.deltas) for (_, w), each in zip(loras, written, strict=True)]
    wanted = merged_by_torch(plain, quantized_names(source), *changes)
    save_file(wanted, tmp_path / "wanted.safetensors")
    zm.convert(tmp_path / "wanted.safetensors", tmp_path / "converted.safetensors", threads=1)
    return loras, tmp_path / "converted.safetensors"


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("chunk", [1 << 15, 100_000, 16 << 20])
def test_several_adapters_in_any_chunks(
    threads: int, chunk: int, source: Path, several, tmp_path: Path, monkeypatch
) -> None:
    loras, wanted = several
    monkeypatch.setattr(jobs, "CHUNK_BYTES", chunk // 4 * 4)
    zm.convert(source, tmp_path / "out.safetensors", loras=loras, threads=threads)
    same_bytes(tmp_path / "out.safetensors", wanted)
    zm.convert(source, tmp_path / "again.safetensors", loras=loras[::-1], threads=threads)
    same_bytes(tmp_path / "again.safetensors", wanted)


def test_layouts_prefixes_and_other_tensors(
    source: Path, plain: Tensors, several, tmp_path: Path
) -> None:
    loras, wanted = several
    folder = tmp_path / "transformer"
    folder.mkdir()
    save_file(
        {name: x.contiguous() for name, x in to_diffusers(plain).items()},
        folder / "diffusion_pytorch_model.safetensors",
    )
    zm.convert(tmp_path, tmp_path / "folder.safetensors", loras=loras, threads=1)
    same_bytes(tmp_path / "folder.safetensors", wanted)
    whole = {PREFIX + name: x for name, x in plain.items()} | {"vae.x.weight": torch.ones(8, 8)}
    save_file(whole, tmp_path / "whole.safetensors")
    zm.convert(tmp_path / "whole.safetensors", tmp_path / "out.safetensors", loras=loras, threads=1)
    found, expected = load_file(tmp_path / "out.safetensors"), load_file(wanted)
    assert torch.equal(found.pop("vae.x.weight"), torch.ones(8, 8))
    assert {k.removeprefix(PREFIX) for k in found} >= expected.keys()
    for name, tensor in expected.items():
        assert tensor_bytes(tensor) == tensor_bytes(found[PREFIX + name]), name


@pytest.mark.parametrize("weight", [1.0, -0.5])
def test_dora_per_column(weight: float, source: Path, plain: Tensors, reference, tmp_path: Path):
    """Which the live branch cannot do: the norms need a pass over the layer."""
    written = af.write_dora(reference, af.dotted("transformer."), ".dora_scale", column=True)
    adapter = write(tmp_path, "a.safetensors", written)
    zm.merge_loras(source, tmp_path / "out.safetensors", [(adapter, weight)], threads=2)
    found = to_diffusers(load_file(tmp_path / "out.safetensors"))
    before = to_diffusers(plain)
    for module in written.deltas:
        stem = f"transformer.{module}"
        a, b = (written.tensors[f"{stem}.lora_{x}.weight"].double() for x in "AB")
        changed = before[f"{module}.weight"].double() + weight * (b @ a)
        magnitude = written.tensors[f"{stem}.dora_scale"].double()
        wanted = changed * magnitude / changed.norm(dim=0, keepdim=True)
        assert torch.equal(found[f"{module}.weight"], wanted.float().to(torch.bfloat16)), module


def test_differences_of_biases_and_norms(source: Path, plain: Tensors, tmp_path: Path) -> None:
    names = {
        "layers.0.attention.norm_q": ("layers.0.attention.q_norm.weight", ".diff"),
        "context_refiner.0.ffn_norm2": ("context_refiner.0.ffn_norm2.weight", ".w_norm"),
        "x_embedder": ("x_embedder.bias", ".diff_b"),
        "noise_refiner.0.adaLN_modulation.0": (
            "noise_refiner.0.adaLN_modulation.0.bias",
            ".diff_b",
        ),
        "t_embedder.mlp.2": ("t_embedder.mlp.2.weight", ".diff"),
    }
    tensors, wanted = {}, dict(plain)
    for i, (module, (name, ending)) in enumerate(names.items()):
        delta = af.random(*plain[name].shape, seed=i)
        tensors[f"diffusion_model.{module}{ending}"] = delta
        wanted[name] = (plain[name].double() - 2 * delta.double()).float().to(torch.bfloat16)
    save_file(tensors, tmp_path / "a.safetensors")
    lora = (tmp_path / "a.safetensors", -2)
    zm.merge_loras(source, tmp_path / "out.safetensors", [lora], threads=1)
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
    # The mean that the bias correction takes is the merged embedder's.
    keep = [r"t_embedder"]
    zm.convert(source, tmp_path / "1.safetensors", loras=[lora], exclude_layers=keep, threads=1)
    zm.convert(
        tmp_path / "out.safetensors", tmp_path / "2.safetensors", exclude_layers=keep, threads=1
    )
    same_bytes(tmp_path / "1.safetensors", tmp_path / "2.safetensors")


def test_a_bias_of_an_adapter_counts_with_alpha_and_weight(
    source: Path, plain: Tensors, tmp_path: Path
) -> None:
    stem, (rows, columns) = "transformer.all_x_embedder.2-1", plain["x_embedder.weight"].shape
    a, b, delta = af.low_rank((rows, columns), 4, 1)
    bias = 8 * af.random(rows, seed=2)
    tensors = {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b, f"{stem}.lora_B.bias": bias}
    save_file(tensors | {f"{stem}.alpha": torch.tensor(6.0)}, tmp_path / "a.safetensors")
    lora = (tmp_path / "a.safetensors", -0.5)
    zm.merge_loras(source, tmp_path / "out.safetensors", [lora], threads=1)
    found, scale = load_file(tmp_path / "out.safetensors"), -0.5 * 6.0 / 4
    for part, change in (("weight", delta), ("bias", bias.double())):
        before = plain[f"x_embedder.{part}"]
        wanted = (before.double() + scale * change).float().to(torch.bfloat16)
        assert torch.equal(found[f"x_embedder.{part}"], wanted)
        assert not torch.equal(before, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_plain_output_keeps_dtypes(dtype, plain: Tensors, reference, tmp_path: Path) -> None:
    model = {name: x.to(dtype) for name, x in plain.items()}
    save_file(model, tmp_path / "in.safetensors", {"by": "me"})
    written = dialects(reference)["diffusers"]
    adapter = write(tmp_path, "a.safetensors", written)
    report = zm.merge_loras(
        tmp_path / "in.safetensors", tmp_path / "out.safetensors", [(adapter, 0.5)], threads=2
    )
    total = to_diffusers({name: x.double() for name, x in model.items()})
    for module, delta in written.deltas.items():
        total[f"{module}.weight"] = total[f"{module}.weight"] + 0.5 * delta
    wanted = {name: x.float().to(dtype) for name, x in to_comfyui(total).items()}
    found = load_file(tmp_path / "out.safetensors")
    assert {name: x.dtype for name, x in found.items()} == dict.fromkeys(found, dtype)
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
    metadata = metadata_of(tmp_path / "out.safetensors")
    assert {k: v for k, v in metadata.items() if k not in OWN} == {"by": "me"}
    assert report.loras[0]["weight"] == 0.5


# ---- what is said


def test_the_file_and_the_report_say_what_was_merged(
    source: Path, reference, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = write(tmp_path, "secret.safetensors", dialects(reference)["diffusers"])
    output, report = tmp_path / "out.safetensors", tmp_path / "r.json"
    command = ["convert", str(source), "-o", str(output), "--lora", f"{adapter}:-0.5"]
    assert main([*command, "--dry-run"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "would be merged at weight -0.5" in shown and "LoRA)" in shown
    assert main([*command, "--dry-run", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["loras"][0]["weight"] == -0.5
    size = document["file_bytes"]
    assert {x["dtype"] for x in document["tensors"].values()} == {"BF16"}
    assert document["input_bytes"] == sum(x.nbytes for x in load_file(source).values())
    assert main([*command, "--report", str(report)]) == 0
    assert output.stat().st_size == size
    written = json.loads(report.read_text())["loras"]
    assert written == document["loras"]
    digest = sha256(adapter)
    assert zm.inspect(output).provenance["loras"] == [{"sha256": digest, "weight": -0.5}]
    assert b"secret" not in output.read_bytes()
    capsys.readouterr()
    assert main(["inspect", str(output)]) == 0
    assert f"{digest[:12]} at -0.5" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("call", [zm.convert, zm.merge_loras])
def test_weights_that_are_no_numbers(call, source: Path, tmp_path: Path) -> None:
    words = r"loras has a weight for a.safetensors that must be a finite number, not '0\.8'"
    with pytest.raises(zm.UsageError, match=words):
        call(source, tmp_path / "out.safetensors", loras=[("a.safetensors", "0.8")])


def test_adapters_of_a_plain_file_stay_known(
    source: Path, several, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In files that are merged again, converted and decoded; in that order."""
    files = [tmp_path / f"file-{i}.safetensors" for i in range(4)]
    (first, _), (second, _) = several[0][:2]
    named = [{"sha256": sha256(path), "weight": 0.5} for path in (first, second, first)]
    zm.merge_loras(source, files[0], [(first, 0.5)])
    zm.merge_loras(files[0], files[1], [(second, 0.5)])
    zm.convert(files[1], files[2], loras=[(first, 0.5)])
    zm.dequantize_checkpoint(files[2], files[3])
    for file, count in zip(files, (1, 2, 3, 3), strict=True):
        assert zm.inspect(file).provenance["loras"] == named[:count]
    assert zm.inspect(files[3]).provenance == {"version": zm.__version__, "loras": named}
    for original, loras in (
        (files[1], [(first, 0.5)]),
        (files[0], [(second, 0.5), (first, 0.5)]),
        (source, [(first, 0.5), (second, 0.5), (first, 0.5)]),
    ):
        report = zm.validate(files[2], original, loras=loras)
        assert not [note for note in report.notes if "not the adapters" in note]
    with pytest.raises(zm.CheckpointError, match="with 1 adapter merged in"):
        zm.validate(files[2], files[1])
    zm.convert(source, files[2], overwrite=True)
    notes = zm.validate(files[2], files[0]).notes
    assert any("merged in that the file's header does not name" in note for note in notes)
    zm.convert(files[1], files[2], overwrite=True)
    assert zm.validate(files[2], files[1]).ok
    capsys.readouterr()
    assert main(["inspect", str(files[0])]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"merged by zimage-mxfp8 {zm.__version__}: loras {sha256(first)[:12]} at 0.5" in shown


@pytest.mark.parametrize("weights", [[0.0], [1.0, -1.0]])
def test_weights_that_add_up_to_0(
    source: Path, several, weights: list[float], tmp_path: Path
) -> None:
    adapter = several[0][0][0]
    loras = [(adapter, weight) for weight in weights]
    report = zm.merge_loras(source, tmp_path / "out.safetensors", loras)
    assert report.changed == 0
    assert f"{adapter} changes nothing: its weights add up to 0" in report.warnings


def test_validate_against_the_original(
    source: Path, several, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loras, _ = several
    output = tmp_path / "out.safetensors"
    zm.convert(source, output, loras=loras, threads=1)
    assert zm.validate(output, threads=1).ok
    found = zm.validate(output, source, loras=loras, threads=1)
    assert found.ok and len(found.errors) == found.layers
    assert not any("adapters" in note for note in found.notes)
    with pytest.raises(zm.CheckpointError, match=r"3 adapters merged in.*`loras`"):
        zm.validate(output, source, threads=1)
    changed = [(path, 2.0) for path, _ in loras]
    found = zm.validate(output, source, loras=changed, threads=1)
    assert not found.ok and any("not the adapters and weights" in note for note in found.notes)
    options = [word for path, w in loras for word in ("--lora", f"{path}:{w}")]
    capsys.readouterr()
    assert main(["validate", str(output), "--against", str(source), *options]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "equal the original's with 3 adapters merged" in shown
    assert main(["validate", str(output), "--against", str(source)]) == 1
    assert "--lora" in capsys.readouterr().err
    assert main(["validate", str(output), *options]) == 2


def test_partly_fitting(source: Path, reference, tmp_path: Path, capsys) -> None:
    written = dialects(reference)["diffusers"]
    others = {f"transformer.layers.7{i}.w.lora_A.weight": torch.ones(4, 8) for i in range(5)}
    encoder = {"lora_te_layers_0_self_attn_q_proj.lora_down.weight": torch.ones(4, 96)}
    save_file(written.tensors | others | encoder, tmp_path / "a.safetensors")
    output = tmp_path / "out.safetensors"
    assert (
        main(["merge-lora", str(source), str(output), "--lora", f"{tmp_path}/a.safetensors"]) == 0
    )
    error = capsys.readouterr().err
    first = '"transformer.layers.70.w.lora_A.weight"'
    assert f"warning: {tmp_path}/a.safetensors: 5 tensors fit nothing" in error and first in error
    assert "layers.74" not in error and "1 tensor for the text encoder" in error


def test_names_with_colons(source: Path, reference, tmp_path: Path, monkeypatch) -> None:
    from zimage_mxfp8.cli.loras import weighted_file

    monkeypatch.chdir(tmp_path)
    adapter = write(tmp_path, "a.safetensors", dialects(reference)["diffusers"])
    shutil.copy(adapter, "b:2")
    for text, path, weight in (
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:-0.5", "a.safetensors", -0.5),
        ("b:2", "b:2", 1.0),
        ("b:2:1e-1", "b:2", 0.1),
        (r"C:\loras\a.safetensors", r"C:\loras\a.safetensors", 1.0),
        (r"C:\loras\a.safetensors:0.8", r"C:\loras\a.safetensors", 0.8),
        ("C:a.safetensors", "C:a.safetensors", 1.0),
    ):
        assert weighted_file(text) == (Path(path), weight), text
    for text in ("a.safetensors:", "a.safetensors:x", "a.safetensors:nan", "a.safetensors:inf"):
        command = ["merge-lora", str(source), "out.safetensors", "--lora", text]
        assert main(command) == 2, text
    assert not Path("out.safetensors").exists()


def test_memory_holds_one_layer_at_a_time(source: Path, reference, tmp_path: Path, monkeypatch):
    """Adapters are read module by module: a few layers' branches are in memory."""
    from zimage_mxfp8.conversion import merging

    adapter = write(tmp_path, "a.safetensors", dialects(reference)["diffusers"])
    merge = merging.Merge(zm_source(source), [(adapter, 1.0)])
    merged = merge.apply(())
    with TensorReader() as reader:
        for tensor in merged.tensors.values():
            reader.read(tensor)
            assert len(merge._cache) <= 2


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    peaks = []
    for layers in (1, 4):
        shapes = zimage_shapes(dim=1024, layers=layers, refiner_layers=1, caption_dim=64)
        adapter = tmp_path / f"adapter-{layers}.safetensors"
        save_file(pairs_of_rank_16(shapes), adapter)
        peaks.append(
            peak_memory(tmp_path / f"{layers}.safetensors", shapes, loras=[[str(adapter), 0.5]])
        )
        converted = tmp_path / f"{layers}.safetensors.out"
        assert load_file(converted)["layers.0.attention.out.weight"].float().any()
    assert peaks[1] < peaks[0] + 32, peaks


def pairs_of_rank_16(shapes: dict[str, tuple[int, ...]]) -> Tensors:
    """On every linear layer of the blocks."""
    tensors = {}
    for name, shape in shapes.items():
        if "layers." in name and len(shape) == 2:
            stem = name.removesuffix(".weight")
            tensors[f"{stem}.lora_A.weight"] = torch.full((16, shape[1]), 0.01).bfloat16()
            tensors[f"{stem}.lora_B.weight"] = torch.full((shape[0], 16), 0.01).bfloat16()
    return tensors


def zm_source(path: Path):
    from zimage_mxfp8.checkpoint.identify import open_for

    return open_for(path, "convert")
