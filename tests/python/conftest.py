from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # one process per core, so one thread per process
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, here and in what tests start

import torch
from safetensors.torch import save_file

import zimage_mxfp8 as zm
from zimage_mxfp8 import _core
from zimage_mxfp8.cli.main import main

pytest.register_assert_rewrite("helpers")  # before they are imported

from helpers.checkpoints import Tensors, random_tensors, small_shapes  # noqa: E402
from helpers.commands import Run  # noqa: E402
from helpers.images import STAGES, Generate  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the GPU suite where there is no GPU, and of it what this build is not for."""
    has_kernels = bool(_core.build_info().cuda)
    for item in items:
        marker = item.get_closest_marker("gpu")
        if marker is None:
            continue
        needs_kernels = marker.kwargs.get("kernels", True)
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        elif needs_kernels and not has_kernels:
            item.add_marker(pytest.mark.skip(reason="this build has no CUDA (ZM_CUDA=ON)"))
        elif has_kernels and not needs_kernels:
            item.add_marker(pytest.mark.skip(reason="for builds without CUDA (ZM_CUDA=OFF)"))


def pytest_collection_finish() -> None:
    """Leave out of garbage collections what was imported: it is much, and it stays."""
    gc.freeze()


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def cpu_target(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test once per CPU target; skips those that this machine lacks."""
    if request.param not in _core.available_cpu_targets():
        pytest.skip(f"this machine has no {request.param}")
    before = _core.active_cpu_target()
    _core.force_cpu_target(request.param)
    yield request.param
    _core.force_cpu_target(before)


@pytest.fixture
def restored_target() -> Iterator[None]:
    """Restores the CPU target after a test that forces others."""
    before = _core.active_cpu_target()
    yield
    _core.force_cpu_target(before)


@pytest.fixture(scope="session")
def small_model() -> Tensors:
    return random_tensors(small_shapes())


@pytest.fixture(scope="session")
def small_file(small_model: Tensors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ComfyUI-layout BF16 checkpoint; tests must not change it."""
    path = tmp_path_factory.mktemp("small") / "model.safetensors"
    save_file(small_model, path)
    return path


@pytest.fixture
def cli(tmp_path: Path) -> Run:
    """Runs `zimage-mxfp8` in a process of its own, in `tmp_path`, without a terminal."""

    def run(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "zimage_mxfp8.cli.main", *map(str, arguments)]
        return subprocess.run(  # type: ignore[call-overload,no-any-return]
            command,
            capture_output=True,
            text=True,
            cwd=options.pop("cwd", tmp_path),  # type: ignore[arg-type]
            env={**os.environ, **options.pop("env", {})},  # type: ignore[dict-item]
            timeout=120,
            **options,
        )

    return run


@pytest.fixture
def in_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Run]:
    """Runs `zimage-mxfp8` in this process and in `tmp_path`, without importing anything again."""
    environment = dict(os.environ)

    def run(*arguments: object, cwd: Path | str = tmp_path) -> subprocess.CompletedProcess[str]:
        words = [str(argument) for argument in arguments]
        monkeypatch.chdir(cwd)
        code = main(words)
        captured = capsys.readouterr()
        return subprocess.CompletedProcess(words, code, captured.out, captured.err)

    yield run
    os.environ.clear()  # commands set variables for libraries
    os.environ.update(environment)


@pytest.fixture(scope="session")
def zimage_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small diffusers folder with all parts; tests must not change it."""
    from helpers.model_folder import make_folder

    return make_folder(tmp_path_factory.mktemp("generate") / "Z-Image-tiny")


@pytest.fixture(scope="session")
def zimage_quantized(zimage_folder: Path) -> Path:
    """Its transformer in MXFP8."""
    path = zimage_folder.parent / "quantized.safetensors"
    zm.convert(zimage_folder, path)
    return path


@pytest.fixture
def turbo(zimage_folder: Path, zimage_quantized: Path, tmp_path: Path) -> Path:
    """A folder with the names of the examples, where the model's own transformer is missing."""
    ignored = shutil.ignore_patterns("transformer")
    shutil.copytree(zimage_folder, tmp_path / "Z-Image-Turbo", ignore=ignored)
    shutil.copy(zimage_quantized, tmp_path / "Z-Image-Turbo-mxfp8.safetensors")
    return tmp_path


@pytest.fixture
def generate(
    zimage_folder: Path,
    zimage_quantized: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Generate:
    """`zimage-mxfp8 generate` in this process and in `tmp_path`: exit code, stdout, stderr.

    Of stderr without the stages, which the tests of progress look at.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()  # too late for the variable that the command sets
    monkeypatch.chdir(tmp_path)
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "1")  # the command sets them, and this restores them
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        monkeypatch.setenv(name, "error")

    def run(
        *arguments: object,
        model: Path | str = zimage_folder,
        transformer: Path | str | None = zimage_quantized,
    ) -> tuple[int, str, str]:
        parts: list[object] = ["generate", "--model-dir", model]
        parts += [] if "--dtype" in arguments else ["--dtype", "float32"]
        parts += [] if "--device" in arguments else ["--device", "cpu"]
        parts += [] if transformer is None else ["--transformer", transformer]
        code = main([str(part) for part in (*parts, *arguments)])
        captured = capsys.readouterr()
        return code, captured.out, STAGES.sub("", captured.err)

    return run
