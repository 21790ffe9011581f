from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import zimage_mxfp8 as zm
from helpers.diffusers_reference import make_reference

# Processes of pytest-xdist that make torch's cache of kernels at the same time warn.
os.environ.setdefault("USE_PYTORCH_KERNEL_CACHE", "0")


@pytest.fixture(scope="session", autouse=True)
def _share_of_the_cores() -> None:
    """Let the processes of pytest-xdist share the cores, on which references are computed."""
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "transformer"
    make_reference(dim=384).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def quantized(folder: Path) -> Path:
    zm.convert(folder, folder.parent / "quantized.safetensors")
    return folder.parent / "quantized.safetensors"
