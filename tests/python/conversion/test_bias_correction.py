"""Bias correction against diffusers' embedder and scheduler, torch, and convert_to_quant."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.transformers.transformer_z_image import TimestepEmbedder
from safetensors.torch import load_file, save_file

import zimage_mxfp8 as zm
from helpers.checkpoints import PREFIX, Tensors, random_tensors, small_shapes
from helpers.convert_to_quant import card_command, run_convert_to_quant
from zimage_mxfp8.checkpoint.source import open_checkpoint
from zimage_mxfp8.conversion.bias_correction import embedder_outputs
from zimage_mxfp8.zimage.sampling import sampler_timesteps

LAYER = "layers.3.adaLN_modulation.0"


def diffusers_timesteps(steps: int, shift: float) -> torch.Tensor:
    """What the pipeline feeds the model: (1000 - t) / 1000, times the model's 1000."""
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    scheduler.set_timesteps(sigmas=torch.linspace(1.0, 1 / steps, steps).tolist())
    return 1000 - scheduler.timesteps.double()


@pytest.mark.parametrize(
    ("sampler", "steps", "shift"),
    [("turbo", 8, 3.0), ("base", 50, 6.0), (1, 1, 3.0), ("20", 20, 3.0)],
)
def test_timesteps_are_those_of_the_sampler(sampler: str | int, steps: int, shift: float) -> None:
    want = diffusers_timesteps(steps, shift).numpy()
    np.testing.assert_allclose(sampler_timesteps(sampler), want, atol=1e-3)


@pytest.fixture(scope="module")
def embedder(small_model: Tensors) -> TimestepEmbedder:
    out_size = small_model["t_embedder.mlp.2.weight"].shape[0]
    module = TimestepEmbedder(out_size, mid_size=1024).double()
    state = {
        name.removeprefix("t_embedder."): tensor.double()
        for name, tensor in small_model.items()
        if name.startswith("t_embedder.")
    }
    module.load_state_dict(state)
    return module


def embed(embedder: TimestepEmbedder, steps: int = 8) -> torch.Tensor:
    times = torch.from_numpy(sampler_timesteps(steps))
    # Its own features are float32, so the comparison is to float32's precision.
    with torch.no_grad():
        return embedder.mlp(embedder.timestep_embedding(times, 256).double())


def test_embedder_equals_diffusers(small_file: Path, embedder: TimestepEmbedder) -> None:
    found = embedder_outputs(open_checkpoint(small_file), "", sampler_timesteps(8))
    want = embed(embedder).numpy()
    # float32 angles of up to 1000 are off by 3e-5
    np.testing.assert_allclose(found, want, atol=2e-4, rtol=0)


def mean_error(
    file: Path, original: Tensors, inputs: torch.Tensor, layer: str = LAYER
) -> torch.Tensor:
    """Mean over `inputs` of the quantised layer's output minus the original's, per output."""
    found = load_file(file)
    rows, cols = original[f"{layer}.weight"].shape
    encoded = zm.MXFP8Array(found[f"{layer}.weight"], found[f"{layer}.weight_scale"], (rows, cols))
    weight = zm.dequantize(encoded, "float32").double()
    change = (weight - original[f"{layer}.weight"].double()) @ inputs.mean(dim=0)
    return change + found[f"{layer}.bias"].double() - original[f"{layer}.bias"].double()


def test_exact_correction_removes_the_mean_error_up_to_rounding(
    small_model: Tensors, small_file: Path, embedder: TimestepEmbedder, tmp_path: Path
) -> None:
    inputs = embed(embedder)
    errors = {}
    for mode in ("none", "timesteps", "synthetic"):
        output = tmp_path / f"{mode}.safetensors"
        zm.convert(small_file, output, bias_correction=mode)
        errors[mode] = mean_error(output, small_model, inputs)
    # Half a unit in the last place of a BF16 bias, and the float32 angles of `embed`.
    rounding = small_model[f"{LAYER}.bias"].double().abs() * 2.0**-8 + 2e-4
    assert (errors["timesteps"].abs() <= rounding).all()
    rms = {mode: float(error.square().mean().sqrt()) for mode, error in errors.items()}
    assert rms["timesteps"] < 0.35 * rms["none"], rms
    assert rms["synthetic"] > 0.9 * rms["none"], "random inputs of zero mean cannot help"


def test_exact_correction_of_float32_biases_has_no_rounding_left(
    embedder: TimestepEmbedder, small_model: Tensors, tmp_path: Path
) -> None:
    tensors = {name: tensor.float() for name, tensor in small_model.items()}
    source, output = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file({PREFIX + name: tensor for name, tensor in tensors.items()}, source)
    zm.convert(source, output)
    inputs = embed(embedder)
    error = mean_error(output, {PREFIX + n: t for n, t in tensors.items()}, inputs, PREFIX + LAYER)
    zm.convert(source, output, bias_correction="none", overwrite=True)
    before = mean_error(output, {PREFIX + n: t for n, t in tensors.items()}, inputs, PREFIX + LAYER)
    assert float(error.abs().max()) < 1e-3 * float(before.abs().max())


def test_float16_biases(small_model: Tensors, tmp_path: Path) -> None:
    tensors = {name: tensor.half() for name, tensor in small_model.items()}
    source, output = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file(tensors, source)
    zm.convert(source, output)
    bias = load_file(output)[f"{LAYER}.bias"]
    assert bias.dtype == torch.float16
    difference = (bias.double() - tensors[f"{LAYER}.bias"].double()).abs()
    assert 0 < float(difference.max()) < 0.1


def test_number_of_timesteps_matters(small_file: Path, tmp_path: Path) -> None:
    biases = []
    for steps in ("turbo", "base", 8):
        output = tmp_path / f"{steps}.safetensors"
        zm.convert(small_file, output, timesteps=steps)
        biases.append(load_file(output)[f"{LAYER}.bias"])
    assert torch.equal(biases[0], biases[2])
    assert not torch.equal(biases[0], biases[1])


@pytest.mark.peer
def test_synthetic_equals_convert_to_quant(tmp_path: Path) -> None:
    source, ours, peers = (tmp_path / f"{n}.safetensors" for n in ("in", "ours", "peers"))
    wide = {f"{LAYER}.weight": (6000, 40), f"{LAYER}.bias": (6000,)}
    save_file(random_tensors(small_shapes(6) | wide), source)
    arguments = card_command(source, peers, "--manual_seed", "7")
    arguments.remove("--zimage")  # whose filter leaves no layer with a bias
    run_convert_to_quant(arguments)
    zm.convert(
        source,
        ours,
        recipe="convert-to-quant",
        exclude_layers=[arguments[arguments.index("--exclude-layers") + 1]],
        bias_correction="synthetic",
        calibration_samples=64,
        seed=7,
        any_model=True,  # no Z-Image has modulations of this shape
    )
    found, want = load_file(ours), load_file(peers)
    assert found.keys() == want.keys()
    layers = [name.removesuffix(".comfy_quant") for name in want if name.endswith("comfy_quant")]
    biases = [f"{layer}.bias" for layer in layers if f"{layer}.bias" in want]
    assert len(biases) > 8
    entries = differing = 0
    for name in biases:
        # BF16 bit patterns of one sign are consecutive: differences count last places
        a, b = (tensor.view(torch.int16).int() for tensor in (found[name], want[name]))
        assert int((a - b).abs().max()) <= 1, name
        entries += a.numel()
        differing += int((a != b).sum())
    assert differing <= entries / 1000, (differing, entries)
    for name in want.keys() - set(biases):
        assert torch.equal(found[name].view(torch.uint8), want[name].view(torch.uint8)), name


def test_missing_embedder_is_named(small_model: Tensors, tmp_path: Path) -> None:
    tensors = {n: t for n, t in small_model.items() if n != "t_embedder.mlp.2.bias"}
    source = tmp_path / "in.safetensors"
    save_file(tensors, source)
    with pytest.raises(zm.CheckpointError, match=r"t_embedder\.mlp\.2\.bias\" is missing"):
        zm.convert(source, tmp_path / "out.safetensors")
    with pytest.raises(zm.CheckpointError, match=r"t_embedder\.mlp\.2\.bias.*correction=\"none\""):
        zm.convert(source, tmp_path / "out.safetensors", any_model=True)
    zm.convert(source, tmp_path / "out.safetensors", any_model=True, bias_correction="none")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("t_embedder.mlp.2.weight", (40, 1000)),
        ("t_embedder.mlp.2.weight", (1,) * 70),
        ("t_embedder.mlp.0.weight", ()),
        ("t_embedder.mlp.0.weight", (1, 256)),
        ("t_embedder.mlp.0.weight", (0, 10**8)),
        ("t_embedder.mlp.2.bias", ()),
        ("layers.3.adaLN_modulation.0.weight", (160, 41)),
    ],
)
def test_shapes_that_do_not_fit(
    small_model: Tensors, tmp_path: Path, name: str, shape: tuple[int, ...]
) -> None:
    source = tmp_path / "in.safetensors"
    save_file({**small_model, name: torch.zeros(shape, dtype=torch.bfloat16)}, source)
    with pytest.raises(zm.CheckpointError, match=name.replace(".", r"\.")):
        zm.convert(source, tmp_path / "out.safetensors")
    with pytest.raises(zm.CheckpointError, match="t_embedder"):
        zm.convert(source, tmp_path / "out.safetensors", any_model=True)


def test_embedder_with_nan_is_named(small_model: Tensors, tmp_path: Path) -> None:
    name = "t_embedder.mlp.0.bias"
    tensors = small_model | {name: small_model[name].clone()}
    tensors[name][7] = float("nan")
    source, output = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file(tensors, source)
    with pytest.raises(zm.NonFiniteError, match=r"t_embedder\.mlp\.0\.bias.* row 0, column 7"):
        zm.convert(source, output)
    with pytest.raises(zm.NonFiniteError, match=r"t_embedder\.mlp\.0\.bias.* row 0, column 7"):
        zm.convert(source, output, bias_correction="none")
    assert not output.exists()
    report = zm.convert(source, output, nonfinite="keep")
    assert report.corrected_biases == 0
    assert f'"{name}" has NaN or Inf and is kept' in report.warnings


def test_large_values_in_the_embedder(small_model: Tensors, tmp_path: Path) -> None:
    name = "t_embedder.mlp.0.bias"
    tensors = small_model | {name: torch.full_like(small_model[name], -8192.0)}
    source, output = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file(tensors, source)
    zm.convert(source, output)  # silu(-8192) is 0, without a warning
    assert torch.isfinite(load_file(output)[f"{LAYER}.bias"]).all()


@pytest.mark.parametrize(("samples", "seed"), [(0, 1), (10**12, 1), (8, -1), (8, 10**20)])
def test_random_inputs_within_reason(small_file: Path, samples: int, seed: int) -> None:
    with pytest.raises(zm.UsageError, match=r"^(calibration_samples|seed) must be"):
        zm.convert(small_file, bias_correction="synthetic", calibration_samples=samples, seed=seed)


def test_unknown_mode(small_file: Path) -> None:
    with pytest.raises(zm.UsageError, match="bias_correction must be one of"):
        zm.convert(small_file, bias_correction="best")  # type: ignore[arg-type]
