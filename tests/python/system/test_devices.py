"""Which device is taken, and what users are told of it."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import zimage_mxfp8 as zm
from helpers.commands import Run
from helpers.diffusers_reference import make_reference
from helpers.fake_driver import make_driver
from zimage_mxfp8 import _core
from zimage_mxfp8.cli import device_warnings
from zimage_mxfp8.system import device_notes, devices, driver
from zimage_mxfp8.system.devices import torch_device

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
GPU = driver.Driver("12.8", (driver.Gpu("Fake RTX 4090", (8, 9), 24 << 30),), "")
NO_GPU = driver.Driver("", (), "no NVIDIA driver was found (libcuda.so.1)")

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="torch finds a CUDA device")
no_kernels = pytest.mark.skipif(bool(_core.build_info().cuda), reason="this build has CUDA")


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_notes, "_warned", set())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "transformer"
    make_reference(dim=128, layers=1).save_pretrained(path)
    return path


# ---- The driver, asked through a library that stands in for it


def test_the_driver_tells_its_gpus(tmp_path: Path) -> None:
    program = "from zimage_mxfp8.system import driver; print(driver.look())"
    ran = subprocess.run(
        [sys.executable, "-c", program],
        env=make_driver(tmp_path),
        capture_output=True,
        text=True,
        check=True,
    )
    want = (
        driver.Gpu("Fake RTX 4090", (8, 9), 24 << 30),
        driver.Gpu("Fake RTX 5090", (12, 0), 32 << 30),
    )
    assert ran.stdout.strip() == str(driver.Driver("12.8", want, ""))


@pytest.mark.parametrize(
    ("source", "init", "problem"),
    [
        (None, 100, "the NVIDIA driver finds no GPU: cuInit gives error 100"),
        ("int nothing;", 0, "no NVIDIA driver was found (libcuda.so.1)"),
    ],
)
def test_a_driver_without_gpus(source: str | None, init: int, problem: str, tmp_path: Path) -> None:
    sources = {} if source is None else {"source": source}
    program = "from zimage_mxfp8.system import driver; print(driver.look().problem)"
    ran = subprocess.run(
        [sys.executable, "-c", program],
        env=make_driver(tmp_path, init=init, **sources),
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.strip() == problem


# ---- The choice


def test_a_gpu_is_taken_with_or_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert torch_device(None) == torch_device("cuda") == torch.device("cuda", 1)
    assert torch_device("cuda:0") == torch_device(torch.device("cuda", 0)) == CUDA
    assert torch_device("cpu") == CPU
    with pytest.raises(zm.UnsupportedError, match="device cuda:2: torch finds 2 CUDA devices; use"):
        torch_device("cuda:2")


@no_gpu
def test_without_a_gpu_the_cpu_is_taken() -> None:
    assert torch_device(None) == CPU
    with pytest.raises(
        zm.UnsupportedError, match=r"device cuda: the torch .* finds no CUDA device"
    ):
        torch_device("cuda")


@pytest.mark.parametrize("works", ["", "new_kernel", "fp8_fused"])
def test_any_kernel_made_for_a_format_will_do(works: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one that decodes, and not one with epilogues only."""
    row_scaled = ("row-scaled", "row-scaled")
    table = [
        SimpleNamespace(name="fp8_fused", operands=[row_scaled], epilogues=["silu_multiply"]),
        SimpleNamespace(name="fp8_rowwise", operands=[row_scaled], epilogues=["none"]),
        SimpleNamespace(name="new_kernel", operands=[row_scaled], epilogues=["none", "add"]),
        SimpleNamespace(
            name="decoding", operands=[row_scaled, ("mxfp8", "mxfp8")], epilogues=["none"]
        ),
    ]
    monkeypatch.setattr(_core, "gemm_kernels", lambda: table)
    monkeypatch.setattr(
        _core,
        "gemm_unsupported",
        lambda kernel, *_: "" if kernel in (works, "decoding") else f"not {kernel}",
    )
    want = "" if works == "new_kernel" else "not fp8_rowwise"
    assert devices.native_gemm_unsupported("row-scaled", 0) == want


@no_kernels
def test_converting_on_a_gpu_needs_kernels(folder: Path, tmp_path: Path) -> None:
    assert not devices.has_kernels(0) and devices.has_kernels(-1)
    with pytest.raises(
        zm.UnsupportedError,
        match=r"^device cuda needs CUDA kernels, and this build has none \(.+\); use cpu, or "
        r"install nvcc 12\.8 or newer, then run ZM_CUDA=ON pip install \.",
    ):
        zm.convert(folder, tmp_path / "out.safetensors", device="cuda")


# ---- What is told


def told(monkeypatch: pytest.MonkeyPatch, found: driver.Driver, cuda: str | None) -> str:
    """The warning where the CPU is taken, on a machine with such a driver and such a torch."""
    monkeypatch.setattr(driver, "look", lambda: found)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.warns(zm.DeviceWarning) as caught:
        device_notes.report_line(CPU, None)
    (warning,) = caught
    return str(warning.message)


def test_a_torch_without_cuda_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    sentence = told(monkeypatch, GPU, None)
    assert "on the CPU, though there is a GPU (Fake RTX 4090)" in sentence
    assert f"({torch.__version__}) is built without CUDA; install torch for CUDA" in sentence


def test_a_torch_that_does_not_find_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    sentence = told(monkeypatch, GPU, "13.0")
    assert f"({torch.__version__}, CUDA 13.0) does not find it" in sentence
    assert "the driver supports CUDA 12.8: update it" in sentence


def test_a_torch_for_cuda_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    sentence = told(monkeypatch, NO_GPU, "13.0")
    assert "is built for CUDA: no NVIDIA driver was found (libcuda.so.1); install" in sentence


def test_nothing_is_told_where_nothing_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(driver, "look", lambda: NO_GPU)
    device_notes.report_line(CPU, None)
    monkeypatch.setattr(driver, "look", lambda: pytest.fail("the CPU was asked for"))
    device_notes.report_line(CPU, "cpu")
    monkeypatch.setattr(device_notes, "has_kernels", lambda device: True)
    device_notes.report_line(CUDA, None)


@no_kernels
@pytest.mark.parametrize("asked", [None, "cuda:0"])
def test_a_gpu_without_kernels(asked: str | None) -> None:
    with pytest.warns(zm.DeviceWarning) as caught:
        device_notes.report_line(CUDA, asked)
        device_notes.report_line(CUDA, asked)  # once
    (warning,) = caught
    sentence = str(warning.message)
    reason = _core.build_info().no_cuda
    assert reason
    assert sentence.startswith("cuda:0 works through torch, without CUDA kernels of this package: ")
    assert f"this build has none ({reason})" in sentence
    assert "slower" in sentence and sentence.endswith(devices.HOW_TO_GET_KERNELS)


@no_gpu
def test_loading_a_model_tells(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "look", lambda: GPU)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.warns(zm.DeviceWarning, match="though there is a GPU"):
        zm.ZImageTransformer.from_checkpoint(folder)
    zm.ZImageTransformer.from_checkpoint(folder)  # without a second warning
    device_notes._warned.clear()
    zm.ZImageTransformer.from_checkpoint(folder, "cpu")


@pytest.mark.slow
@no_gpu
@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is built for CUDA")
@pytest.mark.parametrize("command", ["generate", "sensitivity"])
def test_commands_tell_it_in_a_line(
    command: str, cli: Run, zimage_folder: Path, tmp_path: Path
) -> None:
    arguments: tuple[object, ...] = (zimage_folder, "--size", 32, "--timesteps", 1, "--bound", 9)
    if command == "generate":
        arguments = ("--model-dir", zimage_folder, "--prompt", "a", "-o", "o.png", "--steps", 1)
        arguments += ("--height", 32, "--width", 32)
    ran = cli(command, *arguments, env=make_driver(tmp_path))
    assert ran.returncode == 0
    lines = [line for line in ran.stderr.splitlines() if "GPU" in line]
    (line,) = lines
    assert line.startswith(
        "zimage-mxfp8: warning: the work is done on the CPU, though there is a GPU "
        "(Fake RTX 4090, Fake RTX 5090): the torch that is installed"
    )
    assert "DeviceWarning" not in ran.stderr


def test_other_warnings_stay_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(record=True) as others:
        warnings.simplefilter("always")
        with device_warnings.as_lines():
            warnings.warn("of the device", zm.DeviceWarning, stacklevel=1)
            warnings.warn("of a library", RuntimeWarning, stacklevel=1)
    assert capsys.readouterr().err == "zimage-mxfp8: warning: of the device\n"
    assert [(other.category, str(other.message)) for other in others] == [
        (RuntimeWarning, "of a library")
    ]


@pytest.mark.parametrize(
    ("value", "printed"),
    [
        ("", "0"),
        ("8.0", "80"),
        ("12.1", "121"),
        *(
            (bad, "compute capability such as 8.0")
            for bad in ("80", "8.x", ".5", "8.05", "900.0", "0.0")
        ),
    ],
)
def test_the_capability_that_tests_set(value: str, printed: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from zimage_mxfp8 import _core; print(_core.capability_limit())"],
        env={**os.environ, "ZIMAGE_MXFP8_CAPABILITY": value},
        capture_output=True,
        text=True,
    )
    assert printed in done.stdout + done.stderr
    assert (done.returncode == 0) == printed.isdigit()
