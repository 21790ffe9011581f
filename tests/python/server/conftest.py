from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from starlette.testclient import TestClient

from helpers.serving import Log, Serve, StubEngine, wait_until
from zimage_mxfp8.server.app import create_app
from zimage_mxfp8.server.engine import Engine
from zimage_mxfp8.server.options import ServerOptions
from zimage_mxfp8.server.request_log import LogWriter

# Threads of Ray Serve outlive the Ray that a test started. Their next call would start another one,
# unknown to the tests, and break the Ray of a later test. Ray reads this when it is imported.
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"


@pytest.fixture
def engine() -> Iterator[StubEngine]:
    stub = StubEngine()
    yield stub
    stub.gate.set()


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def serve(engine: StubEngine, log: Log) -> Iterator[Serve]:
    """Starts a server in this process with these options, and returns a client of it.

    It is ready, unless `wait=False`, and draws with the fixture `engine`, unless it gets another.
    """
    with ExitStack() as stack:

        def start(other: Engine | None = None, *, wait: bool = True, **options: Any) -> TestClient:
            writer = LogWriter(log)
            stack.callback(writer.close)
            app = create_app(other or engine, ServerOptions(**options), writer)
            client = TestClient(app, base_url="http://localhost")
            stack.enter_context(client)
            if wait:
                wait_until(lambda: app.state.queue.is_ready)
            return client

        yield start
        engine.gate.set()
