"""What the APIs share: from the fields of a request to a job, and from a job to images."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from ..errors import CheckpointError, UsageError
from ..generation.images import decode_image, open_image
from ..generation.limits import MAX_PIXELS, PIXELS_PER_TOKEN
from ..generation.settings import GenerationSettings
from .engine import Drawing, DrawRequest, Engine, Progress
from .jobs import DeadlineError, Done, Event, Failed, Job, JobQueue, is_of_request
from .loras import LoraFolder
from .middleware import notes_of
from .options import ServerOptions
from .request_errors import ClientGoneError, RequestError, invalid, request_error

if TYPE_CHECKING:
    from PIL.Image import Image

_DECODED_AT_A_TIME = 2  # requests; an image may have 64 MB, and decoding takes several times that


@dataclass(frozen=True)
class Service:
    """The engine of a server and what stands before it.

    Attributes:
        engine: draws.
        queue: its jobs.
        loras: adapters by name.
        options: of the server.
    """

    engine: Engine
    queue: JobQueue
    loras: LoraFolder
    options: ServerOptions
    _decoding: asyncio.Semaphore = field(
        default_factory=lambda: asyncio.Semaphore(_DECODED_AT_A_TIME)
    )

    def size(self, width: int | None, height: int | None, image: Image | None) -> tuple[int, int]:
        """Return the size of an image in pixels.

        Args:
            width: as the client wishes; None: that of the init image, scaled down if it is larger
                than images may be, or else the engine's default.
            height: likewise.
            image: the init image.
        """
        default = self.engine.default_size
        if image is not None:
            default = _fitted(image.size, self.options.max_image_pixels)
        return (default[0] if width is None else width, default[1] if height is None else height)

    def settings(self, fields: Mapping[str, str], **values: Any) -> GenerationSettings:
        """Return checked settings.

        Args:
            fields: the request's field for each argument of `GenerationSettings`, where it differs.
            values: those arguments, with a size.

        Raises:
            RequestError: a value cannot be used.
        """
        try:
            settings = GenerationSettings(**values)
        except UsageError as error:
            raise request_error(error, fields) from None
        image, mask = values.get("init_image"), values.get("mask_image")
        if image is not None and mask is not None and mask.size != image.size:
            raise invalid(
                fields.get("mask_image", "mask_image"),
                f"has {mask.width} x {mask.height} pixels, and the image {image.width} x "
                f"{image.height}; give both the same size",
            )
        assert settings.width and settings.height
        pixels = settings.width * settings.height
        if pixels > self.options.max_image_pixels:
            raise invalid(
                fields.get("width", "width"),
                f"must have at most {self.options.max_image_pixels:,} pixels, and "
                f"{settings.width}x{settings.height} has {pixels:,}",
            )
        if settings.batch * pixels > self.options.max_request_pixels:
            raise invalid(
                fields.get("batch", "batch"),
                f"times the pixels of an image must be at most "
                f"{self.options.max_request_pixels:,}, and {settings.batch} x {settings.width}x"
                f"{settings.height} are {settings.batch * pixels:,}",
            )
        return settings

    @asynccontextmanager
    async def room_for_images(self, http: Request) -> AsyncIterator[None]:
        """Let few requests at a time decode images and submit them: decoding takes much memory.

        Args:
            http: a request whose body is complete.

        Raises:
            QueueFullError, StoppingError: there is no room in the queue.
            ClientGoneError: the client has closed its connection meanwhile.
            DeadlineError: the others took too long.
        """
        self.queue.check_room()
        gone = asyncio.ensure_future(_gone(http))
        place = asyncio.ensure_future(self._decoding.acquire())
        either: list[asyncio.Future[Any]] = [gone, place]
        try:
            seconds = self.options.timeout
            await asyncio.wait(either, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                raise ClientGoneError
            if not place.done():
                raise DeadlineError(seconds)
            self.queue.check_room()
            yield
        finally:
            for each in either:
                each.cancel()
            await asyncio.wait(either)
            if not place.cancelled():
                self._decoding.release()

    async def decode(self, content: bytes, param: str, what: str = "") -> Image:
        """Return the image of a file that a client sent, upright and in any mode.

        Args:
            content: the file.
            param: the field that it came in.
            what: the image, for the sentences of errors; "" for the field's name.

        Raises:
            RequestError: it is not an image, or too large.
        """
        try:
            max_pixels = self.options.max_sent_pixels
            return await run_in_threadpool(_decoded, content, what or param, max_pixels)
        except CheckpointError as error:
            raise RequestError(400, "invalid_image", str(error), param) from None

    def submit(self, http: Request, request: DrawRequest) -> Job:
        """Put a request into the queue.

        Raises:
            QueueFullError, StoppingError: there is no room.
        """
        notes = notes_of(http.scope)
        job = self.queue.submit(request, self.options.timeout, notes.request_id)
        settings = request.settings
        notes.fields |= {
            "size": f"{settings.width}x{settings.height}",
            "steps": settings.steps,
            "n": settings.batch,
        }
        return job

    def failure(self, job: Job, failed: Failed, fields: Mapping[str, str]) -> RequestError:
        """Return what the client is told of a job that failed."""
        error = failed.error
        if isinstance(error, CheckpointError) and is_of_request(error, job.request):
            sentence = str(error)
            for file, _ in job.request.settings.loras:
                sentence = sentence.replace(str(file), file.name)
            return RequestError(400, "invalid_lora", sentence, "lora")
        return request_error(error, fields)

    async def drawing(self, http: Request, job: Job, fields: Mapping[str, str]) -> Drawing:
        """Wait for a job's images; stop it if the client goes away.

        Raises:
            RequestError: there are none.
            ClientGoneError: the client has closed its connection.
        """
        async with events_for(http, job) as events:
            async for event in events:
                if isinstance(event, Failed):
                    raise self.failure(job, event, fields)
                if isinstance(event, Done):
                    return event.drawing
        raise AssertionError("a job ends with Done or Failed")


@asynccontextmanager
async def events_for(http: Request, job: Job) -> AsyncIterator[AsyncIterator[Event]]:
    """Yield a job's events for a client; leaving the block stops the job.

    Reading them raises ClientGoneError once the client has closed its connection.
    """
    gone = asyncio.ensure_future(_gone(http))
    try:
        async with aclosing(job.events()) as events:  # type: ignore[type-var]
            yield _until(gone, events)
    finally:
        gone.cancel()
        with suppress(asyncio.CancelledError):
            await gone


def may_begin(event: Event) -> bool:
    """Return whether a stream may begin with an event.

    While other requests come first it may; else with the first step, so that an error before it
    still gets a status of its own.
    """
    return not isinstance(event, Progress) or event.stage == "denoising"


async def _until(gone: asyncio.Future[None], events: AsyncIterator[Event]) -> AsyncIterator[Event]:
    while True:
        coming = asyncio.ensure_future(anext(events))
        either: set[asyncio.Future[Any]] = {coming, gone}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not coming.done():
                raise ClientGoneError
            event = coming.result()
        except StopAsyncIteration:
            return
        finally:
            if not coming.done():
                coming.cancel()
                with suppress(asyncio.CancelledError):
                    await coming
        yield event


async def _gone(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _decoded(content: bytes, what: str, max_pixels: int) -> Image:
    image = decode_image(content, what, max_pixels)
    open_image(image, what)  # for its errors
    return image


def _fitted(size: tuple[int, int], max_pixels: int) -> tuple[int, int]:
    """Return whole tokens of about a size's shape, within the pixels of an image and of a side."""
    width, height = size
    scale = min(1.0, math.sqrt(max_pixels / (width * height)), MAX_PIXELS / max(size))

    def whole(pixels: int) -> int:
        return max(1, int(pixels * scale) // PIXELS_PER_TOKEN) * PIXELS_PER_TOKEN

    return whole(width), whole(height)
