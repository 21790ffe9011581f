"""The small trained model that the package brings, and what its BF16 original draws."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "small_model"  # a diffusers folder, see `benchmarks.trained`
TRANSFORMER = FOLDER / "transformer.safetensors"  # in MXFP8


@dataclass(frozen=True)
class Example:
    """A caption, the seed of its noise, and the image of the original in BF16.

    Attributes:
        prompt: the caption.
        seed: of the noise.
        image: PNG file that the original's weights drew, computed in float32.
    """

    prompt: str
    seed: int
    image: Path


def examples() -> tuple[int, list[Example]]:
    """Return the side of the images in pixels, and the examples."""
    document = json.loads((FOLDER / "examples.json").read_text("utf-8"))
    return document["side"], [
        Example(each["prompt"], each["seed"], FOLDER / each["image"])
        for each in document["examples"]
    ]
