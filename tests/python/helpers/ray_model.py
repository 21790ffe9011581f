"""For the tests with Ray: a model whose replicas are quick to start and note what they draw."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

import zimage_mxfp8 as zm
from helpers.serving import StubEngine
from zimage_mxfp8.server.engine import Drawing, DrawRequest, EngineLostError, Report

STEP = 0.05  # seconds
ERRORS = {
    "usage": zm.UsageError("steps", "must be fewer"),
    "nan": zm.GenerationError("the image is NaN", 1, "use another seed"),
    "memory": zm.CudaError("cuda:0 ran out of memory"),
    "defect": KeyError("a defect"),
    "rank": EngineLostError("rank 1 was ended by signal 9"),
    "error of a rank": zm.RankError("rank 1 failed: out of memory"),
}


@dataclass(frozen=True)
class NotingModel:
    """A model in place of `ServedModel`.

    Attributes:
        notes: file that gets a line "PROCESS begin SEED" or "PROCESS end SEED" for each drawing.
    """

    notes: Path
    name: str = "stub"
    side: int = 64
    device: str | None = None
    gpus: int = 1

    def load(self) -> NotingEngine:
        return NotingEngine(self.notes)

    def noted(self, what: str) -> list[tuple[int, int]]:
        """The process and the seed of each drawing that began, or that ended."""
        lines = [line.split() for line in self.notes.read_text().splitlines()]
        return [(int(process), int(seed)) for process, kind, seed in lines if kind == what]


class NotingEngine(StubEngine):
    """Takes a while for each step, and returns an init image as it is."""

    def __init__(self, notes: Path) -> None:
        super().__init__()
        self._notes = notes

    def draw(self, request: DrawRequest, report: Report) -> Drawing:
        def slow(update: object) -> None:
            time.sleep(STEP)
            report(update)  # type: ignore[arg-type]

        settings = request.settings
        self._note("begin", settings.seed)
        if settings.prompt in ERRORS:
            raise ERRORS[settings.prompt]
        drawing = super().draw(request, slow)
        self._note("end", settings.seed)
        if isinstance(settings.init_image, Image.Image):
            assert settings.mask_image is None or isinstance(settings.mask_image, Image.Image)
            return Drawing((settings.init_image.convert("RGB"),), drawing.metadata)
        return drawing

    def _note(self, what: str, seed: int | None) -> None:
        with self._notes.open("a") as file:
            file.write(f"{os.getpid()} {what} {seed}\n")
