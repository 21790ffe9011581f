"""Images: against diffusers' own pipelines, and what a user may rely on."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    ZImageImg2ImgPipeline,
    ZImageInpaintPipeline,
    ZImagePipeline,
)
from PIL import Image
from transformers import Qwen3ForCausalLM

import zimage_mxfp8 as zm
from helpers.commands import Run
from helpers.diffusers_reference import load_reference, make_reference
from helpers.images import SIZE, STAGES, Generate, generator_of, init_image, levels, settings_of
from helpers.model_folder import make_pipeline, make_tokenizer
from helpers.terminal import run_in_terminal
from zimage_mxfp8.generation import generator as generator_module
from zimage_mxfp8.generation.images import METADATA_KEY
from zimage_mxfp8.generation.sampler import denoise
from zimage_mxfp8.transformer.model import ZImageTransformer


@pytest.fixture(scope="module")
def reference(zimage_quantized: Path) -> ZImagePipeline:
    """Diffusers' own pipeline, with the weights that the MXFP8 file stands for."""
    plain = zimage_quantized.parent / "plain.safetensors"
    zm.dequantize_checkpoint(zimage_quantized, plain)
    pipeline = make_pipeline()
    load_reference(pipeline.transformer, plain)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# ---- the same images as diffusers'


@pytest.mark.parametrize("steps", [1, 8])
def test_picture_equals_that_of_diffusers(
    generate: Generate, reference: ZImagePipeline, tmp_path: Path, steps: int
) -> None:
    code, out, err = generate(
        *("--prompt", "a cat", "-o", "o.png", "--seed", 7, "--steps", steps, *SIZE)
    )
    assert (code, err) == (0, "")
    count = "1 step" if steps == 1 else f"{steps} steps"
    assert re.fullmatch(
        rf"o\.png: 64x48, seed 7, {count} of \d+\.\d\d s, compute weight-only on cpu\n"
        r"total: \d+\.\d s, peak memory of the process: \d\S* [MG]iB\n",
        out,
    )
    want = reference(
        "a cat",
        height=48,
        width=64,
        num_inference_steps=steps,
        guidance_scale=0.0,
        generator=generator_of(7),
    ).images[0]
    assert abs(levels(tmp_path / "o.png") - levels(want)).max() <= 1
    assert levels(want).std() > 20  # no grey image, which anything would equal


def test_prompt_and_seed_change_the_image(generate: Generate, tmp_path: Path) -> None:
    images = []
    for prompt, seed in (("a cat", 7), ("a dog", 7), ("a cat", 8)):
        code, _, _ = generate(
            *("--prompt", prompt, "-o", "o.png", "--seed", seed, "--overwrite", *SIZE)
        )
        assert code == 0
        images.append(levels(tmp_path / "o.png"))
    assert abs(images[0] - images[1]).max() > 10
    assert abs(images[0] - images[2]).max() > 10


def test_guidance_equals_that_of_diffusers(
    generate: Generate, reference: ZImagePipeline, tmp_path: Path
) -> None:
    options = ("--guidance", 3.5, "--steps", 4, "--seed", 1, *SIZE)
    for negative in ("a dog", None):
        extra = () if negative is None else ("--negative-prompt", negative)
        code, _, err = generate(
            *("--prompt", "a cat", "-o", "o.png", *options, *extra, "--overwrite")
        )
        assert code == 0, err
        want = reference(
            "a cat",
            negative_prompt=negative,
            height=48,
            width=64,
            num_inference_steps=4,
            guidance_scale=3.5,
            generator=generator_of(1),
        ).images[0]
        assert abs(levels(tmp_path / "o.png") - levels(want)).max() <= 1


@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_init_image_equals_that_of_diffusers(
    generate: Generate, reference: ZImagePipeline, tmp_path: Path, strength: float
) -> None:
    image = init_image(tmp_path / "in.png", (64, 48))
    code, out, err = generate(
        *("--prompt", "a cat", "-o", "o.png", "--init-image", "in.png", "--seed", 3),
        *("--strength", strength, "--steps", 6),
    )
    assert code == 0, err
    assert f"64x48, seed 3, {2 if strength == 0.3 else 6} steps" in out
    want = ZImageImg2ImgPipeline(**reference.components)(
        "a cat",
        image=image,
        strength=strength,
        num_inference_steps=6,
        guidance_scale=0.0,
        generator=generator_of(3),
    ).images[0]
    assert abs(levels(tmp_path / "o.png") - levels(want)).max() <= 1


def half_mask(path: Path) -> Image.Image:
    """White on the right half of 64 x 48 pixels."""
    mask = Image.new("L", (64, 48))
    mask.paste(255, (32, 0, 64, 48))
    mask.save(path)
    return mask


@pytest.mark.parametrize("strength", [None, 0.6])
def test_masked_image_equals_that_of_diffusers(
    generate: Generate, reference: ZImagePipeline, tmp_path: Path, strength: float | None
) -> None:
    image, mask = init_image(tmp_path / "in.png", (64, 48)), half_mask(tmp_path / "mask.png")
    given = () if strength is None else ("--strength", strength)
    code, _, err = generate(
        *("--prompt", "a cat", "-o", "o.png", "--init-image", "in.png", "--mask-image", "mask.png"),
        *("--seed", 3, "--steps", 4, *given),
    )
    assert code == 0, err
    want = ZImageInpaintPipeline(**reference.components)(
        "a cat",
        image=image,
        mask_image=mask,
        strength=strength or 1.0,
        num_inference_steps=4,
        guidance_scale=0.0,
        generator=generator_of(3),
    ).images[0]
    found = levels(tmp_path / "o.png")
    assert abs(found - levels(want)).max() <= 1
    code, _, _ = generate(
        *("--prompt", "a cat", "-o", "all.png", "--init-image", "in.png", "--seed", 3),
        *("--steps", 4, "--strength", strength or 1.0),
    )
    assert code == 0
    assert abs(levels(tmp_path / "all.png") - found)[:, :16].max() > 10  # what the mask keeps
    stored = settings_of(tmp_path / "o.png")
    assert (stored["mask_image"], stored["strength"]) == ("mask.png", strength or 1.0)


def test_images_in_memory_give_what_files_give(
    zimage_folder: Path, zimage_quantized: Path, tmp_path: Path
) -> None:
    image, mask = init_image(tmp_path / "in.png", (64, 48)), half_mask(tmp_path / "mask.png")
    generator = zm.ZImageGenerator(zimage_folder, zimage_quantized, "cpu", dtype="float32")
    of_files, in_memory = (
        generator.generate(
            zm.GenerationSettings("a", steps=2, seed=1, batch=2, init_image=i, mask_image=m)
        )
        for i, m in ((tmp_path / "in.png", tmp_path / "mask.png"), (image, mask))
    )
    for a, b in zip(of_files.images, in_memory.images, strict=True):
        assert (levels(a) == levels(b)).all()
    assert abs(levels(in_memory.images[0]) - levels(in_memory.images[1])).max() > 10
    assert of_files.metadata(0)["init_image"] == "in.png"
    assert in_memory.metadata(0)["init_image"] == in_memory.metadata(1)["mask_image"] == "in memory"


@pytest.mark.parametrize("compute", ["mxfp8-emulated", "fp8"])
def test_picture_differs_by_the_rounding_of_activations(
    generate: Generate, reference: ZImagePipeline, tmp_path: Path, compute: str
) -> None:
    code, out, err = generate(
        *("--prompt", "a cat", "-o", "o.png", "--seed", 7, "--compute", compute, *SIZE)
    )
    assert code == 0 and f"compute {compute}" in out, err
    want = levels(
        reference(
            "a cat", height=48, width=64, num_inference_steps=8, guidance_scale=0.0,
            generator=generator_of(7),
        ).images[0]
    )  # fmt: skip
    difference = levels(tmp_path / "o.png") - want
    # Each activation is off by 2 to 3 % (RMS of E4M3's rounding), independently of the others.
    assert 0 < np.sqrt(np.mean(difference**2)) < 0.1 * want.std()


def test_bfloat16_is_the_default_and_near(
    in_process: Run,
    zimage_folder: Path,
    zimage_quantized: Path,
    generate: Generate,
    tmp_path: Path,
) -> None:
    code, _, _ = generate("--prompt", "a cat", "-o", "float32.png", "--seed", 7, *SIZE)
    assert code == 0
    result = in_process(
        *("generate", "--model-dir", zimage_folder, "--transformer", zimage_quantized),
        *("--prompt", "a cat", "-o", "bfloat16.png", "--seed", 7, "--device", "cpu", *SIZE),
    )
    assert result.returncode == 0 and STAGES.sub("", result.stderr) == ""
    assert result.stdout.startswith("bfloat16.png: 64x48, seed 7, 8 steps of ")
    assert settings_of(tmp_path / "bfloat16.png")["dtype"] == "bfloat16"
    wide = levels(tmp_path / "float32.png")
    difference = levels(tmp_path / "bfloat16.png") - wide
    assert 0 < np.sqrt(np.mean(difference**2)) < 0.15 * wide.std()


PARTS = {"float16": [torch.bfloat16, torch.float16, torch.float32]}


def test_float16_is_nearer(zimage_folder: Path, zimage_quantized: Path, tmp_path: Path) -> None:
    image, mask = init_image(tmp_path / "in.png", (64, 48)), half_mask(tmp_path / "mask.png")
    given: list[dict[str, Any]] = [
        {"height": 48, "width": 64},
        {"init_image": image},
        {"init_image": image, "mask_image": mask},
    ]
    settings = [zm.GenerationSettings("a", steps=2, seed=1, guidance=2.0, **x) for x in given]
    captions = zm.ZImageGenerator(zimage_folder, zimage_quantized, "cpu").encode(settings[0])
    drawn: dict[str, list[Any]] = {}
    for dtype in ("float32", "bfloat16", "float16"):
        generator = zm.ZImageGenerator(zimage_folder, zimage_quantized, "cpu", dtype=dtype)
        parts = generator._kept
        encoder = parts["text encoder"]._pipeline.text_encoder
        found = [each.dtype for each in (encoder, parts["transformer"], parts["VAE"].model)]
        assert found == PARTS.get(dtype, [getattr(torch, dtype)] * 3)
        made = [
            generator.generate(each, captions=captions, preview=lambda *_: None)
            for each in settings
        ]
        assert {each.metadata(0)["dtype"] for each in made} == {generator.dtype} == {dtype}
        drawn[dtype] = [levels(each.images[0]) for each in made]
    for i, wide in enumerate(drawn["float32"]):
        errors = {x: np.sqrt(np.mean((drawn[x][i] - wide) ** 2)) for x in drawn}
        assert errors["float16"] < 1 < errors["bfloat16"]


def test_inpainting_pipeline_takes_our_transformer(
    zimage_folder: Path, zimage_quantized: Path, reference: ZImagePipeline, tmp_path: Path
) -> None:
    image = init_image(tmp_path / "in.png", (64, 48))
    mask = Image.new("L", image.size)
    mask.paste(255, (16, 16, 48, 32))
    model = ZImageTransformer.from_checkpoint(zimage_quantized, "cpu", "weight-only", torch.float32)
    images = []
    for transformer in (model, reference.transformer):
        pipeline = ZImageInpaintPipeline(**(reference.components | {"transformer": transformer}))
        pipeline.set_progress_bar_config(disable=True)
        images.append(
            pipeline(
                "a cat",
                image=image,
                mask_image=mask,
                strength=1.0,
                num_inference_steps=4,
                guidance_scale=0.0,
                generator=generator_of(2)[0],
            ).images[0]
        )
    assert abs(levels(images[0]) - levels(images[1])).max() <= 1


# ---- the sampler


@pytest.mark.parametrize(
    ("sampler", "steps", "shift"), [("turbo", 8, 3), ("base", 50, 6), (3, 3, 3)]
)
def test_own_sampler_equals_the_scheduler(sampler: str | int, steps: int, shift: float) -> None:
    def velocity(image: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.sin(3 * image) + t.view(-1, 1, 1, 1)

    seen = []

    def transformer(x: Any, t: torch.Tensor, captions: Any, return_dict: bool) -> Any:
        seen.append(float(t[0]))
        assert len(captions) == len(x) == len(t) == 2 and not return_dict
        return ([velocity(image, t[:1]) for image in x],)

    noise = list(torch.randn(2, 16, 1, 4, 6, generator=torch.Generator().manual_seed(0)))
    found = denoise(transformer, noise, [torch.zeros(1, 2)] * 2, sampler)

    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    want = torch.stack(noise)
    for timestep in scheduler.timesteps:
        t = (1000 - timestep.expand(2)) / 1000
        output = torch.stack([velocity(image, t[:1]) for image in want])
        want = scheduler.step(-output, timestep, want, return_dict=False)[0]
    assert len(seen) == steps
    torch.testing.assert_close(torch.stack(found), want, rtol=1e-5, atol=1e-5)


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> list[list[float]]:
    """What every forward of our transformer is given as t."""
    seen: list[list[float]] = []
    forward = ZImageTransformer.forward

    def watched(self: Any, x: Any, t: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        seen.append(t.tolist())
        return forward(self, x, t, *arguments, **options)

    monkeypatch.setattr(ZImageTransformer, "forward", watched)
    return seen


def test_steps_are_forwards(generate: Generate, times: list[list[float]]) -> None:
    for steps in (8, 3):
        times.clear()
        code, _, _ = generate("--prompt", "", "-o", f"{steps}.png", "--steps", steps, *SIZE)
        assert code == 0
        sigma = np.arange(steps, 0, -1) / steps
        shifted = 3 * sigma / (1 + 2 * sigma)
        assert [len(t) for t in times] == [1] * steps
        np.testing.assert_allclose([t[0] for t in times], 1 - shifted, atol=1e-6)


def test_guidance_and_batch_are_one_forward_a_step(
    generate: Generate, times: list[list[float]]
) -> None:
    code, _, _ = generate(
        *("--prompt", "a", "-o", "o.png", "--steps", 2, "--guidance", 2, "--batch", 3, *SIZE)
    )
    assert code == 0 and [len(t) for t in times] == [6, 6]


# ---- seeds, batches, metadata


@pytest.mark.parametrize("start", ["noise", "init image"])
def test_pictures_of_a_batch_can_be_made_alone(
    generate: Generate, tmp_path: Path, start: str
) -> None:
    init_image(tmp_path / "in.png", (64, 48))
    options = ["--prompt", "a cat", "--steps", 4]
    options += [*SIZE] if start == "noise" else ["--init-image", "in.png"]
    code, out, err = generate(*options, "-o", "o.png", "--seed", 20, "--batch", 3)
    assert code == 0, err
    names = [line.split(":")[0] for line in out.splitlines()]
    assert names == ["o-0.png", "o-1.png", "o-2.png", "total"]
    assert not (tmp_path / "o.png").exists()
    images = [levels(tmp_path / f"o-{i}.png") for i in range(3)]
    for i, image in enumerate(images):
        assert settings_of(tmp_path / f"o-{i}.png")["seed"] == 20 + i
        code, _, _ = generate(*options, "-o", f"alone{i}.png", "--seed", 20 + i)
        assert code == 0
        assert abs(levels(tmp_path / f"alone{i}.png") - image).max() <= 1
    assert abs(images[0] - images[1]).max() > 10


def test_metadata_makes_the_picture_again(generate: Generate, tmp_path: Path) -> None:
    prompt = 'снег, "snow"\n雪'
    code, out, _ = generate("--prompt", prompt, "-o", "a.png", "--steps", 2, *SIZE)
    assert code == 0
    stored = settings_of(tmp_path / "a.png")
    seed = int(re.search(r"seed (\d+)", out)[1])  # type: ignore[index]
    assert stored == {
        "prompt": prompt,
        "negative_prompt": None,
        "seed": seed,
        "steps": 2,
        "width": 64,
        "height": 48,
        "guidance": 0.0,
        "init_image": None,
        "strength": None,
        "loras": [],
        "model": "Z-Image-tiny",
        "transformer": "quantized.safetensors",
        "compute": "weight-only",
        "dtype": "float32",
        "version": zm.__version__,
    }
    content = (tmp_path / "a.png").read_bytes()
    assert b"tEXt" + METADATA_KEY.encode() + b"\0" in content
    code, _, _ = generate("--prompt", prompt, "-o", "b.png", "--seed", seed, "--steps", 2, *SIZE)
    assert code == 0 and (tmp_path / "b.png").read_bytes() == content


def test_seeds_are_drawn_anew(generate: Generate) -> None:
    outs = {
        generate("--prompt", "", "-o", f"{i}.png", "--steps", 1, *SIZE)[1][6:] for i in range(2)
    }
    assert len({re.search(r"seed (\d+)", out)[1] for out in outs}) == 2  # type: ignore[index]


@pytest.mark.parametrize(
    ("size", "options", "want"),
    [
        ((70, 50), (), (64, 48)),
        ((70, 50), ("--width", 32), (32, 48)),
        ((9, 200), (), (16, 192)),
    ],
)
def test_size_comes_from_the_init_image(
    generate: Generate, tmp_path: Path, size: tuple[int, int], options: Any, want: tuple[int, int]
) -> None:
    init_image(tmp_path / "in.png", size)
    code, _, err = generate(
        *("--prompt", "", "-o", "o.png", "--init-image", "in.png", "--steps", 1, *options)
    )
    assert code == 0, err
    with Image.open(tmp_path / "o.png") as image:
        assert image.size == want
    assert settings_of(tmp_path / "o.png")["strength"] == 0.6


def test_init_image_is_turned_upright(generate: Generate, tmp_path: Path) -> None:
    image = init_image(tmp_path / "up.png", (64, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    for name in ("up", "turned"):
        code, _, err = generate(
            *("--prompt", "", "-o", f"o-{name}.png", "--init-image", f"{name}.png", "--seed", 1),
            *("--strength", 0.3, "--steps", 4),
        )
        assert code == 0, err
    assert (levels(tmp_path / "o-up.png") == levels(tmp_path / "o-turned.png")).all()


def test_default_size_and_strength() -> None:
    settings = zm.GenerationSettings("a").resolved()
    assert (settings.width, settings.height, settings.strength) == (1024, 1024, None)
    assert settings.steps == 8 and settings.guidance == 0


# ---- parts


def test_offloading_gives_the_same_image(generate: Generate, tmp_path: Path) -> None:
    init_image(tmp_path / "in.png", (64, 48))
    for options in ((*SIZE,), ("--init-image", "in.png")):
        common = ("--prompt", "a", "--seed", 5, "--steps", 2, "--overwrite", *options)
        assert generate(*common, "-o", "kept.png")[0] == 0
        assert generate(*common, "-o", "offloaded.png", "--offload")[0] == 0
        kept, offloaded = ((tmp_path / f"{n}.png").read_bytes() for n in ("kept", "offloaded"))
        assert kept == offloaded


def watch_parts(monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[set[str]]]:
    """The parts as they are loaded, and which of those before are in memory then."""
    order: list[str] = []
    alive: list[set[str]] = []
    parts: list[tuple[str, weakref.ref[Any]]] = []

    def watch(name: str, make: Callable[..., Any], weights: Callable[[Any], Any]) -> Any:
        def made(*arguments: Any, **options: Any) -> Any:
            order.append(name)
            alive.append({other for other, part in parts if part() is not None})
            part = make(*arguments, **options)
            parts.append((name, weakref.ref(weights(part))))
            return part

        return made

    text_encoder, vae = generator_module.TextEncoder, generator_module.VAE
    monkeypatch.setattr(
        generator_module,
        "TextEncoder",
        watch("text", text_encoder, lambda p: p._pipeline.text_encoder),
    )
    monkeypatch.setattr(generator_module, "VAE", watch("vae", vae, lambda p: p.model))
    monkeypatch.setattr(
        ZImageTransformer,
        "from_checkpoint",
        watch("transformer", ZImageTransformer.from_checkpoint, lambda p: p),
    )
    return order, alive


@pytest.mark.parametrize("start", ["noise", "init image"])
def test_offloading_holds_one_part_at_a_time(
    zimage_folder: Path,
    zimage_quantized: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    start: str,
) -> None:
    order, alive = watch_parts(monkeypatch)
    image = None
    if start == "init image":
        image = tmp_path / "in.png"
        init_image(image, (32, 32))
    generator = zm.ZImageGenerator(
        zimage_folder, zimage_quantized, "cpu", dtype="float32", offload=True
    )
    assert order == []
    generator.generate(zm.GenerationSettings("a", steps=1, height=32, width=32, init_image=image))
    if image is None:
        assert order == ["text", "transformer", "vae"]
        assert alive == [set(), set(), set()]
    else:  # the small VAE encodes the image, so it is there beside the transformer
        assert order == ["text", "transformer", "vae", "vae"]
        assert alive == [set(), set(), {"transformer"}, set()]


def test_without_offloading_parts_are_loaded_once(
    zimage_folder: Path, zimage_quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order, _ = watch_parts(monkeypatch)
    generator = zm.ZImageGenerator(zimage_folder, zimage_quantized, "cpu", dtype="float32")
    settings = zm.GenerationSettings("a", steps=1, height=32, width=32, seed=4)
    first, second = generator.generate(settings), generator.generate(settings)
    assert order == ["text", "transformer", "vae"]
    assert (levels(first.images[0]) == levels(second.images[0])).all()


def test_parts_that_are_held_are_loaded_once(
    zimage_folder: Path, zimage_quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order, alive = watch_parts(monkeypatch)
    generator = zm.ZImageGenerator(
        zimage_folder, zimage_quantized, "cpu", dtype="float32", offload=True
    )
    settings = zm.GenerationSettings("a", steps=1, height=32, width=32, seed=4)
    captions = generator.encode(settings)
    with generator.holding("transformer", "VAE"):
        held = [generator.generate(settings, captions=captions) for _ in range(2)]
    assert order == ["text", "transformer", "vae"]
    assert alive == [set(), set(), {"transformer"}]
    again = generator.generate(settings)  # nothing is held any more
    assert order[3:] == ["text", "transformer", "vae"]
    assert alive[3:] == [set(), set(), set()]
    for made in held:
        assert (levels(made.images[0]) == levels(again.images[0])).all()


def test_captions_stand_for_the_prompts(zimage_folder: Path, zimage_quantized: Path) -> None:
    generator = zm.ZImageGenerator(zimage_folder, zimage_quantized, "cpu", dtype="float32")
    fox, cat = (
        zm.GenerationSettings(prompt, steps=1, height=32, width=32, seed=4, guidance=2.0)
        for prompt in ("a fox", "a cat")
    )
    captions = generator.encode(fox)
    assert len(captions) == 2
    made = generator.generate(cat, captions=captions)
    assert (levels(made.images[0]) == levels(generator.generate(fox).images[0])).all()
    with pytest.raises(
        zm.UsageError,
        match=r"^captions must be 2, not 1; take the result of ZImageGenerator.encode",
    ):
        generator.generate(fox, captions=captions[:1])


def test_steps_are_shown_with_their_latents(zimage_folder: Path, zimage_quantized: Path) -> None:
    generator = zm.ZImageGenerator(zimage_folder, zimage_quantized, "cpu", dtype="float32")
    settings = zm.GenerationSettings("a", steps=3, height=32, width=48, seed=4, batch=2)
    kept: list[tuple[int, torch.Tensor]] = []
    made = generator.generate(settings, on_step=lambda done, x: kept.append((done, x)))
    assert [done for done, _ in kept] == [1, 2, 3]
    assert {tuple(x.shape) for _, x in kept} == {(2, 16, 4, 6)}
    # The last ones are what the VAE decodes.
    pixels = generator._kept["VAE"].decode(kept[-1][1][1:])
    want = (pixels[0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1) * 255
    assert np.abs(levels(made.images[1]) - want.numpy()).max() <= 0.51


def test_peak_memory_begins_anew() -> None:
    code = (  # in a process without the threads and the memory of other tests
        "from types import SimpleNamespace; from zimage_mxfp8.generation.memory import PeakMemory\n"
        "cpu = SimpleNamespace(type='cpu'); first = PeakMemory(cpu); block = b'x' * (200 << 20)\n"
        "with_block = first.nbytes(); del block; print(with_block, PeakMemory(cpu).nbytes())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    if "None" in result.stdout:
        pytest.skip("this system does not tell a peak since a moment")
    with_block, without = map(int, result.stdout.split())
    assert without < with_block - (150 << 20)


@pytest.mark.slow
@pytest.mark.parametrize("offload", [False, True])
def test_threads_share_a_generator(
    zimage_folder: Path, zimage_quantized: Path, offload: bool
) -> None:
    generator = zm.ZImageGenerator(
        zimage_folder, zimage_quantized, "cpu", dtype="float32", offload=offload
    )
    settings = [
        zm.GenerationSettings(f"prompt {i}", steps=2 + i, height=32, width=32, seed=i)
        for i in range(4)
    ]
    want = [generator.generate(each).images[0] for each in settings]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(generator.generate, settings * 2))
    for i, each in enumerate(found):
        assert each.steps == settings[i % 4].steps
        assert abs(levels(each.images[0]) - levels(want[i % 4])).max() <= 1


def test_own_transformer_of_the_folder(
    generate: Generate, zimage_folder: Path, tmp_path: Path
) -> None:
    code, _, err = generate(
        "--prompt", "a cat", "-o", "o.png", "--seed", 7, *SIZE, transformer=None
    )
    assert code == 0, err
    assert settings_of(tmp_path / "o.png")["transformer"] == "transformer"
    pipeline = ZImagePipeline.from_pretrained(zimage_folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    want = pipeline(
        "a cat", height=48, width=64, num_inference_steps=8, guidance_scale=0.0,
        generator=generator_of(7),
    ).images[0]  # fmt: skip
    assert abs(levels(tmp_path / "o.png") - levels(want)).max() <= 1


def test_folder_needs_no_transformer(
    generate: Generate, zimage_folder: Path, tmp_path: Path
) -> None:
    lean = tmp_path / "lean"
    shutil.copytree(zimage_folder, lean, ignore=shutil.ignore_patterns("transformer"))
    code, _, err = generate("--prompt", "a", "-o", "o.png", "--steps", 1, *SIZE, model=lean)
    assert code == 0, err


def test_text_encoder_as_published(
    generate: Generate, zimage_folder: Path, tmp_path: Path, reference: ZImagePipeline
) -> None:
    """The real folder has the whole language model, in shards, under names with a prefix."""
    model = Path(shutil.copytree(zimage_folder, tmp_path / "model"))
    shutil.rmtree(model / "text_encoder")
    whole = Qwen3ForCausalLM(reference.text_encoder.config)
    whole.model.load_state_dict(reference.text_encoder.state_dict())
    whole.save_pretrained(model / "text_encoder", max_shard_size="50KB")
    assert (model / "text_encoder" / "model.safetensors.index.json").is_file()
    for name, folder in (("a", zimage_folder), ("b", model)):
        options = ("-o", f"{name}.png", "--seed", 1, "--steps", 1, *SIZE)
        code, _, err = generate("--prompt", "a cat", *options, model=folder)
        assert (code, err) == (0, "")
    assert (levels(tmp_path / "a.png") == levels(tmp_path / "b.png")).all()


def test_nothing_is_looked_up(
    generate: Generate, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    tried = []

    def refuse(*arguments: object, **_: object) -> None:
        tried.append(arguments)
        raise OSError("no network here")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    code, _, err = generate("--prompt", "a", "-o", "o.png", "--steps", 1, *SIZE)
    assert code == 0, err
    assert tried == []


def test_progress_tells_stages_and_steps(zimage_folder: Path, zimage_quantized: Path) -> None:
    seen: list[zm.GenerationProgress] = []
    generator = zm.ZImageGenerator(
        zimage_folder, zimage_quantized, "cpu", dtype="float32", progress=seen.append
    )
    assert list(dict.fromkeys(p.stage for p in seen)) == ["text encoder", "transformer", "VAE"]
    seen.clear()
    generator.generate(
        zm.GenerationSettings("a", steps=3, height=32, width=32, batch=2), seen.append
    )
    assert [(p.stage, p.done, p.total) for p in seen] == [
        ("encoding", 0, 1),
        ("encoding", 1, 1),
        ("denoising", 1, 3),
        ("denoising", 2, 3),
        ("denoising", 3, 3),
        ("decoding", 0, 2),
        ("decoding", 1, 2),
        ("decoding", 2, 2),
    ]
    assert all(p.seconds > 0 for p in seen if p.stage == "denoising")


@pytest.mark.slow
def test_terminal_shows_steps_and_their_time(zimage_folder: Path, tmp_path: Path) -> None:
    text = run_in_terminal(
        [
            "generate",
            "--model-dir",
            str(zimage_folder),
            "--prompt",
            "a",
            "-o",
            str(tmp_path / "o.png"),
        ]
        + ["--height", "48", "--width", "64", "--device", "cpu", "--dtype", "float32"]
    )
    assert "loading the transformer" in text
    for step in range(1, 9):
        assert re.search(rf"denoising .*step {step} of 8, \d+\.\d\d s per step", text)
    assert "64x48, seed " in text
    assert "Loading" not in text and "Warning" not in text


def test_long_prompts_are_cut_with_a_warning(
    generate: Generate, reference: ZImagePipeline, tmp_path: Path
) -> None:
    prompt = "cat " * 200
    assert len(make_tokenizer()(prompt).input_ids) > 512
    code, _, err = generate("--prompt", prompt, "-o", "o.png", "--seed", 1, "--steps", 1, *SIZE)
    assert code == 0
    assert err.startswith("zimage-mxfp8: warning: a prompt fills the 512 tokens")
    want = reference(
        prompt, height=48, width=64, num_inference_steps=1, guidance_scale=0.0,
        generator=generator_of(1),
    ).images[0]  # fmt: skip
    assert abs(levels(tmp_path / "o.png") - levels(want)).max() <= 1


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from zimage_mxfp8.cli.main import main; code = main(['generate', '--help']); "
        "assert not {'torch', 'diffusers', 'transformers', 'PIL'} & set(sys.modules); "
        "sys.exit(code)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def without(library: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The command line where a library is not installed."""
    code = (
        f"import sys; sys.modules[{library!r}] = None; "
        "from zimage_mxfp8.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True
    )


def test_demo_without_torch_says_how_to_get_it() -> None:
    result = without("torch", "demo")
    assert result.returncode == 0, result.stderr
    sentence = (
        'drawing needs torch, which is not installed; run pip install "zimage-mxfp8[generate]"'
    )
    assert f"skipped: {sentence}\n" in result.stdout and " generate " not in result.stdout
    assert "sound, 185 MXFP8 layers" in result.stdout


def test_wrong_names_are_told_before_torch_is_imported(
    zimage_folder: Path, zimage_quantized: Path, tmp_path: Path
) -> None:
    """Which takes several seconds."""
    (tmp_path / "prompts.txt").write_text("a cat\n")
    (tmp_path / "used" / "of another").mkdir(parents=True)
    model, nothing = ("--model-dir", zimage_folder), ("--transformer", "none.safetensors")
    plain = ("--transformer", zimage_folder / "transformer")
    draw = ("generate", *model, "--prompt", "a", "-o", tmp_path / "o.png")
    judge = ("evaluate", *model, "--prompts", tmp_path / "prompts.txt")
    serve = ("serve", *model, "--port", "0")
    settings_file = next((zimage_folder / "transformer").glob("*.json"))
    cases = (
        (1, "nowhere does not exist", ("generate", "--model-dir", "nowhere", *draw[3:])),
        (1, "the init image none.png does not exist", (*draw, "--init-image", "none.png")),
        (1, "none.safetensors does not exist", (*draw, *nothing)),
        (1, "is a JSON file, not a safetensors file", (*draw, "--transformer", settings_file)),
        (2, "--compute fp8 is for MXFP8 checkpoints", (*draw, *plain, "--compute", "fp8")),
        (2, 'must be "cpu", "cuda" or "cuda:N", not "gpu"', (*draw, "--device", "gpu")),
        (1, "none.safetensors does not exist", (*judge, *nothing)),
        (2, "--compute fp8 is for MXFP8 checkpoints", (*judge, *plain, "--compute", "fp8")),
        (
            2,
            "--against-compute fp8 is for MXFP8 checkpoints",
            (*judge, "--transformer", zimage_quantized, "--against-compute", "fp8"),
        ),
        (2, "--size must be a multiple of 16", (*judge, *plain, "--size", "33")),
        (1, "used has other content", (*judge, *plain, "-o", tmp_path / "used", "--overwrite")),
        (1, "is quantised already (MXFP8", ("sensitivity", zimage_quantized)),
        (2, "--timesteps must be 1 to 8", ("sensitivity", zimage_folder, "--timesteps", "9")),
        (1, "none.safetensors does not exist", (*serve, *nothing)),
        (2, "--compute fp8 is for MXFP8 checkpoints", (*serve, *plain, "--compute", "fp8")),
    )
    lines = [[str(word) for word in words] for _, _, words in cases]
    code = (
        "import json, sys; sys.modules['torch'] = None; from zimage_mxfp8.cli.main import main; "
        "print([(main(x), print('end', file=sys.stderr))[0] for x in json.load(sys.stdin)])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(lines), capture_output=True, text=True
    )
    assert json.loads(result.stdout) == [code for code, _, _ in cases], result.stderr
    found = result.stderr.split("end\n")
    for (_, sentence, words), errors in zip(cases, found, strict=False):
        assert sentence in errors.splitlines()[-1], (words, errors)


@pytest.mark.slow
@pytest.mark.parametrize("library", ["torch", "diffusers", "transformers", "PIL"])
def test_missing_library_is_named(library: str, zimage_folder: Path, tmp_path: Path) -> None:
    init_image(tmp_path / "in.png", (32, 32))
    result = without(
        *(library, "generate", "--model-dir", zimage_folder, "--prompt", "a"),
        *("-o", tmp_path / "o.png", "--init-image", tmp_path / "in.png"),
    )
    assert result.returncode == 1
    (line,) = STAGES.sub("", result.stderr).splitlines()
    package = "pillow" if library == "PIL" else library
    assert f"generate needs {package}, which is not installed" in line
    assert line.endswith('pip install "zimage-mxfp8[generate]"')


def test_diffusers_loads_the_folder_with_our_transformer(
    zimage_folder: Path, zimage_quantized: Path, reference: ZImagePipeline
) -> None:
    """Together with what the README shows."""
    transformer = ZImageTransformer.from_checkpoint(zimage_quantized, "cpu", dtype=torch.float32)
    pipe = ZImagePipeline.from_pretrained(
        zimage_folder, transformer=transformer, local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    assert pipe.transformer is transformer
    images = [
        levels(
            each(
                ["a cat", "a longer prompt"], height=48, width=64, num_inference_steps=3,
                guidance_scale=2.0, generator=generator_of(1, 2),
            ).images[1]
        )
        for each in (pipe, reference)
    ]  # fmt: skip
    assert abs(images[0] - images[1]).max() <= 1


def test_from_pipe_takes_the_transformer_by_name(
    zimage_folder: Path, zimage_quantized: Path, reference: ZImagePipeline, tmp_path: Path
) -> None:
    """As the guide says: by itself diffusers passes only components of the class it expects."""
    transformer = ZImageTransformer.from_checkpoint(zimage_quantized, "cpu", dtype=torch.float32)
    pipe = ZImagePipeline(**(reference.components | {"transformer": transformer}))
    image = init_image(tmp_path / "in.png", (64, 48))
    images = []
    for each in (
        ZImageImg2ImgPipeline.from_pipe(pipe, transformer=pipe.transformer),
        ZImageImg2ImgPipeline(**reference.components),
    ):
        each.set_progress_bar_config(disable=True)
        options = {"num_inference_steps": 2, "guidance_scale": 0.0}
        made = each("a cat", image=image, generator=generator_of(1), **options)
        images.append(levels(made.images[0]))
    assert abs(images[0] - images[1]).max() <= 1


def test_a_pipeline_is_saved_as_the_error_says(
    zimage_quantized: Path, reference: ZImagePipeline, tmp_path: Path
) -> None:
    transformer = ZImageTransformer.from_checkpoint(zimage_quantized, "cpu", dtype=torch.float32)
    pipe = ZImagePipeline(**(reference.components | {"transformer": transformer}))
    with pytest.raises(zm.MissingFeatureError, match="set its transformer to None, save it again"):
        pipe.save_pretrained(tmp_path / "saved")
    pipe.transformer = None
    pipe.save_pretrained(tmp_path / "saved")
    saved = ZImagePipeline.from_pretrained(
        tmp_path / "saved", transformer=transformer, local_files_only=True
    )
    images = []
    for each in (saved, reference):
        each.set_progress_bar_config(disable=True)
        options = {"height": 48, "width": 64, "num_inference_steps": 2, "guidance_scale": 0.0}
        images.append(levels(each("a cat", generator=generator_of(1), **options).images[0]))
    assert abs(images[0] - images[1]).max() <= 1


def test_folder_of_the_tests_is_as_the_real_one(zimage_folder: Path) -> None:
    """The settings of Z-Image Turbo's own folder that the pipeline depends on."""
    index = json.loads((zimage_folder / "model_index.json").read_text())
    assert index["_class_name"] == "ZImagePipeline"
    assert index["text_encoder"] == ["transformers", "Qwen3Model"]
    assert index["tokenizer"] == ["transformers", "Qwen2Tokenizer"]
    scheduler = json.loads((zimage_folder / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["shift"] == 3.0 and scheduler["use_dynamic_shifting"] is False
    assert make_reference().config.axes_dims == [32, 48, 48]
