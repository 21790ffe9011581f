"""A server of one process: the app in uvicorn, from the first request to the last."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from fastapi import FastAPI

from .app import create_app
from .connections import connections
from .engine import Engine
from .options import ServerOptions
from .request_log import LogWriter, log_into

_MAX_CONNECTIONS = 128  # more are answered with 503
_SECONDS_BETWEEN_LOOKS = 0.1
_SECONDS_TO_ANSWER = 1.0  # to clients whose drawing was stopped
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Of what serves and parses requests, and for Pillow's warnings about images.
_LOGGERS = ("uvicorn", "python_multipart", "py.warnings")


def run_server(
    engine: Engine,
    options: ServerOptions,
    listener: socket.socket,
    log: LogWriter,
    on_ready: Callable[[], object],
) -> None:
    """Serve until SIGTERM or SIGINT.

    The first signal finishes what is drawn and refuses everything else; the second one stops that,
    too, after its step, or what is left of responses; the third one ends the process, with 128 and
    the signal's number.

    Args:
        engine: draws.
        options: limits and secrets.
        listener: bound to the address of the server.
        log: gets a line per request.
        on_ready: called when the engine is warm.

    Raises:
        Exception: of the engine, if it cannot be warmed up or its device is broken.
    """
    broken: list[Exception] = []
    app = create_app(engine, options, log, broken.append)
    for name in _LOGGERS:
        log_into(log, name)
    logging.captureWarnings(True)
    server = _Server(config_of(app, options), log, lambda: bool(broken), on_ready)
    try:
        asyncio.run(server.serve([listener]))
    finally:  # an engine that still draws would end the interpreter with an abort
        app.state.queue.stop(now=True)
        app.state.queue.join()
        logging.captureWarnings(False)
    if broken:
        raise broken[0]


def config_of(app: FastAPI, options: ServerOptions) -> uvicorn.Config:
    """Return uvicorn's options for the app."""
    return uvicorn.Config(
        app,
        access_log=False,
        http=connections(options.transfer_timeout),
        lifespan="on",
        limit_concurrency=_MAX_CONNECTIONS,
        log_config=None,
        log_level="warning",
        loop="asyncio",
        server_header=False,
        timeout_graceful_shutdown=round(options.transfer_timeout),
        ws="none",
    )


class _Server(uvicorn.Server):
    """Uvicorn, which ends only when the drawing has."""

    def __init__(
        self,
        config: uvicorn.Config,
        log: LogWriter,
        is_broken: Callable[[], bool],
        on_ready: Callable[[], object],
    ) -> None:
        super().__init__(config)
        self._queue = config.app.state.queue  # type: ignore[union-attr]
        self._log = log
        self._is_broken = is_broken
        self._on_ready = on_ready
        self._signals = self._seen = 0
        self._was_ready = False

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Count signals instead of ending by them."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._count) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def on_tick(self, counter: int) -> bool:
        """Look after the queue; uvicorn calls this ten times a second. Return whether to end."""
        if self._queue.is_ready and not self._was_ready:
            self._was_ready = True
            self._on_ready()
        if self._signals > self._seen:
            self._seen = self._signals
            if not self._queue.running:
                detail = "now"
            elif self._signals == 1:
                detail = "until what is drawn is finished; a second signal stops it"
            else:
                detail = "after this step; a third signal ends the process"
            self._queue.stop(now=self._signals > 1)
            self._log.write({"event": "stopping", "detail": detail})
        if self._is_broken() or (self._signals and not self._queue.running):
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for what is left of responses, and after a second signal no longer."""
        aborting = asyncio.ensure_future(self._abort_connections())
        try:
            await super().shutdown(sockets)
        finally:
            aborting.cancel()

    async def _abort_connections(self) -> None:
        while self._signals < 2:
            await asyncio.sleep(_SECONDS_BETWEEN_LOOKS)
        await asyncio.sleep(_SECONDS_TO_ANSWER)
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    def _count(self, number: int, _frame: FrameType | None) -> None:
        self._signals += 1
        if self._signals == 3:
            # In a thread: this one may hold the lock of the log.
            threading.Thread(target=self._end_process, args=(number,), daemon=True).start()

    def _end_process(self, number: int) -> None:
        self._log.close()
        os._exit(128 + number)
