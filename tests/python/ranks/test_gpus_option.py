"""`--gpus N` of the commands: how many devices share an image, and which."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch

import zimage_mxfp8 as zm
from helpers.commands import Run
from helpers.images import SIZE, Generate, levels
from helpers.ranks import pids
from helpers.serving import decoded, serving
from zimage_mxfp8.generation import generator as generator_module
from zimage_mxfp8.generation.small_model import FOLDER, TRANSFORMER
from zimage_mxfp8.server.engine import DrawRequest
from zimage_mxfp8.server.model import ServedModel
from zimage_mxfp8.system import devices

CPU = torch.device("cpu")


def test_the_first_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert devices.first_gpus(2) == [torch.device("cuda:0"), torch.device("cuda:1")]
    with pytest.raises(zm.UnsupportedError, match="4 GPUs are asked for, and torch finds 3"):
        devices.first_gpus(4)


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The `devices` that generators are given. CPUs stand in for GPUs."""
    found: list[Any] = []

    class Watched(zm.ZImageGenerator):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            found.append(options["devices"])
            super().__init__(*arguments, **options)

    monkeypatch.setattr(generator_module, "ZImageGenerator", Watched)
    monkeypatch.setattr(devices, "first_gpus", lambda count: [CPU] * count)
    return found


@pytest.mark.slow
def test_generate(generate: Generate, given: list[Any], tmp_path: Path) -> None:
    images = []
    for options in (("--device", "cpu"), ("--device", "cuda", "--gpus", 2)):
        code, out, err = generate(
            *("--prompt", "a cat", "-o", "o.png", "--seed", 7, "--steps", 3, "--overwrite"),
            *(*SIZE, *options),
        )
        assert (code, err) == (0, "") and "compute weight-only on cpu" in out
        images.append(levels(tmp_path / "o.png"))
    assert given == [None, [CPU, CPU]]
    assert np.abs(images[0] - images[1]).max() <= 1  # a rounding of a pixel


@pytest.mark.slow
def test_the_model_of_a_server(given: list[Any]) -> None:
    request = DrawRequest(zm.GenerationSettings("a fox", steps=2, width=64, height=64, seed=1))
    images = []
    for device, gpus in (("cpu", 1), ("cuda", 2)):
        how = {"device": device, "dtype": "float32", "gpus": gpus}
        engine = ServedModel("small", 64, FOLDER, TRANSFORMER, **how).load()
        images.append(levels(engine.draw(request, lambda _: None).images[0]))
    assert given == [None, [CPU, CPU]]
    assert np.abs(images[0] - images[1]).max() <= 1


@pytest.mark.slow
def test_a_server_draws_on_after_the_loss_of_a_rank(given: list[Any]) -> None:
    how = {"device": "cuda", "dtype": "float32", "gpus": 2}
    engine = ServedModel("small", 64, FOLDER, TRANSFORMER, **how).load()
    with (
        serving(engine) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
    ):

        def draw() -> bytes:
            made = client.images.generate(prompt="a fox", extra_body={"seed": 1, "steps": 2})
            return decoded(made.data[0].b64_json).tobytes()

        want = draw()
        (rank,) = pids(engine._generator._kept["transformer"])
        os.kill(rank, signal.SIGKILL)
        with pytest.raises(openai.APIStatusError, match="is gone; try again later") as error:
            draw()
        assert (error.value.status_code, error.value.code) == (503, "engine_lost")
        assert error.value.response.headers["Retry-After"] == "5"
        assert draw() == want


@pytest.mark.parametrize("option", ["--gpus", "--gpus-per-replica"])
def test_serve(option: str, in_process: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[ServedModel] = []

    def load(model: ServedModel, _progress: object) -> None:
        loaded.append(model)
        raise zm.UnsupportedError("enough is known")

    monkeypatch.setattr(ServedModel, "load", load)
    for options, gpus in (((), 1), ((option, 2), 2)):
        assert in_process("serve", "--port", 0, *options).returncode == 1
        assert (loaded[-1].gpus, loaded[-1].device) == (gpus, None)
    assert len(loaded) == 2
