"""The speed-up node in the real ComfyUI, against its own forward."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import zimage_mxfp8 as zm
from helpers.adapter_files import random
from helpers.comfyui import error, forward_of, inputs, load, run
from helpers.comfyui_sizes import CAPTION, DIM
from zimage_mxfp8.comfy.nodes import NODE_CLASS_MAPPINGS, speed_up

pytestmark = [pytest.mark.comfyui, pytest.mark.filterwarnings("ignore")]


def addresses_of(model: Any) -> list[int]:
    """Where the codes are; ComfyUI moves the scales in every load."""
    weights = (x for x in model.model.diffusion_model.parameters() if hasattr(x, "_qdata"))
    return [x._qdata.data_ptr() for x in weights]


@pytest.fixture(scope="module")
def stock(comfy: SimpleNamespace, quantized: Path) -> Any:
    return load(comfy, quantized)


@pytest.mark.parametrize(
    "given", [inputs(), inputs(15, 17), inputs(8, 8, 1, 32), inputs(16, 16, 3, 60)]
)
def test_the_same_output(comfy: SimpleNamespace, stock: Any, given: tuple[Any, ...]) -> None:
    fast = speed_up(stock, "weight-only")
    # The epsilon of the norms of q and k differs: 1.2e-7 there, 1e-5 here and in diffusers.
    assert error(run(comfy, fast, given), run(comfy, stock, given)) < 5e-5
    bfloat16 = torch.bfloat16
    assert error(run(comfy, fast, given, bfloat16), run(comfy, stock, given, bfloat16)) < 0.03
    # ComfyUI takes float16 where a device has no bfloat16.
    assert error(run(comfy, fast, given, torch.float16), run(comfy, stock, given)) < 3e-3
    assert forward_of(fast).native_calls == 3 and not forward_of(fast).fallback_calls


@pytest.mark.parametrize("compute", ["fp8", "mxfp8-emulated", "auto"])
def test_every_mode(comfy: SimpleNamespace, quantized: Path, compute: str) -> None:
    stock, given = load(comfy, quantized), inputs()
    wanted = run(comfy, stock, given)
    fast = speed_up(stock, compute)
    found = run(comfy, fast, given)
    assert error(found, wanted) < (5e-5 if compute == "auto" else 0.2)
    assert forward_of(fast).native_calls == 1
    # In mode fp8 the weights are folded where they are, and still what they stand for.
    assert error(run(comfy, stock, given), wanted) < 0.02
    assert error(run(comfy, fast, given), found) == 0


def test_the_weights_are_not_copied(comfy: SimpleNamespace, quantized: Path) -> None:
    stock = load(comfy, quantized)
    fast = speed_up(stock, "weight-only")
    run(comfy, fast, inputs())
    theirs = {
        parameter._qdata.untyped_storage().data_ptr()
        for parameter in stock.model.diffusion_model.parameters()
        if hasattr(parameter, "_qdata")
    }
    transformer = forward_of(fast)._transformer
    ours = [buffer for name, buffer in transformer.named_buffers() if name.endswith("codes")]
    assert len(ours) >= 20
    assert {buffer.untyped_storage().data_ptr() for buffer in ours} <= theirs


# ---- adapters

RANK = 4


def lora_file(original: Path, kind: str, size: float = 0.1) -> dict[str, torch.Tensor]:
    """In ComfyUI's names: split q, k and v, or fused."""
    tensors = {}
    for name, weight in load_file(original).items():
        layer = name.removesuffix(".weight")
        if not name.startswith("layers.") or not layer.endswith(
            ("qkv", "attention.out", "w1", "w2")
        ):
            continue
        parts = {layer: weight}
        if kind == "split" and layer.endswith("qkv"):
            whole = zip("qkv", weight.chunk(3), strict=True)
            parts = {layer.replace("qkv", f"to_{part}"): piece for part, piece in whole}
        for part, piece in parts.items():
            up, down = random(len(piece), RANK, seed=1), random(RANK, piece.shape[1], seed=2)
            up *= size * float(piece.float().norm() / (up @ down).norm())
            tensors[f"diffusion_model.{part}.lora_A.weight"] = down
            tensors[f"diffusion_model.{part}.lora_B.weight"] = up
    return tensors


def with_lora(comfy: SimpleNamespace, model: Any, file: dict[str, Any], strength: float) -> Any:
    return comfy.sd.load_lora_for_models(model, None, dict(file), strength, 0)[0]


@pytest.fixture(scope="module")
def exact(comfy: SimpleNamespace, quantized: Path) -> Any:
    """The decoded weights, to which ComfyUI adds adapters without rounding to 8 bits."""
    plain = quantized.with_name("decoded.safetensors")
    zm.dequantize_checkpoint(quantized, plain)
    return load(comfy, plain)


@pytest.mark.parametrize("kind", ["split", "fused"])
def test_adapters_are_exact(
    comfy: SimpleNamespace, stock: Any, exact: Any, original: Path, kind: str
) -> None:
    given, file = inputs(), lora_file(original, kind)
    without = run(comfy, exact, given)
    for strengths in ((0.7,), (1.0, -0.4)):
        theirs, patched = exact, stock
        for strength in strengths:
            theirs = with_lora(comfy, theirs, file, strength)
            patched = with_lora(comfy, patched, file, strength)
        wanted, fast = run(comfy, theirs, given), speed_up(patched, "weight-only")
        found = run(comfy, fast, given)
        assert not fast.patches and forward_of(fast).native_calls == 1
        effect = float((wanted - without).norm())
        assert effect > 0.05 * float(without.norm())
        assert float((found - wanted).norm()) < 2e-3 * effect
        # ComfyUI's own way, which quantises again.
        requantized = run(comfy, patched, given)
        assert float((requantized - wanted).norm()) > 0.05 * effect


def test_strength_0_is_none(comfy: SimpleNamespace, stock: Any, original: Path) -> None:
    given = inputs()
    plain = run(comfy, speed_up(stock, "weight-only"), given)
    patched = with_lora(comfy, stock, lora_file(original, "fused"), 0.0)
    assert torch.equal(run(comfy, speed_up(patched, "weight-only"), given), plain)


def test_other_patches_stay_comfyuis(comfy: SimpleNamespace, stock: Any) -> None:
    patched, given = stock.clone(), inputs()
    weight = "diffusion_model.layers.0.attention.out.weight"
    difference = random(DIM, DIM, seed=3) * 0.05
    patched.add_patches({weight: ("diff", (difference,))}, 1.0)
    fast = speed_up(patched, "weight-only")
    assert list(fast.patches) == [weight]
    wanted = run(comfy, patched, given)
    assert error(run(comfy, fast, given), wanted) < 0.01  # rounded stochastically in both
    assert error(run(comfy, stock, given), wanted) > 0.05


@pytest.mark.parametrize("kind", ["split", "fused"])
def test_adapters_stay_in_calls_that_fall_back(
    comfy: SimpleNamespace, stock: Any, exact: Any, original: Path, kind: str
) -> None:
    given, file = inputs(), lora_file(original, kind)
    wanted = run(comfy, with_lora(comfy, exact, file, 0.7), given)
    fast = speed_up(with_lora(comfy, stock, file, 0.7), "weight-only")
    found = run(comfy, fast, given, patches={"double_block": [lambda given: {}]})
    assert forward_of(fast).native_calls == 0
    effect = float((wanted - run(comfy, exact, given)).norm())
    assert float((found - wanted).norm()) < 2e-3 * effect
    assert float((run(comfy, fast, given) - wanted).norm()) < 2e-3 * effect
    assert forward_of(fast).native_calls == 1


def test_adapters_of_one_strength_stay_apart(
    comfy: SimpleNamespace, stock: Any, exact: Any, original: Path
) -> None:
    """Of strengths that print alike, and of one that names qkv and one that names its parts."""
    given = inputs()
    split, fused = (lora_file(original, kind) for kind in ("split", "fused"))
    for first, second in ((0.3, 0.1 + 0.2), (0.5, 0.5)):
        theirs, ours = exact, stock
        for file, strength in ((split, first), (fused, second)):
            theirs = with_lora(comfy, theirs, file, strength)
            ours = with_lora(comfy, ours, file, strength)
        wanted = run(comfy, theirs, given)
        assert error(run(comfy, speed_up(ours, "weight-only"), given), wanted) < 2e-4


def test_a_node_behind_another_keeps_its_adapters(
    comfy: SimpleNamespace, stock: Any, exact: Any, original: Path
) -> None:
    given, file = inputs(), lora_file(original, "fused")
    wanted = run(comfy, with_lora(comfy, exact, file, 0.7), given)
    once = speed_up(with_lora(comfy, stock, file, 0.7), "weight-only")
    assert error(run(comfy, speed_up(once, "weight-only"), given), wanted) < 2e-4


def test_merges_are_left_whole(comfy: SimpleNamespace, exact: Any, original: Path) -> None:
    merged = with_lora(comfy, exact, lora_file(original, "fused"), 0.7).clone()
    patches = exact.get_key_patches("diffusion_model.")
    for key, patch in patches.items():
        merged.add_patches({key: patch}, 0.5, 0.5)
    given = inputs()
    assert error(run(comfy, speed_up(merged), given), run(comfy, merged, given)) < 2e-4


# ---- what cannot run here


def test_calls_that_fall_back(
    comfy: SimpleNamespace, stock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    given, fast = inputs(), speed_up(stock, "weight-only")
    hooked = {"patches": {"double_block": [lambda given: {}]}}
    for _ in range(2):
        found = run(comfy, fast, given, **hooked)
    assert torch.equal(found, run(comfy, stock, given, **hooked))
    assert forward_of(fast).fallback_calls == {'a node patches "double_block"': 2}
    assert forward_of(fast).native_calls == 0
    lines = [record.message for record in caplog.records if "own forward runs" in record.message]
    assert len(lines) == 1 and 'because a node patches "double_block"' in lines[0]
    run(comfy, fast, given)
    assert forward_of(fast).native_calls == 1


def replaced_forward(module: Any) -> Any:
    return lambda x: type(module).forward(module, x) + x


def test_what_nodes_put_on_modules_is_kept(comfy: SimpleNamespace, quantized: Path) -> None:
    given, model = inputs(), load(comfy, quantized)
    layer = model.model.diffusion_model.layers[0].feed_forward
    patched = model.clone()
    name = "diffusion_model.layers.0.feed_forward.forward"
    patched.add_object_patch(name, replaced_forward(layer))
    fast = speed_up(patched, "weight-only")
    wanted = run(comfy, patched, given)
    assert error(wanted, run(comfy, model, given)) > 0.01
    assert torch.equal(run(comfy, fast, given), wanted)
    assert list(forward_of(fast).fallback_calls) == ['a node patches "layers.0.feed_forward"']


def test_scaled_positions_are_kept(comfy: SimpleNamespace, stock: Any) -> None:
    patched, given = stock.clone(), inputs()
    options = {"rope_options": {"scale_x": 0.5, "scale_y": 0.5}}
    fast = speed_up(patched, "weight-only")
    assert torch.equal(run(comfy, fast, given, **options), run(comfy, stock, given, **options))
    assert forward_of(fast).native_calls == 0


def test_other_formats_fall_back(comfy: SimpleNamespace, original: Path) -> None:
    model, given = load(comfy, original, torch.float8_e4m3fn), inputs()
    fast = speed_up(model)
    found = run(comfy, fast, given)
    assert torch.isfinite(found).all() and torch.equal(found, run(comfy, model, given))
    assert list(forward_of(fast).fallback_calls) == ["its weights are in float8_e4m3fn"]


def test_int8_files_run_in_comfyui(comfy: SimpleNamespace, original: Path, tmp_path: Path) -> None:
    file, plain, given = tmp_path / "int8.safetensors", tmp_path / "plain.safetensors", inputs()
    zm.convert(original, file, format="int8-convrot")
    zm.dequantize_checkpoint(file, plain)
    model = load(comfy, file)
    weight = model.model.diffusion_model.layers[0].attention.qkv.weight
    assert weight._layout_cls == "TensorWiseINT8Layout" and weight._params.convrot
    assert weight._params.convrot_groupsize == 256
    found, wanted = run(comfy, model, given), run(comfy, load(comfy, plain), given)
    assert 0 < error(found, wanted) < 0.03  # it rounds activations to INT8 too
    fast = speed_up(model)
    assert torch.equal(run(comfy, fast, given), found)
    assert list(forward_of(fast).fallback_calls) == [
        "its weights are in TensorWiseINT8Layout, not in MXFP8"
    ]


def test_a_plain_file_runs_too(comfy: SimpleNamespace, original: Path) -> None:
    model, given = load(comfy, original), inputs()
    fast = speed_up(model)
    assert error(run(comfy, fast, given), run(comfy, model, given)) < 5e-5
    assert forward_of(fast).native_calls == 1


def test_modes_in_turn_on_one_model(comfy: SimpleNamespace, quantized: Path) -> None:
    model, given = load(comfy, quantized), inputs()
    wanted = run(comfy, model, given)
    for compute in ("weight-only", "fp8", "weight-only", "fp8"):
        found = run(comfy, speed_up(model, compute), given)
        assert error(found, wanted) < (0.2 if compute == "fp8" else 0.02)
        assert error(run(comfy, model, given), wanted) < 0.02


def test_another_model(comfy: SimpleNamespace, stock: Any) -> None:
    other = SimpleNamespace(model=SimpleNamespace(diffusion_model=torch.nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="not Z-Image; connect a Z-Image model"):
        speed_up(other)


# ---- ComfyUI around it


def test_unload_and_load_again(comfy: SimpleNamespace, stock: Any) -> None:
    given, fast = inputs(), speed_up(stock, "weight-only")
    before = run(comfy, fast, given)
    comfy.management.unload_all_models()
    comfy.management.soft_empty_cache()
    assert torch.equal(run(comfy, fast, given), before)


def test_dynamic_vram_is_left(
    comfy: SimpleNamespace, stock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ComfyUI loads the file again. Its class for dynamic VRAM cannot run here: it is claimed."""
    given = inputs()
    wanted = run(comfy, stock, given)
    dynamic = stock.clone()
    monkeypatch.setattr(dynamic, "is_dynamic", lambda: True)
    fast = speed_up(dynamic, "weight-only")
    assert fast.model is not stock.model and not fast.is_dynamic()
    assert error(run(comfy, fast, given), wanted) < 5e-5
    assert forward_of(fast).native_calls == 1


def test_a_copy_with_weights_of_its_own(
    comfy: SimpleNamespace, stock: Any, quantized: Path
) -> None:
    given, fast = inputs(), speed_up(stock, "weight-only")
    wanted = run(comfy, fast, given)
    other = load(comfy, quantized)
    copy = fast.clone(model_override=other.get_clone_model_override())
    assert forward_of(copy) is not forward_of(fast)
    assert forward_of(copy).module is other.model.diffusion_model
    assert torch.equal(run(comfy, copy, given), wanted)
    assert forward_of(fast.clone()) is forward_of(fast)


def test_a_sampler_draws_the_same(comfy: SimpleNamespace, stock: Any) -> None:
    noise = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    positive, negative = ([[random(1, n, CAPTION, seed=n), {}]] for n in (21, 33))
    fast, seen = speed_up(stock, "weight-only"), []
    settings = (4, 2.0, "euler", "simple", positive, negative, torch.zeros_like(noise))

    def draw(model: Any) -> torch.Tensor:
        latents = comfy.sample.sample(
            model, noise, *settings, seed=1, callback=lambda step, *_: seen.append(step)
        )
        return latents.float()

    wanted, found = draw(stock), draw(fast)
    assert error(found, wanted) < 0.03
    assert forward_of(fast).native_calls == 8 and not forward_of(fast).fallback_calls
    assert seen == [0, 1, 2, 3] * 2


def test_it_can_be_cancelled(comfy: SimpleNamespace, stock: Any) -> None:
    noise = torch.randn(1, 16, 16, 16)
    caption = [[random(1, 21, CAPTION, seed=1), {}]]
    fast = speed_up(stock, "weight-only")

    def interrupt(*_: Any) -> None:
        comfy.management.interrupt_current_processing()

    with pytest.raises(comfy.management.InterruptProcessingException):
        comfy.sample.sample(
            fast,
            noise,
            *(8, 1.0, "euler", "simple", caption, caption, torch.zeros_like(noise)),
            callback=interrupt,
        )
    comfy.management.interrupt_current_processing(False)
    assert forward_of(fast).native_calls < 8


@pytest.mark.usefixtures("in_models_folder")
def test_the_convert_node(quantized: Path) -> None:
    node = NODE_CLASS_MAPPINGS["ZImageMXFP8Convert"]
    (files,) = node.INPUT_TYPES()["required"]["file"]
    assert "z.safetensors" in files
    before = quantized.read_bytes()
    result = node().convert("z.safetensors", "uniform", overwrite=True)
    assert result["result"] == ("z-mxfp8.safetensors",)
    assert quantized.read_bytes() == before
    with pytest.raises(zm.Error, match="exists"):
        node().convert("z.safetensors", "uniform", overwrite=False)


@pytest.fixture
def in_models_folder(
    comfy: SimpleNamespace, original: Path, quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = ([str(original.parent)], {".safetensors"})
    monkeypatch.setitem(comfy.folder_paths.folder_names_and_paths, "diffusion_models", paths)


@pytest.mark.usefixtures("in_models_folder")
def test_the_load_node(comfy: SimpleNamespace, stock: Any, quantized: Path) -> None:
    """The same model as ComfyUI's loader makes, on weights that do not move afterwards."""
    node, given = NODE_CLASS_MAPPINGS["ZImageMXFP8Load"], inputs()
    assert quantized.name in node.INPUT_TYPES()["required"]["file"][0]
    (model,) = node().load(quantized.name)
    assert not model.is_dynamic()
    wanted, found = stock.model.state_dict(), model.model.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        if not name.endswith("comfy_quant"):
            assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name
    addresses = addresses_of(model)
    fast = speed_up(model, "weight-only")
    assert error(run(comfy, fast, given), run(comfy, stock, given)) < 5e-5
    assert forward_of(fast).native_calls == 1
    assert len(addresses) >= 20 and addresses_of(model) == addresses
    copy = fast.deepclone_multigpu(new_load_device=torch.device("cpu"))
    assert copy.model is not fast.model and forward_of(copy).module is copy.model.diffusion_model


@pytest.mark.usefixtures("in_models_folder")
@pytest.mark.parametrize("kind", ["int8-convrot", "plain"])
def test_the_load_node_takes_other_formats(
    comfy: SimpleNamespace, original: Path, kind: str
) -> None:
    file = original
    if kind != "plain":
        file = original.with_name(f"z-{kind}.safetensors")
        zm.convert(original, file, format=kind)
    (model,) = NODE_CLASS_MAPPINGS["ZImageMXFP8Load"]().load(file.name)
    wanted = load(comfy, file, None)
    assert error(run(comfy, model, inputs()), run(comfy, wanted, inputs())) == 0


@pytest.mark.usefixtures("in_models_folder")
def test_the_load_node_refuses_other_files(comfy: SimpleNamespace, original: Path) -> None:
    other = original.with_name("lora.safetensors")
    save_file({"transformer.layers.0.attention.to_q.lora_A.weight": torch.zeros(4, DIM)}, other)
    with pytest.raises(zm.CheckpointError, match=r"lora\.safetensors"):
        NODE_CLASS_MAPPINGS["ZImageMXFP8Load"]().load(other.name)
