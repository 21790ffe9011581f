"""Images of the same captions and noise by several transformers; the small model's examples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor

from ..transformer.model import ZImageTransformer
from ..zimage.constants import LATENT_CHANNELS
from .components import VAE, TextEncoder
from .folder import open_model_folder
from .limits import PIXELS_PER_TOKEN
from .sampler import denoise
from .small_model import FOLDER, TRANSFORMER, Example

if TYPE_CHECKING:
    from PIL.Image import Image

_BATCH = 32  # images that the transformer computes together


class Painter:
    """Draws the same captions from the same noise with any transformer, in float32.

    Attributes:
        captions: features of each image's caption, [tokens, features].
    """

    def __init__(
        self, folder: Path, captions: Sequence[str], noise: Sequence[torch.Tensor], device: str
    ) -> None:
        """Load all parts but the transformer.

        Args:
            folder: a diffusers folder.
            captions: of each image.
            noise: float32 [16, 1, H, W] of each image, on the device.
            device: where to draw.
        """
        parts, place = open_model_folder(folder), torch.device(device)
        encoder = TextEncoder(parts, place, torch.float32)
        features = {caption: encoder.encode(caption) for caption in dict.fromkeys(captions)}
        self.captions = [features[caption] for caption in captions]
        self._vae = VAE(parts, place, torch.float32)
        self._noise = noise

    @torch.no_grad()
    def draw(
        self, model: ZImageTransformer, sampler: str | int = "turbo"
    ) -> tuple[list[torch.Tensor], list[Image]]:
        """Return the latents and images of a transformer; `sampler` as in `denoise`."""
        latents: list[torch.Tensor] = []
        for first in range(0, len(self._noise), _BATCH):
            batch = slice(first, first + _BATCH)
            captions = [x.to(model.dtype) for x in self.captions[batch]]
            latents += denoise(model, self._noise[batch], captions, sampler)
        processor = VaeImageProcessor(vae_scale_factor=PIXELS_PER_TOKEN)
        decoded = (self._vae.decode(each[None, :, 0]) for each in latents)
        return latents, [processor.postprocess(pixels)[0] for pixels in decoded]


class ExamplePainter:
    """Draws examples with the shipped transformer on the CPU, in float32 but for the 8 bits."""

    def __init__(self, examples: Sequence[Example], side: int) -> None:
        shape = (LATENT_CHANNELS, 1, side // 8, side // 8)
        noise = [
            torch.randn(shape, generator=torch.Generator().manual_seed(example.seed))
            for example in examples
        ]
        self._painter = Painter(FOLDER, [example.prompt for example in examples], noise, "cpu")

    def draw(self, compute: str) -> list[Image]:
        """Return the images of all examples in a compute mode.

        One thread of torch draws: its matrices are small, and on a busy machine several threads
        wait for each other, which took five times as long.
        """
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            model = ZImageTransformer.from_checkpoint(TRANSFORMER, "cpu", compute, torch.float32)
            return self._painter.draw(model)[1]
        finally:
            torch.set_num_threads(threads)


def psnr(image: Image, reference: Image) -> float:
    """Return the peak signal-to-noise ratio of RGB images in dB, infinite for equal ones."""
    difference = np.asarray(image, np.float64) - np.asarray(reference, np.float64)
    square = float(np.square(difference).mean())
    return 10 * float(np.log10(255**2 / square)) if square else float("inf")
