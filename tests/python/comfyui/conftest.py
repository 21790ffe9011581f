"""A checkout of ComfyUI for the tests marked `comfyui`: ZM_COMFYUI=DIR pytest -m comfyui."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import zimage_mxfp8 as zm
from helpers.comfyui_detection import accept_small_models
from helpers.comfyui_sizes import CAPTION, DIM, HIDDEN, LAYERS
from zimage_mxfp8.checkpoint.synthetic import write_synthetic_checkpoint
from zimage_mxfp8.zimage.layers import zimage_shapes


@pytest.fixture(scope="session")
def comfy() -> Iterator[SimpleNamespace]:
    """ComfyUI's modules, on the CPU, with a Z-Image of the tests' width."""
    checkout = os.environ.get("ZM_COMFYUI")
    if not checkout:
        pytest.skip("ZM_COMFYUI names no checkout of ComfyUI")
    # Beside a torch for CPUs, torchvision's wheel (for CUDA) lacks the operators that it extends.
    torchvision = torch.library.Library("torchvision", "DEF")
    torchvision.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    torchvision.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    sys.path.insert(0, checkout)
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import comfy.model_management
    import comfy.sample
    import comfy.sd
    import folder_paths

    undo = accept_small_models()
    yield SimpleNamespace(
        management=comfy.model_management,
        sample=comfy.sample,
        sd=comfy.sd,
        folder_paths=folder_paths,
    )
    undo()
    sys.path.remove(checkout)


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic Z-Image in BF16."""
    path = tmp_path_factory.mktemp("comfy") / "z.safetensors"
    shapes = zimage_shapes(dim=DIM, layers=LAYERS, caption_dim=CAPTION, hidden=HIDDEN)
    write_synthetic_checkpoint(path, shapes)
    return path


@pytest.fixture(scope="session")
def quantized(original: Path) -> Path:
    path = original.with_name("z-mxfp8.safetensors")
    zm.convert(original, path)
    return path
