"""The server around the model that the package ships, on a CUDA device.

pytest -m gpu
"""

from __future__ import annotations

import base64
import urllib.request

import numpy as np
import pytest
import torch

import zimage_mxfp8 as zm
from zimage_mxfp8.generation.images import png_bytes
from zimage_mxfp8.generation.small_model import FOLDER, TRANSFORMER

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")

from helpers.serving import serving  # noqa: E402 - needs both
from zimage_mxfp8.server.engine import GeneratorEngine  # noqa: E402

pytestmark = pytest.mark.gpu

DEVICE = "cuda:0"
PROMPT = "a large red circle left of a small orange diamond on a plain yellow background"


def test_images_and_memory() -> None:
    generator = zm.ZImageGenerator(FOLDER, TRANSFORMER, DEVICE)
    engine = GeneratorEngine(generator, "small", (128, 128), DEVICE)
    with (
        serving(engine) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
    ):
        made = client.images.generate(prompt=PROMPT, extra_body={"seed": 7, "steps": 3})
        with urllib.request.urlopen(f"{address}/metrics") as answer:
            lines = answer.read().decode().splitlines()
    want = generator.generate(zm.GenerationSettings(PROMPT, steps=3, width=128, height=128, seed=7))
    assert base64.b64decode(made.data[0].b64_json) == png_bytes(want.images[0], want.metadata(0))
    assert np.asarray(want.images[0]).std() > 10
    values = {
        name: float(value)
        for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    }
    memory = [values[name] for name in values if name.startswith("zimage_device_memory_bytes")]
    assert len(memory) == 2 and min(memory) > 1e6


def test_the_next_request_after_one_without_memory_works() -> None:
    generator = zm.ZImageGenerator(FOLDER, TRANSFORMER, DEVICE)
    engine = GeneratorEngine(generator, "small", (128, 128), DEVICE)
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    with (
        serving(engine) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
    ):

        def draw(size: str = "auto") -> str:
            options = {"seed": 7, "steps": 3}
            return (
                client.images.generate(prompt=PROMPT, size=size, extra_body=options)
                .data[0]
                .b64_json
            )

        want = draw()
        allowed = torch.cuda.memory_reserved(DEVICE) + (16 << 20)  # a fraction of 2048x2048
        torch.cuda.set_per_process_memory_fraction(allowed / total, DEVICE)
        try:
            for _ in range(2):
                with pytest.raises(openai.InternalServerError) as error:
                    draw("2048x2048")
                assert error.value.code == "out_of_memory"
                assert draw() == want
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)
        assert len(draw("2048x2048")) > len(want)
