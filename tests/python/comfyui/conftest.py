"""A checkout of ComfyUI for the tests marked `comfyui`: ZM_COMFYUI=DIR pytest -m comfyui."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import zimage_mxfp8 as zm
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
    import comfy.model_detection
    import comfy.model_management
    import comfy.sample
    import comfy.sd
    import comfy.supported_models
    import folder_paths

    own = comfy.model_detection.detect_unet_config

    def detect(state: Any, prefix: str, metadata: Any = None) -> dict[str, Any]:
        """As of width 3840, which alone it takes for Z-Image."""
        config: dict[str, Any] = own(state, prefix, metadata=metadata)
        heads = config["dim"] // 128
        return config | {
            **{"n_heads": heads, "n_kv_heads": heads, "ffn_dim_multiplier": 8 / 3},
            **{"axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512], "rope_theta": 256.0},
            **{"z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32},
        }

    comfy.model_detection.detect_unet_config = detect
    comfy.supported_models.ZImage.unet_config = {"image_model": "lumina2", "dim": DIM}
    yield SimpleNamespace(
        management=comfy.model_management,
        sample=comfy.sample,
        sd=comfy.sd,
        folder_paths=folder_paths,
    )
    comfy.model_detection.detect_unet_config = own
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
