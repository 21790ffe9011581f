from __future__ import annotations

from pathlib import Path

import pytest

import zimage_mxfp8 as zm
from helpers.diffusers_reference import make_reference


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "transformer"
    make_reference(dim=384).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def quantized(folder: Path) -> Path:
    zm.convert(folder, folder.parent / "quantized.safetensors")
    return folder.parent / "quantized.safetensors"
