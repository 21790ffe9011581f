"""Numbers of the Z-Image architecture that no tensor shows."""

from __future__ import annotations

HEAD_DIM = 128
PATCH_SIZE = 2
LATENT_CHANNELS = 16
PATCH_FEATURES = PATCH_SIZE * PATCH_SIZE * LATENT_CHANNELS
SEQUENCE_MULTIPLE = 32  # images and captions are padded to multiples of this many tokens
NORM_EPS = 1e-5
FINAL_NORM_EPS = 1e-6
ROPE_THETA = 256.0
ROPE_AXES = (32, 48, 48)  # of a head's elements: caption position or frame, row, column
ROPE_LENGTHS = (1536, 512, 512)  # positions that the published models have on each of these axes
TIME_FEATURES = 256
TIME_SCALE = 1000.0
MAX_MODULATION_DIM = 256  # features of a timestep that modulations take, in models at least as wide
