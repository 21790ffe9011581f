"""Engines draw the images of requests; the rest of the server does not know how."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import CudaError, RankError
from ..generation.settings import GenerationSettings

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..generation.generator import GenerationProgress, ZImageGenerator


@dataclass(frozen=True)
class DrawRequest:
    """What to draw.

    Attributes:
        settings: with width and height, images in memory, and adapters of the server's own folder.
        previews: most previews to report, each of all images of the batch.
    """

    settings: GenerationSettings
    previews: int = 0


@dataclass(frozen=True)
class Progress:
    """Progress of a drawing.

    Attributes:
        stage: the work in progress; steps are those of "denoising".
        done: finished units of it.
        total: all units of it.
    """

    stage: str
    done: int
    total: int


@dataclass(frozen=True)
class Preview:
    """Small estimates of the images while they are drawn.

    Attributes:
        number: of the preview, from 0.
        images: one per image of the batch.
    """

    number: int
    images: tuple[Image, ...]


@dataclass(frozen=True)
class Waiting:
    """A drawing cannot begin, or not go on, because all that could draw it is busy or missing."""


Report = Callable[["Progress | Preview | Waiting"], object]


@dataclass(frozen=True)
class Drawing:
    """Finished images.

    Attributes:
        images: PIL images.
        metadata: settings of each image, see `Generation.metadata`.
        warnings: sentences for the user.
    """

    images: tuple[Image, ...]
    metadata: tuple[dict[str, Any], ...]
    warnings: tuple[str, ...] = ()


class Engine(Protocol):
    """Draws requests. Calls of `draw` and `free_memory` come from one thread for each place.

    Attributes:
        name: of the model, for clients.
        places: number of requests that it draws at a time.
        default_size: width and height of images in pixels, if a request does not say.
    """

    name: str
    places: int
    default_size: tuple[int, int]

    def warm_up(self) -> None:
        """Do what makes the first request slower than others."""

    def draw(self, request: DrawRequest, report: Report) -> Drawing:
        """Draw the images of a request.

        Args:
            request: what to draw.
            report: called with progress, after every step at least, with previews, and several
                times a second while the drawing waits. It raises to stop the drawing; the engine
                lets that exception through.

        Raises:
            EngineLostError: what drew the request is gone.
        """

    def free_memory(self) -> None:
        """Free what a failed drawing may have left."""

    def device_memory(self) -> dict[str, int]:
        """Return bytes by kind ("allocated", ...); empty if the device does not tell."""


class EngineLostError(Exception):
    """The process or machine that drew a request is gone; the request itself is none the worse."""


class GeneratorEngine:
    """An engine around a `ZImageGenerator`, which draws one request at a time.

    Args:
        generator: the generator.
        name: of the model, for clients.
        default_size: width and height of images in pixels, if a request does not say.
        device: name of the device that the generator runs on.
    """

    places = 1

    def __init__(
        self, generator: ZImageGenerator, name: str, default_size: tuple[int, int], device: str
    ) -> None:
        self.name = name
        self.default_size = default_size
        self._generator = generator
        self._device = device

    def warm_up(self) -> None:
        """Draw an image in two steps: of the default size on a GPU, else a small one."""
        width, height = self.default_size if self._device.startswith("cuda") else (64, 64)
        self._generator.generate(
            GenerationSettings("warm-up", steps=2, width=width, height=height, seed=0)
        )

    def draw(self, request: DrawRequest, report: Report) -> Drawing:
        """Draw the images of a request, see `Engine.draw`."""
        settings = request.settings
        number = 0

        def show(_done: int, images: tuple[Image, ...]) -> None:
            nonlocal number
            report(Preview(number, images))
            number += 1

        def tell(progress: GenerationProgress) -> None:
            report(Progress(progress.stage, progress.done, progress.total))

        every = math.ceil(settings.steps * (settings.strength or 1) / (request.previews + 1))
        try:
            made = self._generator.generate(
                settings,
                tell,
                preview=show if request.previews else None,
                preview_every=max(1, every),
            )
        except RankError as error:
            if error.was_killed:
                raise EngineLostError(str(error)) from None
            raise
        return Drawing(
            made.images,
            tuple(made.metadata(i) for i in range(len(made.images))),
            made.warnings,
        )

    def free_memory(self) -> None:
        """Return memory of dead tensors to the device.

        Raises:
            CudaError: the device failed, for good in this process.
        """
        gc.collect()
        if self._device.startswith("cuda"):
            import torch

            try:
                torch.cuda.synchronize(self._device)  # for its errors
                torch.cuda.empty_cache()
            except RuntimeError as error:
                reason = str(error).partition("\n")[0]
                raise CudaError(
                    f"{self._device} cannot be used any more: {reason}", "start the server again"
                ) from None

    def device_memory(self) -> dict[str, int]:
        """Return the bytes that torch has allocated and reserved on a CUDA device."""
        if not self._device.startswith("cuda"):
            return {}
        import torch

        return {
            "allocated": torch.cuda.memory_allocated(self._device),
            "reserved": torch.cuda.memory_reserved(self._device),
        }
