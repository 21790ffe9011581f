"""`generate` with a ControlNet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from diffusers import ZImageControlNetPipeline
from PIL import Image

import zimage_mxfp8 as zm
from helpers.control_reference import file_tensors, make_controlnet, write_controlnet
from helpers.diffusers_reference import load_reference
from helpers.images import SIZE, Generate, fails, generator_of, init_image, levels, settings_of
from helpers.model_folder import make_pipeline

USUAL = ("--prompt", "a cat", "--seed", 7, "--steps", 4, *SIZE)  # 64 x 48 pixels


@pytest.fixture
def net(tmp_path: Path) -> Path:
    """A ControlNet that fits the transformer of the small folder."""
    tensors = file_tensors("1.0", make_controlnet("1.0", (0, 1), refiners=1))
    return write_controlnet(tmp_path / "net.safetensors", tensors)


@pytest.fixture
def options(net: Path, tmp_path: Path) -> tuple[Any, ...]:
    init_image(tmp_path / "edges.png", (64, 48))
    return (*USUAL, "--controlnet", net, "--control-image", "edges.png")


@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_image_equals_that_of_diffusers(
    guidance: float,
    options: tuple[Any, ...],
    generate: Generate,
    zimage_quantized: Path,
    tmp_path: Path,
) -> None:
    settings = ("--guidance", guidance, "--control-strength", 0.6, "-o", "o.png")
    code, _, err = generate(*options, *settings)
    assert code == 0, err
    zm.dequantize_checkpoint(zimage_quantized, tmp_path / "plain.safetensors")
    plain = make_pipeline()
    load_reference(plain.transformer, tmp_path / "plain.safetensors")
    controlnet = make_controlnet("1.0", (0, 1), refiners=1)
    pipeline = ZImageControlNetPipeline(**plain.components, controlnet=controlnet)
    pipeline.set_progress_bar_config(disable=True)
    (want,) = pipeline(
        "a cat",
        control_image=Image.open(tmp_path / "edges.png"),
        controlnet_conditioning_scale=0.6,
        height=48,
        width=64,
        num_inference_steps=4,
        guidance_scale=guidance,
        generator=generator_of(7)[0],
    ).images
    assert abs(levels(tmp_path / "o.png") - levels(want)).max() <= 1
    assert generate(*USUAL, "--guidance", guidance, "-o", "without.png")[0] == 0
    assert abs(levels(tmp_path / "without.png") - levels(want)).max() > 1


def test_settings_are_stored_and_used_again(
    options: tuple[Any, ...], net: Path, generate: Generate, tmp_path: Path
) -> None:
    part = ("--control-strength", 0.5, "--control-start", 0.25, "--control-end", 0.75)
    assert generate(*options, *part, "-o", "o.png")[0] == 0
    stored = settings_of(tmp_path / "o.png")
    wanted = {
        "controlnet": "net.safetensors",
        "control_image": "edges.png",
        "control_strength": 0.5,
        "control_start": 0.25,
        "control_end": 0.75,
    }
    assert {name: stored[name] for name in wanted} == wanted
    with Image.open(tmp_path / "o.png") as image:
        assert (
            'ControlNet 0: "Model: net, Weight: 0.5, Guidance Start: 0.25, Guidance End: 0.75"'
            in image.text["parameters"]
        )
    again = ("--settings-from", "o.png", "-o", "again.png")
    found = generate(*again)
    fails(found, 2, "--control-image", "must be given", "made from the image 'edges.png'")
    code, _, err = generate(*again, "--controlnet", net, "--control-image", "edges.png")
    assert (code, err) == (0, "")
    assert abs(levels(tmp_path / "again.png") - levels(tmp_path / "o.png")).max() == 0


def test_start_and_end_are_fractions_of_the_steps(
    net: Path,
    zimage_folder: Path,
    zimage_quantized: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    init_image(tmp_path / "edges.png", (64, 48))
    seen: list[float | None] = []
    forward = zm.ZImageTransformer.forward

    def recorded(self: Any, *arguments: Any, **others: Any) -> Any:
        control = others.get("controlnet_block_samples")
        seen.append(control.strength if control else None)
        return forward(self, *arguments, **others)

    monkeypatch.setattr(zm.ZImageTransformer, "forward", recorded)
    generator = zm.ZImageGenerator(
        zimage_folder, zimage_quantized, "cpu", dtype="float32", controlnet=net, offload=True
    )
    for begin, end, init, wanted in (
        (None, None, None, [0.75] * 4),
        (0.25, None, None, [None, 0.75, 0.75, 0.75]),
        (None, 0.5, None, [0.75, 0.75, None, None]),
        (0.5, 0.75, None, [None, None, 0.75, None]),
        (0.5, None, 0.5, [None, 0.75]),  # of the two steps that are made of an init image
    ):
        seen.clear()
        generator.generate(
            zm.GenerationSettings(
                "a cat",
                steps=4,
                seed=1,
                batch=2,
                init_image=tmp_path / "edges.png" if init else None,
                strength=init,
                control_image=tmp_path / "edges.png",
                control_start=begin,
                control_end=end,
            )
        )
        assert seen == wanted


def test_inputs_with_a_mask_get_zeros(
    zimage_folder: Path, zimage_quantized: Path, tmp_path: Path
) -> None:
    """Mask 0 and an empty latent, which is what the authors' pipeline gives without a mask."""
    init_image(tmp_path / "edges.png", (64, 48))
    tensors = file_tensors("2.1", make_controlnet("2.1", (0, 1), refiners=1))
    path = write_controlnet(tmp_path / "net.safetensors", tensors)
    cut = dict(tensors)
    name = "control_all_x_embedder.2-1.weight"
    cut[name] = tensors[name].clone().unflatten(1, (4, 33))
    cut[name][..., 16:] = 7.0  # what stands behind zeros has no effect
    cut[name] = cut[name].flatten(1)
    other = write_controlnet(tmp_path / "other.safetensors", cut)
    settings = zm.GenerationSettings("a cat", steps=2, seed=1, control_image=tmp_path / "edges.png")
    images = [
        zm.ZImageGenerator(zimage_folder, zimage_quantized, "cpu", dtype="float32", controlnet=file)
        .generate(settings)
        .images[0]
        for file in (path, other)
    ]
    assert images[0].size == (64, 48)
    assert abs(levels(images[0]) - levels(images[1])).max() == 0


def test_offload_and_quantised_layers(
    options: tuple[Any, ...], net: Path, generate: Generate, tmp_path: Path
) -> None:
    small = tmp_path / "net-mxfp8.safetensors"
    zm.convert(net, small)
    assert generate(*options, "-o", "plain.png")[0] == 0
    quantized = [small if option == net else option for option in options]
    assert generate(*quantized, "--offload", "-o", "q.png")[0] == 0
    assert generate(*quantized, "--compute", "fp8", "-o", "fp8.png")[0] == 0
    plain = levels(tmp_path / "plain.png")
    assert 0 < abs(levels(tmp_path / "q.png") - plain).mean() < 0.2 * plain.std()


def test_needs_both(options: tuple[Any, ...], net: Path, generate: Generate) -> None:
    for half in (options[:-2], (*USUAL, "--control-image", "edges.png")):
        fails(generate(*half, "-o", "o.png"), 2, "--controlnet and --control-image go together")


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("--control-strength", "nan", "--control-strength must be a finite number, not nan"),
        ("--control-strength", "11", "--control-strength must be -10 to 10, not 11.0"),
        ("--control-start", "-0.1", "--control-start must be 0 to 1, not -0.1"),
        ("--control-end", "2", "--control-end must be 0 to 1, not 2.0"),
        ("--control-end", "0", "--control-start must be less than the end"),
    ],
)
def test_bad_numbers(
    option: str, value: str, sentence: str, options: tuple[Any, ...], generate: Generate
) -> None:
    fails(generate(*options, "-o", "o.png", option, value), 2, sentence)


def test_numbers_without_an_image(generate: Generate) -> None:
    result = generate(*USUAL, "-o", "o.png", "--control-strength", 0.5)
    fails(result, 2, "--control-strength has no effect without a control image")


def test_bad_images(options: tuple[Any, ...], generate: Generate, tmp_path: Path) -> None:
    edges, whole = tmp_path / "edges.png", (tmp_path / "edges.png").read_bytes()
    edges.unlink()
    fails(generate(*options, "-o", "o.png"), 1, "the control image edges.png does not exist")
    edges.write_bytes(whole[: len(whole) // 2])
    fails(generate(*options, "-o", "o.png"), 1, "the control image edges.png cannot be read: ")
    edges.write_text("no image")
    fails(generate(*options, "-o", "o.png"), 1, "edges.png has a format unknown to Pillow")
    init_image(edges, (64, 64))
    fails(
        generate(*options, "-o", "o.png"),
        2,
        "--control-image has 64 x 64 pixels, and the image 64 x 48, which is another shape",
    )
    init_image(edges, (128, 96))  # of the same shape: it is scaled
    assert generate(*options, "-o", "o.png")[0] == 0


def test_bad_files(
    options: tuple[Any, ...], net: Path, generate: Generate, zimage_quantized: Path
) -> None:
    write_controlnet(net, file_tensors("1.0", make_controlnet("1.0", (0, 1), 128, refiners=1)))
    fails(
        generate(*options, "-o", "o.png"),
        1,
        f"the ControlNet {net} does not fit the transformer {zimage_quantized}: it is for a model "
        "of width 128, and this one's width is 256",
    )
    net.write_bytes(zimage_quantized.read_bytes())
    fails(generate(*options, "-o", "o.png"), 1, "is not a ControlNet for Z-Image (Z-Image)")
    net.write_bytes(b"{}")
    fails(generate(*options, "-o", "o.png"), 1, "net.safetensors")


def test_settings_from_python(zimage_folder: Path, zimage_quantized: Path) -> None:
    generator = zm.ZImageGenerator(zimage_folder, zimage_quantized, "cpu", offload=True)
    with pytest.raises(zm.UsageError, match="control_image has no effect without a ControlNet"):
        generator.generate(zm.GenerationSettings("a cat", control_image=Path("edges.png")))
