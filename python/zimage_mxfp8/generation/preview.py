"""Small preview images between the denoising steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor

from .components import VAE

if TYPE_CHECKING:
    from PIL.Image import Image

_MAX_SIDE = 32  # latents: 256 pixels, 1/16 of the work of decoding 1024 x 1024

# Called with the number of finished steps and one image per item of the batch.
PreviewCallback = Callable[[int, tuple["Image", ...]], object]


class Previews:
    """A decoder of shrunk latents every few steps; the latents themselves do not change.

    Args:
        vae: the autoencoder.
        every: number of steps between two previews.
        show: called with each preview.
    """

    def __init__(self, vae: VAE, every: int, show: PreviewCallback) -> None:
        self._vae = vae
        self._every = every
        self._show = show
        self._before: torch.Tensor | None = None

    def after_step(self, done: int, total: int, scheduler: Any, latents: torch.Tensor) -> None:
        """Show a preview if one is due: not after the first step, nor after the last one.

        Args:
            done: number of finished steps.
            total: number of all steps.
            scheduler: diffusers' flow-match Euler scheduler, after this step.
            latents: after this step, [batch, 16, H, W].
        """
        before, self._before = self._before, latents
        if before is None or done % self._every or done == total:
            return
        then, now = scheduler.sigmas[scheduler.step_index - 1 : scheduler.step_index + 1].tolist()
        # The end of a straight line through both: the latents still hold noise.
        clean = latents - now * (latents - before) / (now - then)
        height, width = clean.shape[2:]
        scale = min(1.0, _MAX_SIDE / max(height, width))
        size = max(1, round(height * scale)), max(1, round(width * scale))
        small = F.interpolate(clean.nan_to_num(), size, mode="area")
        pixels = torch.cat([self._vae.decode(latent) for latent in small.split(1)])
        images = VaeImageProcessor().postprocess(pixels.nan_to_num())
        self._show(done, tuple(images))
