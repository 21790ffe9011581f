"""A transformer that several CUDA devices share, next to one device.

pytest -m gpu
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import zimage_mxfp8 as zm
from helpers.adapter_files import modules_of, write_pairs
from helpers.control_reference import (
    control_images,
    file_tensors,
    make_controlnet,
    write_controlnet,
)
from helpers.diffusers_reference import make_reference, random_inputs, relative_error
from helpers.images import SIZE, Generate, levels
from zimage_mxfp8.errors import DeviceWarning
from zimage_mxfp8.transformer.ranks.peer_memory import PeerMemory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device or none"),
]

HEADS = 5
MODES = ("weight-only", "fp8", "int8")
BATCHES = {
    "one image": ([(64, 64)], [40]),
    "guidance": ([(32, 48)] * 2, [50, 1]),
    "ragged items": ([(64, 32), (4, 30)], [33, 64]),
}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    # An odd number of blocks: a graph begins and ends with the same half of peers' memory.
    make_reference(dim=HEADS * 128, layers=3, refiners=2).save_pretrained(folder / "transformer")
    zm.convert(folder / "transformer", folder / "quantized.safetensors")
    return folder / "quantized.safetensors"


def load(file: Path, count: int, compute: str) -> zm.ZImageTransformer:
    devices = [f"cuda:{i}" for i in range(count)]
    return zm.ZImageTransformer.from_checkpoint(file, compute=compute, devices=devices)


def inputs_of(batch: str):
    images, times, captions = random_inputs(*BATCHES[batch])
    return [x.cuda() for x in images], times.cuda(), [x.cuda() for x in captions]


def tolerance(compute: str, batch: str, count: int = 2) -> float:
    """Return how far an output may be from that of one device, relative to it.

    Two devices that share two items compute what one computes for each alone. GEMMs of other
    numbers of rows sum in another order, and 8-bit activations magnify that in a small model.
    """
    if batch == "guidance" and count == 2:
        return 1e-3
    return 0.01 if compute == "weight-only" else 0.05


def item_by_item(model: zm.ZImageTransformer, x, t, captions, controls=None) -> list[torch.Tensor]:
    """Return the samples of items one after another, as devices compute that share the items."""
    samples = []
    for i in range(len(x)):
        others = {} if controls is None else {"controlnet_block_samples": controls[i]}
        samples += model([x[i]], t[i : i + 1], [captions[i]], **others).sample
    return samples


def assert_same_as_alone(
    shared: zm.ZImageTransformer, alone: zm.ZImageTransformer, compute: str, count: int
) -> None:
    for batch in BATCHES:
        inputs = inputs_of(batch)
        want = item_by_item(alone, *inputs)
        for _ in range(4):  # eager, captured, and replays of the graph
            found = shared(*inputs).sample
            assert relative_error(found, want) < tolerance(compute, batch, count)
        again = shared(*inputs).sample
        assert all(torch.equal(*pair) for pair in zip(found, again, strict=True))
        if batch == "guidance" and count == 2:  # an item on each device
            assert all(torch.equal(*pair) for pair in zip(found, want, strict=True))


@pytest.mark.parametrize("count", range(2, max(2, min(HEADS, torch.cuda.device_count())) + 1))
@pytest.mark.parametrize("compute", MODES)
def test_devices_give_what_one_gives(compute: str, count: int, file: Path) -> None:
    alone, shared = load(file, 1, compute), load(file, count, compute)
    assert shared._ranks is not None and shared._ranks.reaches_peers
    assert_same_as_alone(shared, alone, compute, count)


@pytest.mark.parametrize("compute", MODES)
def test_devices_that_do_not_reach_each_other(
    compute: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL gathers keys and values if rank 0 has no memory for peers."""

    def fail(*_: object) -> None:
        raise zm.CudaError("no memory of peers")

    alone = load(file, 1, compute)
    monkeypatch.setattr(PeerMemory, "_allocate", fail)
    with pytest.warns(DeviceWarning, match="NCCL sends keys and values"):
        shared = load(file, 2, compute)
    assert shared._ranks is not None and not shared._ranks.reaches_peers
    assert_same_as_alone(shared, alone, compute, 2)


@pytest.mark.parametrize("batch", ["guidance", "one image"])
@pytest.mark.parametrize("compute", MODES)
def test_adapters_and_controlnets(compute: str, batch: str, file: Path) -> None:
    alone, shared = load(file, 1, compute), load(file, 2, compute)
    inputs = inputs_of(batch)
    plain = item_by_item(alone, *inputs)
    modules = modules_of(make_reference(dim=HEADS * 128, layers=3, refiners=2), "to_q")
    adapter = write_pairs(modules, lambda name: name, ".lora_A.weight", ".lora_B.weight")
    model = make_controlnet("2.1", (0, 1, 2), dim=HEADS * 128)
    path = write_controlnet(file.parent / "net.safetensors", file_tensors("2.1", model))
    net = zm.ZImageControlNet.from_checkpoint(path, "cuda")
    images = control_images(BATCHES[batch][0], net.config.control_in_dim)
    images = [image.cuda() for image in images]
    control = net.control(images, 0.75)
    controls = [net.control([image], 0.75) for image in images]

    def assert_same(controlled: bool = False) -> None:
        want = item_by_item(alone, *inputs, controls if controlled else None)
        assert relative_error(want, plain) > 2 * tolerance(compute, batch)
        others = {"controlnet_block_samples": control} if controlled else {}
        for _ in range(3):  # eager, captured, and a replay of the graph
            found = shared(*inputs, **others).sample
            assert relative_error(found, want) < tolerance(compute, batch)

    for each in (alone, shared):
        each.load_lora(adapter.tensors, "a", 6.0)
    assert_same()
    for each in (alone, shared):
        each.set_lora({"a": -5.0})
    assert_same()
    assert_same(controlled=True)
    for each in (alone, shared):
        each.unload_lora("a")
    assert_same(controlled=True)


def test_generate(generate: Generate, tmp_path: Path) -> None:
    images = []
    for count in (1, 2):
        code, out, err = generate(
            *("--prompt", "a cat", "-o", "o.png", "--seed", 7, "--steps", 2, "--overwrite", *SIZE),
            *("--compute", "weight-only", "--dtype", "bfloat16"),
            *("--device", "cuda", "--gpus", count),
        )
        assert code == 0 and " on cuda:0\n" in out, err
        images.append(levels(tmp_path / "o.png"))
    difference = images[1] - images[0]
    assert np.sqrt(np.mean(difference**2)) < 0.05 * images[0].std()


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


PROGRAM = """
import sys
import torch
import zimage_mxfp8 as zm

model = zm.ZImageTransformer.from_checkpoint(sys.argv[1], devices=["cuda:0", "cuda:1"])
width = model.config.cap_feat_dim
x, caption = (torch.randn(*shape, device="cuda") for shape in ((16, 1, 32, 32), (40, width)))
for _ in range(3):  # eager, captured, and a replay of the graph
    model([x], torch.tensor([0.5], device="cuda"), [caption])
if sys.argv[2] != "alive":
    model._other_ranks._parts.processes[0].program.kill()
if sys.argv[2] == "killed, and noticed":
    model._other_ranks._watch.noticed.wait()
print("end of the program")
"""


@pytest.mark.parametrize("ranks", ["alive", "killed", "killed, and noticed"])
def test_the_program_ends(ranks: str, file: Path) -> None:
    """torch joins threads of groups there, and graphs may wait for ranks that have died."""
    command = [sys.executable, "-c", PROGRAM, str(file), ranks]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert (ended.returncode, ended.stdout) == (0, "end of the program\n"), ended.stderr
