"""`generate --lora`, against diffusers' own pipeline with PEFT."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import ZImagePipeline
from PIL import Image
from safetensors.torch import load_file, save_file

import zimage_mxfp8 as zm
from helpers import adapter_files as af
from helpers.commands import Run
from helpers.diffusers_reference import load_reference, make_reference
from helpers.images import SIZE, Generate, fails, generator_of, levels, settings_of
from helpers.model_folder import make_pipeline
from zimage_mxfp8.generation.generator import ZImageGenerator
from zimage_mxfp8.generation.loras import LoraCache
from zimage_mxfp8.generation.settings import GenerationSettings

# PEFT's remark when a second adapter is loaded.
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
OPTIONS = ("--prompt", "a cat", "--seed", "7", "--steps", "2", "--dtype", "float32", *SIZE)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    layers = af.modules_of(make_reference())
    attention = {name: layer for name, layer in layers.items() if "attention" in name}
    dialect = af.dotted("transformer."), ".lora_A.weight", ".lora_B.weight"
    for name, rank in (("first", 4), ("second", 3)):
        written = af.write_pairs(attention, *dialect, rank=rank)
        save_file(written.tensors, folder / f"{name}.safetensors")
    return [folder / "first.safetensors", folder / "second.safetensors"]


@pytest.fixture(scope="module")
def reference(zimage_quantized: Path, tmp_path_factory: pytest.TempPathFactory) -> ZImagePipeline:
    plain = tmp_path_factory.mktemp("plain") / "plain.safetensors"
    zm.dequantize_checkpoint(zimage_quantized, plain)
    pipeline = make_pipeline()
    load_reference(pipeline.transformer, plain)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class Recorder:
    """A transformer that notes which adapters are read."""

    def __init__(self) -> None:
        self.loras: dict[str, SimpleNamespace] = {}
        self.read: list[str] = []
        self.unload_lora = self.loras.pop

    def load_lora(self, file: Path, name: str) -> None:
        self.read.append(file.stem)
        self.loras[name] = SimpleNamespace(weight=0.0, notes=(), stem=file.stem)

    def active_adapters(self) -> list[str]:
        return [name for name, lora in self.loras.items() if lora.weight]

    def set_lora(self, weights: dict[str, float]) -> None:
        for name, lora in self.loras.items():
            lora.weight = weights.get(name, 0.0)


def test_adapters_that_were_used_last_stay_loaded(tmp_path: Path) -> None:
    cache, transformer = LoraCache(), Recorder()

    def use(*names: str) -> list[str]:
        transformer.read.clear()
        cache.use(transformer, [(tmp_path / name, 1.0) for name in names])  # type: ignore[arg-type]
        assert sorted(transformer.loras[n].stem for n in transformer.active_adapters()) == sorted(
            names
        )
        return [*transformer.read]

    for name in "abcde":
        assert use(name) == [name]
    assert use("a") == []  # four others are kept, and it is the latest again
    assert use("f") == ["f"] and use() == []
    assert use("b") == ["b"]  # as the oldest it went for f
    assert use("a", "e") == [] and use("d", "f") == []
    assert use("c") == ["c"]


def draw(pipeline: ZImagePipeline) -> Image.Image:
    return pipeline(
        "a cat",
        height=48,
        width=64,
        num_inference_steps=2,
        guidance_scale=0.0,
        generator=generator_of(7),
    ).images[0]


def test_sums_beyond_float32_with_an_adapter_name_it_as_a_cause(
    generate: Generate, adapters: list[Path], tmp_path: Path
) -> None:
    huge = {name: tensor * 1e17 for name, tensor in load_file(adapters[0]).items()}
    save_file(huge, tmp_path / "huge.safetensors")
    result = generate(*OPTIONS, "-o", "o.png", "--lora", "huge.safetensors")
    fails(
        result, 1, "NaN or Inf in step 1", "try it without its LoRAs, or run zimage-mxfp8 validate"
    )


def test_images_are_those_of_diffusers(
    generate: Generate, reference: ZImagePipeline, adapters: list[Path], tmp_path: Path
) -> None:
    first, second = adapters
    loras = ("--lora", f"{first}:0.5", "--lora", f"{second}:-1.5")
    code, _, err = generate(*OPTIONS, "-o", "o.png", *loras)
    assert (code, err) == (0, "")
    without = draw(reference)
    reference.load_lora_weights(str(first), adapter_name="first")
    reference.load_lora_weights(str(second), adapter_name="second")
    reference.set_adapters(["first", "second"], [0.5, -1.5])
    want = draw(reference)
    reference.unload_lora_weights()
    assert abs(levels(want) - levels(without)).max() > 5
    assert abs(levels(tmp_path / "o.png") - levels(want)).max() <= 1
    stored = settings_of(tmp_path / "o.png")
    assert stored["loras"] == [
        {"name": "first.safetensors", "weight": 0.5},
        {"name": "second.safetensors", "weight": -1.5},
    ]
    with Image.open(tmp_path / "o.png") as image:
        assert 'Loras: "first:0.5, second:-1.5"' in image.text["parameters"]

    # The file knows names of adapters, not where they are.
    again = ("--settings-from", "o.png", "--dtype", "float32", "-o", "p.png")
    fails(generate(*again), 2, "--lora", "first.safetensors:0.5, second.safetensors:-1.5")
    assert generate(*again, *loras)[0] == 0
    assert torch.equal(
        torch.tensor(levels(tmp_path / "o.png")), torch.tensor(levels(tmp_path / "p.png"))
    )


def test_a_generator_switches_adapters(
    zimage_folder: Path, zimage_quantized: Path, adapters: list[Path]
) -> None:
    generator = ZImageGenerator(zimage_folder, zimage_quantized, "cpu", dtype="float32")

    def make(*loras: tuple[Path, float]) -> torch.Tensor:
        settings = GenerationSettings("a cat", steps=1, height=48, width=64, seed=7, loras=loras)
        return torch.tensor(levels(generator.generate(settings).images[0]))

    first, second = adapters
    plain, with_first = make(), make((first, 1.0))
    assert not torch.equal(plain, with_first)
    assert not torch.equal(make((second, 1.0)), with_first)
    assert torch.equal(make(), plain)
    assert torch.equal(make((first, 0.25), (first, 0.75)), with_first)


@pytest.mark.parametrize(
    ("lora", "code", "part"),
    [
        ("missing.safetensors", 1, "missing.safetensors"),
        ("missing.safetensors:inf", 2, "the weight in missing.safetensors:inf is not finite"),
        (":0.5", 1, ":0.5"),
        ("oft.safetensors", 1, "oft.safetensors is OFT"),
    ],
)
def test_wrong_adapters_are_named(
    lora: str, code: int, part: str, cli: Run, zimage_folder: Path, tmp_path: Path
) -> None:
    """Before torch is imported and the model is loaded."""
    save_file({"layers.0.attention.out.oft_blocks": torch.ones(2)}, tmp_path / "oft.safetensors")
    result = cli("generate", "--model-dir", zimage_folder, *OPTIONS, "-o", "o.png", "--lora", lora)
    assert result.returncode == code and part in result.stderr and result.stdout == ""
    assert "loading" not in result.stderr


def test_what_is_not_used_is_told(generate: Generate, adapters: list[Path], tmp_path: Path) -> None:
    tensors = load_file(adapters[0])
    tensors["transformer.layers.77.attention.to_q.lora_A.weight"] = torch.ones(4, 256)
    tensors["lora_te1_text_model.lora_down.weight"] = torch.ones(4, 4)
    save_file(tensors, tmp_path / "more.safetensors")
    code, _, err = generate(*OPTIONS, "-o", "o.png", "--lora", "more.safetensors")
    assert code == 0
    first, second = err.splitlines()
    assert "1 tensor without a counterpart in this model, such as transformer.layers.77." in first
    assert "1 tensor for the text encoder" in second


def test_threads_with_different_adapters(
    zimage_folder: Path, zimage_quantized: Path, adapters: list[Path]
) -> None:
    generator = ZImageGenerator(zimage_folder, zimage_quantized, "cpu", dtype="float32")

    def make(i: int) -> torch.Tensor:
        loras = ((adapters[i % 2], 1.0),) if i % 3 else ()
        settings = GenerationSettings("a cat", steps=2, height=48, width=64, seed=7, loras=loras)
        return torch.tensor(levels(generator.generate(settings).images[0]))

    alone = [make(i) for i in range(6)]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(make, range(6)))
    assert all(torch.equal(x, y) for x, y in zip(alone, together, strict=True))


def test_a_file_that_changed_is_read_again(
    zimage_folder: Path, zimage_quantized: Path, adapters: list[Path], tmp_path: Path
) -> None:
    generator = ZImageGenerator(zimage_folder, zimage_quantized, "cpu", dtype="float32")

    def make(*loras: tuple[Path, float]) -> torch.Tensor:
        settings = GenerationSettings("a cat", steps=1, height=48, width=64, seed=7, loras=loras)
        return torch.tensor(levels(generator.generate(settings).images[0]))

    file = tmp_path / "adapter.safetensors"
    shutil.copy(adapters[0], file)
    first = make((file, 1.0))
    shutil.copy(adapters[1], file)
    second = make((file, 1.0))
    assert not torch.equal(first, second)
    assert torch.equal(second, make((adapters[1], 1.0)))
    file.write_bytes(b"")
    with pytest.raises(zm.CheckpointError):
        make((adapters[0], 1.0), (file, 1.0))
    assert torch.equal(make((adapters[0], 1.0)), first)


def test_an_image_is_made_again_without_its_adapters(
    generate: Generate, adapters: list[Path], tmp_path: Path
) -> None:
    assert generate(*OPTIONS, "-o", "a.png")[0] == 0
    assert generate(*OPTIONS, "-o", "b.png", "--lora", adapters[0])[0] == 0
    again = ("--settings-from", "b.png", "--dtype", "float32", "--no-lora", "-o", "c.png")
    assert generate(*again)[0] == 0
    assert (levels(tmp_path / "a.png") == levels(tmp_path / "c.png")).all()
