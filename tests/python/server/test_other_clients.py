"""The calls of Open WebUI and SillyTavern, in the order and with the fields of their sources.

Open WebUI at commit 02530d5, SillyTavern at 02903fd.
"""

from __future__ import annotations

import base64
from typing import Any

import pytest

from helpers.serving import Serve, StubEngine, decoded, image_file

KEY = "s3cret"
BASIC = {"Authorization": f"Basic {base64.b64encode(f'user:{KEY}'.encode()).decode()}"}
NO_BASIC = {"Authorization": "Basic "}  # what SillyTavern sends without a login


@pytest.mark.parametrize("key", [None, KEY])
def test_sillytavern(serve: Serve, engine: StubEngine, key: str | None) -> None:
    client = serve(api_key=key)
    headers = BASIC if key else NO_BASIC

    def get(path: str) -> Any:
        answer = client.get(f"/sdapi/v1/{path}", headers=headers)
        assert answer.status_code == 200, path
        return answer.json()

    options = get("options")
    assert "forge_preset" not in options
    assert [each["name"] for each in get("upscalers") + get("latent-upscale-modes")] == []
    assert [each["model_name"] for each in get("sd-vae")] == []
    assert client.get("/sdapi/v1/sd-modules", headers=headers).status_code == 404
    sampler = get("samplers")[0]["name"]
    scheduler = get("schedulers")[0]["name"]
    model = get("sd-models")[0]["title"]
    assert model == options["sd_model_checkpoint"]
    chosen = {"sd_model_checkpoint": model}
    assert client.post("/sdapi/v1/options", json=chosen, headers=headers).status_code == 200
    progress = get("progress")
    assert progress["progress"] == 0 and progress["state"]["job_count"] == 0
    answer = client.post(
        "/sdapi/v1/txt2img",
        json={
            "url": "http://localhost:8000",
            "auth": f"user:{KEY}",
            "prompt": "a fox",
            "negative_prompt": "lowres",
            "sampler_name": sampler,
            "scheduler": scheduler,
            "steps": 9,
            "cfg_scale": 1,
            "width": 96,
            "height": 64,
            "restore_faces": False,
            "enable_hr": False,
            "hr_upscaler": "None",
            "hr_scale": 2,
            "hr_additional_modules": [],
            "denoising_strength": 0.7,
            "hr_second_pass_steps": 0,
            "seed": -1,
            "override_settings": {"CLIP_stop_at_last_layers": 1, "sd_vae": "Automatic"},
            "override_settings_restore_afterwards": True,
            "clip_skip": 1,
            "save_images": True,
            "send_images": True,
            "do_not_save_grid": False,
            "do_not_save_samples": False,
        },
        headers=headers,
    )
    assert answer.status_code == 200, answer.text
    assert decoded(answer.json()["images"][0]).size == (96, 64)
    (request,) = engine.drawn
    settings = request.settings
    assert (settings.steps, settings.guidance, settings.negative_prompt) == (9, 0, None)
    assert client.post("/sdapi/v1/interrupt", headers=headers).status_code == 200


def test_open_webui_by_openai(serve: Serve, engine: StubEngine) -> None:
    client = serve(api_key=KEY)
    headers = {"Authorization": f"Bearer {KEY}"}
    answer = client.post(
        "/v1/images/generations",
        json={
            "model": "stub",
            "prompt": "a fox",
            "n": 1,
            "size": "64x64",
            "response_format": "b64_json",
            "num_inference_steps": 4,  # by its field for additional parameters
        },
        headers=headers,
    )
    (image,) = answer.json()["data"]
    assert image.get("url") is None
    assert decoded(image["b64_json"]).size == (64, 64)
    for name in ("image", "image[]"):  # the latter if its own client gave a list
        answer = client.post(
            "/v1/images/edits",
            data={"model": "stub", "prompt": "a fox", "n": "1", "response_format": "b64_json"},
            files={name: ("3f.png", image_file(), "image/png")},
            headers=headers,
        )
        assert decoded(answer.json()["data"][0]["b64_json"]).size == (64, 48)
    assert engine.drawn[0].settings.steps == 4


def test_open_webui_by_a1111(serve: Serve, engine: StubEngine) -> None:
    client = serve(api_key=KEY)
    models = client.get("/sdapi/v1/sd-models", headers=BASIC).json()
    assert [(each["title"], each["model_name"]) for each in models] == [("stub", "stub")]
    options = client.get("/sdapi/v1/options", headers=BASIC).json()
    options["sd_model_checkpoint"] = "other"
    assert client.post("/sdapi/v1/options", json=options, headers=BASIC).status_code == 200
    fields = {"prompt": "a fox", "batch_size": 2, "width": 64, "height": 64, "steps": 50}
    fields["negative_prompt"] = "lowres"
    answer = client.post("/sdapi/v1/txt2img", json=fields, headers=BASIC).json()
    assert [decoded(image).size for image in answer["images"]] == [(64, 64)] * 2
    assert isinstance(answer["info"], str)
    assert client.post("/sdapi/v1/txt2img", json={**fields, "cfg_scale": 4}, headers=BASIC).json()
    settings = [each.settings for each in engine.drawn]
    assert [each.steps for each in settings] == [50, 50]
    assert [each.negative_prompt for each in settings] == [None, "lowres"]
