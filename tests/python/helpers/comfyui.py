"""Calls of ComfyUI's models in tests."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from .comfyui_sizes import CAPTION


def load(comfy: SimpleNamespace, path: Path, dtype: torch.dtype | None = torch.float32) -> Any:
    """A MODEL, as *Load Diffusion Model* makes it."""
    return comfy.sd.load_diffusion_model(str(path), model_options={"dtype": dtype})


def inputs(height: int = 16, width: int = 24, items: int = 2, tokens: int = 21) -> tuple[Any, ...]:
    """Latents, times and captions."""
    generator = torch.Generator().manual_seed(height + tokens)
    x = torch.randn(items, 16, height, width, generator=generator)
    context = torch.randn(items, tokens, CAPTION, generator=generator)
    return x, torch.linspace(0.9, 0.2, items), context


def run(
    comfy: SimpleNamespace, model: Any, given: tuple[Any, ...], dtype=torch.float32, **options: Any
) -> torch.Tensor:
    """One call of the model, with transformer_options."""
    comfy.management.load_models_gpu([model], force_patch_weights=True)
    x, times, context = given
    with torch.inference_mode():
        found = model.model.diffusion_model(
            x.to(dtype), times, context.to(dtype), context.shape[1], transformer_options=options
        )
    return found.float().clone()


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative to what is wanted."""
    return float((found - wanted).norm() / wanted.norm())


def forward_of(model: Any) -> Any:
    """The forward that the speed-up has put on a MODEL."""
    return model.object_patches["diffusion_model._forward"]
