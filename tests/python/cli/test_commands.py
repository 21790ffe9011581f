"""The commands around conversion, as a user or a script runs them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import comfy_kitchen
import pytest
import torch
from safetensors.torch import load_file, save_file

import zimage_mxfp8 as zm
from helpers.checkpoints import Tensors, metadata_of, random_tensors, sha256, tensor_bytes
from helpers.commands import Run
from helpers.terminal import run_in_terminal
from zimage_mxfp8.checkpoint.synthetic import write_synthetic_checkpoint
from zimage_mxfp8.zimage.layers import zimage_shapes


@pytest.fixture(scope="module")
def converted(small_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("commands") / "converted.safetensors"
    zm.convert(small_file, path)
    return path


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `sensitivity` measures in a moment."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    shapes = zimage_shapes(dim=128, layers=1, refiner_layers=1, caption_dim=64, hidden=18)
    save_file(random_tensors(shapes), path)
    return path


def test_convert_is_quiet_without_a_terminal(cli: Run, small_file: Path, tmp_path: Path) -> None:
    result = cli("convert", "-i", small_file, "-o", "o.safetensors")
    size = (tmp_path / "o.safetensors").stat().st_size
    assert result.stdout == f"wrote o.safetensors: 185 layers in MXFP8, {size:,} bytes\n"
    assert result.stderr == ""


def test_convert_on_a_terminal_shows_a_summary(small_file: Path, tmp_path: Path) -> None:
    text = run_in_terminal(
        ["convert", "-i", str(small_file), "-o", str(tmp_path / "o.safetensors")]
    )
    assert "converting" in text
    assert re.search(r"quantised to MXFP8\s*│\s*185", text)
    assert re.search(r"iB -> .*iB \([+-]\d+\.\d%\) in \d+\.\d s", text)


def test_convert_json_and_report(in_process: Run, small_file: Path, tmp_path: Path) -> None:
    result = in_process(
        *("convert", "-i", small_file, "-o", "o.safetensors", "--json", "--report", "r.json")
    )
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["quantized"] == 185 and summary["recipe"] == "uniform"
    report = json.loads((tmp_path / "r.json").read_text())
    assert len(report["tensors"]) == 185
    entry = report["tensors"]["layers.0.attention.qkv.weight"]
    assert set(entry) == {
        "relative_squared_error",
        "snr_db",
        "max_error",
        "elements",
        "scale_histogram",
    }
    assert sum(entry["scale_histogram"].values()) == 120 * 2
    again = in_process("convert", "-i", small_file, "-o", "other.safetensors", "--report", "r.json")
    assert again.returncode == 1 and "r.json exists; --overwrite" in again.stderr
    assert not (tmp_path / "other.safetensors").exists()


def test_both_spellings(in_process: Run, small_file: Path) -> None:
    for exclude in ("--exclude-layers", "--exclude_layers"):
        result = in_process(
            *("convert", "-i", small_file, "-o", "o.safetensors", "--overwrite", exclude, "layers"),
            *("--comfy-quant", "--save_quant_metadata", "--low_memory", "--calib_samples", 9),
        )
        assert result.returncode == 0, result.stderr


@pytest.mark.peer
def test_dequantize_equals_comfy_kitchen(
    in_process: Run, small_model: Tensors, converted: Path, tmp_path: Path
) -> None:
    result = in_process("dequantize", converted, "-o", "plain.safetensors")
    assert result.returncode == 0, result.stderr
    plain, stored = load_file(tmp_path / "plain.safetensors"), load_file(converted)
    assert plain.keys() == small_model.keys()
    assert {name: t.shape for name, t in plain.items()} == {
        name: t.shape for name, t in small_model.items()
    }
    for name, tensor in plain.items():
        scale = stored.get(f"{name}_scale")
        if scale is None:
            assert tensor_bytes(tensor) == tensor_bytes(stored[name]), name
            continue
        with comfy_kitchen.use_backend("eager"):
            want = comfy_kitchen.dequantize_mxfp8(
                stored[name], scale.view(torch.float8_e8m0fnu), torch.bfloat16
            )
        rows, cols = tensor.shape
        assert tensor_bytes(tensor) == tensor_bytes(want[:rows, :cols].contiguous()), name
    assert "_quantization_metadata" not in metadata_of(tmp_path / "plain.safetensors")


def test_converting_decoded_weights_again_loses_nothing(
    in_process: Run, converted: Path, tmp_path: Path
) -> None:
    # The codes may differ (224 under one scale is 448 under the next), the numbers may not.
    assert in_process("dequantize", converted, "-o", "plain.safetensors").returncode == 0
    zm.convert(tmp_path / "plain.safetensors", tmp_path / "a.safetensors", bias_correction="none")
    assert in_process("dequantize", "a.safetensors", "-o", "again.safetensors").returncode == 0
    assert sha256(tmp_path / "again.safetensors") == sha256(tmp_path / "plain.safetensors")


def test_dequantize_protects_files(in_process: Run, converted: Path, small_file: Path) -> None:
    result = in_process("dequantize", converted, "-o", converted, "--overwrite")
    assert result.returncode == 2 and "is the input" in result.stderr
    result = in_process("dequantize", small_file, "-o", "plain.safetensors")
    assert result.returncode == 1 and "it is not quantised" in result.stderr


def test_dequantize_refuses_broken_files(in_process: Run, converted: Path, tmp_path: Path) -> None:
    tensors = load_file(converted)
    del tensors["layers.0.attention.qkv.comfy_quant"]
    save_file(tensors, tmp_path / "broken.safetensors")  # and without the header's description
    result = in_process("dequantize", "broken.safetensors", "-o", "plain.safetensors")
    assert result.returncode == 1
    assert '"layers.0.attention.qkv.comfy_quant" is missing' in result.stderr


def test_inspect(in_process: Run, small_model: Tensors, small_file: Path, converted: Path) -> None:
    text = in_process("inspect", converted).stdout
    assert "Z-Image, ComfyUI layout" in text and "29 MXFP8, 1 BF16" in text
    document = json.loads(in_process("inspect", converted, "--json").stdout)
    assert document["parameters"] == sum(t.numel() for t in small_model.values())
    assert document["nbytes"] == sum(
        t.numel() * t.element_size() for t in load_file(converted).values()
    )
    formats: dict[str, int] = {}
    for group in document["groups"]:
        for form, count in group["formats"].items():
            formats[form] = formats.get(form, 0) + count
    assert formats == {"MXFP8": 185, "BF16": 453 - 185}
    assert "not Z-Image" not in in_process("inspect", small_file).stdout


def test_inspect_of_other_formats(in_process: Run, small_model: Tensors, tmp_path: Path) -> None:
    name = "layers.0.feed_forward.w1.weight"
    scaled = {name: small_model[name].to(torch.float8_e4m3fn), f"{name}_scale": torch.ones(1)}
    save_file(small_model | scaled, tmp_path / "a.safetensors")
    result = in_process("inspect", "a.safetensors")
    assert "quantised: FP8 with scales" in result.stdout and result.stderr == ""


def test_inspect_of_something_else(in_process: Run, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3)}, tmp_path / "a.safetensors", {"note": "[N, K]"})
    text = in_process("inspect", "a.safetensors").stdout
    assert "not Z-Image" in text and "metadata note: [N, K]" in text


@pytest.mark.slow
def test_demo(in_process: Run, tmp_path: Path) -> None:
    result = in_process("demo")
    assert result.returncode == 0, result.stderr
    assert "185" in result.stdout and "sound, 185 MXFP8 layers" in result.stdout
    for mode in (
        "weight-only",
        "fp8",
        "mxfp8-emulated",
        "int8",
    ):  # test_small_model.py has the images
        row = re.search(rf"│ {mode}\s*│[^│]*│\s*([\d.]+) │\s*([\d.]+) │", result.stdout)
        assert row and 40 < float(row[2]) <= float(row[1]) < 60
    assert not list(tmp_path.iterdir())


def test_synthetic_checkpoints_are_always_the_same(tmp_path: Path) -> None:
    shapes = {"a.weight": (1500, 1000), "b": (7,)}
    digests = set()
    for threads in (1, 3):
        path = tmp_path / f"{threads}.safetensors"
        write_synthetic_checkpoint(path, shapes, seed=5, threads=threads)
        digests.add(sha256(path))
    write_synthetic_checkpoint(tmp_path / "x.safetensors", shapes, seed=6)
    assert len(digests) == 1 and sha256(tmp_path / "x.safetensors") not in digests
    weight = load_file(path)["a.weight"].float()
    assert 0.01 < float(weight.std()) < 0.05 and float(weight.abs().max()) > 0.1


def test_version_and_help(cli: Run) -> None:
    assert cli("--version").stdout == f"zimage-mxfp8 {zm.__version__}\n"
    names = ("convert", "generate", "inspect", "probe", "compare", "sensitivity", "validate")
    for command in (
        "",
        *names,
        "evaluate",
        "dequantize",
        "export",
        "recipes",
        "doctor",
        "demo",
        "comfyui",
    ):
        result = cli(*command.split(), "--help")
        assert result.returncode == 0 and "usage: zimage-mxfp8" in result.stdout


@pytest.mark.parametrize("command", ["inspect", "probe", "compare", "sensitivity"])
def test_options_are_not_abbreviated(in_process: Run, command: str) -> None:
    result = in_process(command, "x.safetensors", "--jso")
    assert result.returncode == 2
    assert result.stderr == (
        "zimage-mxfp8: error: unrecognized arguments: --jso; did you mean --json? "
        f"(see zimage-mxfp8 {command} --help)\n"
    )


def test_unknown_options_before_the_command(in_process: Run) -> None:
    result = in_process("--jso", "recipes")
    assert result.returncode == 2
    assert result.stderr.endswith("unrecognized arguments: --jso (see zimage-mxfp8 --help)\n")


def test_terminal_of_no_width() -> None:
    assert run_in_terminal(["doctor"], columns=0) == run_in_terminal(["doctor"], columns=80)


def test_names_that_the_terminal_cannot_show(cli: Run, tmp_path: Path) -> None:
    save_file({"é\nß": torch.zeros(3)}, tmp_path / "ü.safetensors")
    for command in (("inspect", "ü.safetensors"), ("convert", "-i", "ü.safetensors"), ("recipes",)):
        result = cli(*command, env={"PYTHONIOENCODING": "ascii"})
        assert "Traceback" not in result.stderr
        assert len(result.stderr.splitlines()) <= 1


@pytest.mark.parametrize(
    "ending", ["| head -1", "| true", ">&-", "2>&-", ">&- 2>&-", ">/dev/full", "2>/dev/full"]
)
@pytest.mark.parametrize("command", ["convert -i {} --dry-run", "inspect {} --json", "--help"])
def test_output_that_goes_nowhere(small_file: Path, command: str, ending: str) -> None:
    program = f"{sys.executable} -m zimage_mxfp8.cli.main {command.format(small_file)}"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    result = subprocess.run(
        f"{program} {ending}",
        shell=True,
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    for word in ("Traceback", "Exception", "Warning"):
        assert word not in result.stderr
    if ending == ">/dev/full":
        assert result.returncode == 1
        assert result.stderr == FULL


FULL = (
    "zimage-mxfp8: error: standard output: No space left on device; free some space, or choose "
    "another disk\n"
)


@pytest.mark.parametrize("environment", [{}, {"PYTHONUNBUFFERED": "1"}])
def test_stdout_is_named(cli: Run, environment: dict[str, str]) -> None:
    program = [sys.executable, "-m", "zimage_mxfp8.cli.main", "recipes"]
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            program, stdout=full, stderr=subprocess.PIPE, text=True, env=inherited | environment
        )
    assert (result.returncode, result.stderr) == (1, FULL)


@pytest.fixture(params=["closed pipe", "full"])
def unreadable(request: pytest.FixtureRequest) -> Iterator[int]:
    """A file that cannot be written."""
    if request.param == "full":
        writer = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, writer = os.pipe()
        os.close(reader)
    yield writer
    os.close(writer)


@pytest.mark.parametrize(
    ("command", "code", "made"),
    [
        ("convert -i {} -o made.safetensors --exclude-layers nothing", 0, True),  # with a warning
        ("sensitivity {} --device cpu --size 32 --timesteps 1 --write-recipe made.toml", 0, True),
        ("recipes --jso", 2, False),
        ("inspect none", 1, False),
    ],
)
def test_nobody_reads_stderr(
    tiny_file: Path, tmp_path: Path, unreadable: int, command: str, code: int, made: bool
) -> None:
    program = [sys.executable, "-m", "zimage_mxfp8.cli.main", *command.format(tiny_file).split()]
    result = subprocess.run(program, cwd=tmp_path, stdout=subprocess.PIPE, stderr=unreadable)
    assert result.returncode == code
    assert any(tmp_path.glob("made.*")) == bool(result.stdout) == made


def test_dequantize_refuses_nan_codes(in_process: Run, converted: Path, tmp_path: Path) -> None:
    tensors = load_file(converted)
    tensors["layers.3.attention.out.weight"].view(torch.uint8)[2, 2] = 0x7F
    save_file(tensors, tmp_path / "broken.safetensors", metadata_of(converted))
    result = in_process("dequantize", "broken.safetensors", "-o", "plain.safetensors")
    assert result.returncode == 1
    sentence = 'layer "layers.3.attention.out" is damaged: it has NaN codes'
    assert f"broken.safetensors: {sentence}" in result.stderr
    assert not (tmp_path / "plain.safetensors").exists()
