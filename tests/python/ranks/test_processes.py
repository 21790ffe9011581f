"""A transformer whose ranks are processes on the CPU, through gloo.

The ranks of NCCL and GPUs run the same code: gpu/test_ranks_cuda.py.
"""

from __future__ import annotations

import copy
import gc
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import zimage_mxfp8 as zm
from helpers.adapter_files import modules_of, write_pairs
from helpers.control_reference import (
    control_images,
    file_tensors,
    make_controlnet,
    write_controlnet,
)
from helpers.diffusers_reference import (
    load_reference,
    make_reference,
    random_inputs,
    relative_error,
)
from helpers.model_folder import make_folder
from helpers.ranks import pids
from zimage_mxfp8.transformer.ranks.other_ranks import OtherRanks

pytestmark = pytest.mark.slow

HEADS = 3
LAYERS = 4
BATCHES = {
    "one image": ([(16, 16)], [32]),
    "fewer tokens than a tile": ([(2, 2)], [1]),
    "guidance": ([(10, 14)] * 2, [5, 1]),
    "ragged items": ([(16, 16), (4, 30), (2, 2)], [33, 1, 64]),
    "more items than ranks": ([(8, 8)] * 4, [3, 4, 5, 6]),
}
FLOAT32 = 1e-5  # rounding of sums in different order


def make_model():
    return make_reference(dim=HEADS * 128, layers=LAYERS, refiners=2)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(folder / "transformer")
    zm.convert(folder / "transformer", folder / "quantized.safetensors")
    return folder / "quantized.safetensors"


def load(
    file: Path, ranks: int, compute: str = "weight-only", dtype: torch.dtype = torch.float32
) -> zm.ZImageTransformer:
    devices = ["cpu"] * ranks
    return zm.ZImageTransformer.from_checkpoint(file, compute=compute, dtype=dtype, devices=devices)


def is_running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def wait_until(condition) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen within 30 seconds")


@pytest.fixture(scope="module")
def reference(file: Path):
    zm.dequantize_checkpoint(file, file.parent / "plain.safetensors")
    model = make_model()
    load_reference(model, file.parent / "plain.safetensors")
    return model


@pytest.fixture(scope="module", params=[2, HEADS + 1])
def shared(file: Path, request: pytest.FixtureRequest) -> zm.ZImageTransformer:
    return load(file, request.param)


@pytest.mark.parametrize("batch", BATCHES)
def test_ranks_give_what_diffusers_gives(
    batch: str, shared: zm.ZImageTransformer, reference
) -> None:
    inputs = random_inputs(*BATCHES[batch])
    want = reference(*inputs, return_dict=False)[0]
    for _ in range(2):
        assert relative_error(shared(*inputs).sample, want) < FLOAT32


@pytest.mark.parametrize("compute", ["weight-only", "int8"])
def test_ranks_in_float16(compute: str, file: Path) -> None:
    """One of them has no tokens of the image."""
    inputs = random_inputs([(4, 6)], [33])
    want = load(file, 1, compute)(*inputs).sample
    found = load(file, 2, compute, torch.float16)(*inputs).sample
    assert {sample.dtype for sample in found} == {torch.float16}
    assert relative_error(found, want) < (3e-3 if compute == "weight-only" else 0.03)


def test_adapters_count_on_all_ranks(shared: zm.ZImageTransformer, file: Path) -> None:
    alone = load(file, 1)
    inputs = random_inputs([(10, 14)], [5])
    modules = modules_of(make_model(), "to_q")
    written = write_pairs(modules, lambda name: name, ".lora_A.weight", ".lora_B.weight")
    save_file(written.tensors, file.parent / "lora.safetensors")
    plain = shared(*inputs).sample

    def same(**others) -> list[torch.Tensor]:
        found = shared(*inputs, **others).sample
        assert relative_error(found, alone(*inputs, **others).sample) < FLOAT32
        return found

    for model in (alone, shared):
        model.load_lora(file.parent / "lora.safetensors", "a", 3.0)
        model.load_lora(written.tensors, "b", {"layers.0.": 2.0})
    assert relative_error(same(), plain) > 1e-3
    assert relative_error(same(joint_attention_kwargs={"scale": 2.0}), plain) > 1e-3
    for model in (alone, shared):
        model.set_lora({"b": -4.0})
    assert relative_error(same(), plain) > 1e-3
    for model in (alone, shared):
        model.unload_lora("b")
        model.disable_lora()
    assert relative_error(same(), plain) < FLOAT32
    with pytest.raises(zm.CheckpointError):
        shared.load_lora({"nothing": torch.zeros(2)}, "c")
    shared.enable_lora()
    shared.unload_lora()
    assert relative_error(shared(*inputs).sample, plain) < FLOAT32


@pytest.mark.parametrize("kind", ["1.0", "2.1"])
def test_controlnets_run_on_all_ranks(
    kind, shared: zm.ZImageTransformer, file: Path, tmp_path: Path
) -> None:
    model = make_controlnet(kind, (0, 2), dim=HEADS * 128)
    path = write_controlnet(tmp_path / "net.safetensors", file_tensors(kind, model))
    net = zm.ZImageControlNet.from_checkpoint(path, "cpu", dtype=torch.float32)
    sizes = [(8, 12), (4, 6)]
    inputs = random_inputs(sizes, [5, 40])
    images = control_images(sizes, net.config.control_in_dim)
    alone = load(file, 1)
    for strength in (0.75, -0.5):
        control = net.control(images, strength)
        want = alone(*inputs, controlnet_block_samples=control).sample
        found = shared(*inputs, controlnet_block_samples=control).sample
        assert relative_error(found, want) < FLOAT32
        assert relative_error(found, alone(*inputs).sample) > 1e-3


def test_a_model_on_several_devices_stays_there(shared: zm.ZImageTransformer) -> None:
    assert shared.to("cpu") is shared
    with pytest.raises(zm.UnsupportedError, match="stays where it is and in its dtype"):
        shared.to(torch.bfloat16)
    with pytest.raises(zm.UnsupportedError, match="cannot be copied or pickled"):
        copy.deepcopy(shared)
    assert f"{shared._ranks.size} devices from cpu" in repr(shared)


def test_processes_end_with_the_model(file: Path) -> None:
    model = load(file, 2)
    (pid,) = pids(model)
    assert is_running(pid)
    del model
    gc.collect()
    wait_until(lambda: not is_running(pid))


def test_a_rank_that_is_killed_ends_the_call(file: Path) -> None:
    model = load(file, 3)
    processes = pids(model)
    inputs = random_inputs([(16, 16)], [32])
    model(*inputs)
    os.kill(processes[0], signal.SIGSTOP)
    failure: list[Exception] = []

    def call() -> None:
        try:
            model(*inputs)
        except zm.RankError as error:
            failure.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    time.sleep(0.2)
    os.kill(processes[0], signal.SIGKILL)
    thread.join(30)
    sentence = "the transformer on 3 devices has stopped: rank 1 (cpu) was ended by signal 9"
    assert [str(error) for error in failure] == [f"{sentence}; load it again"]
    with pytest.raises(zm.RankError) as caught:
        model(*inputs)
    assert caught.value.problem == sentence
    wait_until(lambda: not any(map(is_running, processes)))


def test_ctrl_c_counts_while_a_rank_is_stopped(file: Path) -> None:
    model = load(file, 2)
    inputs = random_inputs([(16, 16)], [32])
    model(*inputs)
    (pid,) = pids(model)
    os.kill(pid, signal.SIGSTOP)
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        model(*inputs)
    timer.join()
    with pytest.raises(zm.RankError, match="load it again"):
        model(*inputs)
    wait_until(lambda: not is_running(pid))


def test_a_rank_that_is_killed_before_it_connects(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connected = OtherRanks._connected

    def kill_first(self: OtherRanks) -> object:
        os.kill(self._parts.processes[0].program.pid, signal.SIGKILL)
        return connected(self)

    monkeypatch.setattr(OtherRanks, "_connected", kill_first)
    with pytest.raises(zm.RankError, match=r"rank 1 \(cpu\) was ended by signal 9"):
        load(file, 2)


def test_a_model_that_lost_a_rank_can_be_freed(file: Path) -> None:
    model = load(file, 2)
    inputs = random_inputs([(4, 4)], [3])
    os.kill(pids(model)[0], signal.SIGKILL)
    for _ in range(2):
        with pytest.raises(zm.RankError):
            model(*inputs)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


def test_adapters_are_found_from_another_folder(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = modules_of(make_model(), "to_q")
    written = write_pairs(modules, lambda name: name, ".lora_A.weight", ".lora_B.weight")
    save_file(written.tensors, tmp_path / "lora.safetensors")
    model = load(file, 2)
    monkeypatch.chdir(tmp_path)
    assert model.load_lora("lora.safetensors", "a").name == "a"


def test_an_error_of_a_rank_is_told(file: Path) -> None:
    model = load(file, 2)
    assert model._other_ranks is not None
    change = model._other_ranks.change_adapters("unload", "nobody")
    with pytest.raises(zm.UsageError, match='"nobody" is no adapter that is loaded'), change:
        pass
    with pytest.raises(zm.RankError, match=r"rank 1 \(cpu\) failed: .*nobody") as error:
        model(*random_inputs([(4, 4)], [3]))
    assert not error.value.was_killed


def test_an_error_of_rank_0_ends_the_others(file: Path) -> None:
    model = load(file, 2)
    (pid,) = pids(model)
    hook = model.layers[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(*random_inputs([(4, 4)], [3]))
    hook.remove()
    with pytest.raises(zm.RankError, match=r"rank 0 had an error \(ZeroDivisionError\)"):
        model(*random_inputs([(4, 4)], [3]))
    wait_until(lambda: not is_running(pid))


def test_a_checkpoint_that_a_rank_cannot_read(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    opened: Any = SimpleNamespace(path=str(tmp_path / "missing.safetensors"), state=lambda: ())
    others = OtherRanks(opened, [cpu, cpu], "weight-only", torch.float32, cuda_graphs=True)
    with pytest.raises(zm.CheckpointError, match=r"missing\.safetensors"):
        others.join()
    others.end()


def test_a_file_that_is_replaced_while_it_is_loaded(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = tmp_path / "model.safetensors", tmp_path / "other.safetensors"
    for each in (path, other):
        shutil.copyfile(file, each)
    start = OtherRanks.__init__

    def start_and_replace(self: OtherRanks, *arguments, **options) -> None:
        start(self, *arguments, **options)
        other.replace(path)

    monkeypatch.setattr(OtherRanks, "__init__", start_and_replace)
    with pytest.raises(zm.CheckpointError, match="was replaced while it was loaded; load it again"):
        load(path, 2)


def test_calls_inside_a_forward_are_refused(file: Path) -> None:
    shared = load(file, 2)
    inputs = random_inputs([(10, 14)], [5])
    shared.layers[0].register_forward_hook(lambda *_: shared(*inputs))
    with pytest.raises(zm.UnsupportedError, match="within one of its own forwards"):
        shared(*inputs)
    with pytest.raises(zm.RankError, match="rank 0 had an error"):
        shared(*inputs)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_that_ends_leaves_the_ranks(file: Path) -> None:
    shared = load(file, 2)
    program = os.fork()
    if program == 0:
        shared._other_ranks._end()  # as at the end of a program
        os._exit(0)
    os.waitpid(program, 0)
    assert shared._other_ranks._parts.directory.exists()
    inputs = random_inputs([(10, 14)], [5])
    assert len(shared(*inputs).sample) == 1


def test_processes_end_when_rank_0_is_killed(file: Path) -> None:
    script = f"""
        import sys, time, torch, zimage_mxfp8 as zm
        model = zm.ZImageTransformer.from_checkpoint(
            {str(file)!r}, compute="weight-only", devices=["cpu"] * 2
        )
        print(model._other_ranks._parts.processes[0].program.pid, flush=True)
        time.sleep(600)
    """
    # Not guarded by `if __name__ == "__main__"`: the ranks must not run it.
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_running(pid)
        parent.kill()
    wait_until(lambda: not is_running(pid))


def test_images_and_a_new_start_after_a_loss(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    alone = zm.ZImageGenerator(folder, device="cpu", dtype="float32")
    shared = zm.ZImageGenerator(folder, dtype="float32", devices=["cpu"] * 2)
    settings = zm.GenerationSettings(
        "a fox", height=64, width=96, steps=3, seed=1, guidance=3.0, negative_prompt="a hound"
    )
    want = np.asarray(alone.generate(settings).images[0]).astype(int)

    def check() -> None:
        found = np.asarray(shared.generate(settings).images[0]).astype(int)
        assert np.abs(found - want).max() <= 1  # a rounding of a pixel

    check()
    for pid in pids(shared._kept["transformer"]):
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(zm.RankError, match="was ended by signal 9") as error:
        shared.generate(settings)
    assert error.value.was_killed
    check()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"devices": "cpu"}, "devices must be a list of devices, not 'cpu'"),
        ({"devices": []}, "devices must be a list of devices, not []"),
        ({"device": "cpu", "devices": ["cpu"]}, "devices contradicts device; give one of them"),
    ],
    ids=str,
)
def test_devices_that_cannot_be(file: Path, arguments, sentence: str) -> None:
    with pytest.raises(zm.UsageError) as caught:
        zm.ZImageTransformer.from_checkpoint(file, **arguments)
    assert str(caught.value).startswith(sentence)
