"""Limits and defaults of the settings of an image.

Separate from `settings.py` because help texts need them too, without the imports of the checks.
"""

from __future__ import annotations

from ..zimage.constants import ROPE_LENGTHS

PIXELS_PER_TOKEN = 16  # a side: 8 pixels to a latent, 2 latents to a patch
DEFAULT_SIZE = 1024
DEFAULT_STRENGTH = 0.6
DEFAULT_MASKED_STRENGTH = 1.0  # the mask says what stays; the default of diffusers' pipeline
DEFAULT_CONTROL_STRENGTH = 0.75  # of diffusers' pipelines; recommended by the authors for 1.0
MAX_CONTROL_STRENGTH = 10
MAX_PIXELS = min(ROPE_LENGTHS[1:]) * PIXELS_PER_TOKEN  # a side
MAX_STEPS = 1000
MAX_IMAGES = 64  # of a batch, far beyond what a device's memory holds in 1024 x 1024
MAX_GUIDANCE = 100  # useful values are below 10; huge ones overflow
SEEDS = 2**63
