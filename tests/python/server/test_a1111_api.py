"""AUTOMATIC1111's API in process: what Open WebUI and SillyTavern send and read."""

from __future__ import annotations

import base64
import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from helpers.serving import Serve, StubEngine, decoded, image_file, wait_until
from zimage_mxfp8.generation.images import open_image

TEXT, IMAGE = "/sdapi/v1/txt2img", "/sdapi/v1/img2img"


def text_of(content: bytes) -> str:
    return base64.b64encode(content).decode()


def test_text_to_image(serve: Serve, engine: StubEngine) -> None:
    answer = serve().post(
        TEXT,
        json={
            "prompt": "a fox",
            "negative_prompt": "b",
            "batch_size": 2,
            "n_iter": 1,
            "width": 96,
            "height": 32,
            "steps": 5,
            "cfg_scale": 3.5,
            "seed": 9,
            "sampler_name": "DPM++ 2M",
            "override_settings": {"sd_model_checkpoint": "other"},
            "save_images": True,
        },
    )
    assert answer.status_code == 200, answer.text
    document = answer.json()
    assert set(document) == {"images", "parameters", "info"}
    images = [decoded(text) for text in document["images"]]
    assert [image.size for image in images] == [(96, 32)] * 2
    assert [image.getpixel((0, 0)) for image in images] == [(9, 0, 0), (10, 0, 0)]
    info = json.loads(document["info"])
    assert info["seed"] == 9 and info["all_seeds"] == [9, 10]
    assert (info["width"], info["height"], info["steps"], info["cfg_scale"]) == (96, 32, 5, 3.5)
    assert info["infotexts"][1] == images[1].text["parameters"]
    assert "Seed: 10" in info["infotexts"][1] and "CFG scale: 3.5" in info["infotexts"][1]
    settings = engine.drawn[0].settings
    assert (settings.guidance, settings.negative_prompt) == (2.5, "b")


def test_a_cfg_scale_of_one_is_no_guidance(serve: Serve, engine: StubEngine) -> None:
    client = serve()
    for scale in (1, 0, None):
        fields = {"prompt": "a", "negative_prompt": "b", "cfg_scale": scale, "seed": -1}
        assert client.post(TEXT, json=fields).status_code == 200
    for request in engine.drawn:
        settings = request.settings
        assert (settings.guidance, settings.negative_prompt, settings.seed) == (0, None, None)
        assert (settings.width, settings.height, settings.steps) == (64, 48, 8)


def test_loras_in_the_prompt(serve: Serve, engine: StubEngine, tmp_path: Path) -> None:
    (tmp_path / "ink wash.safetensors").touch()
    client = serve(lora_dir=tmp_path)
    fields = {"prompt": "a fox <lora:ink wash:0.8> in snow <lora:ink wash>"}
    assert client.post(TEXT, json=fields).status_code == 200
    settings = engine.drawn[0].settings
    file = tmp_path / "ink wash.safetensors"
    assert settings.loras == ((file, 0.8), (file, 1.0))
    assert settings.prompt == "a fox  in snow"
    answer = client.post(TEXT, json={"prompt": "<lora:oil:1>"})
    assert answer.status_code == 400
    assert answer.json()["detail"] == 'there is no LoRA "oil"; there are ink wash'
    answer = client.post(TEXT, json={"prompt": "<lora:ink wash:.-.>"})
    assert 'the weight ".-."' in answer.json()["detail"]
    for weight in ("99999999999999999999", "-100.1", "1e7", "0,5", "nan", "te=0.5"):
        answer = client.post(TEXT, json={"prompt": f"<lora:ink wash:{weight}>"})
        assert answer.status_code == 400
        assert answer.json()["detail"] == (
            f'prompt has the LoRA "ink wash" with the weight "{weight}"; weights are numbers from '
            "-100 to 100"
        )
    assert len(engine.drawn) == 1
    assert client.post(TEXT, json={"prompt": "<lora:ink wash:-100>"}).status_code == 200


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,"])
def test_image_to_image(serve: Serve, engine: StubEngine, prefix: str) -> None:
    sent = image_file()
    answer = serve().post(
        IMAGE,
        json={"prompt": "a", "init_images": [prefix + text_of(sent)], "denoising_strength": 0.5},
    )
    assert answer.status_code == 200, answer.text
    assert "init_images" not in answer.json()["parameters"]
    settings = engine.drawn[0].settings
    assert settings.strength == 0.5
    assert settings.init_image.tobytes() == Image.open(io.BytesIO(sent)).tobytes()


@pytest.mark.parametrize(("invert", "kept"), [(0, 0), (1, 255)])
def test_masks(serve: Serve, engine: StubEngine, invert: int, kept: int) -> None:
    mask = Image.new("L", (128, 96))  # of another size: it is scaled, as there
    mask.paste(255, (64, 0, 128, 96))
    buffer = io.BytesIO()
    mask.save(buffer, "PNG")
    fields = {
        "init_images": [text_of(image_file())],
        "mask": text_of(buffer.getvalue()),
        "inpainting_mask_invert": invert,
    }
    assert serve().post(IMAGE, json=fields).status_code == 200
    settings = engine.drawn[0].settings
    found = np.asarray(settings.mask_image)
    assert settings.mask_image.size == (64, 48)
    assert (found[:, :30] == kept).all() and (found[:, 34:] == 255 - kept).all()
    assert settings.strength == 0.75


def test_loras_whose_names_are_not_text_are_left_out(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "ink.safetensors").touch()
    try:
        (tmp_path / "\udcff.safetensors").touch()
    except OSError:
        pytest.skip("the file system takes UTF-8 only")
    answer = serve(lora_dir=tmp_path).get("/sdapi/v1/loras")
    assert [each["name"] for each in answer.json()] == ["ink"]


def test_a_mask_of_16_bits_is_scaled(serve: Serve, engine: StubEngine) -> None:
    pixels = np.zeros((48, 64), np.uint16)
    pixels[:, 32:] = 0x7000  # darker than mid-grey
    pixels[:, 48:] = 0xFFFF
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    sent = text_of(buffer.getvalue())
    assert serve().post(IMAGE, json={"init_images": [sent], "mask": sent}).status_code == 200
    settings = engine.drawn[0].settings
    assert isinstance(settings.mask_image, Image.Image)
    assert np.asarray(settings.mask_image)[0, ::16].tolist() == [0, 0, 0x70, 0xFF]
    assert isinstance(settings.init_image, Image.Image)
    assert open_image(settings.init_image).getpixel((40, 0)) == (0x70,) * 3


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"init_images": ["%%%"]}, "init_images must be base64 of an image file"),
        ({"init_images": []}, "init_images must have at least 1 element"),
        ({"init_images": [text_of(b"x")]}, "the init image must be a PNG, JPEG, WebP, GIF"),
        ({"init_images": [text_of(image_file())], "steps": 0}, "steps must be 1 to 1000, not 0"),
        ({"init_images": [text_of(image_file())], "denoising_strength": 0}, "denoising_strength"),
        ({"init_images": [text_of(image_file())], "batch_size": 4, "n_iter": 4}, "batch_size"),
    ],
)
def test_refusals(serve: Serve, engine: StubEngine, fields: dict[str, Any], sentence: str) -> None:
    answer = serve().post(IMAGE, json={"prompt": "a", **fields})
    assert answer.status_code == 400
    assert sentence in answer.json()["detail"] and not engine.drawn


def test_base64_in_lines(serve: Serve, engine: StubEngine) -> None:
    image = base64.encodebytes(image_file()).decode()
    assert "\n" in image.strip()
    assert serve().post(IMAGE, json={"prompt": "a", "init_images": [image]}).status_code == 200


def test_the_largest_cfg_scale(serve: Serve) -> None:
    client = serve()
    assert client.post(TEXT, json={"prompt": "a", "cfg_scale": 101}).status_code == 200
    answer = client.post(TEXT, json={"prompt": "a", "cfg_scale": 102})
    assert answer.json()["detail"] == "cfg_scale must be at most 101, not 102"


def test_progress_and_interrupt(serve: Serve, engine: StubEngine) -> None:
    client = serve()
    idle = client.get("/sdapi/v1/progress").json()
    assert idle["progress"] == 0 and idle["state"]["job_count"] == 0
    assert client.post("/sdapi/v1/interrupt").status_code == 200
    engine.gate.clear()
    with ThreadPoolExecutor(2) as others:
        first = others.submit(client.post, TEXT, json={"prompt": "a", "steps": 20})
        wait_until(lambda: engine.drawn)
        second = others.submit(client.post, TEXT, json={"prompt": "b", "steps": 1})
        wait_until(lambda: client.get("/sdapi/v1/progress").json()["state"]["job_count"] == 2)
        engine.pause_at = 6
        engine.gate.set()
        wait_until(lambda: engine.steps == 5)
        state = client.get("/sdapi/v1/progress").json()
        assert state["progress"] == 0.25 and state["state"]["sampling_steps"] == 20
        client.post("/sdapi/v1/interrupt")
        engine.pause_at = None
        engine.gate.set()
        assert first.result().status_code == 409
        assert first.result().json()["error"] == "interrupted"
        assert second.result().status_code == 200
    assert engine.steps == 5 + 1 + 1  # the step that had begun, and the other request's


def test_an_interrupt_is_about_requests_of_its_own_address(
    serve: Serve, engine: StubEngine
) -> None:
    client = serve()
    other = TestClient(client.app, base_url="http://localhost", client=("192.0.2.1", 5000))
    engine.gate.clear()
    with ThreadPoolExecutor(2) as others:
        running = others.submit(client.post, TEXT, json={"prompt": "a", "steps": 2})
        wait_until(lambda: engine.drawn)
        assert other.post("/sdapi/v1/interrupt").status_code == 200
        waiting = others.submit(other.post, TEXT, json={"prompt": "b"})
        wait_until(lambda: client.get("/sdapi/v1/progress").json()["state"]["job_count"] == 2)
        assert other.post("/sdapi/v1/interrupt").status_code == 200
        assert waiting.result(30).status_code == 409
        engine.gate.set()
        assert running.result(30).status_code == 200
    assert len(engine.drawn) == 1


def test_an_interrupt_leaves_requests_of_the_other_api_alone(
    serve: Serve, engine: StubEngine
) -> None:
    client = serve()
    engine.gate.clear()
    with ThreadPoolExecutor(1) as others:
        running = others.submit(client.post, "/v1/images/generations", json={"prompt": "a"})
        wait_until(lambda: engine.drawn)
        client.post("/sdapi/v1/interrupt")
        engine.gate.set()
        assert running.result().status_code == 200


def test_lists(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "ink.safetensors").touch()
    client = serve(lora_dir=tmp_path)

    def get(name: str) -> Any:
        answer = client.get(f"/sdapi/v1/{name}")
        assert answer.status_code == 200
        return answer.json()

    (model,) = get("sd-models")
    assert model["title"] == model["model_name"] == "stub"
    assert get("options")["sd_model_checkpoint"] == "stub"
    assert client.post("/sdapi/v1/options", json={"sd_model_checkpoint": "x"}).status_code == 200
    assert [each["name"] for each in get("samplers")] == ["Euler"]
    assert [each["label"] for each in get("schedulers")] == ["Simple"]
    assert [each["name"] for each in get("loras")] == ["ink"]
    assert str(tmp_path) not in client.get("/sdapi/v1/loras").text
    for name in ("upscalers", "latent-upscale-modes", "sd-vae"):
        assert get(name) == []
    answer = client.get("/sdapi/v1/other")
    assert answer.status_code == 404 and answer.json()["detail"] == "Not Found"
