"""The examples of the small model, drawn together in one batch."""

from __future__ import annotations

from collections.abc import Sequence
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


class ExamplePainter:
    """Draws examples on the CPU, in float32 but for the 8 bits of a compute mode."""

    def __init__(self, examples: Sequence[Example], side: int) -> None:
        folder, device = open_model_folder(FOLDER), torch.device("cpu")
        encoder = TextEncoder(folder, device, torch.float32)
        self._captions = [encoder.encode(example.prompt) for example in examples]
        self._vae = VAE(folder, device, torch.float32)
        shape = (LATENT_CHANNELS, 1, side // 8, side // 8)
        self._noise = [
            torch.randn(shape, generator=torch.Generator().manual_seed(example.seed))
            for example in examples
        ]

    def draw(self, compute: str) -> list[Image]:
        """Return the images of all examples with the shipped transformer.

        One thread of torch draws: its matrices are small, and on a busy machine several threads
        wait for each other, which took five times as long.
        """
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return self._draw(compute)
        finally:
            torch.set_num_threads(threads)

    def _draw(self, compute: str) -> list[Image]:
        model = ZImageTransformer.from_checkpoint(TRANSFORMER, "cpu", compute, torch.float32)
        latents = denoise(model, self._noise, self._captions)
        decoded = [self._vae.decode(each[None, :, 0]) for each in latents]
        processor = VaeImageProcessor(vae_scale_factor=PIXELS_PER_TOKEN)
        return [processor.postprocess(pixels)[0] for pixels in decoded]


def psnr(image: Image, reference: Image) -> float:
    """Return the peak signal-to-noise ratio of RGB images in dB, infinite for equal ones."""
    difference = np.asarray(image, np.float64) - np.asarray(reference, np.float64)
    square = float(np.square(difference).mean())
    return 10 * float(np.log10(255**2 / square)) if square else float("inf")
