"""A thousand requests of all kinds: the memory of the process stays."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

from helpers.serving import Serve, StubEngine, image_file

STATUS = Path("/proc/self/statm")
MIB = 1 << 20
IMAGE_BYTES = 256 * 256 * 3


def resident() -> int:
    gc.collect()
    return int(STATUS.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not STATUS.exists(), reason="the system does not show a process's memory")
def test_memory_stays_over_a_thousand_requests(serve: Serve, engine: StubEngine) -> None:
    client = serve()
    sent = image_file((256, 256))
    fields = {"prompt": "a", "size": "256x256", "steps": 2, "output_format": "jpeg"}

    def round_of_requests() -> None:
        for path, options, status in (
            ("/v1/images/generations", {"json": fields}, 200),
            ("/v1/images/generations", {"json": {**fields, "stream": True}}, 200),
            ("/v1/images/edits", {"data": fields, "files": {"image": ("a.png", sent)}}, 200),
            ("/v1/images/generations", {"json": {**fields, "n": 99}}, 400),
        ):
            assert client.post(path, **options).status_code == status
        engine.failure = MemoryError()
        assert client.post("/v1/images/generations", json=fields).status_code == 500
        engine.failure = None
        engine.drawn.clear()

    for _ in range(40):
        round_of_requests()
    before = resident()
    for _ in range(200):
        round_of_requests()
    assert resident() - before < 16 * MIB < 200 * IMAGE_BYTES
