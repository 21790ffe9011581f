"""For the tests of the server: an engine that draws squares, and servers around it."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import uvicorn
from PIL import Image
from starlette.testclient import TestClient

from zimage_mxfp8.server.app import create_app
from zimage_mxfp8.server.engine import Drawing, DrawRequest, Engine, Preview, Progress, Report
from zimage_mxfp8.server.options import ServerOptions
from zimage_mxfp8.server.request_log import LogWriter
from zimage_mxfp8.server.run import config_of

Serve = Callable[..., TestClient]


class Log(io.StringIO):
    """The log of a server."""

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.getvalue().splitlines()]


def wait_until(condition: Callable[[], object], seconds: float = 30, pause: float = 0.005) -> None:
    """Wait for something that other threads or processes do, and look for it after each pause."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(pause)


def image_file(size: tuple[int, int] = (64, 48), mode: str = "RGB", kind: str = "PNG") -> bytes:
    """A file of random pixels."""
    channels = len(Image.new(mode, (1, 1)).getbands())
    shape = (size[1], size[0], channels)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(), mode).save(buffer, kind)
    return buffer.getvalue()


def decoded(text: str) -> Image.Image:
    """The image of base64."""
    return Image.open(io.BytesIO(base64.b64decode(text, validate=True)))


def request_of(fields: dict[str, Any], path: str = "/v1/images/generations") -> bytes:
    """An HTTP request with a JSON body."""
    body = json.dumps(fields).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def events_of(text: str) -> list[dict[str, Any]]:
    """The events of a stream, which must have their types as names."""
    found = []
    for block in text.split("\n\n"):
        if block and not block.startswith(":"):
            name, data = block.split("\n")
            found.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {found[-1]['type']}"
    return found


@contextmanager
def serving(engine: Engine, log: Log | None = None, **options: Any) -> Iterator[str]:
    """A real server on a free port, in a thread; yields its address."""
    writer = LogWriter(log or Log())
    settings = ServerOptions(**options)
    app = create_app(engine, settings, writer)
    server = uvicorn.Server(config_of(app, settings))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
        thread.start()
        try:
            wait_until(lambda: server.started and app.state.queue.is_ready)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(30)
            writer.close()


def noisy(engine: StubEngine) -> Any:
    """The engine's `draw` with images that do not fit into a socket's buffers."""
    draw = engine.draw

    def drawn(request: Any, report: Any) -> Any:
        made = draw(request, report)
        size = made.images[0].size
        pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
        return replace(made, images=(Image.fromarray(pixels),) * len(made.images))

    return drawn


class StubEngine:
    """Paints every image in one colour, that of its seed.

    Attributes:
        places: requests that it draws at a time.
        drawn: the requests that were begun.
        steps: number of steps that were done.
        gate: steps wait for it; it is open at first.
        pause_at: the step before which the gate closes by itself.
        failure: is raised by the next drawings, after their first step.
        freed: how often memory was freed.
    """

    name = "stub"
    default_size = (64, 48)

    def __init__(self, places: int = 1) -> None:
        self.places = places
        self.drawn: list[DrawRequest] = []
        self.steps = 0
        self.gate = threading.Event()
        self.gate.set()
        self.pause_at: int | None = None
        self.failure: Exception | None = None
        self.freed = 0
        self.on_warm_up: Callable[[], object] = lambda: None

    def warm_up(self) -> None:
        self.on_warm_up()

    def draw(self, request: DrawRequest, report: Report) -> Drawing:
        self.drawn.append(request)
        settings = request.settings
        report(Progress("encoding", 0, 1))
        report(Progress("encoding", 1, 1))
        for step in range(1, settings.steps + 1):
            if step == self.pause_at:
                self.gate.clear()
            assert self.gate.wait(30)
            self.steps += 1
            report(Progress("denoising", step, settings.steps))
            if self.failure is not None:
                raise self.failure
            if 1 < step <= request.previews + 1:
                small = Image.new("RGB", (8, 8), "grey")
                report(Preview(step - 2, (small,) * settings.batch))
        seed = 5 if settings.seed is None else settings.seed
        settings = settings.resolved()
        images = [
            Image.new("RGB", (settings.width or 0, settings.height or 0), ((seed + i) % 256, 0, 0))
            for i in range(settings.batch)
        ]
        return Drawing(
            tuple(images), tuple(self._metadata(request, seed + i) for i in range(settings.batch))
        )

    def free_memory(self) -> None:
        self.freed += 1

    def device_memory(self) -> dict[str, int]:
        return {"allocated": 123}

    def _metadata(self, request: DrawRequest, seed: int) -> dict[str, Any]:
        settings = request.settings.resolved()
        return {
            "prompt": settings.prompt,
            "negative_prompt": settings.negative_prompt,
            "seed": seed,
            "steps": settings.steps,
            "width": settings.width,
            "height": settings.height,
            "guidance": settings.guidance,
            "init_image": None,
            "strength": settings.strength,
            "loras": [{"name": file.name, "weight": weight} for file, weight in settings.loras],
            "model": self.name,
            "transformer": "stub.safetensors",
            "compute": "weight-only",
            "dtype": "float32",
            "version": "0",
        }
