"""What quantising a layer does to the output, against diffusers and plain arithmetic."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ml_dtypes import float8_e4m3fn
from safetensors.torch import save_file
from scipy.linalg import hadamard

import zimage_mxfp8 as zm
from helpers.checkpoints import Tensors, random_tensors
from helpers.commands import Run, drop_the_right_to_ignore_permissions, fails, only
from helpers.diffusers_reference import CAPTION, make_reference, quantize_inputs
from helpers.model_folder import make_pipeline
from helpers.terminal import first_column, tables_in_terminal
from zimage_mxfp8.analysis.sensitivity import run as analysis
from zimage_mxfp8.analysis.sensitivity.cases import record_cases
from zimage_mxfp8.analysis.sensitivity.measure import measure, output_error
from zimage_mxfp8.analysis.sensitivity.rounding import quantized, round_to_mxfp8
from zimage_mxfp8.analysis.sensitivity.search import smallest_prefix
from zimage_mxfp8.analysis.sensitivity.settings import MEASURED_MODES, chosen_steps
from zimage_mxfp8.analysis.sensitivity.targets import find_targets
from zimage_mxfp8.cli.main import main
from zimage_mxfp8.conversion.recipes import Recipe, recipe_toml, rules_outside_blocks
from zimage_mxfp8.streaming.jobs import StageProgress
from zimage_mxfp8.transformer.compute import Compute
from zimage_mxfp8.zimage.layers import zimage_shapes

SIZE = (64, 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sensitivity") / "transformer"
    make_reference(dim=128, layers=2).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> zm.ZImageTransformer:
    return zm.ZImageTransformer.from_checkpoint(folder, "cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def cases(model: zm.ZImageTransformer):
    captions = [
        torch.randn(n, CAPTION, generator=torch.Generator().manual_seed(n)) for n in (5, 40)
    ]
    return record_cases(model, captions, SIZE, 2, seed=3)


def analyse(folder: Path, **options: object) -> zm.SensitivityReport:
    settings: dict[str, object] = {
        "size": SIZE,
        "timesteps": 2,
        "dtype": torch.float32,
        "device": "cpu",
    }
    return zm.analyse_sensitivity(folder, **{**settings, **options})  # type: ignore[arg-type]


def test_targets_are_the_layers_that_recipes_know(
    folder: Path, model: zm.ZImageTransformer, tmp_path: Path
) -> None:
    zm.convert(folder, tmp_path / "all.safetensors", recipe=write_keep_nothing(tmp_path))
    layers = zm.inspect(tmp_path / "all.safetensors")
    assert layers is not None
    from zimage_mxfp8.transformer.model_file import open_model

    blocks = {
        name: layer.shape
        for name, layer in open_model(tmp_path / "all.safetensors").layers.items()
        if name.split(".")[0] in ("layers", "noise_refiner", "context_refiner")
    }
    assert {target.name: target.shape for target in find_targets(model)} == blocks


def write_keep_nothing(folder: Path) -> Path:
    (folder / "nothing.toml").write_text('title = "everything"\n')
    return folder / "nothing.toml"


def round_to_fp8(matrix: torch.Tensor) -> torch.Tensor:
    """E4M3 with a scale per row."""
    values = matrix.numpy()
    factors = np.abs(values).max(1, keepdims=True) / np.float32(448)
    return torch.from_numpy((values / factors).astype(float8_e4m3fn).astype(np.float32) * factors)


def round_to_int8(matrix: torch.Tensor) -> torch.Tensor:
    """INT8 with a scale per row, of columns that are rotated in blocks of 32."""
    values = np.pad(matrix.numpy(), ((0, 0), (0, -matrix.shape[1] % 32)))
    blocks = hadamard(32) / 32**0.5
    rotated = (values.reshape(len(values), -1, 32) @ blocks).reshape(values.shape)
    factors = np.abs(rotated).max(1, keepdims=True) / 127
    rounded = (np.rint(rotated / factors) * factors).reshape(len(values), -1, 32) @ blocks.T
    return torch.from_numpy(rounded.reshape(values.shape).astype(np.float32))[:, : matrix.shape[1]]


# What a mode makes of a layer's weights and of its input, tokens as rows.
Rounding = Callable[[torch.Tensor], torch.Tensor]
ROUNDINGS: dict[str, tuple[Rounding, Rounding]] = {
    "mxfp8": (round_to_mxfp8, round_to_mxfp8),
    "fp8": (round_to_mxfp8, round_to_fp8),  # folding changes no weight here
    "weight-only": (round_to_mxfp8, lambda x: x),
    "int8": (lambda weight: round_to_int8(round_to_mxfp8(weight)), round_to_int8),
}


@pytest.mark.parametrize(
    ("compute", "name"),
    [
        ("mxfp8", "layers.1.attention.qkv"),
        ("mxfp8", "layers.0.feed_forward.w1"),
        ("mxfp8", "layers.0.feed_forward.w3"),
        ("mxfp8", "layers.1.feed_forward.w2"),
        ("mxfp8", "context_refiner.0.attention.out"),
        ("mxfp8", "noise_refiner.0.adaLN_modulation.0"),
        *((mode, "layers.1.attention.qkv") for mode in ("fp8", "weight-only", "int8")),
        ("int8", "layers.0.feed_forward.w3"),
    ],
)
def test_one_layer_alone_is_what_diffusers_gives_with_it_rounded(
    compute: Compute, name: str, model: zm.ZImageTransformer, cases
) -> None:
    target = next(t for t in find_targets(model) if t.name == name)
    found = measure(model, [target], cases, compute)
    of_weight, of_input = ROUNDINGS[compute]
    reference = make_reference(dim=128, layers=2)
    quantize_inputs(reference, {name}, lambda x: of_input(x.flatten(0, -2)).view(x.shape))
    with torch.no_grad():
        for parameter_name, parameter in reference.named_parameters():
            ours = parameter_name.replace("to_out.0", "out")
            for part in ("to_q", "to_k", "to_v"):
                ours = ours.replace(f"attention.{part}", "attention.qkv")
            if ours == f"{name}.weight":
                parameter.copy_(of_weight(parameter))
        for case, error in zip(cases, found, strict=True):
            t = torch.full((2,), case.time)
            velocities = reference(case.latents, t, case.captions, return_dict=False)[0]
            want = output_error(velocities, case.velocities)
            # Where sums in another order decide a rounding, a step of E4M3 differs.
            assert error.total == pytest.approx(want.total, rel=0.05)
            assert error.total > 1e-9


def test_the_model_is_as_before_afterwards(model: zm.ZImageTransformer, cases) -> None:
    before = [x.clone() for x in cases[0].run(model)]
    with torch.no_grad(), quantized(model, find_targets(model), "int8"):
        changed = cases[0].run(model)
    assert not torch.equal(changed[0], before[0])
    assert all(torch.equal(a, b) for a, b in zip(cases[0].run(model), before, strict=True))


@pytest.mark.parametrize("compute", MEASURED_MODES)
def test_all_layers_are_what_a_converted_model_gives(
    compute: Compute, tensors: Tensors, tmp_path: Path
) -> None:
    """With 18 columns in a layer, which are padded and rotated with their padding."""
    save_file(tensors, tmp_path / "plain.safetensors")
    recipe = Recipe("all", "all", "Every layer of the blocks.", rules_outside_blocks())
    (tmp_path / "all.toml").write_text(recipe_toml(recipe))
    zm.convert(
        *(tmp_path / "plain.safetensors", tmp_path / "all.safetensors"),
        recipe=tmp_path / "all.toml",
        bias_correction="none",
    )

    def load(name: str, mode: str) -> zm.ZImageTransformer:
        return zm.ZImageTransformer.from_checkpoint(tmp_path / name, "cpu", mode, torch.float32)

    original = load("plain.safetensors", "weight-only")
    captions = analysis._synthetic_captions(CAPTION, 0)
    (case,) = record_cases(original, captions, (32, 32), 1, 0)
    with torch.no_grad(), quantized(original, find_targets(original), compute):
        found = case.run(original)
    error = output_error(found, case.velocities).total
    # Where sums in another order decide a rounding, a step of the format differs.
    of_mode = {"mxfp8": "mxfp8-emulated"}.get(compute, compute)
    want = case.run(load("all.safetensors", of_mode))
    assert output_error(found, want).total < 0.01 * error
    for other in {"mxfp8-emulated", "fp8", "weight-only", "int8"} - {of_mode}:
        want = case.run(load("all.safetensors", other))
        assert output_error(found, want).total > 0.05 * error, other


def test_bands_are_those_of_the_transform() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 16, 1, 24, 40)).astype(np.float32)
    error = output_error([torch.from_numpy(a)], [torch.from_numpy(b)])
    rows, columns = np.fft.fftfreq(24)[:, None], np.fft.fftfreq(40)[None, :]
    low = np.hypot(rows, columns) <= 0.125
    difference, wanted = (np.abs(np.fft.fft2(x.astype(np.float64))) ** 2 for x in (a - b, b))
    assert error.total == pytest.approx(((a - b) ** 2).sum() / (b**2).sum(), rel=1e-5)
    assert error.low == pytest.approx(difference[..., low].sum() / wanted[..., low].sum())
    assert error.high == pytest.approx(difference[..., ~low].sum() / wanted[..., ~low].sum())


def test_content_and_detail_are_told_apart() -> None:
    image = torch.randn(16, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    wave = torch.cos(2 * math.pi * torch.arange(32) / 32)  # one cycle in the image
    slow = output_error([image + wave], [image])
    assert slow.low > 0.1
    assert slow.high < 1e-10
    checks = (-1.0) ** torch.arange(32)
    fast = output_error([image + checks], [image])
    assert fast.high > 0.1
    assert fast.low < 1e-10


@given(st.lists(st.floats(0, 10), max_size=30), st.floats(0, 10))
def test_the_smallest_prefix_of_falling_errors(errors: list[float], bound: float) -> None:
    falling = sorted(errors, reverse=True)
    kept, error = smallest_prefix(len(falling), falling.__getitem__, bound)
    assert kept == next((i for i, e in enumerate(falling) if e <= bound), len(falling))
    assert error == (falling[kept] if kept < len(falling) else 0.0)


def test_the_steps_that_are_chosen() -> None:
    assert chosen_steps(1) == [4]
    assert chosen_steps(2) == [0, 7]
    assert chosen_steps(4) == [0, 2, 5, 7]
    assert chosen_steps(8) == list(range(8))


def test_the_report_as_a_whole(folder: Path, tmp_path: Path) -> None:
    free = analyse(folder, bound=1e-9)
    assert len(free.smallest.kept) == len(free.layers) == 5 * 4 + 3
    assert free.smallest.error == 0.0
    loose = analyse(folder, bound=10.0)
    assert loose.smallest.kept == ()
    assert loose.smallest == zm_choice(loose.everything, "smallest")
    bound = loose.everything.error * 0.7
    report = analyse(folder, bound=bound)
    assert 0 < len(report.smallest.kept) < len(report.layers)
    assert report.smallest.error <= bound < report.everything.error
    assert report.everything.nbytes < report.smallest.nbytes < free.smallest.nbytes
    assert {m.name for m in report.groups} == {
        *("attention", "feed_forward", "adaLN_modulation"),
        *("noise_refiner", "context_refiner", "first blocks", "last blocks"),
    }
    # What is kept costs more for its bytes than what is not.
    worth = [m.error.total / m.saved for m in report.layers]
    assert worth == sorted(worth, reverse=True)
    kept = {m.name for m in report.layers[: len(report.smallest.kept)]}
    assert kept == set(report.smallest.kept)
    assert json.loads(json.dumps(report.to_dict()))["bound"] == bound


def zm_choice(choice: analysis.Choice, name: str) -> analysis.Choice:
    return analysis.Choice(name, choice.kept, choice.nbytes, choice.error)


def test_sizes_are_those_that_convert_writes(folder: Path, tmp_path: Path) -> None:
    """Against BF16 sources, as `nbytes` counts."""
    tensors = tmp_path / "bf16"
    make_reference(dim=128, layers=2).to(torch.bfloat16).save_pretrained(tensors)
    report = analyse(tensors)
    output = tmp_path / "card.safetensors"
    zm.convert(tensors, output, recipe="uniform")
    with output.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    stored = sum(
        entry["data_offsets"][1] - entry["data_offsets"][0]
        for name, entry in header.items()
        if name != "__metadata__" and not name.endswith(".comfy_quant")
    )
    assert report.card.nbytes == stored


def test_planted_outliers_are_seen(tmp_path: Path) -> None:
    reference = make_reference(dim=128, layers=2)
    with torch.no_grad():
        reference.layers[1].attention.to_out[0].weight[:, 7] *= 100
        reference.layers[0].attention_norm1.weight[11] = 300.0  # the input of layers.0's qkv
    reference.save_pretrained(tmp_path)
    salience = analyse(tmp_path).salience
    assert salience["layers.1.attention.out"].weight_outliers == pytest.approx(1 / 128)
    assert salience["layers.0.attention.qkv"].activation_peak > 50
    assert salience["layers.1.attention.qkv"].activation_peak < 50
    assert all(0 <= s.time_drift <= 1 and 0 <= s.depth_drift <= 1 for s in salience.values())


def stop_after(count: int, folder: Path, state: Path) -> None:
    """Interrupt a run after so many measurements."""

    class StoppedError(Exception):
        pass

    def stop(progress: StageProgress) -> None:
        if progress.done == count:
            raise StoppedError

    with pytest.raises(StoppedError):
        analyse(folder, state=state, progress=stop)


def test_an_interrupted_run_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "state.json"
    stop_after(9, folder, state)
    calls: list[int] = []
    measured = analysis.measure
    monkeypatch.setattr(
        analysis, "measure", lambda *arguments: calls.append(1) or measured(*arguments)
    )
    resumed = analyse(folder, state=state)
    first = len(calls)
    assert analyse(folder) == resumed
    assert len(calls) - first == first + 9
    calls.clear()
    assert analyse(folder, state=state) == resumed
    assert calls == []


def test_a_state_of_another_run(folder: Path, tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    analyse(folder, state=state)
    with pytest.raises(zm.UsageError, match=r"state.json is of a run with another seed \(0, not 5"):
        analyse(folder, state=state, seed=5)
    with pytest.raises(
        zm.UsageError,
        match=r"of a run with another compute mode \(mxfp8, not int8\); name another file, or",
    ):
        analyse(folder, state=state, compute="int8")
    state.write_text("[]")
    with pytest.raises(
        zm.UsageError, match=r"state.json is not the state of a sensitivity run; name"
    ):
        analyse(folder, state=state)


Errors = list[dict[str, object]]


@pytest.mark.parametrize(
    "errors",
    [
        None,
        [],
        [{"total": 1.0, "low": 1.0, "high": 1.0}] * 3,
        [{"total": 1.0}] * 2,
        [{"total": "1", "low": 1.0, "high": 1.0}] * 2,
        [{"total": math.nan, "low": 1.0, "high": 1.0}] * 2,
        [{"total": -1.0, "low": 1.0, "high": 1.0}] * 2,
        [{"total": 10**400, "low": 1.0, "high": 1.0}] * 2,
    ],
)
def test_a_state_that_is_damaged(folder: Path, tmp_path: Path, errors: Errors | None) -> None:
    state = tmp_path / "state.json"
    stop_after(1, folder, state)
    document = json.loads(state.read_text())
    document["errors"]["layers.0.attention.qkv"] = errors
    state.write_text(json.dumps(document))
    refused(folder, state)


@pytest.mark.parametrize(
    "content",
    [b"", b"\0", b"[" * 100_000, b'{"run": [], "errors": {}}', b'{"run": 1, "errors": 1}'],
)
def test_a_state_that_is_none(folder: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "state.json").write_bytes(content)
    refused(folder, tmp_path / "state.json")


def refused(folder: Path, state: Path) -> None:
    before = state.read_bytes()
    with pytest.raises(
        zm.UsageError, match=r"state.json is not the state of a sensitivity run; name"
    ):
        analyse(folder, state=state)
    assert state.read_bytes() == before


def test_a_state_of_another_checkpoint(folder: Path, tmp_path: Path) -> None:
    make_reference(dim=128, layers=1).save_pretrained(tmp_path / "other")
    stop_after(1, folder, tmp_path / "state.json")
    with pytest.raises(zm.UsageError, match=r"is of a run with another checkpoint; name another"):
        analyse(tmp_path / "other", state=tmp_path / "state.json")


@pytest.mark.parametrize("dtype", [torch.float16, None, "float32"])
def test_dtypes_that_it_does_not_measure_in(dtype: object, folder: Path) -> None:
    with pytest.raises(
        zm.UsageError, match=r"dtype must be torch\.bfloat16 or torch\.float32, not"
    ):
        zm.analyse_sensitivity(folder, dtype=dtype)


def test_a_state_that_lacks_a_condition(folder: Path, tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    stop_after(1, folder, state)
    document = json.loads(state.read_text())
    del document["run"]["compute mode"]
    state.write_text(json.dumps(document))
    with pytest.raises(zm.UsageError, match=r"state.json has no compute mode; name another file"):
        analyse(folder, state=state)


def test_where_a_state_cannot_be(folder: Path, tmp_path: Path, cli: Run) -> None:
    """Told before the model is loaded; and /dev/zero never ends."""
    weights = folder / "diffusion_pytorch_model.safetensors"
    for path, error, sentence in (
        ("/dev/zero", zm.OutputError, "is not a regular file"),
        (str(tmp_path), zm.OutputError, "is a folder"),
        (str(tmp_path / "none" / "s.json"), zm.OutputError, "none does not exist"),
        (str(weights), zm.UsageError, "is the input"),
    ):
        with pytest.raises(error, match=sentence):
            analyse(folder, state=path)
    (tmp_path / "s.json").write_text("{}")
    (tmp_path / "s.json").chmod(0)
    ran = cli(
        *("sensitivity", folder, "--state", "s.json"),
        preexec_fn=drop_the_right_to_ignore_permissions,
    )
    assert ran.returncode == 1
    assert "s.json cannot be read: no permission" in ran.stderr


# ---- checkpoints that cannot be measured


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    """A tiny model in the ComfyUI layout."""
    shapes = zimage_shapes(dim=128, layers=1, refiner_layers=1, caption_dim=CAPTION, hidden=18)
    return random_tensors(shapes, torch.float32)


def test_layers_that_quantising_makes_larger(tensors: Tensors, tmp_path: Path) -> None:
    """18 is padded to 32, and its scales take the rest: nothing is saved."""
    save_file(tensors, tmp_path / "a.safetensors")
    report = analyse(tmp_path / "a.safetensors", size=(32, 32), timesteps=1)
    assert {m.name for m in report.layers if m.saved <= 0} == {
        f"{block}.0.feed_forward.{name}"
        for block in ("layers", "noise_refiner", "context_refiner")
        for name in ("w1", "w2", "w3")
    }
    assert all(m.saved <= 0 for m in report.layers[:9]), "they are the first to be kept"


W1, W2, W3 = (f"layers.0.feed_forward.w{i}.weight" for i in (1, 2, 3))


def test_outputs_that_are_no_numbers(tensors: Tensors, tmp_path: Path, in_process: Run) -> None:
    for value in (math.nan, math.inf):
        weight = tensors[W1].clone()
        weight[3, 5] = value
        save_file(tensors | {W1: weight}, tmp_path / "a.safetensors")
        ran = in_process(
            "sensitivity", "a.safetensors", "--size", 32, "--device", "cpu", "--state", "s"
        )
        fails(ran, 1, "a.safetensors: the model's own output has NaN or Inf at step 0")
        only(tmp_path, "a.safetensors")
    final = {name: 0 * tensors[name] for name in tensors if name.startswith("final_layer.linear")}
    save_file(tensors | final, tmp_path / "a.safetensors")
    with pytest.raises(zm.CheckpointError, match="the model's own output is zero at step 4"):
        analyse(tmp_path / "a.safetensors", size=(32, 32), timesteps=1)


def test_outputs_that_quantising_makes_infinite(tensors: Tensors, tmp_path: Path) -> None:
    """The largest floats round to a code that decodes to infinity."""
    huge = torch.where(tensors[W2] > 0, 3.38e38, -3.38e38)
    small = {name: tensors[name] * 1e-19 for name in (W1, W3)}
    save_file(tensors | small | {W2: huge}, tmp_path / "a.safetensors")
    with pytest.raises(zm.CheckpointError, match=r"Inf with layers.0.feed_forward.w2 quantised"):
        analyse(tmp_path / "a.safetensors", size=(32, 32), timesteps=1)


def test_nothing_is_lost(tensors: Tensors, tmp_path: Path) -> None:
    """Where blocks add nothing, and every layer on the page's map is harmless."""
    from zimage_mxfp8.analysis.sensitivity.page import sensitivity_page

    blocks = ("layers", "noise_refiner", "context_refiner")
    idle = {n: 0 * t if n.startswith(blocks) else t for n, t in tensors.items()}
    save_file(idle, tmp_path / "a.safetensors")
    report = analyse(tmp_path / "a.safetensors", size=(32, 32), timesteps=1)
    assert report.everything.error == 0 and report.smallest.kept == ()
    levels = re.search(r'"levels":\[([^]]*)\]', sensitivity_page(report))
    assert levels is not None and set(levels[1].split(",")) == {"0"}


# ---- real captions


def test_prompts(zimage_folder: Path, tmp_path: Path, in_process: Run) -> None:
    arguments = (
        "sensitivity",
        zimage_folder,
        "--size",
        32,
        "--device",
        "cpu",
        "--dtype",
        "float32",
    )
    one = ("--timesteps", 1)
    prompts = ("--prompt", "a", "--prompt", "")
    from transformers.utils import logging

    logging.disable_progress_bar()  # too late for the variable that the command sets
    ran = in_process(*arguments, *one, *prompts, "--model-dir", zimage_folder, "--json")
    assert ran.returncode == 0, ran.stderr
    lines = ran.stderr.splitlines()
    assert lines[0] == "zimage-mxfp8: encoding the prompts"
    assert all(line.startswith("zimage-mxfp8: ") for line in lines), ran.stderr
    other = shutil.copytree(zimage_folder, tmp_path / "other")
    config = other / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_size": 32}))
    for options, code, sentence in (
        (
            ["--model-dir", other, *one],
            1,
            "other/text_encoder gives 32: they belong to different models",
        ),
        (
            ["--model-dir", zimage_folder, *one, "--prompt", os.fsdecode(b"\xff")],
            2,
            "--prompt must be UTF-8 text",
        ),
        (["--model-dir", zimage_folder, "--timesteps", 9], 2, "--timesteps must be 1 to 8"),
    ):
        fails(in_process(*arguments, "--prompt", "a", *options), code, sentence)


def test_too_little_memory_for_the_text_encoder(
    zimage_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from zimage_mxfp8.generation.components import TextEncoder

    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "1")  # the command sets them, and this restores them
    monkeypatch.setattr(TextEncoder, "__init__", lambda *_: torch.empty(1 << 50) and None)
    options = ["--device", "cpu", "--prompt", "a", "--model-dir", str(zimage_folder)]
    assert main(["sensitivity", str(zimage_folder), *options]) == 1
    sentence = "not enough memory for the text encoder; measure without --prompt"
    assert sentence in capsys.readouterr().err


def test_convert_takes_the_recipe(folder: Path, tmp_path: Path, in_process: Run) -> None:
    ran = in_process(
        *("sensitivity", folder, "--size", 64, "--timesteps", 2, "--bound", 0.03, "--device"),
        *("cpu", "--dtype", "float32", "--json", "--write-recipe", tmp_path / "found.toml"),
    )
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout)
    zm.convert(folder, tmp_path / "out.safetensors", recipe=tmp_path / "found.toml")
    from zimage_mxfp8.transformer.model_file import open_model

    layers = set(open_model(tmp_path / "out.safetensors").layers)
    everything = {layer["name"] for layer in report["layers"]}
    assert layers == everything - set(report["smallest"]["kept"])
    assert report["smallest"]["kept"]
    # The converted model does what was measured for it.
    original = zm.ZImageTransformer.from_checkpoint(folder, "cpu", dtype=torch.float32)
    captions = analysis._synthetic_captions(CAPTION, 0)
    cases = record_cases(original, captions, SIZE, 2, 0)
    emulated = zm.ZImageTransformer.from_checkpoint(
        tmp_path / "out.safetensors", "cpu", "mxfp8-emulated", torch.float32
    )
    errors = [output_error(case.run(emulated), case.velocities).total for case in cases]
    error = math.sqrt(sum(errors) / len(errors))
    # Modulations have corrected biases there, and a few roundings fall otherwise.
    assert error == pytest.approx(report["smallest"]["error"], rel=0.15)


def test_the_tables(folder: Path, in_process: Run) -> None:
    ran = in_process("sensitivity", folder, "--size", 64, "--timesteps", 1, "--device", "cpu")
    assert ran.returncode == 0, ran.stderr
    assert "each group quantised alone for compute mode mxfp8" in " ".join(ran.stdout.split())
    assert "the model card's exclusions" in ran.stdout
    assert "layers.0.feed_forward.w2" in ran.stdout


def test_the_mode_is_in_every_output(folder: Path, tmp_path: Path, in_process: Run) -> None:
    outputs = ("--html", "s.html", "--write-recipe", "s.toml", "--state", "s.json")
    ran = in_process(
        *("sensitivity", folder, "--size", 32, "--timesteps", 1, "--device", "cpu"),
        *("--dtype", "float32", "--compute", "int8", "--json", *outputs),
    )
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["conditions"]["compute"] == "int8"
    text = re.sub(r"<[^>]*>", " ", (tmp_path / "s.html").read_text("utf-8"))
    assert re.search(r"compute mode\s+int8", text)
    assert "in compute mode int8" in (tmp_path / "s.toml").read_text()
    assert json.loads((tmp_path / "s.json").read_text())["run"]["compute mode"] == "int8"


def test_a_log_tells_each_stage(folder: Path, in_process: Run) -> None:
    """Where there is no terminal for a bar."""
    ran = in_process(
        "sensitivity", folder, "--size", 64, "--timesteps", 1, "--device", "cpu", "--json"
    )
    lines = [line.removeprefix("zimage-mxfp8: ") for line in ran.stderr.splitlines()]
    stages = [line.partition(" (")[0] for line in lines]
    assert list(dict.fromkeys(stages)) == [
        "loading the model",
        "running the original model",
        "measuring each layer alone",
        "measuring groups of layers",
        "looking at channels",
        "looking for the smallest set to keep",
        "done",
    ]
    counts = [tuple(map(int, re.findall(r"\d+", line))) for line in lines[2:]]
    assert len({total for _, total in counts}) == 1
    done = [done for done, _ in counts]
    assert done == sorted(done) and done[0] == 0 and counts[-1][0] == counts[-1][1]
    # A line for a stage, or for another tenth of everything: no flood in a log of a large model.
    assert len(set(stages)) + 2 < len(lines) <= len(set(stages)) + 10
    json.loads(ran.stdout)


def test_tables_fit_80_columns(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    command = ["sensitivity", folder.name, "--size", "64", "--timesteps", "1", "--device", "cpu"]
    tables, text = tables_in_terminal(command, 80)
    report = analyse(folder, timesteps=1, dtype=torch.bfloat16)
    assert first_column(tables[0]) == [group.name for group in report.groups]
    assert first_column(tables[1]) == [layer.name for layer in report.layers[:15]]
    assert set(first_column(tables[2])) <= set(report.salience) and len(tables[2]) == 1 + 15
    assert len(tables[3]) == 1 + 3
    assert "--json and wider terminals also show: first step, last step." in text


def test_prompts_are_measured_with(zimage_folder: Path, tmp_path: Path, in_process: Run) -> None:
    prompts = ["a red fox in snow", "two cats"]
    ran = in_process(
        *("sensitivity", zimage_folder, "--model-dir", zimage_folder, "--size", 32),
        *("--timesteps", 1, "--device", "cpu", "--dtype", "float32", "--json"),
        *("--html", "page.html", *(x for prompt in prompts for x in ("--prompt", prompt))),
    )
    assert ran.returncode == 0, ran.stderr
    errors = {m["name"]: m["error"]["total"] for m in json.loads(ran.stdout)["layers"]}
    # The captions are those of diffusers' pipeline.
    with torch.no_grad():
        captions, _ = make_pipeline().encode_prompt(
            prompts, device="cpu", do_classifier_free_guidance=False
        )

    def errors_with(captions: list[torch.Tensor] | None) -> dict[str, float]:
        report = analyse(zimage_folder, size=(32, 32), timesteps=1, captions=captions)
        return {m.name: m.error.total for m in report.layers}

    assert errors == pytest.approx(errors_with(captions), rel=0.05)
    assert errors != pytest.approx(errors_with(None), rel=0.05)
    assert "layers.1.feed_forward.w2" in (tmp_path / "page.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--bound", "0"], "bound must be a number above 0"),
        (["--bound", "nan"], "bound must be a number above 0"),
        (["--size", "40"], "--size must be multiples of 16"),
        (["--size", "99999999984"], "--size must be multiples of 16 up to 8192"),
        (["--seed", "99999999999999999999"], "seed must be 0 or more, and below 2^63"),
        (["--timesteps", "9"], "--timesteps must be 1 to 8, not 9"),
        (["--compute", "mxfp8-emulated"], '--compute: invalid choice "mxfp8-emulated"'),
        (["--html", "x", "--write-recipe", "./x"], "and another output are the same file"),
        (["--html", "x", "--state", "x"], "and another output are the same file"),
        (["--prompt", "a fox"], "--prompt and --model-dir go together"),
        (["--model-dir", "x"], "--prompt and --model-dir go together"),
        (["--device", "tpu"], "--device: must be"),
    ],
)
def test_wrong_usage(options: list[str], sentence: str, folder: Path, in_process: Run) -> None:
    ran = in_process("sensitivity", folder, *options)
    assert ran.returncode == 2
    assert sentence in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_quantised_checkpoint(folder: Path, tmp_path: Path, in_process: Run) -> None:
    zm.convert(folder, tmp_path / "q.safetensors")
    ran = in_process("sensitivity", tmp_path / "q.safetensors")
    assert ran.returncode == 1
    assert "q.safetensors is quantised already" in ran.stderr


@pytest.mark.parametrize("option", ["--html", "--write-recipe"])
def test_no_output_replaces_the_weights(option: str, tmp_path: Path, in_process: Run) -> None:
    make_reference(dim=128, layers=1).save_pretrained(tmp_path / "m")
    weights = tmp_path / "m" / "diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    ran = in_process(
        "sensitivity", "m", option, weights, "--overwrite", "--device", "cpu", "--size", 32
    )
    fails(ran, 2, "is the input; choose another name")
    assert weights.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"bound": "x"}, "bound must be a number, not 'x'"),
        ({"size": 512}, "size must be (height, width), not 512"),
        ({"size": (512,)}, "size must be (height, width), not (512,)"),
        ({"size": (64.0, 64)}, "size must be a whole number, not 64.0"),
        ({"timesteps": 2.5}, "timesteps must be a whole number, not 2.5"),
        ({"seed": None}, "seed must be a whole number, not None"),
        ({"seed": -1}, "seed must be 0 or more"),
        ({"compute": "auto"}, "compute must be mxfp8, fp8, weight-only, int8, not 'auto'"),
        ({"compute": 8}, "compute must be mxfp8, fp8, weight-only, int8, not 8"),
        ({"captions": []}, f"captions must be a list of tensors [tokens, {CAPTION}]"),
        ({"captions": ["a fox"]}, "captions must be floating-point tensors"),
        ({"captions": [torch.zeros(3, 4)]}, "number 0 is torch.float32 [3, 4]"),
        ({"captions": [torch.zeros(0, CAPTION)]}, "with one token at least"),
        (
            {"captions": [torch.full((3, CAPTION), math.nan)]},
            "captions must be finite, but number 0 has NaN or Inf",
        ),
    ],
)
def test_wrong_arguments_from_python(
    folder: Path, options: dict[str, object], sentence: str
) -> None:
    with pytest.raises(zm.UsageError, match=re.escape(sentence)):
        analyse(folder, **options)


def test_a_set_of_everything_is_announced(folder: Path, in_process: Run) -> None:
    options = (
        "--size",
        32,
        "--timesteps",
        1,
        "--device",
        "cpu",
        "--bound",
        1e-9,
        "--dtype",
        "float32",
    )
    ran = in_process("sensitivity", folder, *options)
    assert ran.returncode == 0
    assert "convert refuses a recipe that keeps them all" in ran.stderr


def test_an_output_that_exists(folder: Path, tmp_path: Path, in_process: Run) -> None:
    (tmp_path / "r.toml").write_text("mine")
    ran = in_process("sensitivity", folder, "--write-recipe", tmp_path / "r.toml")
    assert ran.returncode == 1
    assert "r.toml" in ran.stderr
    assert (tmp_path / "r.toml").read_text() == "mine"
