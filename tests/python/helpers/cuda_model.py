"""A small model on a CUDA device, and its inputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import zimage_mxfp8 as zm
from zimage_mxfp8.transformer.compute import COMPUTE_MODES, unsupported

RAGGED = ([(16, 16), (4, 30), (2, 2)], [33, 1, 64])
EQUAL = ([(8, 12), (8, 12)], [32, 32])


def on_device(inputs):
    return [[x.cuda() for x in inputs[0]], inputs[1].cuda(), [c.cuda() for c in inputs[2]]]


def load(path: Path, compute: str = "auto", dtype=torch.bfloat16) -> zm.ZImageTransformer:
    index = torch.cuda.current_device()
    if compute in COMPUTE_MODES and (why := unsupported(compute, index)):
        pytest.skip(why)
    return zm.ZImageTransformer.from_checkpoint(path, "cuda", compute, dtype)
