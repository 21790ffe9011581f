"""Files of ControlNets: recognised, converted, checked, and refused where they do not belong."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from diffusers import ZImageControlNetModel
from safetensors.torch import load_file, save_file

import zimage_mxfp8 as zm
from helpers.checkpoints import Tensors, to_diffusers
from helpers.control_reference import (
    EMBEDDER,
    Kind,
    control_images,
    file_tensors,
    make_controlnet,
    write_controlnet,
)
from helpers.diffusers_reference import make_reference, random_inputs
from zimage_mxfp8.cli.main import main
from zimage_mxfp8.zimage.control import CONTROLNET, CONTROLNET_1

DIM = 128
# Generation, number of blocks, and how `inspect` calls it.
GENERATIONS: list[tuple[Kind, int, str]] = [
    ("1.0", 6, "1.0"),
    ("2.0", 15, "2.0"),
    ("2.1", 15, "2.1 or Tile 2.1"),
    ("2.1", 3, "2.1-lite or Tile 2.1-lite"),
]


def small(kind: Kind, blocks: int = 2) -> Tensors:
    return file_tensors(kind, make_controlnet(kind, range(blocks), DIM))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_controlnet(tmp_path / "in.safetensors", small("2.1"), torch.bfloat16)


@pytest.mark.parametrize(
    ("kind", "blocks", "parameters"),
    # As counted in the published files.
    [("1.0", 6, 1_550_778_368), ("2.1", 15, 3_356_225_792), ("2.1", 3, 1_008_308_480)],
)
def test_the_table_has_the_shapes_of_the_published_files(
    kind: Kind, blocks: int, parameters: int
) -> None:
    with torch.device("meta"):
        theirs = ZImageControlNetModel(
            control_layers_places=[i * 30 // blocks for i in range(blocks)],
            control_in_dim=16 if kind == "1.0" else 33,
            add_control_noise_refiner=None if kind == "1.0" else "control_noise_refiner",
        ).state_dict()
    table = CONTROLNET_1 if kind == "1.0" else CONTROLNET
    sizes = {"patch": 64} if kind == "1.0" else {}
    shapes = table.shapes(sizes, {"n_layers": blocks, "n_refiner_layers": 2})
    ours = to_diffusers({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}
    assert sum(math.prod(shape) for shape in shapes.values()) == parameters


@pytest.mark.parametrize(("kind", "blocks", "title"), GENERATIONS)
def test_generations_are_told_before_and_after_conversion(
    kind: Kind, blocks: int, title: str, tmp_path: Path
) -> None:
    source = write_controlnet(tmp_path / "in.safetensors", small(kind, blocks), torch.bfloat16)
    output = tmp_path / "out.safetensors"
    zm.convert(source, output)
    for path, layout in ((source, "diffusers"), (output, "ComfyUI")):
        found = zm.inspect(path)
        assert found.kind == (
            f"ControlNet for Z-Image, Fun-Controlnet-Union {title}, {layout} layout"
        )
        assert "generate with a ControlNet, ZImageControlNet" in found.accepted_by
        assert found.breaches == []
    assert zm.inspect(output).quantization == "MXFP8"


def test_conversion_by_its_own_recipe(file: Path, tmp_path: Path) -> None:
    output, decoded = tmp_path / "out.safetensors", tmp_path / "decoded.safetensors"
    report = zm.convert(file, output)
    assert report.recipe == "controlnet" and report.warnings == []
    source, found = load_file(file), load_file(output)
    parts = ("attention.qkv", "attention.out", "feed_forward.w1", "feed_forward.w2")
    quantized = {
        f"{stack}.{i}.{part}.weight"
        for stack in ("control_layers", "control_noise_refiner")
        for i in range(2)
        for part in (*parts, "feed_forward.w3")
    }
    assert {n for n, t in found.items() if t.dtype == torch.float8_e4m3fn} == quantized
    kept = [n for n in source if "_proj." in n or "adaLN" in n or n.startswith(EMBEDDER)]
    assert len(kept) == 2 * 2 * 4 + 2 * 2 + 2
    assert all(torch.equal(found[name], source[name]) for name in kept)
    assert zm.validate(output, file).ok
    assert zm.inspect(output).provenance["recipe"] == "controlnet"
    zm.dequantize_checkpoint(output, decoded)
    plain = load_file(decoded)
    assert to_diffusers(plain).keys() == source.keys()
    w1 = "control_layers.0.feed_forward.w1.weight"
    error = (plain[w1].float() - source[w1].float()).norm() / source[w1].float().norm()
    assert 0 < error < 0.05
    assert zm.inspect(decoded).quantization is None


def test_another_recipe_can_be_named(file: Path, tmp_path: Path) -> None:
    report = zm.convert(file, tmp_path / "out.safetensors", recipe="zimage")
    assert report.recipe == "zimage"
    net = zm.ZImageControlNet.from_checkpoint(tmp_path / "out.safetensors", "cpu")
    assert net.config.control_in_dim == 33  # from an embedder that is padded to 160 columns


def test_biases_that_cannot_be_corrected_are_told(file: Path, tmp_path: Path) -> None:
    """Of a recipe that quantises modulations, whose input is in the transformer's file."""
    report = zm.convert(file, tmp_path / "out.safetensors", recipe="convert-to-quant")
    (warning,) = report.warnings
    assert "biases cannot be corrected" in warning and report.corrected_biases == 0


def test_the_command_takes_the_recipe_too(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.safetensors"
    assert main(["convert", str(file), str(output), "--exclude-layers", r"\.w3\."]) == 0
    assert "16 layers in MXFP8" in capsys.readouterr().out
    assert zm.inspect(output).provenance["recipe"] == "controlnet"


def test_under_a_prefix(tmp_path: Path) -> None:
    tensors = {f"model.{name}": tensor for name, tensor in small("1.0").items()}
    path = write_controlnet(tmp_path / "in.safetensors", tensors)
    assert 'prefix "model."' in zm.inspect(path).kind
    assert zm.ZImageControlNet.from_checkpoint(path, "cpu").config.refiner == "plain"


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (["validate", "{file}"], "has no MXFP8 layers"),
        (["dequantize", "{file}", "-o", "o.safetensors"], "has no MXFP8 layers"),
        (["probe", "{file}"], "is a ControlNet for Z-Image, not the model itself"),
        (["compare", "{file}"], "is a ControlNet for Z-Image, not the model itself"),
        (["sensitivity", "{file}"], "is a ControlNet for Z-Image, not the model itself"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_commands_that_do_not_take_it(
    command: list[str], sentence: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word.format(file=file) for word in command]) == 1
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == "" and sentence in line


def test_it_is_not_taken_for_a_transformer(file: Path) -> None:
    with pytest.raises(zm.WrongKindError, match="is a ControlNet for Z-Image, not the model"):
        zm.ZImageTransformer.from_checkpoint(file, "cpu")


def broken(edit) -> Tensors:
    tensors = small("2.1")
    edit(tensors)
    return tensors


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({"a.weight": torch.ones(2, 2)}, r"is not a ControlNet for Z-Image \(another model\)"),
        ({"decoder.conv_in.weight": torch.ones(2, 2)}, r"not a ControlNet for Z-Image \(VAE\)"),
        (
            {"control_model.input_blocks.0.0.weight": torch.ones(2, 2)},
            r"not a ControlNet for Z-Image \(ControlNet\)",
        ),
        (
            broken(lambda t: t.pop("control_layers.1.after_proj.weight")),
            'not a whole ControlNet for Z-Image: "control_layers.1.after_proj.weight" is missing',
        ),
        (
            broken(lambda t: t.pop("control_layers.1.attention.to_k.weight")),
            'lacks tensor "control_layers.1.attention.to_k.weight"',
        ),
        (
            broken(lambda t: t.pop(f"{EMBEDDER}.weight")),
            f'not a whole ControlNet for Z-Image: "{EMBEDDER}.weight" is missing',
        ),
        (
            broken(lambda t: t.update({"control_layers.1.before_proj.weight": torch.ones(9, 9)})),
            '"control_layers.1.before_proj.weight" is not part of a ControlNet for Z-Image',
        ),
        (
            broken(lambda t: t.update({f"{EMBEDDER}.weight": torch.ones(100, 132)})),
            "not a whole ControlNet for Z-Image",
        ),
        (
            broken(lambda t: t.update({f"{EMBEDDER}.bias": torch.ones(DIM, dtype=torch.int32)})),
            "is I32, which this package cannot run",
        ),
    ],
    ids=["unknown", "VAE", "another's", "tensor", "q, k, v", "embedder", "extra", "size", "type"],
)
def test_bad_files_are_named(tensors: Tensors, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "in.safetensors"
    save_file(tensors, path)
    with pytest.raises(zm.CheckpointError, match=sentence) as caught:
        zm.ZImageControlNet.from_checkpoint(path, "cpu")
    assert "\n" not in str(caught.value)


def test_a_transformer_is_not_taken_for_it(zimage_quantized: Path) -> None:
    with pytest.raises(zm.WrongKindError, match=r"is not a ControlNet for Z-Image \(Z-Image\)"):
        zm.ZImageControlNet.from_checkpoint(zimage_quantized, "cpu")
    assert not any("--controlnet" in use for use in zm.inspect(zimage_quantized).accepted_by)


@pytest.fixture(scope="module")
def transformer(tmp_path_factory: pytest.TempPathFactory) -> zm.ZImageTransformer:
    folder = tmp_path_factory.mktemp("base")
    make_reference(layers=4, refiners=2).save_pretrained(folder)
    return zm.ZImageTransformer.from_checkpoint(folder, "cpu", dtype=torch.float32)


@pytest.mark.parametrize(
    ("kind", "blocks", "dim", "refiners", "sentence"),
    [
        ("1.0", 2, 128, 2, "it is for a model of width 128, and this one's width is 256"),
        ("1.0", 3, 256, 2, "its 3 blocks cannot be spread evenly over the 4 of the model"),
        ("2.1", 2, 256, 1, "its refiner has 1 block, and the model's noise refiner 2"),
        ("2.0", 1, 256, 2, "it has 1 block, fewer than the 2 of the model's noise refiner"),
    ],
)
def test_a_controlnet_of_another_model(
    kind: Kind,
    blocks: int,
    dim: int,
    refiners: int,
    sentence: str,
    transformer: zm.ZImageTransformer,
    tmp_path: Path,
) -> None:
    tensors = file_tensors(kind, make_controlnet(kind, range(blocks), dim, refiners))
    path = write_controlnet(tmp_path / "in.safetensors", tensors)
    net = zm.ZImageControlNet.from_checkpoint(path, "cpu", dtype=torch.float32)
    control = net.control(control_images([(4, 4)], net.config.control_in_dim))
    with pytest.raises(zm.InvalidArgumentError, match=sentence):
        transformer(*random_inputs([(4, 4)], [5]), controlnet_block_samples=control)


def test_bad_arguments_are_named(transformer: zm.ZImageTransformer, tmp_path: Path) -> None:
    tensors = file_tensors("1.0", make_controlnet("1.0", (0, 2)))
    path = write_controlnet(tmp_path / "in.safetensors", tensors)
    net = zm.ZImageControlNet.from_checkpoint(path, "cpu", dtype=torch.float32)
    inputs = random_inputs([(4, 4)], [5])
    (image,) = control_images([(4, 4)], 16)
    for strength in (float("nan"), float("inf"), "much", [0.5]):
        with pytest.raises(zm.UsageError, match="strength must be a finite number"):
            net.control([image], strength)
    for images, sentence in (
        ([], "must be a list"),
        (None, "must be a list"),
        ([None], "must be a floating-point tensor, not NoneType"),
        ([image[:9]], r"must be \[16, 1, H, W\], not \[9, 1, 4, 4\]"),
    ):
        with pytest.raises(zm.InvalidArgumentError, match=sentence):
            net.control(images)
    before = transformer(*inputs).sample[0]
    for given, sentence in (
        ({0: image}, "controlnet_block_samples is not supported as dict"),
        (net.control([image, image]), "there are 2 control images for 1 latent image"),
        (net.control([image[..., :2]]), r"must be \[16, 1, 4, 4\], as large as x\[0\]"),
    ):
        with pytest.raises(zm.InvalidArgumentError, match=sentence):
            transformer(*inputs, controlnet_block_samples=given)
    assert torch.equal(transformer(*inputs).sample[0], before)
    half = zm.ZImageControlNet.from_checkpoint(path, "cpu")
    with pytest.raises(
        zm.InvalidArgumentError, match=r"is on cpu in torch\.bfloat16, but the model"
    ):
        transformer(*inputs, controlnet_block_samples=half.control([image]))
    half.to(torch.float32)
    given = half.control([image])
    assert len(transformer(*inputs, controlnet_block_samples=given).sample) == 1
