"""The server around the model that the package ships."""

from __future__ import annotations

import base64
import io
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openai
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import zimage_mxfp8 as zm
from helpers.serving import events_of, image_file, serving
from zimage_mxfp8.generation.images import png_bytes
from zimage_mxfp8.generation.small_model import FOLDER, TRANSFORMER
from zimage_mxfp8.server.engine import GeneratorEngine

PROMPT = "a large red circle left of a small orange diamond on a plain yellow background"


@pytest.fixture(scope="module")
def generator() -> zm.ZImageGenerator:
    return zm.ZImageGenerator(FOLDER, TRANSFORMER, "cpu", dtype="float32")


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an adapter, and with one of another model."""
    folder = tmp_path_factory.mktemp("loras")
    for file, width in (("ink", 128), ("other", 64)):
        a, b = (torch.randn(4, width), torch.randn(width, 4))
        keys = [f"diffusion_model.layers.{i}.attention.out.lora_{{}}.weight" for i in range(30)]
        tensors = {
            key.format(name): x for key in keys for name, x in (("A", a.clone()), ("B", b.clone()))
        }
        save_file(tensors, folder / f"{file}.safetensors")
    return folder


@pytest.fixture(scope="module")
def client(generator: zm.ZImageGenerator, loras: Path) -> Iterator[openai.OpenAI]:
    engine = GeneratorEngine(generator, "small", (128, 128), "cpu")
    with (
        serving(engine, lora_dir=loras) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def files_of(made: openai.types.ImagesResponse) -> list[bytes]:
    return [base64.b64decode(image.b64_json) for image in made.data]


def test_images_are_those_of_the_generator(
    client: openai.OpenAI, generator: zm.ZImageGenerator
) -> None:
    made = client.images.generate(prompt=PROMPT, n=2, extra_body={"seed": 7, "steps": 3})
    want = generator.generate(
        zm.GenerationSettings(PROMPT, steps=3, width=128, height=128, seed=7, batch=2)
    )
    assert files_of(made) == [png_bytes(want.images[i], want.metadata(i)) for i in range(2)]
    assert np.asarray(want.images[0]).std() > 10


def test_edits_are_those_of_the_generator(
    client: openai.OpenAI, generator: zm.ZImageGenerator
) -> None:
    image = Image.open(io.BytesIO(image_file((64, 64))))
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    transparent = image.copy()
    transparent.putalpha(Image.eval(mask, lambda level: 255 - level))
    sent = {}
    for name, each in (("image", image), ("mask", transparent)):
        buffer = io.BytesIO()
        each.save(buffer, "PNG")
        sent[name] = (f"{name}.png", buffer.getvalue())
    made = client.images.edit(prompt=PROMPT, **sent, extra_body={"seed": 7, "steps": 3})  # type: ignore[call-overload]
    want = generator.generate(
        zm.GenerationSettings(PROMPT, steps=3, seed=7, init_image=image, mask_image=mask)
    )
    assert files_of(made) == [png_bytes(want.images[0], want.metadata(0))]


def test_loras_are_those_of_the_generator(
    client: openai.OpenAI, generator: zm.ZImageGenerator, loras: Path
) -> None:
    fields = {"seed": 7, "steps": 2}
    lora = {"name": "ink", "scale": 0.05}
    with_it, without = (
        files_of(client.images.generate(prompt=PROMPT, extra_body={**fields, **more}))
        for more in ({"lora": lora}, {})
    )
    for files, used in ((with_it, ((loras / "ink.safetensors", 0.05),)), (without, ())):
        want = generator.generate(
            zm.GenerationSettings(PROMPT, steps=2, width=128, height=128, seed=7, loras=used)
        )
        assert files == [png_bytes(want.images[0], want.metadata(0))]
    images = [np.asarray(Image.open(io.BytesIO(files[0])), int) for files in (with_it, without)]
    assert abs(images[0] - images[1]).max() > 10
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(prompt=PROMPT, extra_body={**fields, "lora": "other"})
    assert (refused.value.param, refused.value.code) == ("lora", "invalid_lora")
    assert "other.safetensors" in str(refused.value) and str(loras) not in str(refused.value)


def test_stream_shows_what_comes(client: openai.OpenAI) -> None:
    events = list(
        client.images.generate(
            prompt=PROMPT, stream=True, partial_images=3, extra_body={"seed": 7, "steps": 8}
        )
    )
    *partial, completed = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(e.b64_json))).resize((32, 32)), float)
        for e in events
    ]
    errors = [np.abs(each - completed).mean() for each in partial]
    assert len(errors) == 3 and errors == sorted(errors, reverse=True) and errors[-1] > 0


def test_progress_names_the_stages(client: openai.OpenAI) -> None:
    fields = {"prompt": PROMPT, "stream": True, "steps": 2}
    text = client.post("/images/generations", body=fields, cast_to=str)
    assert [line for line in text.split("\n\n") if line.startswith(":")] == [
        ": step 1 of 2",
        ": step 2 of 2",
        ": decoding 0 of 1",
        ": decoding 1 of 1",
    ]
    assert len(events_of(text)) == 1


def test_the_server_draws_on_after_an_image_that_is_nan(
    client: openai.OpenAI, generator: zm.ZImageGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = generator._kept["VAE"]
    with monkeypatch.context() as patch:
        decode = vae.decode
        patch.setattr(vae, "decode", lambda latents: decode(latents) * float("nan"))
        with pytest.raises(
            openai.InternalServerError, match="the VAE turned finite latents"
        ) as bad:
            client.images.generate(prompt=PROMPT, extra_body={"steps": 1})
        assert bad.value.code == "not_finite" and str(FOLDER) not in str(bad.value)
    assert client.images.generate(prompt=PROMPT, extra_body={"steps": 1}).data


def test_the_server_draws_on_after_a_forward_without_memory(
    client: openai.OpenAI, generator: zm.ZImageGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[torch.Tensor]] = []
    freed: list[bool] = []

    def no_memory(*_: object) -> None:
        activations = torch.zeros(1)
        held.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB.")

    free_memory = GeneratorEngine.free_memory

    def free(engine: GeneratorEngine) -> None:
        free_memory(engine)
        freed.append(held[0]() is None)

    monkeypatch.setattr(GeneratorEngine, "free_memory", free)
    # The forward tells how much is free of the device, which is the CPU here.
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 80 << 30))
    hook = generator._kept["transformer"].layers[-1].register_forward_pre_hook(no_memory)
    try:
        with pytest.raises(openai.InternalServerError, match="too little memory") as bad:
            client.images.generate(prompt=PROMPT, extra_body={"seed": 7, "steps": 2})
    finally:
        hook.remove()
    assert (bad.value.status_code, bad.value.code) == (500, "out_of_memory")
    assert freed == [True]
    made = client.images.generate(prompt=PROMPT, extra_body={"seed": 7, "steps": 2})
    want = generator.generate(zm.GenerationSettings(PROMPT, steps=2, width=128, height=128, seed=7))
    assert files_of(made) == [png_bytes(want.images[0], want.metadata(0))]


def test_a_device_that_is_broken_is_told(
    generator: zm.ZImageGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with ...")

    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    engine = GeneratorEngine(generator, "small", (64, 64), "cuda:0")
    words = (
        "cuda:0 cannot be used any more: CUDA error: an illegal memory access was encountered; s"
    )
    with pytest.raises(zm.CudaError, match=words):
        engine.free_memory()
