"""The quantizer for diffusers' own transformer: files, arithmetic, offloading, adapters."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from diffusers import PipelineQuantizationConfig, ZImagePipeline, ZImageTransformer2DModel
from diffusers.hooks import apply_group_offloading
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import zimage_mxfp8 as zm
from helpers import adapter_files as af
from helpers.checkpoints import metadata_of, tensor_bytes, to_diffusers
from helpers.diffusers_reference import (
    load_reference,
    make_reference,
    random_inputs,
    relative_error,
    save_in_bfloat16,
)
from helpers.model_folder import TEXT_ENCODER, VAE, make_parts
from zimage_mxfp8.diffusers import MXFP8Linear, ZImageMXFP8Config, quantize_, set_compute
from zimage_mxfp8.system import devices
from zimage_mxfp8.transformer import arithmetic
from zimage_mxfp8.transformer.compute import Compute
from zimage_mxfp8.transformer.linear import quantized_linear

INPUTS = random_inputs([(8, 8), (8, 12)], [5, 9])
WEIGHTS = "diffusion_pytorch_model.safetensors"
load = ZImageTransformer2DModel.from_pretrained


def run(model: torch.nn.Module) -> list[torch.Tensor]:
    with torch.no_grad():
        return [x.float() for x in model(*INPUTS, return_dict=False)[0]]


def quantized_layers(model: torch.nn.Module) -> dict[str, MXFP8Linear]:
    return {name: x for name, x in model.named_modules() if isinstance(x, MXFP8Linear)}


def assert_same_state(a: torch.nn.Module, b: torch.nn.Module) -> None:
    mine, other = a.state_dict(), b.state_dict()
    assert mine.keys() == other.keys()
    assert all(tensor_bytes(mine[key]) == tensor_bytes(other[key]) for key in mine)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformer's folder in BF16."""
    return save_in_bfloat16(make_reference(), tmp_path_factory.mktemp("plain") / "transformer")


@pytest.fixture(scope="module")
def saved(plain: Path) -> Path:
    """The same, quantised while loading and saved."""
    folder = plain.parent / "saved"
    load(plain, quantization_config=ZImageMXFP8Config()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def converted(plain: Path) -> Path:
    """The same by `convert`."""
    file = plain.parent / "converted.safetensors"
    zm.convert(plain, file, bias_correction="none")
    return file


@pytest.fixture(scope="module")
def reference(converted: Path) -> ZImageTransformer2DModel:
    """Diffusers' class in float32 with the decoded weights."""
    decoded = converted.parent / "decoded.safetensors"
    zm.dequantize_checkpoint(converted, decoded)
    model = make_reference()
    load_reference(model, decoded)
    return model


@pytest.fixture(scope="module")
def expected(reference: ZImageTransformer2DModel) -> list[torch.Tensor]:
    return run(reference)


@pytest.fixture
def model(saved: Path) -> ZImageTransformer2DModel:
    return load(saved, dtype=torch.float32)


# ---- Files


@pytest.mark.parametrize("recipe", ["uniform", "zimage"])
def test_codes_and_scales_are_those_of_convert(recipe: str, plain: Path, tmp_path: Path) -> None:
    zm.convert(plain, tmp_path / "ours.safetensors", recipe=recipe, bias_correction="none")
    load(plain, quantization_config=ZImageMXFP8Config(recipe)).save_pretrained(tmp_path / "saved")
    ours = {
        name: tensor
        for name, tensor in load_file(tmp_path / "ours.safetensors").items()
        if not name.endswith(".comfy_quant")
    }
    expected = {}
    for name, tensor in to_diffusers(ours).items():
        if name.endswith("attention.qkv.weight_scale"):  # rows of a tile follow each other
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                expected[name.replace("qkv", f"to_{part}")] = piece
        else:
            expected[name] = tensor
    found = load_file(tmp_path / "saved" / WEIGHTS)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype, name
        assert tensor_bytes(tensor) == tensor_bytes(expected[name]), name


def test_saved_files_are_read_back_byte_for_byte(saved: Path, tmp_path: Path) -> None:
    model = load(saved)
    model.save_pretrained(tmp_path)
    first, second = load_file(saved / WEIGHTS), load_file(tmp_path / WEIGHTS)
    assert first.keys() == second.keys()
    assert all(tensor_bytes(first[name]) == tensor_bytes(second[name]) for name in first)
    assert metadata_of(saved / WEIGHTS) == metadata_of(tmp_path / WEIGHTS)
    entries = [json.loads((f / "config.json").read_text()) for f in (saved, tmp_path)]
    wanted = {"quant_method": "zimage_mxfp8", "recipe": "uniform", "compute": "weight-only"}
    assert [entry["quantization_config"] for entry in entries] == [wanted, wanted]


def test_header_describes_every_layer(saved: Path) -> None:
    described = json.loads(metadata_of(saved / WEIGHTS)["_quantization_metadata"])["layers"]
    tensors = load_file(saved / WEIGHTS)
    codes = {name for name, x in tensors.items() if x.dtype == torch.float8_e4m3fn}
    assert {f"{name}.weight" for name in described} == codes
    assert described["layers.0.feed_forward.w1"] == {
        "format": "mxfp8",
        "group_size": 32,
        "orig_dtype": "torch.bfloat16",
        "orig_shape": [682, 256],
    }


def test_shards_are_the_same_as_one_file(plain: Path, saved: Path, tmp_path: Path) -> None:
    load(plain).save_pretrained(tmp_path / "plain", max_shard_size="1MB")
    model = load(tmp_path / "plain", quantization_config=ZImageMXFP8Config())
    model.save_pretrained(tmp_path / "saved", max_shard_size="1MB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    assert_same_state(load(tmp_path / "saved"), load(saved))


def test_codes_do_not_depend_on_the_dtype_of_the_rest(plain: Path, saved: Path) -> None:
    half = load(plain, quantization_config=ZImageMXFP8Config(), dtype=torch.float16)
    wanted = load(saved).state_dict()
    for name, layer in quantized_layers(half).items():
        assert torch.equal(layer.weight, wanted[f"{name}.weight"])
    assert half.dtype == torch.float16


def test_excluded_layers_stay_plain(plain: Path) -> None:
    config = ZImageMXFP8Config(exclude_layers=[r"layers\.1\.attention\.qkv"])
    layers = quantized_layers(load(plain, quantization_config=config))
    attention = "layers.{}.attention.to_{}"
    assert all(attention.format(0, part) in layers for part in "qkv")
    assert not any(attention.format(1, part) in layers for part in "qkv")


def test_pipeline_finds_the_quantizer_in_the_folder(saved: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    parts = make_parts(TEXT_ENCODER, VAE)
    ZImagePipeline(**parts, transformer=load(saved)).save_pretrained(tmp_path)
    pipe = ZImagePipeline.from_pretrained(tmp_path, dtype=torch.float32).to("cpu")
    assert_same_state(pipe.transformer, load(saved, dtype=torch.float32))
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    (image,) = pipe(
        "a fox", 32, 32, num_inference_steps=1, generator=generator, output_type="latent"
    ).images
    assert image.isfinite().all()


def test_pipeline_quantises_its_transformer(plain: Path, saved: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    parts = make_parts(TEXT_ENCODER, VAE)
    ZImagePipeline(**parts, transformer=load(plain)).save_pretrained(tmp_path)
    mapping = PipelineQuantizationConfig(quant_mapping={"transformer": ZImageMXFP8Config()})
    pipe = ZImagePipeline.from_pretrained(
        tmp_path, quantization_config=mapping, dtype=torch.bfloat16
    )
    assert_same_state(pipe.transformer, load(saved))


# ---- Arithmetic


def test_output_is_that_of_decoded_weights(
    model: ZImageTransformer2DModel, expected: list[torch.Tensor]
) -> None:
    assert relative_error(run(model), expected) < 1e-5


def test_quantize_in_place_equals_loading(plain: Path, saved: Path, tmp_path: Path) -> None:
    model = load(plain, dtype=torch.bfloat16)
    quantize_(model)
    assert_same_state(model, load(saved))
    model.save_pretrained(tmp_path)
    assert_same_state(load(tmp_path), model)


def test_devices_without_kernels_give_the_same(
    plain: Path,
    saved: Path,
    expected: list[torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(devices, "has_kernels", lambda _: False)
    assert arithmetic.on(torch.device("cpu")) is arithmetic.by_torch
    model = load(plain, quantization_config=ZImageMXFP8Config(), dtype=torch.float32)
    assert_same_state(model, load(saved, dtype=torch.float32))
    assert relative_error(run(model), expected) < 1e-5
    set_compute(model, "fp8")
    assert {layer.compute for layer in quantized_layers(model).values()} == {"fp8"}
    assert relative_error(run(model), expected) < 0.08


def test_state_dict_can_be_loaded(plain: Path, model: ZImageTransformer2DModel) -> None:
    other = load(plain, quantization_config=ZImageMXFP8Config(), dtype=torch.float32)
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_state_dict(model.state_dict(), strict=True)
    assert_same_state(other, model)


def test_moving_to_another_dtype_leaves_codes_alone(model: ZImageTransformer2DModel) -> None:
    layer = model.layers[0].adaLN_modulation[0]
    layer.set_compute("fp8", "layer")
    moved = copy.deepcopy(layer).to("cpu", torch.bfloat16)
    assert moved.bias.dtype == moved.compute_dtype == torch.bfloat16
    for kept in ("weight", "weight_scale", "row_scale_bits"):
        assert torch.equal(getattr(moved, kept), getattr(layer, kept))


@pytest.mark.parametrize(("compute", "bound"), [("mxfp8-emulated", 0.08), ("fp8", 0.08)])
def test_modes_that_quantise_activations(
    compute: str, bound: float, model: ZImageTransformer2DModel, expected: list[torch.Tensor]
) -> None:
    set_compute(model, compute)
    assert {layer.compute for layer in quantized_layers(model).values()} == {compute}
    assert 1e-3 < relative_error(run(model), expected) < bound


def test_layer_in_mode_fp8_equals_our_transformers(saved: Path) -> None:
    layer = load(saved).layers[0].feed_forward.w1
    ours, _ = quantized_linear(
        layer.weight.data.clone(), layer.weight_scale.clone(), 682, "fp8", torch.bfloat16
    )
    layer.set_compute("fp8", "w1")
    x = torch.randn(7, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(layer(x), ours(ours.encode(x)))


def test_folded_weights_are_saved_folded(
    model: ZImageTransformer2DModel, saved: Path, tmp_path: Path
) -> None:
    set_compute(model, "fp8")
    wanted = run(model)
    model.save_pretrained(tmp_path)
    again = load(tmp_path, dtype=torch.float32)
    assert {layer.compute for layer in quantized_layers(again).values()} == {"fp8"}
    assert relative_error(run(again), wanted) == 0
    again.load_state_dict(load(saved, dtype=torch.float32).state_dict())  # not folded
    assert relative_error(run(again), wanted) == 0


def test_layers_marked_for_full_precision_keep_their_input(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((saved / "config.json").read_text())
    metadata = metadata_of(saved / WEIGHTS)
    described = json.loads(metadata["_quantization_metadata"])
    marked = "layers.0.adaLN_modulation.0"
    described["layers"][marked]["full_precision_matrix_mult"] = True
    metadata["_quantization_metadata"] = json.dumps(described)
    save_file(load_file(saved / WEIGHTS), tmp_path / WEIGHTS, metadata)
    model = load(tmp_path)
    set_compute(model, "mxfp8-emulated")
    modes = {name: layer.compute for name, layer in quantized_layers(model).items()}
    assert modes.pop(marked) == "weight-only"
    assert set(modes.values()) == {"mxfp8-emulated"}
    model.save_pretrained(tmp_path / "again")
    kept = json.loads(metadata_of(tmp_path / "again" / WEIGHTS)["_quantization_metadata"])
    assert kept == described


def test_dequantize_gives_plain_layers(
    model: ZImageTransformer2DModel, expected: list[torch.Tensor], tmp_path: Path
) -> None:
    model.dequantize()
    assert not quantized_layers(model)
    assert relative_error(run(model), expected) < 1e-5
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.slow
def test_compiled_equals_eager() -> None:
    model = make_reference(dim=128, layers=1)
    quantize_(model)
    wanted = run(model)  # which also makes the table of rotations
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert relative_error(run(compiled), wanted) == 0


@pytest.mark.parametrize("compute", ["fp8", "mxfp8-emulated"])
def test_compiled_layers_equal_eager_ones(
    compute: Compute, model: ZImageTransformer2DModel
) -> None:
    set_compute(model, compute)
    layers, x = model.layers[0].feed_forward, torch.randn(1, 7, 256)
    torch._dynamo.reset()
    compiled = torch.compile(layers, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), layers(x))


# ---- Offloading and adapters


def offload_groups(level: str) -> Callable[[ZImageTransformer2DModel], None]:
    def offload(model: ZImageTransformer2DModel) -> None:
        cpu = torch.device("cpu")
        blocks = {"num_blocks_per_group": 1} if level == "block_level" else {}
        apply_group_offloading(model, cpu, cpu, offload_type=level, **blocks)

    return offload


def offload_by_accelerate(model: ZImageTransformer2DModel) -> None:
    cpu_offload(model, torch.device("cpu"), offload_buffers=True)
    assert model.layers[0].attention.to_q.weight.is_meta


@pytest.mark.parametrize(
    "offload",
    [offload_groups("block_level"), offload_groups("leaf_level"), offload_by_accelerate],
    ids=["blocks", "leaves", "accelerate"],
)
def test_offloaded_transformer_runs(
    offload: Callable[[ZImageTransformer2DModel], None],
    model: ZImageTransformer2DModel,
    expected: list[torch.Tensor],
) -> None:
    offload(model)
    assert relative_error(run(model), expected) < 1e-5


def test_adapters_are_loaded_beside_the_weights(
    saved: Path, reference: ZImageTransformer2DModel, tmp_path: Path
) -> None:
    attention = af.modules_of(reference, "to_q") | af.modules_of(reference, "to_out.0")
    written = af.write_pairs(
        attention, af.dotted("transformer."), ".lora_A.weight", ".lora_B.weight"
    )
    save_file(written.tensors, tmp_path / "lora.safetensors", written.metadata)
    torch.manual_seed(0)
    parts = make_parts(TEXT_ENCODER, VAE)
    results = []
    for transformer in (copy.deepcopy(reference), load(saved, dtype=torch.float32)):
        pipe = ZImagePipeline(**parts, transformer=transformer)
        before = run(transformer)
        pipe.load_lora_weights(str(tmp_path / "lora.safetensors"), adapter_name="a")
        pipe.set_adapters(["a"], [0.5])
        results.append(run(transformer))
        assert relative_error(results[-1], before) > 1e-2
    assert relative_error(results[1], results[0]) < 1e-5
    with pytest.raises(zm.UnsupportedError, match="cannot be fused into MXFP8 weights"):
        pipe.fuse_lora()
    with pytest.raises(zm.UnsupportedError, match="adapters are loaded"):
        transformer.save_pretrained(tmp_path / "with adapters")
    with pytest.raises(zm.UnsupportedError, match="with adapters cannot be quantised"):
        ours = copy.deepcopy(reference)
        ZImagePipeline(**parts, transformer=ours).load_lora_weights(
            str(tmp_path / "lora.safetensors")
        )
        quantize_(ours)
    pipe.unload_lora_weights()
    assert_same_state(transformer, load(saved, dtype=torch.float32))


# ---- Errors


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"recipe": "unifrom"}, zm.UsageError, 'recipe "unifrom" does not exist'),
        ({"exclude_layers": ["("]}, zm.UsageError, "exclude_layers .* is not a regular expression"),
        ({"compute": "int8"}, zm.UsageError, "compute must be mxfp8, fp8, "),
    ],
)
def test_bad_configurations(
    options: dict[str, object], error: type[zm.Error], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        ZImageMXFP8Config(**options)


def test_recipe_that_keeps_everything(plain: Path) -> None:
    config = ZImageMXFP8Config(exclude_layers=["."])
    with pytest.raises(zm.UsageError, match="recipe keeps every layer"):
        load(plain, quantization_config=config)


def test_nan_is_named(plain: Path, tmp_path: Path) -> None:
    model = load(plain)
    model.layers[1].feed_forward.w2.weight.data[3, 5] = float("nan")
    with pytest.raises(
        zm.NonFiniteError, match=r'"layers\.1\.feed_forward\.w2\.weight" has NaN at \[3, 5\]'
    ) as caught:
        quantize_(model)
    assert (caught.value.row, caught.value.column) == (3, 5)
    model.save_pretrained(tmp_path)
    with pytest.raises(zm.NonFiniteError, match=r"w2\.weight. has NaN at \[3, 5\]"):
        load(tmp_path, quantization_config=ZImageMXFP8Config())
    with pytest.raises(zm.UsageError, match="recipe keeps every layer"):
        quantize_(model, exclude_layers=["."])
    assert not quantized_layers(model)
    assert not getattr(model, "is_quantized", False)


def test_only_once_and_only_zimage(model: ZImageTransformer2DModel) -> None:
    with pytest.raises(zm.UsageError, match="transformer is quantised already"):
        quantize_(model)
    with pytest.raises(zm.UnsupportedError, match="Linear cannot be quantised by"):
        quantize_(torch.nn.Linear(2, 2))
    with pytest.raises(zm.UsageError, match="model has no layers in MXFP8"):
        set_compute(torch.nn.Linear(2, 2), "fp8")


def test_offloaded_weights_are_refused(plain: Path, model: ZImageTransformer2DModel) -> None:
    original = load(plain)
    offload_by_accelerate(original)
    with pytest.raises(zm.UnsupportedError, match="with offloaded weights cannot be quantised"):
        quantize_(original)
    offload_by_accelerate(model)
    with pytest.raises(zm.UnsupportedError, match="are offloaded and cannot be folded"):
        set_compute(model, "fp8")


def edited(saved: Path, folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text((saved / "config.json").read_text())
    tensors = load_file(saved / WEIGHTS)
    edit(tensors)
    with safe_open(saved / WEIGHTS, "pt") as file:
        save_file(tensors, folder / WEIGHTS, file.metadata())
    return folder


LAYER = "layers.0.attention.to_q"


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (lambda t: t.pop(f"{LAYER}.weight_scale"), "is torch.float8_e4m3fn and has no scales"),
        (
            lambda t: t.update({f"{LAYER}.weight": t[f"{LAYER}.weight"].bfloat16()}),
            "is torch.bfloat16, not float8_e4m3fn codes",
        ),
        (
            lambda t: t.update({f"{LAYER}.weight": t[f"{LAYER}.weight"][:32].clone()}),
            r"is \[32, 256\], and the model has \[256, 256\] there",
        ),
        (
            lambda t: t.update({"layers.7.x.weight_scale": torch.zeros(1)}),
            '"layers.7.x" is quantised, and the model has no linear layer of that name',
        ),
        (
            lambda t: [t.pop(name) for name in list(t) if name.endswith("_scale")],
            "the weights are not quantised",
        ),
    ],
    ids=["no scales", "not codes", "another shape", "unknown layer", "not quantised"],
)
def test_damaged_folders(
    edit: Callable[[dict[str, torch.Tensor]], None], sentence: str, saved: Path, tmp_path: Path
) -> None:
    with pytest.raises(zm.CheckpointError, match=sentence):
        load(edited(saved, tmp_path / "damaged", edit))
