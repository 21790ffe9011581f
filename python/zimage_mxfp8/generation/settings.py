"""The settings of an image."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checks import finite_number, image_source, lora_weight, path, text, whole_number
from ..errors import UsageError
from .limits import (
    DEFAULT_CONTROL_STRENGTH,
    DEFAULT_MASKED_STRENGTH,
    DEFAULT_SIZE,
    DEFAULT_STRENGTH,
    MAX_CONTROL_STRENGTH,
    MAX_GUIDANCE,
    MAX_IMAGES,
    MAX_PIXELS,
    MAX_STEPS,
    PIXELS_PER_TOKEN,
    SEEDS,
)

if TYPE_CHECKING:
    from PIL.Image import Image

_NEVER_NONE = ("prompt", "steps", "guidance", "batch")


@dataclass(frozen=True)
class GenerationSettings:
    """The settings of a generation, checked on creation.

    Attributes:
        prompt: description of the image.
        negative_prompt: description of what to avoid; only with `guidance`.
        steps: forward passes of the transformer, from noise to image (twice as wide with
            `guidance`). With an init image, `strength` of them.
        height: pixels, a multiple of 16; None: 1024, or that of the init or control image.
        width: likewise.
        guidance: classifier-free guidance s, 0 to 100: positive + s * (positive - negative), which
            is a CFG scale of s + 1 in ComfyUI. 0: without, as Turbo needs it.
        seed: seed of the first image; image i has seed + i. None draws one.
        batch: number of images made together; 1 to 64.
        init_image: image to start from, a file or a PIL image; a str becomes a Path.
        mask_image: what of the init image is drawn anew: white, or lighter than mid-grey; the rest
            stays. A file or a PIL image of the init image's size.
        strength: share of the init image that noise replaces, 0.01 to 1; None: 0.6, or 1 with a
            mask.
        loras: adapter files, or pairs of a file and a weight (see `ZImageTransformer.load_lora`);
            pairs after the checks.
        control_image: image for a ControlNet, a file or a PIL image, as large as the image or of
            the same shape.
        control_strength: what the hints of the ControlNet are multiplied by, -10 to 10; None: 0.75.
        control_start: fraction of the steps before the ControlNet begins, 0 to 1; None: 0.
        control_end: fraction of the steps after which it ends; None: 1.

    Raises:
        UsageError: if a value has the wrong type or is invalid, or two contradict each other.
    """

    prompt: str
    negative_prompt: str | None = None
    steps: int = 8
    height: int | None = None
    width: int | None = None
    guidance: float = 0.0
    seed: int | None = None
    batch: int = 1
    init_image: Path | Image | None = None
    mask_image: Path | Image | None = None
    strength: float | None = None
    loras: tuple[tuple[Path, float], ...] = ()
    control_image: Path | Image | None = None
    control_strength: float | None = None
    control_start: float | None = None
    control_end: float | None = None

    def __post_init__(self) -> None:
        self._check_types()
        if not 1 <= self.steps <= MAX_STEPS:
            raise UsageError("steps", f"must be 1 to {MAX_STEPS}, not {self.steps}")
        for name, size in (("height", self.height), ("width", self.width)):
            if size is not None and (size % PIXELS_PER_TOKEN or not 0 < size <= MAX_PIXELS):
                raise UsageError(
                    name,
                    f"must be a multiple of {PIXELS_PER_TOKEN} up to {MAX_PIXELS}, not {size}",
                )
        if not 0 <= self.guidance <= MAX_GUIDANCE:
            raise UsageError("guidance", f"must be 0 to {MAX_GUIDANCE}, not {self.guidance}")
        if self.negative_prompt and not self.guidance:
            raise UsageError(
                "negative_prompt", "has no effect without guidance", "add `guidance` or drop it"
            )
        if not 1 <= self.batch <= MAX_IMAGES:
            raise UsageError(
                "batch",
                f"must be 1 to {MAX_IMAGES}, not {self.batch}",
                "for more images, make several batches",
            )
        if self.seed is not None and not 0 <= self.seed <= SEEDS - self.batch:
            raise UsageError("seed", "must be 0 or more, and below 2^63 for every image")
        for name in ("mask_image", "strength"):
            if getattr(self, name) is not None and self.init_image is None:
                raise UsageError(
                    name, "has no effect without an init image", "add `init_image` or drop it"
                )
        if self.strength is not None and not 0.01 <= self.strength <= 1:
            raise UsageError("strength", f"must be 0.01 to 1, not {self.strength}")
        self._check_control()

    def _check_control(self) -> None:
        strength, start, end = self.control_strength, self.control_start, self.control_end
        given = {"control_strength": strength, "control_start": start, "control_end": end}
        for name, value in given.items():
            if value is not None and self.control_image is None:
                raise UsageError(
                    name, "has no effect without a control image", "add `control_image` or drop it"
                )
        most = MAX_CONTROL_STRENGTH
        if strength is not None and not -most <= strength <= most:
            raise UsageError("control_strength", f"must be -{most} to {most}, not {strength}")
        for name, value in (("control_start", start), ("control_end", end)):
            if value is not None and not 0 <= value <= 1:
                raise UsageError(name, f"must be 0 to 1, not {value}")
        if (start or 0.0) >= (1.0 if end is None else end):
            raise UsageError("control_start", "must be less than the end", "see `control_end`")

    def _check_types(self) -> None:
        """Convert numbers and paths of other types to Python's own, so that they fit into JSON."""
        for names, check in (
            (("prompt", "negative_prompt"), text),
            (("steps", "height", "width", "seed", "batch"), whole_number),
            (
                ("guidance", "strength", "control_strength", "control_start", "control_end"),
                finite_number,
            ),
            (("init_image", "mask_image", "control_image"), image_source),
        ):
            for name in names:
                value = getattr(self, name)
                if value is None and name not in _NEVER_NONE:
                    continue
                object.__setattr__(self, name, check(name, value))
        if not isinstance(self.loras, (list, tuple)):
            raise UsageError("loras", "must be a list of files, or of pairs of a file and a weight")
        object.__setattr__(self, "loras", _check_loras(self.loras))

    def resolved(self, image_size: tuple[int, int] | None = None) -> GenerationSettings:
        """Return these settings with every open value filled in.

        Args:
            image_size: width and height of the init image or, without one, of the control image.
        """
        controlled = self.control_image is not None
        strength = DEFAULT_STRENGTH if self.mask_image is None else DEFAULT_MASKED_STRENGTH
        width, height = image_size or (DEFAULT_SIZE, DEFAULT_SIZE)
        return replace(
            self,
            height=_whole_tokens(height) if self.height is None else self.height,
            width=_whole_tokens(width) if self.width is None else self.width,
            seed=draw_seed() if self.seed is None else self.seed,
            strength=strength
            if self.init_image is not None and self.strength is None
            else self.strength,
            control_strength=DEFAULT_CONTROL_STRENGTH
            if controlled and self.control_strength is None
            else self.control_strength,
            control_start=0.0 if controlled and self.control_start is None else self.control_start,
            control_end=1.0 if controlled and self.control_end is None else self.control_end,
        )


def _check_loras(pairs: Sequence[object]) -> tuple[tuple[Path, float], ...]:
    """Return files with their weights; the sum of one file's weights must be valid too."""
    checked = []
    sums: dict[Path, float] = {}
    for pair in pairs:
        if isinstance(pair, (str, os.PathLike)):
            pair = (pair, 1.0)
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise UsageError("loras", "must be files, or pairs of a file and a weight")
        file = path("loras", pair[0])
        weight = _lora_weight(file, pair[1])
        place = file.absolute()
        sums[place] = _lora_weight(file, sums.get(place, 0.0) + weight)
        checked.append((file, weight))
    return tuple(checked)


def _lora_weight(file: Path, weight: Any) -> float:
    try:
        return lora_weight("weight", weight)
    except UsageError as error:
        raise UsageError("loras", f"has a weight for {file} that {error.problem}") from None


def draw_seed() -> int:
    """Return a random seed, short enough to type."""
    import secrets  # it imports hashlib, which takes a while

    return secrets.randbelow(1 << 32)


def _whole_tokens(pixels: int) -> int:
    tokens = min(pixels, MAX_PIXELS) // PIXELS_PER_TOKEN
    return max(tokens, 1) * PIXELS_PER_TOKEN
