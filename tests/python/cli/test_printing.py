"""Reports as text, arrays as one line, and `progress=True`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import zimage_mxfp8 as zm
from helpers.checkpoints import random_tensors, small_shapes
from helpers.commands import Run
from helpers.terminal import python_in_terminal, run_in_terminal
from zimage_mxfp8.zimage.layers import zimage_shapes

TINY = zimage_shapes(dim=128, layers=1, refiner_layers=1, caption_dim=64, hidden=18)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, its MXFP8 file, and what `sensitivity` measures in a moment."""
    folder = tmp_path_factory.mktemp("printing")
    save_file(random_tensors(small_shapes(2)), folder / "in.safetensors")
    zm.convert(folder / "in.safetensors", folder / "q.safetensors")
    save_file(random_tensors(TINY), folder / "tiny.safetensors")
    return folder


# ---- reports


@pytest.fixture
def reports(files: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """By the command that prints them."""
    monkeypatch.chdir(files)
    return {
        "inspect q.safetensors": zm.inspect("q.safetensors"),
        "validate q.safetensors --against in.safetensors": zm.validate(
            "q.safetensors", "in.safetensors"
        ),
        "probe in.safetensors": zm.probe("in.safetensors"),
        "compare in.safetensors": zm.compare("in.safetensors"),
        "sensitivity tiny.safetensors --size 32 --timesteps 1 --device cpu --bound 0.02": (
            zm.analyse_sensitivity(
                "tiny.safetensors", size=(32, 32), timesteps=1, device="cpu", bound=0.02
            )
        ),
    }


def test_reports_are_the_commands_text(
    in_process: Run, files: Path, reports: dict[str, object]
) -> None:
    for command, report in reports.items():
        result = in_process(*command.split(), cwd=files)
        assert result.returncode == 0, result.stderr
        text = result.stdout.replace("--json and wider", "to_dict() and wider")
        if command.startswith("probe"):  # followed by commands to copy
            text, _, commands = text.partition("\nTo keep ")
            assert "\nzimage-mxfp8 convert in.safetensors --recipe FILE.toml -o " in commands
        assert f"{report}\n" == text, command


def test_reports_have_short_reprs(files: Path, reports: dict[str, object]) -> None:
    converted = zm.convert("in.safetensors", "again.safetensors", overwrite=True, error_stats=True)
    for report in (*reports.values(), converted):
        assert re.fullmatch(rf"{type(report).__name__}\('\w+\.safetensors', .+\)", repr(report))
        assert len(repr(report)) < 100


def test_a_conversion_is_the_terminals_table(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files)
    output = tmp_path / "o.safetensors"
    report = zm.convert("in.safetensors", output, error_stats=True)
    text = str(report)
    assert "\x1b" not in text and not text.endswith("\n")
    words = ["convert", "in.safetensors", str(output), "--overwrite", "--report"]
    shown = run_in_terminal([*words, str(tmp_path / "r.json")], 160)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    lines = [line for line in text.splitlines() if " GB/s" not in line]
    assert len(lines) > 20
    assert [line for line in lines if line not in re.split(r"[\r\n]+", shown)] == []


def test_reports_fit_the_terminal_without_colours(files: Path) -> None:
    code = (
        "import zimage_mxfp8 as zm; print(zm.validate('q.safetensors', 'in.safetensors'))\n"
        "print(zm.probe('in.safetensors'))"
    )
    text = python_in_terminal(["-c", f"import os; os.chdir({str(files)!r}); {code}"], 80)
    assert "\x1b" not in text
    lines = text.split("\r\n")
    assert len(lines) > 40
    for line in lines:
        assert len(line) <= 80 or line.startswith("zimage-mxfp8 convert "), line


def test_reports_where_the_encoding_has_no_lines(files: Path) -> None:
    code = "import zimage_mxfp8 as zm; print(zm.inspect('q.safetensors'))"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=files, env=environment, capture_output=True
    )
    assert result.returncode == 0, result.stderr
    assert b"Z-Image, ComfyUI layout" in result.stdout and result.stdout.isascii()


# ---- arrays


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (np.ones((5, 70), np.float32), "MXFP8Array(5x70, NumPy, uint8)"),
        (torch.ones(5, 70), "MXFP8Array(5x70, torch on cpu, float8_e4m3fn)"),
    ],
    ids=["NumPy", "torch"],
)
def test_arrays_are_one_line(array: object, text: str) -> None:
    assert repr(zm.quantize(array)) == text
    assert repr(zm.quantize_rows(array)) == text.replace("MXFP8Array", "RowScaledArray")


def test_arrays_of_anything_have_a_repr() -> None:
    codes = np.zeros((32, 32), ml_dtypes.float8_e4m3fn)
    scales = np.zeros((128, 4), np.uint8)
    assert repr(zm.MXFP8Array(codes, scales, (5, 7))) == "MXFP8Array(5x7, NumPy, float8_e4m3fn)"
    assert repr(zm.MXFP8Array([1], None, (5, 7))) == "MXFP8Array(5x7, list)"
    assert repr(zm.RowScaledArray("a", None)) == "RowScaledArray(?, str)"


# ---- progress=True

CALLS = {
    "converting": "zm.convert('in.safetensors', 'o.safetensors', overwrite=True, progress=True)",
    "decoding": (
        "zm.dequantize_checkpoint('q.safetensors', 'p.safetensors', overwrite=True, progress=True)"
    ),
    "checking": "zm.validate('q.safetensors', progress=True)",
    "probing": "zm.probe('in.safetensors', progress=True)",
    "comparing: low rank": "zm.compare('in.safetensors', progress=True)",
    "making weights": (
        "write_synthetic_checkpoint('s.safetensors', {'a.weight': (64, 64)}, overwrite=True, "
        "progress=True)"
    ),
    "loading the transformer": (
        "zm.ZImageTransformer.from_checkpoint('tiny.safetensors', 'cpu', progress=True)"
    ),
    "measuring groups of layers": (
        "zm.analyse_sensitivity('tiny.safetensors', size=(32, 32), timesteps=1, device='cpu', "
        "progress=True)"
    ),
}
CODE = """
import zimage_mxfp8 as zm
from zimage_mxfp8.checkpoint.synthetic import write_synthetic_checkpoint
"""


@pytest.mark.slow
def test_true_draws_bars_on_a_terminal(files: Path) -> None:
    calls = "\n".join(CALLS.values())
    text = python_in_terminal(
        ["-c", f"import os\nos.chdir({str(files)!r})\n{CODE}{calls}"], columns=160
    )
    assert "Traceback" not in text, text
    for title in CALLS:
        # Stages may be too short to be drawn; the last frame, with the count, always is.
        assert ("31/31" if "measuring" in title else title) in text, title


@pytest.mark.slow
def test_true_draws_nothing_elsewhere(files: Path) -> None:
    calls = "\n".join(call for title, call in CALLS.items() if "measuring" not in title)
    result = subprocess.run(
        [sys.executable, "-c", CODE + calls], cwd=files, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_an_analysis_tells_a_log_that_it_lives(files: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", CODE + CALLS["measuring groups of layers"]],
        cwd=files,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0 and result.stdout == ""
    lines = result.stderr.splitlines()
    assert lines[0] == "loading the model" and lines[-1].startswith("done (")


@pytest.mark.slow
def test_a_generator_draws_bars(zimage_folder: Path, zimage_quantized: Path) -> None:
    code = f"""
import zimage_mxfp8 as zm
generator = zm.ZImageGenerator(
    {str(zimage_folder)!r}, {str(zimage_quantized)!r}, "cpu", dtype="float32", progress=True
)
generator.generate(zm.GenerationSettings("a", steps=2, height=32, width=32), progress=True)
"""
    text = python_in_terminal(["-c", code], columns=160)
    assert "Traceback" not in text, text
    for title in ("loading the text encoder", "loading the transformer", "step 2 of 2"):
        assert title in text, title


@pytest.mark.parametrize("progress", [False, None])
def test_no_progress(files: Path, progress: bool | None) -> None:
    assert zm.validate(files / "q.safetensors", progress=progress).ok


def test_progress_that_cannot_be_called(files: Path, tmp_path: Path) -> None:
    output = tmp_path / "o.safetensors"
    with pytest.raises(zm.UsageError, match="progress must be a function, True or None, not 'yes'"):
        zm.convert(files / "in.safetensors", output, progress="yes")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
