"""Every file is named for what it is, by every command, in one sentence; `inspect` describes it."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from safetensors.torch import save_file

import zimage_mxfp8 as zm
from helpers.checkpoints import Tensors, random_tensors, small_shapes
from helpers.images import Generate
from zimage_mxfp8.cli.main import main

Make = Callable[[Path], None]


def tensors(**shapes: tuple[int, ...]) -> Tensors:
    return random_tensors({name.replace("__", "."): shape for name, shape in shapes.items()})


def named(*names: str) -> Make:
    """A safetensors file with matrices of these names."""
    return lambda path: save_file(random_tensors(dict.fromkeys(names, (32, 32))), path)


def zimage(change: Callable[[Tensors], object]) -> Make:
    def make(path: Path) -> None:
        found = random_tensors(small_shapes(2))
        change(found)
        save_file(found, path)

    return make


def written(content: bytes) -> Make:
    return lambda path: path.write_bytes(content) and None


def zipped(name: str) -> Make:
    def make(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, b"x" * 100)

    return make


def folder(*files: str) -> Make:
    def make(path: Path) -> None:
        path.mkdir()
        for file in files:
            (path / file).write_bytes(b"x")

    return make


def linked(path: Path) -> None:
    path.symlink_to("gone.safetensors")


def as_float8(found: Tensors) -> None:
    for name, tensor in found.items():
        if tensor.dim() == 2:
            found[name] = tensor.to(torch.float8_e4m3fn)


W1 = "layers.0.feed_forward.w1"
LORA = "layers.0.attention.to_q.lora_"
KOHYA = "lora_unet_layers_0_attention_to_q.lora_"


def lora(prefix: str, *pairs: str) -> Make:
    return lambda path: save_file(
        random_tensors(
            {prefix + pair: (8, 64) if i == 0 else (64, 8) for i, pair in enumerate(pairs)}
        ),
        path,
    )


# What the file is -> how it is made, what every command says, what to do.
KINDS: dict[str, tuple[Make, str, str]] = {
    "LoRA of PEFT": (
        lora("transformer.", LORA + "A.weight", LORA + "B.weight"),
        'is an adapter, not a model: LoRA of rank 8 for Z-Image, names begin with "transformer."',
        "give this file to convert, merge-lora or generate with",
    ),
    "LoRA without prefix": (
        lora("", LORA + "A.default.weight", LORA + "B.default.weight"),
        "LoRA of rank 8 for Z-Image, such as",
        "give this file to",
    ),
    "LoRA of kohya and musubi": (
        lora("", KOHYA + "down.weight", KOHYA + "up.weight"),
        'LoRA of rank 8 for Z-Image, names begin with "lora_unet_"',
        "give this file to",
    ),
    "LoRA of VideoX-Fun": (
        lora("", KOHYA.replace("unet_", "unet__") + "down.weight", KOHYA + "up.weight"),
        "LoRA of rank 8 for Z-Image",
        "give this file to",
    ),
    "LoHa": (
        named(*(f"lora_unet_layers_0_attention_to_q.hada_{w}" for w in ("w1_a", "w1_b", "w2_a"))),
        "is an adapter, not a model: LoHa",
        "give this file to",
    ),
    "LoKr": (
        named("lycoris_layers_0_attention_to_q.lokr_w1", "lycoris_layers_0_attention_to_q.lokr_w2"),
        'LoKr for Z-Image, names begin with "lycoris_"',
        "give this file to",
    ),
    "LoRA of Flux": (
        lora("", "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"),
        "LoRA of rank 8 for Flux",
        "give this file to",
    ),
    "LoRA of SDXL": (
        lora("", "lora_unet_input_blocks_4_1_proj_in.lora_down.weight"),
        "LoRA of rank 8 for Stable Diffusion",
        "give this file to",
    ),
    "full difference": (
        named("diffusion_model.layers.0.attention.qkv.diff"),
        "full difference for Z-Image",
        "give this file to",
    ),
    "VAE": (
        named("decoder.conv_in.weight", "encoder.conv_in.weight"),
        'is a VAE, not a transformer (see "decoder.conv_in.weight")',
        "use the checkpoint of the Z-Image transformer",
    ),
    "text encoder": (
        named("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"),
        "is a text encoder, not a transformer",
        "use the checkpoint of the Z-Image transformer",
    ),
    "vision encoder": (
        named("vision_model.encoder.layers.0.self_attn.q_proj.weight"),
        "is a vision encoder, not a transformer",
        "use the checkpoint of the Z-Image transformer",
    ),
    "ControlNet": (
        named("control_model.input_blocks.0.0.weight"),
        "is a ControlNet, not a model",
        "use the checkpoint of the Z-Image transformer",
    ),
    "Flux": (
        named("double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"),
        "is Flux, not Z-Image",
        "--any-model",
    ),
    "Flux of diffusers": (
        named("single_transformer_blocks.0.proj_mlp.weight", "transformer_blocks.0.ff.weight"),
        "is Flux, not Z-Image",
        "--any-model",
    ),
    "Qwen-Image": (
        named("transformer_blocks.0.img_mod.1.weight"),
        "is Qwen-Image, not Z-Image",
        "--any-model",
    ),
    "Wan": (
        named("blocks.0.self_attn.q.weight", "patch_embedding.weight"),
        "is Wan, not Z-Image",
        "--any-model",
    ),
    "SDXL": (
        named(
            "model.diffusion_model.label_emb.0.0.weight",
            "first_stage_model.decoder.conv_in.weight",
            "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight",
        ),
        "is Stable Diffusion XL, not Z-Image",
        "--any-model",
    ),
    "Lumina 2": (
        named(
            "cap_embedder.1.weight",
            "noise_refiner.0.attention.qkv.weight",
            "layers.0.adaLN_modulation.1.weight",
            "norm_final.weight",
        ),
        "is Lumina 2, not Z-Image",
        "--any-model",
    ),
    "Z-Image without pad tokens": (
        zimage(lambda t: [t.pop(name) for name in ("x_pad_token", "cap_pad_token")]),
        'is part of a Z-Image only: it lacks "cap_pad_token"',
        "download it again",
    ),
    "text encoder with a vision tower, in FP8": (
        lambda path: save_file(
            {
                "visual.blocks.0.attn.qkv.weight": torch.ones(8, 8).to(torch.float8_e4m3fn),
                "model.embed_tokens.weight": torch.ones(8, 8),
            },
            path,
        ),
        "is a text encoder, not a transformer",
        "use the checkpoint of the Z-Image transformer",
    ),
    "Llama": (
        named("tok_embeddings.weight", "layers.0.feed_forward.w1.weight"),
        "is a text encoder, not a transformer",
        "use the checkpoint of the Z-Image transformer",
    ),
    "unknown": (
        named("a.weight"),
        'is not a Z-Image checkpoint (its first tensor is "a.weight")',
        "",
    ),
    "part of Z-Image": (
        named("layers.0.feed_forward.w1.weight", "layers.0.adaLN_modulation.0.weight"),
        'is part of a Z-Image only: it lacks "cap_embedder.1.weight"',
        "download it again",
    ),
    "adapter inside": (
        zimage(lambda t: t.update({f"layers.0.attention.{LORA[17:]}A.weight": torch.ones(2, 40)})),
        "has adapter matrices inside the model",
        "merge the adapter into the weights",
    ),
    "PEFT base layer": (
        zimage(lambda t: t.update({f"{W1}.base_layer.weight": t.pop(f"{W1}.weight")})),
        f'was saved with a PEFT adapter attached ("{W1}.base_layer.weight")',
        "fuse_lora()",
    ),
    "a norm in E8M0": (
        zimage(
            lambda t: t.update(
                {
                    "layers.0.attention.k_norm.weight": torch.full(
                        (128,), 255, dtype=torch.uint8
                    ).view(torch.float8_e8m0fnu)
                }
            )
        ),
        "is quantised already (FP8, see",
        "BF16, F16 or F32",
    ),
    "a token in FP8": (
        zimage(lambda t: t.update({"x_pad_token": t["x_pad_token"].to(torch.float8_e5m2)})),
        'is quantised already (FP8, see "x_pad_token")',
        "BF16, F16 or F32",
    ),
    "Flux in FP8": (
        lambda path: save_file(
            {"double_blocks.0.img_attn.qkv.weight": torch.ones(8, 8).to(torch.float8_e4m3fn)}, path
        ),
        "is Flux, not Z-Image",
        "this one is quantised, so that it cannot be converted or compared either",
    ),
    "unknown in FP8": (
        lambda path: save_file({"a.weight": torch.ones(8, 8).to(torch.float8_e4m3fn)}, path),
        'is not a Z-Image checkpoint (its first tensor is "a.weight")',
        "this one is quantised, so that it cannot be converted or compared either",
    ),
    "plain FP8": (zimage(as_float8), "is quantised already (FP8, see", "BF16, F16 or F32"),
    "scaled FP8": (
        zimage(
            lambda t: t.update(
                {
                    f"{W1}.weight": t[f"{W1}.weight"].to(torch.float8_e4m3fn),
                    f"{W1}.scale_weight": torch.ones(1),
                }
            )
        ),
        "is quantised already (FP8 with scales, see",
        "BF16, F16 or F32",
    ),
    "NVFP4": (
        zimage(lambda t: t.update({f"{W1}.weight_scale_2": torch.ones(1)})),
        "is quantised already (NVFP4, see",
        "BF16, F16 or F32",
    ),
    "INT8": (
        zimage(lambda t: t.update({f"{W1}.weight": torch.zeros(75, 40, dtype=torch.int8)})),
        "is quantised already (INT8, see",
        "BF16, F16 or F32",
    ),
    "GGUF": (
        written(b"GGUF\3\0\0\0" + bytes(99)),
        "is a GGUF file, not a safetensors file",
        "use the BF16 checkpoint",
    ),
    "zip pickle": (
        lambda path: torch.save({"a": torch.ones(3)}, path),
        "is a PyTorch pickle",
        "use the model's safetensors file",
    ),
    "legacy pickle": (
        lambda path: torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=False),
        "is a PyTorch pickle",
        "use the model's safetensors file",
    ),
    "Python's pickle": (
        written(pickle.dumps({"weights": list(range(100))}, protocol=4)),
        "is a PyTorch pickle",
        "safetensors",
    ),
    "zip archive": (zipped("model.safetensors"), "is a zip archive", "unpack it first"),
    "Git LFS pointer": (
        written(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12309866400\n"),
        "is a Git LFS pointer, not a safetensors file",
        "git lfs pull",
    ),
    "HTML page": (
        written(b"\n<!DOCTYPE html><html><body>Log in</body></html>"),
        "is a web page, not a safetensors file",
        "download the file itself",
    ),
    "index.json": (
        written(json.dumps({"metadata": {}, "weight_map": {"a": "b"}}).encode()),
        "is the index of a sharded checkpoint, not a safetensors file",
        "give the folder that it is in",
    ),
    "config": (
        written(json.dumps({"_class_name": "ZImageTransformer2DModel"}).encode()),
        "is a JSON file, not a safetensors file",
        "or its folder",
    ),
    "an error message": (
        written(b"Entry not found"),
        "is a text file",
        "download the model's file",
    ),
    "a long text": (  # a character is cut where the look at it ends
        written(b"a" + "é".encode() * 5000),
        "is a text file",
        "download the model's file",
    ),
    "empty file": (written(b""), "is empty", "download it again"),
    "dangling link": (linked, "is a link to gone.safetensors, which does not exist", "restore"),
    "link to itself": (
        lambda path: path.symlink_to(path.name),
        "is a link to in.safetensors, which leads back to it",
        "link to the file itself",
    ),
    "empty folder": (
        lambda path: path.mkdir(),
        "is not a diffusers folder",
        "name the model's folder",
    ),
    "folder of single files": (
        folder("one.safetensors"),
        "is not a diffusers folder",
        "name another file: its 1 safetensors file cannot be used here",
    ),
    "folder of pickles": (
        folder("pytorch_model.bin"),
        "is not a diffusers folder",
        "download the safetensors files",
    ),
}
COMMANDS = {
    "convert": ["convert", "-i", "{file}", "-o", "out.safetensors"],
    "validate": ["validate", "{file}"],
    "dequantize": ["dequantize", "{file}", "-o", "out.safetensors"],
    "export": ["export", "{file}", "--to", "fp8-rowwise", "-o", "out.safetensors"],
    "probe": ["probe", "{file}"],
    "compare": ["compare", "{file}"],
    "sensitivity": ["sensitivity", "{file}", "--device", "cpu"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_refused_by_name(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make, problem, remedy = KINDS[kind]
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "in.safetensors")
    before = sorted(path.name for path in tmp_path.iterdir())
    for command, arguments in COMMANDS.items():
        code = main([argument.format(file="in.safetensors") for argument in arguments])
        out, err = capsys.readouterr()
        assert code == 1 and out == "", (command, out, err)
        (line,) = err.splitlines()
        assert line.startswith("zimage-mxfp8: error: in.safetensors"), (command, line)
        assert problem in line and remedy in line, (command, line)
        assert len(line) < 400, line
        is_other_model = "--any-model" in remedy or kind == "unknown"
        assert ("--any-model" in line) == is_other_model, "advised for a part or an adapter"
        assert sorted(path.name for path in tmp_path.iterdir()) == before
    with pytest.raises(zm.CheckpointError) as caught:
        zm.ZImageTransformer.from_checkpoint("in.safetensors", "cpu")
    assert problem in str(caught.value)
    # `inspect` describes it.
    assert main(["inspect", "in.safetensors"]) == 0
    described = capsys.readouterr().out
    assert "in.safetensors: " in described
    others = {"validate (as the original)", "convert (any model)", "compare (any model)"}
    found = zm.inspect("in.safetensors")
    assert found.adapter is not None or set(found.accepted_by) <= others


def test_a_folder_of_files_names_one_that_can_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    named("decoder.conv_in.weight")(Path("in/ae.safetensors"))
    save_file(random_tensors(small_shapes(2)), "in/plain.safetensors")
    zm.convert("in/plain.safetensors", "in/encoded.safetensors")
    for command, arguments in COMMANDS.items():
        assert main([argument.format(file="in") for argument in arguments]) == 1
        error = capsys.readouterr().err
        name = "encoded" if command in ("validate", "dequantize", "export") else "plain"
        assert f"name one of its files, such as {name}.safetensors" in error
    assert "name one of its 3 safetensors files" in zm.inspect("in").refusal
    for name in ("ae", "encoded"):
        Path(f"in/{name}.safetensors").unlink()
    assert "name its only safetensors file, plain.safetensors" in zm.inspect("in").refusal


@pytest.mark.parametrize(
    "kind", ["LoRA of PEFT", "VAE", "scaled FP8", "HTML page", "part of Z-Image"]
)
def test_generate_refuses_by_name(kind: str, generate: Generate, tmp_path: Path) -> None:
    make, problem, _ = KINDS[kind]
    make(tmp_path / "in.safetensors")
    code, out, err = generate(
        "--prompt", "a", "-o", "a.png", "--steps", 1, transformer="in.safetensors"
    )
    assert code == 1 and out == "" and problem in err.splitlines()[-1]
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if c not in ("validate", "dequantize", "export")]
)
def test_converted_file_is_refused_where_the_original_is_needed(
    command: str, zimage_quantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "out.safetensors")
    arguments = [
        output if a == "out.safetensors" else a.format(file=zimage_quantized)
        for a in COMMANDS[command]
    ]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert "is quantised already (MXFP8, see" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"\x00" * 100, b"\xff" * 5, b"\x10" + bytes(7) + b"{" * 16])
def test_damaged_files_are_described(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.safetensors").write_bytes(content)
    assert main(["inspect", str(tmp_path / "in.safetensors")]) == 0
    out = capsys.readouterr().out
    assert "a damaged or unknown file" in out and "no command takes it: it " in out
    with pytest.raises(zm.CheckpointError, match="does not exist"):
        zm.inspect(tmp_path / "none.safetensors")


def sharded(folder: Path) -> list[Path]:
    model = ZImageTransformer2DModel(
        dim=256,
        n_layers=4,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=64,
        axes_dims=[32, 48, 48],
        axes_lens=[1536, 512, 512],
    )
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="12MB")
    return sorted(folder.glob("*-of-*.safetensors"))


def test_one_shard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = sharded(tmp_path / "transformer")
    assert len(shards) > 1
    for shard in shards:
        assert main(["convert", "-i", str(shard), "-o", str(tmp_path / "o.safetensors")]) == 1
        assert "is one shard of several; give the folder with all shards and their index: " in (
            capsys.readouterr().err
        )
        assert zm.inspect(shard).kind == "one shard of a sharded Z-Image"
    assert main(["convert", "-i", str(tmp_path), "-o", str(tmp_path / "o.safetensors")]) == 0


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("double_blocks.0.img_attn.qkv.weight", "Flux, one shard of several"),
        ("model.layers.0.self_attn.q_proj.weight", "text encoder, one shard of several"),
        ("a.weight", "not Z-Image, one shard of several"),
    ],
)
def test_one_shard_of_another_model(
    name: str, title: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard, output = tmp_path / "model-00001-of-00003.safetensors", tmp_path / "o.safetensors"
    named(name)(shard)
    command = ["convert", str(shard), str(output)]
    assert main(command) == 1
    assert f"{shard} is one shard of several and is " in capsys.readouterr().err
    assert not output.exists()
    assert zm.inspect(shard).kind == title
    assert main([*command, "--any-model"]) == 0
    assert f"{shard} is one shard of several: the others are not" in capsys.readouterr().err


def test_two_patch_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ZImageTransformer2DModel(
        all_patch_size=(2, 4),
        all_f_patch_size=(1, 1),
        dim=256,
        n_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=64,
        axes_dims=[32, 48, 48],
        axes_lens=[1536, 512, 512],
    )
    model.to(torch.bfloat16).save_pretrained(tmp_path / "two")
    output = tmp_path / "o.safetensors"
    assert main(["convert", "-i", str(tmp_path / "two"), "-o", str(output)]) == 1
    error = capsys.readouterr().err
    assert "has embedders for several patch sizes" in error and "all_patch_size=(2,)" in error
    assert not output.exists()


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda t: t.pop("x_pad_token"), ['"x_pad_token" is missing']),
        (lambda t: t.pop(f"{W1}.weight"), [f'"{W1}.weight" is missing']),
        (
            lambda t: t.update({f"{W1}.weight": torch.zeros(7, 40).bfloat16()}),
            [f'"{W1}.weight" is [7, 40], not [75, 40]'],
        ),
        (
            lambda t: t.update({"layers.1.attention.out.weight": torch.zeros(40, 40).long()}),
            ['"layers.1.attention.out.weight" is I64, not BF16, F16, F32 or F64'],
        ),
        (
            lambda t: t.update({"layers.1.attention_norm1.weight": torch.ones(40).bool()}),
            ['"layers.1.attention_norm1.weight" is BOOL, not BF16, F16, F32 or F64'],
        ),
        (
            lambda t: t.update({"layers.1.feed_forward.w9.weight": torch.zeros(8, 8).double()}),
            ['"layers.1.feed_forward.w9.weight" is not a weight of Z-Image'],
        ),
        (
            lambda t: t.update({"layers.1.feed_forward.w9.weight": torch.zeros(8, 8)}),
            ['"layers.1.feed_forward.w9.weight" is not a weight of Z-Image'],
        ),
        (
            lambda t: [t.pop(n) for n in list(t) if n.startswith("layers.1.attention")],
            ["layers.1.attention.k_norm.weight", "is missing; and 1 more; download or export"],
        ),
        (
            lambda t: [t.pop(n) for n in list(t) if n.startswith("layers.1.") and "w1" not in n],
            ["is missing; and 7 more; download"],
        ),
    ],
)
def test_structure_is_checked_before_writing(
    change: Callable[[Tensors], object],
    parts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    zimage(change)(tmp_path / "in.safetensors")
    for arguments in (["-o", "o.safetensors"], ["--dry-run"]):
        assert main(["convert", "-i", "in.safetensors", *arguments]) == 1
        out, err = capsys.readouterr()
        assert out == "" and "is not a whole Z-Image transformer: " in err
        assert all(part in err for part in parts), err
        assert "--any-model" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


def test_what_blocks_do_not_use_is_copied(tmp_path: Path) -> None:
    extra = {
        "norm_final.weight": torch.ones(40),
        "siglip_embedder.1.weight": torch.ones(40, 8),
        "layers.0.attention.step": torch.tensor(3),
    }
    zimage(lambda t: t.update(extra))(tmp_path / "in.safetensors")
    zm.convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors")
    assert zm.validate(tmp_path / "out.safetensors", tmp_path / "in.safetensors").ok


def test_mutated_headers() -> None:
    """A few; `fuzz_headers.py` by itself tries many."""
    from programs.fuzz_headers import fuzz

    fuzz(60, None, seed=7)
    fuzz(10, None, seed=7, command_line=True)
