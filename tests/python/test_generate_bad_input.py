"""Bad input of `generate`: one sentence, the right exit code, no picture."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import zimage_mxfp8 as zm
from conftest import Generate
from test_generate import init_image
from zimage_mxfp8.generation.components import VAE, TextEncoder
from zimage_mxfp8.generation.pictures import open_init_image, picture_paths
from zimage_mxfp8.transformer.model import ZImageTransformer

USUAL = ("--prompt", "a", "-o", "o.png", "--steps", "2", "--height", "32", "--width", "32")


def fails(result: tuple[int, str, str], code: int, *parts: str) -> None:
    found, out, err = result
    assert found == code, err
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("zimage-mxfp8: error: "), err
    for part in parts:
        assert part in line, (part, line)


# ---- options


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--height", "40"), "--height must be a multiple of 16 up to 8192, not 40"),
        (("--width", "8208"), "--width must be a multiple of 16 up to 8192, not 8208"),
        (("--steps", "0"), "--steps"),
        (("--steps", "1001"), "--steps must be 1 to 1000"),
        (("--batch", "0"), "--batch"),
        (("--seed", "-1"), "--seed"),
        (("--seed", str(2**63 - 1), "--batch", "2"), "--seed must be 0 or more, and below 2^63"),
        (("--guidance", "-1"), "--guidance must be 0 or more"),
        (("--guidance", "nan"), "--guidance must be 0 or more"),
        (("--negative-prompt", "b"), "--negative-prompt has no effect without guidance"),
        (("--strength", "0.5"), "--strength is for --init-image"),
        (("--init-image", "i.png", "--strength", "0"), "--strength must be 0.01 to 1"),
        (("--init-image", "i.png", "--strength", "1.5"), "--strength must be 0.01 to 1"),
        (("--prompt", "\udcff"), "--prompt is not UTF-8 text"),
        (("--guidance", "1", "--negative-prompt", "\udcff"), "--negative-prompt is not UTF-8"),
        (("-o", "o.jpg"), "o.jpg must end with .png"),
        (("-o", "folder/"), "folder/ is a folder"),
        (("--compute", "fast"), "--compute"),
        (("--dtype", "float16"), "--dtype"),
        (("--device", "tpu"), 'device must be "cpu", "cuda" or "cuda:N", not "tpu"'),
        (("--colour", "red"), "--colour"),
    ],
)
def test_options(
    generate: Generate, tmp_path: Path, options: tuple[str, ...], sentence: str
) -> None:
    fails(generate(*USUAL, *options), 2, sentence)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["--prompt", "-o"])
def test_needed_options(generate: Generate, missing: str) -> None:
    at = USUAL.index(missing)
    fails(
        generate(*USUAL[:at], *USUAL[at + 2 :]), 2, "the following arguments are required", missing
    )


def test_modes_that_are_not_to_be_had(generate: Generate) -> None:
    fails(generate(*USUAL, "--device", "cuda:99"), 1, "device cuda:99: ")
    fails(generate(*USUAL, "--compute", "mxfp8"), 1, "compute=mxfp8: ", "the CPU has ")
    fails(generate(*USUAL, "--compute", "folded", transformer=None), 2, "is not quantised")


def test_settings_from_python() -> None:
    for changes in ({"steps": 0}, {"batch": 0}, {"seed": -1}, {"height": 0}, {"width": -16}):
        with pytest.raises(zm.UsageError, match=f"--{next(iter(changes))} must be"):
            zm.GenerationSettings("a", **changes)
    with pytest.raises(zm.UsageError, match="dtype must be bfloat16 or float32, not 'half'"):
        zm.ZImageGenerator("nowhere", dtype="half")


# ---- files


def test_output_is_protected(generate: Generate, tmp_path: Path, zimage_quantized: Path) -> None:
    (tmp_path / "o.png").write_text("mine")
    fails(generate(*USUAL), 1, "o.png exists; --overwrite")
    (tmp_path / "o-1.png").write_text("mine")
    fails(generate(*USUAL, "--batch", 2), 1, "o-1.png exists; --overwrite")
    fails(generate(*USUAL, "-o", "none/o.png"), 1, "does not exist; create it first")
    fails(generate(*USUAL, "--init-image", "o.png", "--overwrite"), 2, "o.png is the input")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o-1.png", "o.png"]
    assert (tmp_path / "o.png").read_text() == (tmp_path / "o-1.png").read_text() == "mine"


def test_picture_names() -> None:
    assert picture_paths(Path("a/b.c.PNG"), 1) == [Path("a/b.c.PNG")]
    assert picture_paths(Path("a/b.c.PNG"), 2) == [Path("a/b.c-0.PNG"), Path("a/b.c-1.PNG")]


def test_init_image(generate: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = (*USUAL, "--init-image", "i.png")
    fails(generate(*options), 1, "the init image i.png does not exist")
    (tmp_path / "i.png").mkdir()
    fails(generate(*options), 1, "the init image i.png cannot be read: ", "directory")
    (tmp_path / "i.png").rmdir()
    (tmp_path / "i.png").write_text("no picture")
    fails(generate(*options), 1, "the init image i.png is in no format that Pillow reads")
    init_image(tmp_path / "whole.png", (64, 64))
    content = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "i.png").write_bytes(content[: len(content) // 2])
    fails(generate(*options), 1, "the init image i.png cannot be read: ")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 - 1)
    with pytest.raises(zm.CheckpointError, match="too large; scale it down"):
        open_init_image(tmp_path / "whole.png")
    assert not (tmp_path / "o.png").exists()


def test_transparent_and_grey_init_images(tmp_path: Path) -> None:
    for mode in ("RGBA", "L", "P", "1", "I;16"):
        Image.new(mode, (16, 16)).save(tmp_path / "i.png")
        assert open_init_image(tmp_path / "i.png").mode == "RGB"


def test_transformer(generate: Generate, tmp_path: Path, zimage_quantized: Path) -> None:
    fails(generate(*USUAL, transformer="none.safetensors"), 1, "none.safetensors does not exist")
    content = zimage_quantized.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[: len(content) // 2])
    fails(generate(*USUAL, transformer="cut.safetensors"), 1, "cut.safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    fails(generate(*USUAL, transformer="other.safetensors"), 1, "is no Z-Image transformer")


def test_transformer_of_another_model(
    generate: Generate, tmp_path: Path, zimage_folder: Path
) -> None:
    tensors = load_file(zimage_folder / "transformer" / "diffusion_pytorch_model.safetensors")
    tensors["cap_embedder.0.weight"] = torch.ones(64)
    tensors["cap_embedder.1.weight"] = torch.ones(256, 64)
    save_file(tensors, tmp_path / "other.safetensors")
    fails(
        generate(*USUAL, transformer="other.safetensors"),
        1,
        "other.safetensors takes captions of 64 features",
        "text_encoder gives 96: they belong to different models",
    )


# ---- the model's folder


@pytest.fixture
def model(zimage_folder: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(zimage_folder, tmp_path / "model"))


def test_folder_that_is_none(generate: Generate, tmp_path: Path) -> None:
    fails(
        generate(*USUAL, model="Tongyi-MAI/Z-Image-Turbo"),
        1,
        "Tongyi-MAI/Z-Image-Turbo does not exist",
        "names on a hub are not looked up",
        "--local-dir FOLDER",
    )
    (tmp_path / "file").touch()
    fails(generate(*USUAL, model="file"), 1, "file is a file")
    (tmp_path / "empty").mkdir()
    fails(generate(*USUAL, model="empty"), 1, "empty is no diffusers folder", "model_index.json")


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("file", "change", "sentence"),
    [
        ("model_index.json", {"_class_name": "FluxPipeline"}, "is a model for FluxPipeline, not"),
        ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "is a DDIMScheduler"),
        ("vae/config.json", {"latent_channels": 4}, "vae does not make 16 channels of 8 x 8"),
        ("vae/config.json", {"block_out_channels": [8, 8]}, "vae does not make 16 channels"),
        ("vae/config.json", {"block_out_channels": 3}, "vae does not make 16 channels"),
        ("text_encoder/config.json", {"hidden_size": "wide"}, "config.json has no hidden_size"),
    ],
)
def test_folder_of_another_model(
    generate: Generate, model: Path, file: str, change: dict[str, Any], sentence: str
) -> None:
    edit(model / file, lambda document: document.update(change))
    fails(generate(*USUAL, model="model"), 1, "model", sentence)


@pytest.mark.parametrize("part", ["tokenizer", "text_encoder", "vae", "scheduler"])
def test_missing_part_is_named(generate: Generate, model: Path, part: str) -> None:
    shutil.rmtree(model / part)
    fails(generate(*USUAL, model="model"), 1, f"model has no {part}/; download")


def test_missing_transformer_is_named(generate: Generate, model: Path) -> None:
    shutil.rmtree(model / "transformer")
    fails(
        generate(*USUAL, model="model", transformer=None),
        1,
        "model has no transformer/; name a file with --transformer",
    )


FILES = [
    "tokenizer/tokenizer_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "scheduler/scheduler_config.json",
]


@pytest.mark.parametrize("file", FILES)
def test_missing_file_is_named(generate: Generate, model: Path, file: str) -> None:
    (model / file).unlink()
    part, name = file.split("/")
    fails(generate(*USUAL, model="model"), 1, f"model/{part} has no {name}")


@pytest.mark.parametrize("offload", [(), ("--offload",)], ids=["", "offload"])
@pytest.mark.parametrize("file", ["model_index.json", "tokenizer/tokenizer.json", *FILES])
def test_damaged_file_is_named(
    generate: Generate, model: Path, file: str, offload: tuple[str, ...]
) -> None:
    content = (model / file).read_bytes()
    (model / file).write_bytes(content[: len(content) // 2])
    fails(generate(*USUAL, *offload, model="model"), 1, f"model/{file.rpartition('/')[0]}", "again")
    assert not (model.parent / "o.png").exists()


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("text_encoder/model.safetensors", "layers.0.self_attn.q_proj.weight"),
        ("vae/diffusion_pytorch_model.safetensors", "decoder.conv_in.weight"),
    ],
)
def test_incomplete_weights_are_not_made_up(
    generate: Generate, model: Path, part: str, name: str
) -> None:
    tensors = load_file(model / part)
    kept = tensors.pop(name)
    save_file(tensors, model / part, {"format": "pt"})
    folder = part.split("/")[0]
    fails(generate(*USUAL, model="model"), 1, f"model/{folder} lack tensor", f'"{name}" (1 in all)')
    save_file(tensors | {name: kept[:-1]}, model / part, {"format": "pt"})
    fails(generate(*USUAL, model="model"), 1, f"model/{folder} cannot be loaded: ")


def test_missing_shard(generate: Generate, model: Path) -> None:
    tensors = load_file(model / "text_encoder" / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "gone.safetensors")}
    (model / "text_encoder" / "model.safetensors").unlink()
    (model / "text_encoder" / "model.safetensors.index.json").write_text(json.dumps(index))
    fails(generate(*USUAL, model="model"), 1, "model/text_encoder cannot be loaded: ")


def test_tokenizer_without_chat_template(generate: Generate, model: Path) -> None:
    (model / "tokenizer" / "chat_template.jinja").unlink()
    fails(generate(*USUAL, model="model"), 1, "model/tokenizer has no chat template")


@pytest.mark.parametrize(
    ("file", "change"),
    [
        (
            "text_encoder/config.json",
            {"auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.Own"}},
        ),
        (
            "tokenizer/tokenizer_config.json",
            {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}},
        ),
    ],
)
def test_code_of_a_folder_is_not_run(
    generate: Generate, model: Path, file: str, change: dict[str, Any]
) -> None:
    part = model / file.split("/")[0]
    (part / "own.py").write_text("from pathlib import Path; Path('ran').touch()\nclass Own: pass\n")
    unknown = {"model_type": "own", "tokenizer_class": "OwnTokenizer"}
    edit(model / file, lambda document: document.update(unknown | change))
    fails(generate(*USUAL, model="model"), 1, f"model/{part.name} cannot be loaded: ")
    assert not (model.parent / "ran").exists()


# ---- NaN


def test_nan_in_the_transformer_is_reported_with_the_step(
    generate: Generate, tmp_path: Path, zimage_folder: Path
) -> None:
    tensors = load_file(zimage_folder / "transformer" / "diffusion_pytorch_model.safetensors")
    tensors["layers.0.attention.to_out.0.weight"][3, 3] = float("nan")
    save_file(tensors, tmp_path / "nan.safetensors")
    fails(
        generate(*USUAL, "--seed", 9, transformer="nan.safetensors"),
        1,
        "the picture of seed 9 became NaN or Inf in step 1 of 2 (compute exact, float32)",
        "validate nan.safetensors",
    )
    assert not (tmp_path / "o.png").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_first_bad_step_and_picture_are_named(
    zimage_folder: Path, zimage_quantized: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    forward, calls = ZImageTransformer.forward, []

    def broken(self: Any, *arguments: Any, **options: Any) -> Any:
        (sample,) = forward(self, *arguments, **options)
        calls.append(len(sample))
        if len(calls) == 3:
            sample[1][0, 0, 0, 0] = value
        return (sample,)

    monkeypatch.setattr(ZImageTransformer, "forward", broken)
    generator = zm.ZImageGenerator(zimage_folder, zimage_quantized, "cpu", dtype="float32")
    settings = zm.GenerationSettings("a", steps=5, height=32, width=32, batch=2, seed=10)
    with pytest.raises(zm.GenerationError, match="seed 11 became NaN or Inf in step 3 of 5") as e:
        generator.generate(settings)
    assert e.value.step == 3
    assert calls == [2] * 5  # nobody looked before the end


@pytest.mark.parametrize(
    ("part", "method", "step", "sentence"),
    [
        (TextEncoder, "encode", 0, "the text encoder gave NaN or Inf for the prompt"),
        (VAE, "decode", None, "the VAE turned sound latents into NaN or Inf"),
    ],
)
def test_nan_of_other_parts_is_theirs(
    zimage_folder: Path,
    zimage_quantized: Path,
    monkeypatch: pytest.MonkeyPatch,
    part: type,
    method: str,
    step: int | None,
    sentence: str,
) -> None:
    sound = getattr(part, method)

    def broken(self: Any, argument: Any) -> torch.Tensor:
        out = sound(self, argument)
        out.view(-1)[0] = float("nan")
        return out

    monkeypatch.setattr(part, method, broken)
    generator = zm.ZImageGenerator(zimage_folder, zimage_quantized, "cpu", dtype="float32")
    with pytest.raises(zm.GenerationError, match=re.escape(sentence)) as e:
        generator.generate(zm.GenerationSettings("a", steps=1, height=32, width=32))
    assert e.value.step == step


# ---- on the way


def test_too_little_memory_is_a_sentence(
    zimage_folder: Path, zimage_quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VAE, "decode", lambda self, latents: torch.empty(1 << 50))
    settings = zm.GenerationSettings("a", steps=1, height=32, width=32)
    for offload, remedy in ((False, "; --offload"), (True, "size or batch")):
        generator = zm.ZImageGenerator(
            zimage_folder, zimage_quantized, "cpu", dtype="float32", offload=offload
        )
        with pytest.raises(zm.UnsupportedError, match="not enough memory for decoding") as e:
            generator.generate(settings)
        assert remedy in str(e.value)


def test_as_a_process(zimage_folder: Path, tmp_path: Path) -> None:
    """What the shell sees of an error that comes late: a damaged VAE, after all imports."""
    model = shutil.copytree(zimage_folder, tmp_path / "model")
    weights = model / "vae" / "diffusion_pytorch_model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    command = [sys.executable, "-m", "zimage_mxfp8.cli.main", "generate", "--model-dir", "model"]
    result = subprocess.run(
        [*command, *USUAL, "--device", "cpu", "--offload"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    fails((result.returncode, result.stdout, result.stderr), 1, "model/vae cannot be loaded: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
