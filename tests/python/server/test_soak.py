"""A thousand requests of all kinds: the memory of the process stays."""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import zimage_mxfp8 as zm
from helpers.serving import Serve, StubEngine, image_file
from zimage_mxfp8.generation.small_model import FOLDER, TRANSFORMER
from zimage_mxfp8.server.engine import GeneratorEngine

pytestmark = pytest.mark.slow

STATUS = Path("/proc/self/statm")
MIB = 1 << 20
GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"


def resident() -> int:
    gc.collect()
    return int(STATUS.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def assert_memory_stays(round_of_requests: Callable[[], None], rounds: int, nbytes: int) -> None:
    """Check the memory that requests leave.

    Args:
        round_of_requests: sends one of each kind.
        rounds: their number, without the first ones.
        nbytes: what a round must not leave behind.
    """
    if not STATUS.exists():
        pytest.skip("the system does not show a process's memory")
    for _ in range(rounds // 8):
        round_of_requests()
    before = resident()
    for _ in range(rounds):
        round_of_requests()
    assert resident() - before < 16 * MIB < rounds * nbytes


def test_memory_stays_over_a_thousand_requests(serve: Serve, engine: StubEngine) -> None:
    client = serve()
    sent = image_file((256, 256))
    fields = {"prompt": "a", "size": "256x256", "steps": 2, "output_format": "jpeg"}

    def round_of_requests() -> None:
        for path, options, status in (
            (GENERATIONS, {"json": fields}, 200),
            (GENERATIONS, {"json": {**fields, "stream": True}}, 200),
            (EDITS, {"data": fields, "files": {"image": ("a.png", sent)}}, 200),
            (GENERATIONS, {"json": {**fields, "n": 99}}, 400),
        ):
            assert client.post(path, **options).status_code == status
        engine.failure = MemoryError()
        assert client.post(GENERATIONS, json=fields).status_code == 500
        engine.failure = None
        engine.drawn.clear()

    assert_memory_stays(round_of_requests, rounds=200, nbytes=256 * 256 * 3)


def save_adapters(folder: Path) -> list[str]:
    """Write more adapters than stay loaded; return their names."""
    names = [f"ink-{i}" for i in range(7)]
    for name in names:
        tensors = {}
        for layer in range(30):
            for part, shape in (("A", (4, 128)), ("B", (128, 4))):
                key = f"diffusion_model.layers.{layer}.attention.out.lora_{part}.weight"
                tensors[key] = 0.01 * torch.randn(*shape)
        save_file(tensors, folder / f"{name}.safetensors")
    return names


def test_memory_stays_over_a_thousand_images(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The small model, with an adapter in every third request."""
    generator = zm.ZImageGenerator(FOLDER, TRANSFORMER, "cpu", dtype="float32")
    adapters = itertools.cycle(save_adapters(tmp_path))
    sent = image_file((64, 64))
    fields = {"prompt": "a red circle", "size": "64x64", "steps": 1}

    def no_memory(*_: object) -> None:
        raise torch.OutOfMemoryError

    # A forward without memory tells how much is free of the device, which is the CPU here.
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 80 << 30))
    client = serve(GeneratorEngine(generator, "small", (64, 64), "cpu"), lora_dir=tmp_path)
    layer = generator._kept["transformer"].layers[-1]

    def round_of_requests() -> None:
        stream = {"stream": True, "partial_images": 1, "steps": 2}
        for path, options, status in (
            (GENERATIONS, {"json": fields}, 200),
            (GENERATIONS, {"json": {**fields, "lora": next(adapters)}}, 200),
            (GENERATIONS, {"json": {**fields, **stream}}, 200),
            (EDITS, {"data": fields, "files": {"image": ("a.png", sent)}}, 200),
            (GENERATIONS, {"json": {**fields, "n": 99}}, 400),
        ):
            assert client.post(path, **options).status_code == status
        hook = layer.register_forward_pre_hook(no_memory)
        asked = {**fields, "lora": next(adapters)}
        assert client.post(GENERATIONS, json=asked).status_code == 500
        hook.remove()

    adapter_nbytes = 30 * 2 * 4 * 128 * 4
    assert_memory_stays(round_of_requests, rounds=170, nbytes=adapter_nbytes)
