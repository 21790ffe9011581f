"""A node package for the tests of ComfyUI's server: small stand-ins for text encoder and VAE."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .comfyui_detection import accept_small_models
from .comfyui_sizes import CAPTION, DIM

HIDDEN = 256  # of the feed-forward layers of the server's models


class SmallVAE:
    """Encodes images by a fixed projection of their tiles of 8 x 8."""

    def spacial_compression_encode(self) -> int:
        return 8

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        tiles = F.pixel_unshuffle(image.movedim(-1, 1), 8)
        generator = torch.Generator().manual_seed(5)
        return F.conv2d(tiles, torch.randn(16, tiles.shape[1], 1, 1, generator=generator) / 8)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return F.interpolate(latents[:, :3], scale_factor=8).movedim(1, -1).sigmoid()


class SmallCLIP:
    """Captions of random features, seeded by the text."""

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens_scheduled(self, tokens: str) -> list[Any]:
        generator = torch.Generator().manual_seed(len(tokens))
        return [[torch.randn(1, 21, CAPTION, generator=generator), {}]]


def small_controlnet(dtype: torch.dtype = torch.float32, **kind: Any) -> Any:
    """A MODEL_PATCH with a Fun ControlNet, as *Load Model Patch* makes it of a file."""
    import comfy.ldm.lumina.controlnet
    import comfy.model_patcher
    import comfy.ops

    module = comfy.ldm.lumina.controlnet.ZImage_Control(
        **{"dim": DIM, "n_heads": DIM // 128, "n_kv_heads": DIM // 128, "dtype": dtype},
        **{"ffn_dim_multiplier": HIDDEN / DIM, "operations": comfy.ops.manual_cast},
        **kind,
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 0.1
            parameter.copy_(1 + 0.2 * noise if "norm" in name else noise * scale)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(module, load_device=cpu, offload_device=cpu)


class _Loader:
    """A node that takes the place of a loader."""

    FUNCTION, CATEGORY = "load", "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        return {"required": {}}


class LoadSmallCLIP(_Loader):
    RETURN_TYPES = ("CLIP",)

    def load(self) -> tuple[Any]:
        return (SmallCLIP(),)


class LoadSmallVAE(_Loader):
    RETURN_TYPES = ("VAE",)

    def load(self) -> tuple[Any]:
        return (SmallVAE(),)


class LoadSmallControlNet(_Loader):
    RETURN_TYPES = ("MODEL_PATCH",)

    def load(self) -> tuple[Any]:
        return (small_controlnet(n_control_layers=6),)


class Report:
    """Shows latents, and the calls of the speed-up behind which they were drawn."""

    RETURN_TYPES: tuple[str, ...] = ()
    FUNCTION, CATEGORY, OUTPUT_NODE = "report", "tests", True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        return {"required": {"model": ("MODEL",), "samples": ("LATENT",)}}

    def report(self, model: Any, samples: dict[str, torch.Tensor]) -> dict[str, Any]:
        forward = model.object_patches.get("diffusion_model._forward")
        native = [] if forward is None else [forward.native_calls]
        fallback = [] if forward is None else list(forward.fallback_calls)
        latents = samples["samples"].flatten().tolist()
        return {"ui": {"native": native, "fallback": fallback, "latents": latents}}


def register() -> dict[str, type]:
    """Return the nodes, in a ComfyUI that takes small models."""
    accept_small_models()
    return {cls.__name__: cls for cls in (LoadSmallCLIP, LoadSmallVAE, LoadSmallControlNet, Report)}
