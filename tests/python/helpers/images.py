"""Checks of `generate` and of the images that it writes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from zimage_mxfp8.generation.images import METADATA_KEY

Generate = Callable[..., "tuple[int, str, str]"]


# What `generate` tells without a terminal while all goes well.
STAGES = re.compile(
    r"^zimage-mxfp8: (?:(?:checking|loading) [a-zA-Z ]+(?: \.\.\.)?|encoding|"
    r"denoising: step \d+ of \d+, \S+ s per step|decoding(?:: image \d+ of \d+)?)\n",
    re.MULTILINE,
)


SIZE = ("--height", "48", "--width", "64")


def levels(image: Path | Image.Image) -> np.ndarray:
    if isinstance(image, Path):
        image = Image.open(image)
    return np.asarray(image).astype(int)


def settings_of(path: Path) -> dict[str, Any]:
    with Image.open(path) as image:
        return json.loads(image.text[METADATA_KEY])


def generator_of(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def init_image(path: Path, size: tuple[int, int]) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 6, 3), np.uint8)
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    image.save(path)
    return image


def fails(result: tuple[int, str, str], code: int, *parts: str) -> None:
    found, out, err = result
    assert found == code, err
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("zimage-mxfp8: error: "), err
    for part in parts:
        assert part in line, (part, line)
