"""The small trained model on a CUDA device, whose feed-forward width of 341 every mode pads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

import zimage_mxfp8 as zm
from zimage_mxfp8.generation.small_model import FOLDER, TRANSFORMER, examples
from zimage_mxfp8.transformer.compute import COMPUTE_MODES, unsupported

pytestmark = pytest.mark.gpu

LEAST = {"mxfp8-emulated": 35, "mxfp8": 35}  # PSNR in dB; 38 for other modes


@pytest.mark.parametrize("compute", COMPUTE_MODES)
def test_it_draws_what_the_original_drew(compute: str) -> None:
    if why := unsupported(compute, torch.cuda.current_device()):
        pytest.skip(why)
    side, shown = examples()
    generator = zm.ZImageGenerator(FOLDER, TRANSFORMER, "cuda", compute)
    for example in shown:
        settings = zm.GenerationSettings(example.prompt, height=side, width=side, seed=example.seed)
        (image,) = generator.generate(settings).images
        original = np.asarray(Image.open(example.image))
        assert peak_signal_noise_ratio(original, np.asarray(image)) > LEAST.get(compute, 38)
