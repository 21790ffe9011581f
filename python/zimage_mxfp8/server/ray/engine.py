"""An engine that has replicas draw."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, WorkerCrashedError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from ...generation.settings import draw_seed
from ..engine import Drawing, DrawRequest, EngineLostError, Preview, Progress, Report, Waiting
from .replica import Failure

_POLL = 0.2  # seconds between two reports that a drawing waits
_LOST = (
    EngineLostError,  # told by a replica that has lost a rank
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    RayServeException,
    WorkerCrashedError,
)


class RayEngine:
    """An engine that draws each request on a replica that is free.

    A request whose replica dies, or loses one of its ranks, is drawn once more with the same seed.

    Args:
        handle: of the replicas.
        name: of the model, for clients.
        places: most replicas that there may be.
        default_size: width and height of images in pixels, if a request does not say.
    """

    def __init__(
        self, handle: DeploymentHandle[Any], name: str, places: int, default_size: tuple[int, int]
    ) -> None:
        self.name = name
        self.places = places
        self.default_size = default_size
        self._handle = handle

    def warm_up(self) -> None:
        """Wait for a replica: they draw once before they are ready."""
        self._handle.is_ready.remote().result()

    def draw(self, request: DrawRequest, report: Report) -> Drawing:
        """Draw the images of a request, see `Engine.draw`."""
        settings = request.settings
        if settings.seed is None:
            request = replace(request, settings=replace(settings, seed=draw_seed()))
        report = _without_repetition(report)
        try:
            return asyncio.run(self._draw(request, report))
        except _LOST:
            pass
        try:
            return asyncio.run(self._draw(request, report))
        except _LOST as error:
            raise EngineLostError(f"two replicas were lost: {error}") from None

    def free_memory(self) -> None:
        """Do nothing: replicas do it themselves."""

    def device_memory(self) -> dict[str, int]:
        """Return nothing: the devices are those of the replicas."""
        return {}

    async def _draw(self, request: DrawRequest, report: Report) -> Drawing:
        handle = self._handle.options(stream=True, multiplexed_model_id=_adapters(request))
        report(Waiting())
        events: Any = handle.draw.remote(request)
        event: Any = Waiting()
        try:
            while not isinstance(event, (Drawing, Failure)):
                event = await _next(events, report if isinstance(event, Waiting) else None)
                if isinstance(event, (Progress, Preview)):
                    report(event)
        except BaseException:
            events.cancel()
            raise
        if isinstance(event, Failure):
            raise event.error
        return event


async def _next(events: AsyncIterator[Any], report: Report | None) -> Any:
    """Return the next event; meanwhile report that the drawing waits."""
    coming = asyncio.ensure_future(anext(events))
    try:
        while not coming.done():
            await asyncio.wait([coming], timeout=_POLL)
            if not coming.done() and report is not None:
                report(Waiting())
        return coming.result()
    finally:
        if not coming.done():
            coming.cancel()
            await asyncio.wait([coming])


def _without_repetition(report: Report) -> Report:
    """Return a report that leaves out previews which come again when a drawing is repeated."""
    count = 0

    def once(update: Progress | Preview | Waiting) -> None:
        nonlocal count
        if isinstance(update, Preview):
            if update.number < count:
                return
            count = update.number + 1
        report(update)

    return once


def _adapters(request: DrawRequest) -> str:
    """Return what stands for the adapters of a request: Ray looks for a replica that has them."""
    return ",".join(sorted(file.stem for file, _ in request.settings.loras))
