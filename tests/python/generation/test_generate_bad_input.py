"""Bad input of `generate`: one sentence, the right exit code, no image."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import zimage_mxfp8 as zm
from helpers.images import STAGES, Generate, fails, init_image
from zimage_mxfp8.cli.main import main
from zimage_mxfp8.cli.models import settle_devices
from zimage_mxfp8.generation.components import VAE, TextEncoder
from zimage_mxfp8.generation.images import decode_image, image_paths, open_image
from zimage_mxfp8.generation.limits import MAX_IMAGES
from zimage_mxfp8.transformer.model import ZImageTransformer

USUAL = ("--prompt", "a", "-o", "o.png", "--steps", "2", "--height", "32", "--width", "32")


def usual_but(*options: object) -> list[object]:
    """`USUAL` with other options, some in place of its own: none may be given twice."""
    pairs = zip(USUAL[::2], USUAL[1::2], strict=True)
    return [word for pair in pairs if pair[0] not in options for word in pair] + [*options]


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
        (("--batch", "100000000"), "--batch must be 1 to 64, not 100000000; for more images"),
        (("--guidance", "-1"), "--guidance must be 0 to 100, not -1.0"),
        (("--guidance", "1e38"), "--guidance must be 0 to 100, not 1e+38"),
        (("--guidance", "nan"), "--guidance must be a finite number, not nan"),
        (("--negative-prompt", "b"), "--negative-prompt has no effect without guidance"),
        (
            ("--strength", "0.5"),
            "--strength has no effect without an init image; add --init-image or drop it",
        ),
        (("--init-image", "i.png", "--strength", "0"), "--strength must be 0.01 to 1"),
        (("--init-image", "i.png", "--strength", "1.5"), "--strength must be 0.01 to 1"),
        (("--prompt", "\udcff"), "--prompt must be UTF-8 text"),
        (("--guidance", "1", "--negative-prompt", "\udcff"), "--negative-prompt must be UTF-8"),
        (("-o", "o.jpg"), "o.jpg must end with .png"),
        (("-o", "o/.png"), "--output o/.png has no name before .png"),
        (("-o", "folder/"), "folder/ is a folder"),
        (("--compute", "fast"), "--compute"),
        (("--dtype", "float64"), "--dtype"),
        (("--device", "tpu"), '--device: must be "cpu", "cuda" or "cuda:N", not "tpu"'),
        (("--device", "cpu", "--gpus", "2"), "--device cpu contradicts --gpus 2; leave one out"),
        (("--device", "cpu", "--gpus", "1"), "--device cpu contradicts --gpus 1; leave one out"),
        (("--gpus", "0"), "--gpus"),
        (("--colour", "red"), "--colour"),
    ],
)
def test_options(
    generate: Generate, tmp_path: Path, options: tuple[str, ...], sentence: str
) -> None:
    fails(generate(*usual_but(*options)), 2, sentence)
    assert not list(tmp_path.iterdir())


def test_a_prompt_is_no_settings(model: Path) -> None:
    generator = zm.ZImageGenerator(model, device="cpu", offload=True)
    with pytest.raises(zm.UsageError, match="settings must be GenerationSettings, not 'a fox'"):
        generator.generate("a fox")  # type: ignore[arg-type]


def test_needed_options(generate: Generate) -> None:
    sentence = "the following arguments are required: --prompt, or --settings-from"
    fails(generate(*USUAL[2:]), 2, sentence)


def test_one_gpu_is_not_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def settled(gpus: int | None, device: str | None) -> tuple[str | None, int]:
        arguments = argparse.Namespace(gpus=gpus, device=device, compute="auto")
        settle_devices(arguments)
        return arguments.device, arguments.gpus

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(zm.UnsupportedError, match="1 GPU is asked for, and torch finds 0; leave"):
        settled(1, None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert settled(None, None) == (None, 1)
    assert settled(1, None) == ("cuda", 1)
    assert settled(1, "cuda:1") == ("cuda:1", 1)
    assert settled(2, None) == (None, 2)


def test_modes_that_are_not_to_be_had(generate: Generate) -> None:
    fails(generate(*USUAL, "--device", "cuda:99"), 1, "device cuda:99: ")
    fails(
        generate(*USUAL, "--device", "cuda", "--gpus", "99"),
        1,
        "99 GPUs are asked for, and torch finds ",
    )
    # Told before files are read: there is no such folder.
    fails(
        generate(*USUAL, "--compute", "mxfp8", model="none"),
        1,
        "compute mode mxfp8: it needs the block-scaled tensor cores of a GPU",
        "the CPU has ",
    )
    fails(
        generate(*USUAL, "--compute", "fp8", transformer=None),
        2,
        "--compute fp8 is for MXFP8 checkpoints, and this one is not quantised",
        "--compute weight-only",
    )


def test_settings_from_python() -> None:
    for changes in ({"steps": 0}, {"batch": 0}, {"seed": -1}, {"height": 0}, {"width": -16}):
        with pytest.raises(zm.UsageError, match=f"^{next(iter(changes))} must be"):
            zm.GenerationSettings("a", **changes)
    with pytest.raises(zm.UsageError, match=f"^batch must be 1 to {MAX_IMAGES}"):
        zm.GenerationSettings("a", batch=MAX_IMAGES + 1)
    assert zm.GenerationSettings("a", batch=MAX_IMAGES).batch == MAX_IMAGES
    with pytest.raises(
        zm.UsageError, match="dtype must be bfloat16, float16 or float32, not 'half'"
    ):
        zm.ZImageGenerator("nowhere", dtype="half")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"model_dir": None}, "model_dir must be the path of a file or folder, not None"),
        ({"transformer": 3}, "transformer must be the path of a file or folder, not 3"),
        ({"compute": None}, "compute must be auto, .*, not None"),
        (
            {"dtype": torch.float64},
            "dtype must be bfloat16, float16 or float32, not torch.float64",
        ),
        ({"dtype": ["float32"]}, r"float16 or float32, not \['float32'\]"),
    ],
)
def test_arguments_of_another_type(
    zimage_folder: Path, arguments: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(zm.UsageError, match=sentence):
        zm.ZImageGenerator(**({"model_dir": zimage_folder, "device": "cpu"} | arguments))


@pytest.mark.parametrize(
    ("name", "values", "sentence"),
    [
        ("prompt", (None, ["a", "b"], 5, b"a"), "prompt must be a text, not "),
        ("negative_prompt", (5, ["a"]), "negative_prompt must be a text, not "),
        ("steps", (2.0, 2.5, "2", True, None), "steps must be a whole number, not "),
        ("height", (32.0, "32"), "height must be a whole number, not "),
        ("width", (32.0, "32"), "width must be a whole number, not "),
        ("seed", (1.5, "1", True), "seed must be a whole number, not "),
        ("batch", (2.0, "2", None), "batch must be a whole number, not "),
        ("guidance", ("1", None, True, 10**400), "guidance must be a finite number, not "),
        ("strength", ("x", float("nan")), "strength must be a finite number, not "),
        ("init_image", (3, b"a.png", ["a.png"]), "init_image must be a path or a PIL image, not "),
    ],
)
def test_wrong_types_from_python(name: str, values: tuple[Any, ...], sentence: str) -> None:
    for value in values:
        with pytest.raises(zm.UsageError, match=f"^{sentence}") as error:
            zm.GenerationSettings(**{"prompt": "a", "guidance": 1.0, name: value})
        assert str(error.value).endswith(repr(value)[:80])


def test_numbers_and_paths_of_other_types_become_plain() -> None:
    settings = zm.GenerationSettings(
        "a",
        steps=np.int64(3),
        height=np.uint16(32),
        seed=np.int32(5),
        guidance=np.float32(1.5),
        init_image="a/b.png",
        strength=1,
    )
    assert (settings.steps, settings.height, settings.seed) == (3, 32, 5)
    assert {type(n) for n in (settings.steps, settings.height, settings.seed)} == {int}
    assert (settings.guidance, type(settings.guidance)) == (1.5, float)
    assert settings.init_image == Path("a/b.png")
    assert (settings.strength, type(settings.strength)) == (1.0, float)


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        (("validate", "a.safetensors"), "--threads 1 needs less"),
        (("validate", "a.safetensors", "--threads", "1"), "close other programs"),
        (("inspect", "a.safetensors"), "close other programs"),
        (("generate", "--model-dir", "m", *USUAL), "--offload needs less"),
        (("generate", "--model-dir", "m", *USUAL, "--offload"), "close other programs"),
    ],
)
def test_remedy_for_memory_is_an_option_of_the_command(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    remedy: str,
) -> None:
    def no_memory(arguments: object) -> int:
        raise MemoryError

    monkeypatch.setattr(importlib.import_module(f"zimage_mxfp8.cli.{options[0]}"), "run", no_memory)
    code = main(list(options))
    captured = capsys.readouterr()
    fails((code, captured.out, captured.err), 1, f"out of memory; {remedy}")


# ---- files


def test_output_is_protected(generate: Generate, tmp_path: Path, zimage_quantized: Path) -> None:
    (tmp_path / "o.png").write_text("mine")
    fails(generate(*USUAL), 1, "o.png exists; --overwrite")
    (tmp_path / "o-1.png").write_text("mine")
    fails(generate(*USUAL, "--batch", 2), 1, "o-1.png exists; --overwrite")
    fails(generate(*usual_but("-o", "none/o.png")), 1, "does not exist; create it first")
    fails(generate(*USUAL, "--init-image", "o.png", "--overwrite"), 2, "o.png is the input")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o-1.png", "o.png"]
    assert (tmp_path / "o.png").read_text() == (tmp_path / "o-1.png").read_text() == "mine"


def test_picture_names() -> None:
    assert image_paths(Path("a/b.c.PNG"), 1) == [Path("a/b.c.PNG")]
    assert image_paths(Path("a/b.c.PNG"), 2) == [Path("a/b.c-0.PNG"), Path("a/b.c-1.PNG")]


def test_init_image(generate: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = (*USUAL, "--init-image", "i.png")
    fails(generate(*options), 1, "the init image i.png does not exist")
    (tmp_path / "i.png").mkdir()
    fails(generate(*options), 1, "the init image i.png is not a regular file; name an image")
    (tmp_path / "i.png").rmdir()
    os.mkfifo(tmp_path / "i.png")
    fails(generate(*options), 1, "the init image i.png is not a regular file; name an image")
    (tmp_path / "i.png").unlink()
    (tmp_path / "i.png").write_text("no image")
    fails(generate(*options), 1, "the init image i.png has a format unknown to Pillow")
    init_image(tmp_path / "whole.png", (64, 64))
    content = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "i.png").write_bytes(content[: len(content) // 2])
    fails(generate(*options), 1, "the init image i.png cannot be read: ")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 - 1)
    with pytest.raises(zm.CheckpointError, match="too large; scale it down"):
        open_image(tmp_path / "whole.png")
    assert not (tmp_path / "o.png").exists()


def test_mask_image(generate: Generate, tmp_path: Path) -> None:
    fails(
        generate(*USUAL, "--mask-image", "m.png"), 2, "--mask-image has no effect without an init"
    )
    init_image(tmp_path / "i.png", (64, 64))
    options = (*USUAL, "--init-image", "i.png", "--mask-image", "m.png")
    fails(generate(*options), 1, "the mask image m.png does not exist")
    init_image(tmp_path / "m.png", (64, 48))
    fails(
        generate(*options),
        2,
        "--mask-image has 64 x 48 pixels, and the init image 64 x 64; give both the same size",
    )


@pytest.mark.parametrize("suffix", ["png", "jpeg", "webp", "gif", "bmp"])
def test_sent_images_are_decoded_as_files_are(tmp_path: Path, suffix: str) -> None:
    init_image(tmp_path / f"i.{suffix}", (20, 10))
    content = (tmp_path / f"i.{suffix}").read_bytes()
    sent = open_image(decode_image(content, "image", 200))
    assert sent.tobytes() == open_image(tmp_path / f"i.{suffix}").tobytes()
    with pytest.raises(zm.CheckpointError, match="the image has 20 x 10 pixels, more than 199"):
        decode_image(content, "image", 199)


def test_sent_images_of_other_formats_are_refused(tmp_path: Path) -> None:
    init_image(tmp_path / "i.tiff", (20, 10))
    for content in ((tmp_path / "i.tiff").read_bytes(), b"%!PS-Adobe-3.0 EPSF-3.0\n"):
        with pytest.raises(zm.CheckpointError, match="the image must be a PNG, JPEG, WebP, GIF"):
            decode_image(content, "image", 200)
    with pytest.raises(zm.CheckpointError, match="the image is empty"):
        decode_image(b"", "image", 200)


def pixels_of(path: Path) -> list[tuple[int, int, int]]:
    """The first row."""
    image = open_image(path)
    assert image.mode == "RGB"
    return [image.getpixel((x, 0)) for x in range(image.width)]


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "CMYK"])
def test_ordinary_init_images_keep_their_levels(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGB", (2, 1))
    image.putpixel((1, 0), (255, 255, 255))
    image.convert(mode).save(tmp_path / "i.tiff")
    assert pixels_of(tmp_path / "i.tiff") == [(0, 0, 0), (255, 255, 255)]


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_init_images_of_16_bits_keep_their_levels(tmp_path: Path, suffix: str) -> None:
    levels = np.array([[0, 257, 1000, 32768, 65280, 65535]], np.uint16)
    Image.fromarray(levels).save(tmp_path / f"i.{suffix}")
    with Image.open(tmp_path / f"i.{suffix}") as image:
        assert image.mode == "I;16"
    found = pixels_of(tmp_path / f"i.{suffix}")
    assert found == [(n, n, n) for n in (0, 1, 4, 128, 254, 255)]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_init_images_without_a_white_are_refused(
    generate: Generate, tmp_path: Path, mode: str
) -> None:
    Image.new(mode, (16, 16), 100).save(tmp_path / "i.tiff")
    fails(
        generate(*USUAL, "--init-image", "i.tiff"),
        1,
        "the init image i.tiff has 32-bit pixels",
        "save it with 8 or 16 bits per channel",
    )


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB"])
def test_transparent_init_images_are_on_white(tmp_path: Path, mode: str) -> None:
    """Black: transparent, half so if the mode has that, and a grey that is not."""
    path, options = tmp_path / "i.png", {}
    grey = (100, 100, 100)
    image = Image.new("RGBA", (3, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 128))
    image.putpixel((2, 0), (*grey, 255))
    half = (127, 127, 127)
    if mode == "P":
        image = Image.new("P", (3, 1))
        image.putpalette([0, 0, 0, 0, 0, 0, *grey])
        image.putdata([0, 1, 2])
        options = {"transparency": bytes([0, 128, 255])}
    elif mode in ("L", "RGB"):  # one colour that stands for nothing
        image = image.convert(mode)
        options = {"transparency": 0 if mode == "L" else (0, 0, 0)}
        half = (255, 255, 255)
    else:
        image = image.convert(mode)
    image.save(path, **options)
    assert pixels_of(path) == [(255, 255, 255), half, grey]


def test_transformer(generate: Generate, tmp_path: Path, zimage_quantized: Path) -> None:
    fails(generate(*USUAL, transformer="none.safetensors"), 1, "none.safetensors does not exist")
    content = zimage_quantized.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[: len(content) // 2])
    fails(generate(*USUAL, transformer="cut.safetensors"), 1, "cut.safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    fails(generate(*USUAL, transformer="other.safetensors"), 1, "is not a Z-Image checkpoint")


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
        generate(*USUAL, model="nowhere/at/all"),
        1,
        "nowhere/at/all does not exist; name a model folder",
        "Tongyi-MAI/Z-Image-Turbo with --download",
    )
    (tmp_path / "file").touch()
    fails(generate(*USUAL, model="file"), 1, "file is a file")
    (tmp_path / "empty").mkdir()
    fails(generate(*USUAL, model="empty"), 1, "empty is not a diffusers folder", "model_index.json")


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("file", "change", "sentence"),
    [
        *(
            (f"{folder}_config.json", {name: value}, f"{name} is {json.dumps(value)}; take the")
            for folder, name, value in [
                ("scheduler/scheduler", "base_shift", "x"),
                ("scheduler/scheduler", "max_shift", None),
                ("scheduler/scheduler", "shift", "x"),
                ("scheduler/scheduler", "shift", 0),
                ("scheduler/scheduler", "shift", -1.5),
                ("scheduler/scheduler", "shift", float("nan")),
                ("scheduler/scheduler", "shift", True),
                ("scheduler/scheduler", "shift_terminal", 1.0),
                ("scheduler/scheduler", "num_train_timesteps", 0),
                ("scheduler/scheduler", "num_train_timesteps", 5.5),
                ("scheduler/scheduler", "max_image_seq_len", 256),
            ]
        ),
        ("vae/config.json", {"shift_factor": None}, "vae/config.json cannot be used: shift_factor"),
        ("vae/config.json", {"scaling_factor": "x"}, 'scaling_factor is "x"; take the file'),
        ("vae/config.json", {"scaling_factor": 0}, "scaling_factor is 0; take the file"),
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


@pytest.mark.parametrize("name", ["scaling_factor", "shift_factor"])
def test_missing_setting_of_the_vae(generate: Generate, model: Path, name: str) -> None:
    edit(model / "vae" / "config.json", lambda document: document.pop(name))
    fails(generate(*USUAL, model="model"), 1, f"vae/config.json cannot be used: {name} is missing")


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
    "tokenizer/tokenizer.json",
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
@pytest.mark.parametrize("file", ["model_index.json", *FILES])
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
    has, needed = ([n, *kept.shape[1:]] for n in (len(kept) - 1, len(kept)))
    fails(
        generate(*USUAL, model="model"),
        1,
        f'tensor "{name}" in model/{folder} has shape {has} where its config.json needs '
        f"{needed} (1 in all); download the model again",
    )


@pytest.mark.parametrize(
    ("file", "change", "name"),
    [
        ("vae/config.json", {"layers_per_block": 0}, "decoder.up_blocks.0.resnets.1.conv1.bias"),
        ("vae/config.json", {"mid_block_add_attention": False}, "decoder.mid_block.attentions.0."),
        (
            "text_encoder/config.json",
            {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2},
            "layers.2.input_layernorm.weight",
        ),
    ],
)
def test_weights_without_a_place_are_not_dropped(
    generate: Generate, model: Path, file: str, change: dict[str, Any], name: str
) -> None:
    edit(model / file, lambda document: document.update(change))
    folder = file.split("/")[0]
    fails(
        generate(*USUAL, model="model"),
        1,
        f'the weights in model/{folder} have tensor "{name}',
        "for which its config.json has no place; download",
    )


def test_reason_on_a_second_line_is_told(generate: Generate, model: Path) -> None:
    edit(
        model / "text_encoder" / "config.json", lambda document: document.update(layer_types=["x"])
    )
    code, out, err = generate(*USUAL, model="model")
    fails((code, out, err), 1, "model/text_encoder cannot be loaded: ", "layer_type")
    assert ":;" not in err and len(err.split("validate_layer_type")[1]) > 40


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
    ("template", "sentence"),
    [
        ("{{ x", "model/tokenizer cannot be loaded: "),
        ("{{ 1/0 }}", "model/tokenizer cannot be loaded: division by zero"),
        ("{{ raise_exception('no') }}", "model/tokenizer cannot be loaded: no;"),
        ("{{ messages[5].content }}", "model/tokenizer cannot be loaded: "),
        ("x", "the chat template of model/tokenizer leaves out the prompt"),
    ],
)
def test_broken_chat_template(
    generate: Generate, model: Path, template: str, sentence: str
) -> None:
    (model / "tokenizer" / "chat_template.jinja").write_text(template)
    fails(generate(*USUAL, model="model"), 1, sentence, "again")


def test_tokenizer_without_letters(generate: Generate, model: Path) -> None:
    def strip(document: dict[str, Any]) -> None:
        document["model"]["vocab"] = {"<|endoftext|>": 0}
        document["added_tokens"] = []

    edit(model / "tokenizer" / "tokenizer.json", strip)
    fails(generate(*USUAL, model="model"), 1, "model/tokenizer has no tokens for letters")


def test_tokenizer_of_two_files(
    generate: Generate, model: Path, tmp_path: Path, zimage_folder: Path
) -> None:
    folder = model / "tokenizer"
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    fails(generate(*USUAL, model="model"), 1, "model/tokenizer has no tokenizer.json or vocab.json")
    (folder / "merges.txt").write_text("#version: 0.2\n")
    images = []
    for i, source in enumerate((zimage_folder, model)):
        code, _, err = generate(*usual_but("-o", f"{i}.png", "--seed", 1), model=source)
        assert code == 0, err
        images.append(np.asarray(Image.open(tmp_path / f"{i}.png")))
    assert (images[0] == images[1]).all()


def test_tokenizer_of_another_model(generate: Generate, model: Path) -> None:
    def shift(document: dict[str, Any]) -> None:
        vocabulary = document["model"]["vocab"]
        document["model"]["vocab"] = {token: i + 5000 for token, i in vocabulary.items()}

    edit(model / "tokenizer" / "tokenizer.json", shift)
    fails(
        generate(*USUAL, model="model"),
        1,
        "model/tokenizer has tokens up to number 5",
        "model/text_encoder up to 258: they belong to different models",
    )


@pytest.mark.parametrize(
    ("file", "change", "sentence"),
    [
        (
            "tokenizer/tokenizer_config.json",
            {"pad_token": "<nope>"},
            "tokens up to number 259, and model/text_encoder up to 258",
        ),
        ("text_encoder/config.json", {"return_dict": False}, "text_encoder cannot be loaded: "),
    ],
)
def test_settings_that_fail_only_in_use(
    generate: Generate, model: Path, file: str, change: dict[str, Any], sentence: str
) -> None:
    edit(model / file, lambda document: document.update(change))
    fails(generate(*USUAL, model="model"), 1, sentence, "again")


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
    result = generate(*USUAL, "--seed", 9, transformer="nan.safetensors")
    fails(
        result,
        1,
        "the image of seed 9 became NaN or Inf in step 1 of 2 (compute weight-only, float32)",
        "run zimage-mxfp8 validate nan.safetensors to check the file",
    )
    assert result[2].endswith("to check the file\n")  # what else may help is in use already
    assert not (tmp_path / "o.png").exists()


@pytest.mark.parametrize(
    ("value", "compute"), [(float("nan"), "weight-only"), (float("inf"), "mxfp8-emulated")]
)
def test_first_bad_step_and_picture_are_named(
    zimage_folder: Path,
    zimage_quantized: Path,
    monkeypatch: pytest.MonkeyPatch,
    value: float,
    compute: str,
) -> None:
    forward, calls = ZImageTransformer.forward, []

    def broken(self: Any, *arguments: Any, **options: Any) -> Any:
        (sample,) = forward(self, *arguments, **options)
        calls.append(len(sample))
        if len(calls) == 3:
            sample[1][0, 0, 0, 0] = value
        return (sample,)

    monkeypatch.setattr(ZImageTransformer, "forward", broken)
    generator = zm.ZImageGenerator(zimage_folder, zimage_quantized, "cpu", compute, "float32")
    settings = zm.GenerationSettings("a", steps=5, height=32, width=32, batch=2, seed=10)
    with pytest.raises(zm.GenerationError, match="seed 11 became NaN or Inf in step 3 of 5") as e:
        generator.generate(settings)
    assert e.value.step == 3
    assert ('compute="weight-only"' in e.value.hint) == (compute != "weight-only")
    assert calls == [2] * 5  # nobody looked before the end


@pytest.mark.parametrize(
    ("part", "method", "step", "sentence"),
    [
        (TextEncoder, "encode", 0, "the text encoder gave NaN or Inf for the prompt"),
        (VAE, "decode", None, "the VAE turned finite latents into NaN or Inf"),
    ],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_nan_of_other_parts_is_theirs(
    zimage_folder: Path,
    zimage_quantized: Path,
    monkeypatch: pytest.MonkeyPatch,
    part: type,
    method: str,
    step: int | None,
    sentence: str,
    dtype: str,
) -> None:
    sound = getattr(part, method)

    def broken(self: Any, argument: Any) -> torch.Tensor:
        out = sound(self, argument)
        out.view(-1)[0] = float("nan")
        return out

    monkeypatch.setattr(part, method, broken)
    generator = zm.ZImageGenerator(zimage_folder, zimage_quantized, "cpu", dtype=dtype)
    with pytest.raises(zm.GenerationError, match=re.escape(sentence)) as e:
        generator.generate(zm.GenerationSettings("a", steps=1, height=32, width=32))
    assert e.value.step == step
    assert ('or use `dtype="float32"`' in e.value.hint) == (dtype == "bfloat16")


# ---- on the way


def test_too_little_memory_is_a_sentence(
    zimage_folder: Path, zimage_quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VAE, "decode", lambda self, latents: torch.empty(1 << 50))
    settings = zm.GenerationSettings("a", steps=1, height=32, width=32)
    for offload, remedy in ((False, "; `offload=True`"), (True, "size or batch")):
        generator = zm.ZImageGenerator(
            zimage_folder, zimage_quantized, "cpu", dtype="float32", offload=offload
        )
        with pytest.raises(zm.UnsupportedError, match="not enough memory for decoding") as e:
            generator.generate(settings)
        assert remedy in str(e.value)


def test_too_little_memory_of_a_device_is_a_sentence(
    zimage_folder: Path, zimage_quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: object) -> None:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 79.11 "
            "GiB of which 409.56 MiB is free."
        )

    monkeypatch.setattr(VAE, "decode", no_memory)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 << 28, 10 << 30))
    generator = zm.ZImageGenerator(zimage_folder, zimage_quantized, "cpu", dtype="float32")
    with pytest.raises(zm.CudaError) as e:
        generator.generate(zm.GenerationSettings("a", steps=1, height=32, width=32))
    assert str(e.value) == (
        "cpu ran out of memory for decoding an image: another 1.50 GiB were needed, and 0.5 of "
        "10.0 GiB are free; close other programs, or use a smaller size or batch; "
        "`offload=True` needs less"
    )


@pytest.mark.slow
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
    err = STAGES.sub("", result.stderr)
    fails((result.returncode, result.stdout, err), 1, "model/vae cannot be loaded: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_adapters_without_weights_count_once() -> None:
    """As for `convert` and `merge_loras`."""
    settings = zm.GenerationSettings("a", loras=["a.safetensors", (Path("b.safetensors"), 0.5)])  # type: ignore[arg-type]
    assert settings.loras == ((Path("a.safetensors"), 1.0), (Path("b.safetensors"), 0.5))
