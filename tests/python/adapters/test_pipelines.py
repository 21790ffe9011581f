"""The adapter calls of diffusers' pipelines, on ours and on its own transformer with PEFT."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    ZImageControlNetInpaintPipeline,
    ZImageControlNetPipeline,
    ZImageImg2ImgPipeline,
    ZImageInpaintPipeline,
    ZImagePipeline,
)
from diffusers.loaders.peft import PeftAdapterMixin
from PIL import Image
from safetensors.torch import save_file

import zimage_mxfp8 as zm
from helpers import adapter_files as af
from helpers.adapter_dialects import NAMES, dialects
from helpers.control_reference import (
    Kind,
    file_tensors,
    make_controlnet,
    silence_refiner,
    write_controlnet,
)
from helpers.diffusers_reference import load_reference, make_reference, relative_error
from helpers.model_folder import TEXT_ENCODER, VAE, make_parts

# PEFT's remark when a second adapter is loaded.
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")

SAME = 2e-5  # of float32 over two steps


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint in MXFP8, the same decoded, and adapters in dialects diffusers takes."""
    folder = tmp_path_factory.mktemp("pipelines")
    model = make_reference(dim=256)
    model.save_pretrained(folder / "transformer")
    zm.convert(folder / "transformer", folder / "mxfp8.safetensors")
    zm.dequantize_checkpoint(folder / "mxfp8.safetensors", folder / "plain.safetensors")
    attention = af.modules_of(model, "to_q") | af.modules_of(model, "to_out.0")
    every = {n: x for n, x in af.modules_of(model).items() if "layers" in n and "adaLN" not in n}
    native = af.dotted("diffusion_model.")
    dialect = af.dotted("transformer."), ".lora_A.weight", ".lora_B.weight"
    adapters = {
        "a": af.write_pairs(attention, *dialect),
        "b": af.write_pairs(
            every, af.underscored("lora_unet_"), ".lora_down.weight", ".lora_up.weight", 2.0
        ),
        "c": af.write_peft(model, 6.0, False),
        "wide": af.write_pairs(attention, *dialect, rank=9),
        "dora": af.write_dora(model, af.dotted("transformer."), ".lora_magnitude_vector"),
        "lokr, whole": af.write_lokr(attention, native, "none", float("inf"), (4, 4)),
        "lokr, split": af.write_lokr(attention, native, "second", 64.0, (4, 4)),
    }
    for name, written in adapters.items():
        save_file(written.tensors, folder / f"{name}.safetensors", written.metadata)
    return {path.stem: path for path in folder.glob("*.safetensors")}


class Pair:
    """The same pipeline twice: with our transformer and with diffusers'."""

    def __init__(
        self,
        files: dict[str, Path],
        pipeline: type[DiffusionPipeline] = ZImagePipeline,
        controlnets: tuple[object, object] | None = None,
    ) -> None:
        self.files = files
        reference = make_reference(dim=256)
        load_reference(reference, files["plain"])
        ours = zm.ZImageTransformer.from_checkpoint(
            files["mxfp8"], "cpu", "weight-only", torch.float32
        )
        torch.manual_seed(0)
        parts = make_parts(TEXT_ENCODER, VAE)
        mine, others = ({"controlnet": x} for x in controlnets) if controlnets else ({}, {})
        self.ours = pipeline(**parts, transformer=ours, **mine)
        self.theirs = pipeline(**parts, transformer=reference, **others)
        for each in self.both:
            each.set_progress_bar_config(disable=True)

    @property
    def both(self) -> tuple[ZImagePipeline, ZImagePipeline]:
        return self.ours, self.theirs

    def do(self, call: Callable[[ZImagePipeline], object]) -> object:
        """Call both; they return the same."""
        mine, reference = (call(pipeline) for pipeline in self.both)
        assert mine == reference
        return mine

    def load(self, name: str, adapter: str | None = None, **options: object) -> None:
        self.do(
            lambda pipeline: pipeline.load_lora_weights(
                str(self.files[name]), adapter_name=adapter, **options
            )
        )

    def draw(self, **options: object) -> torch.Tensor:
        """Draw with both; return ours."""
        ours, theirs = (draw_with(pipeline, **options) for pipeline in self.both)
        assert relative_error(ours, theirs) < SAME
        return ours


def draw_with(pipeline: ZImagePipeline, **options: object) -> torch.Tensor:
    return pipeline(
        "a photo",
        height=64,
        width=64,
        num_inference_steps=2,
        guidance_scale=0.0,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        **options,
    ).images


@pytest.fixture
def pair(files: dict[str, Path]) -> Pair:
    return Pair(files)


@pytest.fixture(scope="module")
def every_dialect(files: dict[str, Path]) -> dict[str, af.Written]:
    return dialects(Pair(files).theirs.transformer)


def add(model: torch.nn.Module, deltas: af.Deltas) -> None:
    """Add dense changes to the weights of diffusers' transformer."""
    for name, delta in deltas.items():
        weight = model.get_submodule(name).weight
        weight.data = (weight.double() + delta).float()


# Dialects that the call does not load -> the error, and what its message says.
REFUSED: dict[str, tuple[type[Exception], str]] = {
    "LoHa": (ValueError, "should be empty"),
    "LoHa of high rank": (ValueError, "should be empty"),
    "LoHa, fused": (ValueError, "should be empty"),
    "difference, fused": (ValueError, "should be empty"),
    "DoRA, ai-toolkit": (ValueError, "should be empty"),
    "musubi fork, rsLoRA": (ValueError, "should be empty"),
    "musubi fork, DoRA": (ValueError, "should be empty"),
    "VideoX-Fun, alpha 0": (zm.CheckpointError, r"load the file with pipe\.transformer\.load_l"),
}
# The magnitude is left out by diffusers, which writes to its log that it does.
CHANGED = ("DoRA, OneTrainer", "DoRA, fused")


@pytest.mark.slow
@pytest.mark.parametrize("dialect", [name for name in NAMES if name not in CHANGED])
def test_a_dialect_is_its_dense_change_or_refused(
    dialect: str, pair: Pair, every_dialect: dict[str, af.Written], tmp_path: Path
) -> None:
    """What docs/guide/lora.md states of the files that diffusers refuses."""
    written = every_dialect[dialect]
    save_file(written.tensors, tmp_path / "adapter.safetensors", written.metadata)
    plain = draw_with(pair.ours)
    if dialect in REFUSED:
        error, message = REFUSED[dialect]
        with pytest.raises(error, match=message):
            pair.ours.load_lora_weights(str(tmp_path / "adapter.safetensors"))
        assert torch.equal(draw_with(pair.ours), plain)
        return
    pair.ours.load_lora_weights(str(tmp_path / "adapter.safetensors"))
    add(pair.theirs.transformer, written.deltas)
    assert relative_error(pair.draw(), plain) > 1e-3


@pytest.mark.parametrize("dialect", CHANGED)
def test_diffusers_leaves_a_dora_scale_out(
    dialect: str, pair: Pair, every_dialect: dict[str, af.Written], tmp_path: Path
) -> None:
    """The difference that docs/guide/lora.md states; equality would mean to update it."""
    written = every_dialect[dialect]
    save_file(written.tensors, tmp_path / "adapter.safetensors", written.metadata)
    pair.ours.load_lora_weights(str(tmp_path / "adapter.safetensors"), adapter_name="a")
    without = draw_with(pair.ours)
    pair.ours.delete_adapters("a")
    pair.ours.transformer.load_lora(tmp_path / "adapter.safetensors")
    add(pair.theirs.transformer, written.deltas)
    assert relative_error(without, pair.draw()) > 1e-3


def test_the_calls_of_a_user(pair: Pair) -> None:
    plain = pair.draw()
    pair.load("a", "a")
    with_a = pair.draw()
    assert relative_error(with_a, plain) > 0.01
    pair.load("b", "b")
    assert pair.do(lambda p: p.get_list_adapters()) == {"transformer": ["a", "b"]}
    assert pair.do(lambda p: p.get_active_adapters()) == ["b"]
    with_b = pair.draw()
    pair.do(lambda p: p.set_adapters(["a", "b"], [0.5, -0.3]))
    assert pair.do(lambda p: sorted(p.get_active_adapters())) == ["a", "b"]
    both = pair.draw()
    assert relative_error(both, with_b) > 0.01
    pair.draw(joint_attention_kwargs={"scale": 0.4})
    assert relative_error(pair.draw(), both) == 0
    pair.do(lambda p: p.disable_lora())
    assert relative_error(pair.draw(), plain) < 1e-6
    pair.do(lambda p: p.enable_lora())
    assert relative_error(pair.draw(), both) == 0
    pair.do(lambda p: p.set_adapters("a", {"transformer": 0.25}))
    pair.draw()
    pair.do(lambda p: p.delete_adapters("b"))
    assert pair.do(lambda p: p.get_list_adapters()) == {"transformer": ["a"]}
    pair.draw()
    pair.do(lambda p: p.unload_lora_weights())
    assert pair.do(lambda p: p.get_list_adapters()) == {}
    assert pair.do(lambda p: p.get_active_adapters()) == []
    assert torch.equal(pair.draw(), plain)


BLOCKS = {"layers.0.attention.to_q": 0.0, "layers.0": 0.3, "layers.1": -0.5}


@pytest.mark.parametrize(
    "set_weights",
    [
        lambda p: p.transformer.set_adapters("b", BLOCKS),
        lambda p: p.set_adapters("b", {"transformer": BLOCKS}),
        lambda p: p.set_adapters(["b", "a"], [{"transformer": BLOCKS}, 0.5]),
    ],
)
def test_weights_by_block(set_weights: Callable[[ZImagePipeline], object], pair: Pair) -> None:
    pair.load("a", "a")
    pair.load("b", "b")
    before = pair.draw()
    pair.do(set_weights)
    assert relative_error(pair.draw(), before) > 0.01


@pytest.mark.parametrize("name", ["dora", "lokr, whole", "lokr, split"])
def test_other_kinds(name: str, pair: Pair) -> None:
    pair.load(name, "x")
    drawn = [pair.draw()]
    for weight in (0.5, -1.0):
        pair.do(lambda p, weight=weight: p.set_adapters("x", weight))
        drawn.append(pair.draw())
        assert relative_error(drawn[-1], drawn[-2]) > 0.01


def test_a_weight_may_change_between_steps(pair: Pair) -> None:
    pair.load("a", "a")
    constant = pair.draw()

    def change(pipeline: ZImagePipeline, step: int, time: object, inputs: dict[str, object]):
        pipeline.set_adapters("a", -0.5)
        return inputs

    changed = pair.draw(callback_on_step_end=change)
    pair.do(lambda p: p.set_adapters("a", 1.0))
    assert torch.equal(pair.draw(), constant)
    assert relative_error(changed, constant) > 0.01


PICTURE, MASK = Image.linear_gradient("L").resize((64, 64)).convert("RGB"), Image.new("L", (64, 64))
MASK.paste(255, (0, 0, 64, 32))
EDIT = {"image": PICTURE, "strength": 1.0}
CONTROL = {"control_image": PICTURE, "controlnet_conditioning_scale": 0.8}


@pytest.mark.parametrize(
    ("pipeline", "kind", "inputs"),
    [
        (ZImageImg2ImgPipeline, None, EDIT),
        (ZImageInpaintPipeline, None, EDIT | {"mask_image": MASK}),
        (ZImageControlNetPipeline, "1.0", CONTROL),
        (
            ZImageControlNetInpaintPipeline,
            "2.1",
            CONTROL | {"image": PICTURE, "mask_image": MASK},
        ),
    ],
)
def test_every_pipeline_takes_adapters(
    pipeline: type[DiffusionPipeline],
    kind: Kind | None,
    inputs: dict[str, object],
    files: dict[str, Path],
    tmp_path: Path,
) -> None:
    nets = None
    if kind:
        net = make_controlnet(kind, (0,), refiners=1)
        if kind == "2.1":
            silence_refiner(net)
        path = write_controlnet(tmp_path / "net.safetensors", file_tensors(kind, net))
        nets = zm.ZImageControlNet.from_checkpoint(path, "cpu", dtype=torch.float32), net
    pair = Pair(files, pipeline, nets)
    plain = pair.draw(**inputs)
    pair.load("b", "b")
    assert relative_error(pair.draw(**inputs), plain) > 0.01
    pair.load("a", "a")
    pair.do(lambda p: p.set_adapters(["a", "b"], [-0.5, 0.3]))
    pair.draw(**inputs)
    pair.do(lambda p: p.unload_lora_weights())
    assert torch.equal(pair.draw(**inputs), plain)


def test_settings_of_the_header(pair: Pair) -> None:
    pair.load("c")
    assert pair.do(lambda p: p.get_list_adapters()) == {"transformer": ["default_0"]}
    pair.draw()


@pytest.mark.parametrize("settings", [None, {"target_rank": 16}])
def test_hotswap(settings: dict[str, int] | None, pair: Pair) -> None:
    if settings is not None:
        pair.do(lambda p: p.enable_lora_hotswap(**settings))
    pair.load("a", "a")
    before = pair.draw()
    pair.load("wide", "a", hotswap=True)
    assert pair.do(lambda p: p.get_list_adapters()) == {"transformer": ["a"]}
    assert relative_error(pair.draw(), before) > 0.01
    with pytest.raises(zm.UsageError, match=r'"b" is no adapter that is loaded \("a"\)'):
        pair.ours.load_lora_weights(str(pair.files["b"]), adapter_name="b", hotswap=True)


def test_fused_adapters_stay_branches(pair: Pair) -> None:
    plain = pair.draw()
    pair.load("a", "a")
    pair.theirs.fuse_lora(lora_scale=0.5)
    with pytest.warns(UserWarning, match="keeps adapters as branches"):
        pair.ours.fuse_lora(lora_scale=0.5)
    assert pair.do(lambda p: p.num_fused_loras) == 1
    fused = pair.draw()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pair.do(lambda p: p.unload_lora_weights())
    assert relative_error(pair.draw(), fused) < 1e-6
    assert pair.do(lambda p: p.get_list_adapters()) == {}
    assert pair.ours.transformer.loras == {}
    pair.ours.unfuse_lora()  # too late, as with PEFT
    assert torch.equal(draw_with(pair.ours), fused)
    assert relative_error(plain, fused) > 0.01


@pytest.mark.filterwarnings("ignore:fuse_lora keeps adapters:UserWarning")
@pytest.mark.filterwarnings("ignore:Adapter . was active which is now deleted:UserWarning")
@pytest.mark.parametrize(
    "calls",
    [
        ["load a", "disable", "unload", "load a"],
        ["load a", "load b", "delete b"],
        ["load a", "fuse a", "unload", "load b", "disable"],
        ["load a", "fuse a", "unload", "load b as a"],
        ["load a", "load b", "delete a"],
    ],
    ids=" ".join,
)
def test_orders_of_calls(calls: list[str], pair: Pair) -> None:
    steps = {
        "disable": lambda p: p.disable_lora(),
        "unload": lambda p: p.unload_lora_weights(),
        "delete a": lambda p: p.delete_adapters("a"),
        "delete b": lambda p: p.delete_adapters("b"),
        "fuse a": lambda p: p.fuse_lora(adapter_names=["a"]),
        "load a": lambda p: p.load_lora_weights(str(pair.files["a"]), adapter_name="a"),
        "load b": lambda p: p.load_lora_weights(str(pair.files["b"]), adapter_name="b"),
        "load b as a": lambda p: p.load_lora_weights(str(pair.files["b"]), adapter_name="a"),
    }
    for call in calls:
        pair.do(steps[call])
    pair.draw()
    pair.do(lambda p: p.get_list_adapters())
    pair.do(lambda p: p.get_active_adapters())


def test_unfused_adapters_count_as_before(pair: Pair) -> None:
    """Not so with PEFT's, which keep the scale of `fuse_lora`."""
    pair.load("a", "a")
    before = pair.draw()
    with pytest.warns(UserWarning, match="keeps adapters as branches"):
        pair.ours.fuse_lora(lora_scale=0.5)
    pair.ours.unfuse_lora()
    assert pair.ours.num_fused_loras == 0
    assert torch.equal(pair.draw(), before)


def test_an_adapter_can_be_moved_away(pair: Pair) -> None:
    pair.load("a", "a")
    pair.do(lambda p: p.set_lora_device(["a"], "cpu"))
    pair.draw()


def test_names_that_are_taken_or_unknown(pair: Pair) -> None:
    pair.load("a", "a")
    with pytest.raises(zm.UsageError, match='"a" is taken by another adapter'):
        pair.ours.load_lora_weights(str(pair.files["b"]), adapter_name="a")
    for pipeline in pair.both:
        with pytest.raises(ValueError, match="not in the list of present adapters"):
            pipeline.set_adapters("x")
    pair.draw()


def test_every_adapter_method_of_diffusers_is_there_or_refused() -> None:
    refused = {"add_adapter", "save_lora_adapter"}
    methods = {name for name in vars(PeftAdapterMixin) if not name.startswith("_")}
    there = {name for name in methods if hasattr(zm.ZImageTransformer, name)}
    assert methods - there == refused
