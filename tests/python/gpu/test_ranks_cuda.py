"""A transformer that several CUDA devices share, next to one device.

pytest -m gpu
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

import zimage_mxfp8 as zm
from helpers.diffusers_reference import make_reference, random_inputs, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device or none"),
]

HEADS = 5  # uneven for two and three devices
BATCHES = {
    "one image": ([(64, 64)], [40]),
    "guidance": ([(32, 48)] * 2, [50, 1]),
    "ragged items": ([(64, 32), (4, 30)], [33, 64]),
}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_reference(dim=HEADS * 128, layers=3).save_pretrained(folder / "transformer")
    zm.convert(folder / "transformer", folder / "quantized.safetensors")
    return folder / "quantized.safetensors"


def load(file: Path, count: int, compute: str) -> zm.ZImageTransformer:
    devices = [f"cuda:{i}" for i in range(count)]
    return zm.ZImageTransformer.from_checkpoint(file, compute=compute, devices=devices)


def inputs_of(batch: str):
    images, times, captions = random_inputs(*BATCHES[batch])
    return [x.cuda() for x in images], times.cuda(), [x.cuda() for x in captions]


@pytest.mark.parametrize("count", range(2, max(2, min(HEADS, torch.cuda.device_count())) + 1))
@pytest.mark.parametrize("compute", ["weight-only", "fp8"])
def test_devices_give_what_one_gives(compute: str, count: int, file: Path) -> None:
    alone, shared = load(file, 1, compute), load(file, count, compute)
    for batch in BATCHES:
        inputs = inputs_of(batch)
        want = alone(*inputs).sample
        for _ in range(4):  # eager, captured, and replays of the graph
            found = shared(*inputs).sample
            assert relative_error(found, want) < 0.01  # of roundings to bfloat16
        again = shared(*inputs).sample
        assert all(torch.equal(*pair) for pair in zip(found, again, strict=True))


def test_a_rank_that_is_killed_ends_the_call(file: Path) -> None:
    model = load(file, 2, "weight-only")
    inputs = inputs_of("one image")
    for _ in range(3):
        model(*inputs)
    assert model._other_ranks is not None
    os.kill(model._other_ranks._parts.processes[0].program.pid, signal.SIGKILL)
    with pytest.raises(zm.RankError, match=r"rank 1 \(cuda:1\) was ended by signal 9"):
        for _ in range(100):
            model(*inputs)
            torch.cuda.synchronize()
