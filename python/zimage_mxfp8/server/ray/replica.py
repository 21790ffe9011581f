"""A replica: the process that draws on one GPU, one request at a time."""

from __future__ import annotations

import asyncio
import threading
import traceback
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ray import serve

from ...errors import Error
from ..engine import Drawing, DrawRequest, EngineLostError, Preview, Progress, Waiting
from ..jobs import StoppedError, is_of_request, without_frames
from ..model import ServedModel

# As many as `LoraCache` keeps, so that Ray knows about where which adapters are loaded.
_KEPT_ADAPTERS = 4


class DefectError(Exception):
    """An error that nobody foresaw, with the traceback of the process that it happened in."""


@dataclass(frozen=True)
class Failure:
    """The end of a drawing without images.

    Attributes:
        error: the reason.
    """

    error: Exception


Event = Progress | Preview | Drawing | Failure


class Replica:
    """Draws with a model that it loads when it starts.

    Args:
        model: the model.
    """

    def __init__(self, model: ServedModel) -> None:
        self._broken: str | None = None
        self._engine = model.load()
        self._engine.warm_up()
        self._thread = ThreadPoolExecutor(1, "drawing")

    async def draw(self, request: DrawRequest) -> AsyncIterator[Event]:
        """Yield the events of a drawing; the last one is a `Drawing` or a `Failure`.

        Closing this stops the drawing after its step, and waits for that.
        """
        if request.settings.loras:
            await self._keep(serve.get_multiplexed_model_id())
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event | None] = asyncio.Queue()
        is_stopped = threading.Event()

        def report(update: Progress | Preview | Waiting) -> None:
            if is_stopped.is_set():
                raise StoppedError
            assert not isinstance(update, Waiting)  # of engines that wait for others
            loop.call_soon_threadsafe(events.put_nowait, update)

        def draw() -> Drawing | Failure:
            try:
                return self._engine.draw(request, report)
            except Exception as error:
                is_clean = isinstance(error, StoppedError) or is_of_request(error, request)
                failure = Failure(without_frames(_portable(error)))
            if not is_clean:  # not above: there the error's frames hold tensors
                self._clean_up()
            return failure

        drawing = loop.run_in_executor(self._thread, draw)
        drawing.add_done_callback(lambda _: events.put_nowait(None))
        try:
            while (event := await events.get()) is not None:
                yield event
            yield drawing.result()
        finally:
            is_stopped.set()
            await asyncio.wait([drawing])

    async def is_ready(self) -> bool:
        """Return True: a replica that answers has loaded its model."""
        return True

    def check_health(self) -> None:
        """Raise if the replica must be replaced. Ray Serve calls it."""
        if self._broken is not None:
            raise RuntimeError(self._broken)

    @serve.multiplexed(max_num_models_per_replica=_KEPT_ADAPTERS)
    async def _keep(self, adapters: str) -> str:
        """Let Ray know which adapters are loaded here, so that it sends their requests here."""
        return adapters

    def _clean_up(self) -> None:
        """Free what a failed drawing has left; a device that cannot do so draws nothing more."""
        try:
            self._engine.free_memory()
        except Exception as error:
            self._broken = f"the device is broken: {error}"


def _portable(error: Exception) -> Exception:
    """Return an error that processes without torch can read."""
    if isinstance(error, (EngineLostError, Error, MemoryError, StoppedError)):
        return error
    return DefectError("".join(traceback.format_exception(error)))
