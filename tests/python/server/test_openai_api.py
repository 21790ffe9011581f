"""OpenAI's images API in process, with an engine that paints squares."""

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

import zimage_mxfp8 as zm
from helpers.serving import Serve, StubEngine, decoded, events_of, image_file, wait_until
from zimage_mxfp8.server.openai_api import ImageBody

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"


def test_models(serve: Serve) -> None:
    client = serve()
    (model,) = client.get("/v1/models").json()["data"]
    assert model["id"] == "stub" and model["object"] == "model"
    assert client.get("/v1/models/stub").json() == model
    answer = client.get("/v1/models/other")
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"


def test_defaults(serve: Serve, engine: StubEngine) -> None:
    answer = serve().post(GENERATIONS, json={"prompt": "a fox", "unknown": [1]})
    assert answer.status_code == 200
    document = answer.json()
    (item,) = document["data"]
    image = decoded(item["b64_json"])
    assert (image.format, image.size) == ("PNG", (64, 48))
    assert json.loads(image.text["zimage-mxfp8"])["prompt"] == "a fox"
    assert document["created"] > 1.7e9
    assert (document["size"], document["output_format"]) == ("64x48", "png")
    (request,) = engine.drawn
    settings = request.settings
    assert (settings.steps, settings.guidance, settings.batch, settings.seed) == (8, 0, 1, None)
    assert request.previews == 0


def test_fields_of_null_or_nothing_are_not_given(serve: Serve, engine: StubEngine) -> None:
    names = set(ImageBody.model_fields) - {"prompt"}
    client = serve()
    body = {"prompt": "a", **dict.fromkeys(names)}
    assert client.post(GENERATIONS, json=body).status_code == 200
    for size in ("", "auto"):
        body = {"prompt": "a", "negative_prompt": "", "size": size, "lora": ""}
        assert client.post(GENERATIONS, json=body).status_code == 200
    plain = zm.GenerationSettings("a", width=64, height=48)
    assert [each.settings for each in engine.drawn] == [plain] * 3


def test_ten_images(serve: Serve, engine: StubEngine) -> None:
    client = serve()
    data = client.post(GENERATIONS, json={"prompt": "a", "n": 10, "seed": 3}).json()["data"]
    assert [decoded(item["b64_json"]).getpixel((0, 0))[0] for item in data] == list(range(3, 13))
    assert client.post(GENERATIONS, json={"prompt": "a", "n": 11}).status_code == 400
    assert len(engine.drawn) == 1


def test_other_methods(serve: Serve) -> None:
    for path in (GENERATIONS, EDITS):
        answer = serve().get(path)
        assert answer.status_code == 405 and answer.headers["Allow"] == "POST"
        assert answer.json()["error"]["code"] == "method_not_allowed"


def test_all_fields(serve: Serve, engine: StubEngine, tmp_path: Path) -> None:
    for name in ("ink.safetensors", "oil.safetensors", "notes.txt"):
        (tmp_path / name).touch()
    answer = serve(lora_dir=tmp_path).post(
        GENERATIONS,
        json={
            "prompt": "a",
            "model": "stub",
            "n": 3,
            "size": "96x32",
            "seed": 7,
            "steps": 4,
            "guidance_scale": 2.5,
            "negative_prompt": "b",
            "lora": ["ink", {"name": "oil.safetensors", "scale": 0.5}],
            "user": "someone",
            "quality": "high",
        },
    )
    assert answer.status_code == 200, answer.text
    assert [item["seed"] for item in answer.json()["data"]] == [7, 8, 9]
    reds = [decoded(x["b64_json"]).getpixel((0, 0)) for x in answer.json()["data"]]
    assert reds == [(7, 0, 0), (8, 0, 0), (9, 0, 0)]
    settings = engine.drawn[0].settings
    assert (settings.width, settings.height, settings.steps) == (96, 32, 4)
    assert (settings.guidance, settings.negative_prompt) == (2.5, "b")
    assert settings.loras == (
        (tmp_path / "ink.safetensors", 1.0),
        (tmp_path / "oil.safetensors", 0.5),
    )


@pytest.mark.parametrize("file_format", ["png", "webp", "jpeg"])
def test_formats(serve: Serve, file_format: str) -> None:
    fields = {"prompt": "a", "output_format": file_format, "seed": 200}
    client = serve()
    (item,) = client.post(GENERATIONS, json=fields).json()["data"]
    image = decoded(item["b64_json"])
    assert image.format == file_format.upper()
    assert abs(image.convert("RGB").getpixel((9, 9))[0] - 200) <= 3
    (item,) = client.post(GENERATIONS, json={**fields, "response_format": "url"}).json()["data"]
    head, _, data = item["url"].partition(",")
    assert head == f"data:image/{file_format};base64" and "b64_json" not in item
    assert decoded(data).format == file_format.upper()


def test_compression_makes_files_smaller(serve: Serve, engine: StubEngine) -> None:
    noise = Image.open(io.BytesIO(image_file()))
    draw = engine.draw
    engine.draw = lambda request, report: type(drawing := draw(request, report))(  # type: ignore[method-assign]
        (noise,), drawing.metadata
    )
    client = serve()
    sizes = []
    for quality in (100, 50, 0):
        fields = {"prompt": "a", "output_format": "jpeg", "output_compression": quality}
        (item,) = client.post(GENERATIONS, json=fields).json()["data"]
        sizes.append(len(item["b64_json"]))
    assert sizes[0] > sizes[1] > sizes[2]


@pytest.mark.parametrize(
    ("fields", "param", "sentence"),
    [
        ({}, "prompt", "prompt is missing"),
        ({"prompt": ""}, "prompt", "prompt must have at least 1 character"),
        ({"prompt": "x" * 32_001}, "prompt", "prompt must have at most 32,000 characters"),
        ({"prompt": "\ud800"}, "prompt", "must be valid Unicode"),
        ({"n": 0}, "n", "n must be 1 or more"),
        ({"n": 11}, "n", "n must be 10 or less"),
        ({"n": 1.5}, "n", "n must be a whole number"),
        ({"size": "big"}, "size", 'size must be "auto" or WIDTHxHEIGHT'),
        ({"size": "0x64"}, "size", "WIDTHxHEIGHT"),
        ({"size": "65x64"}, "size", "size must be a multiple of 16"),
        ({"size": "64x65"}, "size", "size must be a multiple of 16"),
        ({"size": "999999x64"}, "size", "multiple of 16 up to"),
        ({"size": "8192x8192"}, "size", "must have at most 4,194,304 pixels"),
        ({"steps": 0}, "num_inference_steps", "must be 1 to 1000, not 0"),
        ({"seed": -1}, "seed", "seed must be 0 or more"),
        ({"guidance_scale": 101}, "guidance_scale", "must be 0 to 100"),
        (
            {"negative_prompt": "b"},
            "negative_prompt",
            "has no effect without guidance; add guidance_scale or drop it",
        ),
        (
            {"strength": 0.5},
            "strength",
            "strength is for /v1/images/edits; send the image there, or drop it",
        ),
        ({"response_format": "file"}, "response_format", "must be 'url' or 'b64_json'"),
        ({"output_format": "svg"}, "output_format", "'png'"),
        ({"partial_images": 4}, "partial_images", "partial_images must be 3 or less"),
        ({"lora": "ink"}, "lora", 'there is no LoRA "ink"; there are none here'),
        ({"lora": "../../etc/passwd"}, "lora", "there is no LoRA"),
        ({"lora": {"name": "x", "scale": 1000}}, "lora", "lora: scale must be 100 or less"),
        ({"lora": 5}, "lora", "lora has a value of the wrong type"),
        ({"lora": [5]}, "lora", "lora has a value of the wrong type"),
        ({"lora": [{"name": 5}]}, "lora", "lora: name must be a string"),
        ({"lora": {"name": 5, "scale": 1000}}, "lora", "lora: name must be a string"),
        ({"lora": {"weight": "x"}}, "lora", "lora: name is missing"),
        ({"lora": [{"name": 5, "scale": "x"}]}, "lora", "lora: name must be a string"),
        ({"stream": "maybe"}, "stream", "stream must be true or false"),
        ({"lora": ["x"] * 17}, "lora", "lora must be at most 16 LoRAs, not 17"),
    ],
)
def test_refused_fields(
    serve: Serve, engine: StubEngine, fields: dict[str, Any], param: str, sentence: str
) -> None:
    given = fields if not fields or "prompt" in fields else {"prompt": "a", **fields}
    answer = serve().post(
        GENERATIONS, content=json.dumps(given), headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param and sentence in error["message"], error
    assert error["type"] == "invalid_request_error"
    assert not engine.drawn


@pytest.mark.parametrize(
    ("route", "needed"),
    [
        (GENERATIONS, "application/json"),
        (EDITS, "multipart/form-data"),
        ("/sdapi/v1/txt2img", "application/json"),
    ],
)
@pytest.mark.parametrize(
    ("given", "said"), [(None, "is not given"), ("Text/Plain; charset=utf-8", 'is "text/plain"')]
)
def test_the_type_of_the_body(
    serve: Serve, engine: StubEngine, route: str, needed: str, given: str | None, said: str
) -> None:
    headers = {} if given is None else {"Content-Type": given}
    answer = serve().post(route, content=b'{"prompt": "a fox"}', headers=headers)
    assert answer.status_code == 415
    document = answer.json()
    message = document["detail"] if "detail" in document else document["error"]["message"]
    assert message == (
        f"the type of the body {said}; send it with the header Content-Type: {needed}"
    )
    assert not engine.drawn


def test_types_that_are_built_on_json(serve: Serve) -> None:
    """The body's fault is told, not its type."""
    headers = {"Content-Type": "application/vnd.api+json"}
    answer = serve().post(GENERATIONS, content=b'{"prompt": 3}', headers=headers)
    assert answer.status_code == 400
    assert "prompt" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"prompt": ', "is not valid JSON at character 11 (Expecting value)"),
        (b"[1, 2]", "cannot be used"),
        (b'"a fox"', "cannot be used"),
        (b"", "is empty"),
    ],
)
@pytest.mark.parametrize("route", [GENERATIONS, "/sdapi/v1/txt2img"])
def test_a_body_that_is_no_object(serve: Serve, route: str, body: bytes, said: str) -> None:
    answer = serve().post(route, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    document = answer.json()
    message = document["detail"] if "detail" in document else document["error"]["message"]
    assert message == f"the body {said}; it must be a JSON object"


def test_a_lora_that_is_misspelt(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "watercolour.safetensors").touch()
    (tmp_path / "folder.safetensors").mkdir()
    client = serve(lora_dir=tmp_path)
    answer = client.post(GENERATIONS, json={"prompt": "a", "lora": "watercolor"})
    assert answer.status_code == 400
    assert "did you mean watercolour?" in answer.json()["error"]["message"]
    assert str(tmp_path) not in answer.text
    answer = client.post(GENERATIONS, json={"prompt": "a", "lora": "folder"})
    assert answer.json()["error"]["code"] == "lora_not_found"


def test_stream(serve: Serve, engine: StubEngine) -> None:
    answer = serve().post(
        GENERATIONS,
        json={"prompt": "a", "stream": True, "partial_images": 2, "n": 2, "seed": 1, "steps": 4},
    )
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert ": step 1 of 4\n\n" in answer.text and ": step 4 of 4\n\n" in answer.text
    events = events_of(answer.text)
    partial, completed = "image_generation.partial_image", "image_generation.completed"
    assert [event["type"] for event in events] == [partial] * 4 + [completed] * 2
    assert [event["partial_image_index"] for event in events[:4]] == [0, 0, 1, 1]
    assert [event["image_index"] for event in events] == [0, 1] * 3
    assert [event["seed"] for event in events[4:]] == [1, 2]
    assert decoded(events[0]["b64_json"]).size == (8, 8)
    assert decoded(events[5]["b64_json"]).getpixel((0, 0)) == (2, 0, 0)
    common = {"created_at", "size", "quality", "background", "output_format"}
    assert all(common <= event.keys() for event in events)
    assert "usage" in events[4]
    assert engine.drawn[0].previews == 2


def test_stream_without_previews(serve: Serve, engine: StubEngine) -> None:
    answer = serve().post(GENERATIONS, json={"prompt": "a", "stream": True})
    assert [event["type"] for event in events_of(answer.text)] == ["image_generation.completed"]
    assert engine.drawn[0].previews == 0


# ---- edits


def test_edit(serve: Serve, engine: StubEngine) -> None:
    sent = image_file((70, 50))
    answer = serve().post(EDITS, data={"prompt": "a"}, files={"image": ("a.png", sent)})
    assert answer.status_code == 200, answer.text
    settings = engine.drawn[0].settings
    assert isinstance(settings.init_image, Image.Image)
    assert settings.init_image.tobytes() == Image.open(io.BytesIO(sent)).tobytes()
    assert (settings.width, settings.height) == (64, 48)
    assert settings.mask_image is None and settings.strength is None


def test_edit_with_all_fields(serve: Serve, engine: StubEngine, tmp_path: Path) -> None:
    (tmp_path / "ink.safetensors").touch()
    fields = {
        "prompt": "a",
        "n": "2",
        "size": "32x32",
        "seed": "3",
        "steps": "5",
        "strength": "0.4",
        "lora": '[{"name": "ink", "scale": 0.7}]',
        "stream": "true",
        "partial_images": "1",
        "user": "x",
    }
    answer = serve(lora_dir=tmp_path).post(
        EDITS, data=fields, files={"image[]": ("a.jpg", image_file(kind="JPEG"))}
    )
    events = events_of(answer.text)
    assert [event["type"] for event in events] == ["image_edit.partial_image"] * 2 + [
        "image_edit.completed"
    ] * 2
    settings = engine.drawn[0].settings
    assert (settings.width, settings.height, settings.batch) == (32, 32, 2)
    assert (settings.seed, settings.steps, settings.strength) == (3, 5, 0.4)
    assert settings.loras == ((tmp_path / "ink.safetensors", 0.7),)


def test_a_mask_is_drawn_where_it_is_transparent(serve: Serve, engine: StubEngine) -> None:
    pixels = np.array(Image.open(io.BytesIO(image_file(mode="RGBA"))))
    pixels[..., 3] = 255
    pixels[:, 32:, 3] = 0
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    answer = serve().post(
        EDITS,
        data={"prompt": "a"},
        files={"image": ("a.png", image_file()), "mask": ("m.png", buffer.getvalue())},
    )
    assert answer.status_code == 200, answer.text
    mask = np.asarray(engine.drawn[0].settings.mask_image)
    assert (mask[:, :32] == 0).all() and (mask[:, 32:] == 255).all()


def test_a_large_image_is_drawn_smaller_in_its_shape(serve: Serve, engine: StubEngine) -> None:
    answer = serve(max_image_pixels=64 * 64).post(
        EDITS, data={"prompt": "a"}, files={"image": ("a.png", image_file((128, 64)))}
    )
    assert answer.status_code == 200
    settings = engine.drawn[0].settings
    assert (settings.width, settings.height) == (80, 32)


def test_a_long_image_is_drawn_as_long_as_images_may_be(serve: Serve, engine: StubEngine) -> None:
    sent = {"image": ("a.png", image_file((16_000, 2)))}
    answer = serve().post(EDITS, data={"prompt": "a"}, files=sent)
    assert answer.status_code == 200, answer.text
    settings = engine.drawn[0].settings
    assert (settings.width, settings.height) == (8192, 16)


@pytest.mark.parametrize(
    ("files", "param", "sentence"),
    [
        ({}, "image", "image must be a file of the form"),
        ({"image": b"no image"}, "image", "the image must be a PNG, JPEG, WebP, GIF or BMP file"),
        ({"image": image_file(kind="TIFF")}, "image", "the image must be a PNG, JPEG, WebP"),
        ({"image": image_file()[:500]}, "image", "the image cannot be read"),
        ({"image": b""}, "image", "the image is empty"),
        ({"image": image_file(), "image[]": image_file()}, "image", "must be one image"),
        ({"image": image_file((200, 200))}, "image", "200 x 200 pixels, more than 16,384"),
        ({"image": image_file(), "mask": image_file()}, "mask", "must have an alpha channel"),
        (
            {"image": image_file(), "mask": image_file((64, 64), "RGBA")},
            "mask",
            "mask has 64 x 64 pixels, and the image 64 x 48; give both the same size",
        ),
        ({"image": image_file(), "mask": b"GIF8"}, "mask", "the mask"),
    ],
)
def test_refused_files(
    serve: Serve, engine: StubEngine, files: dict[str, bytes], param: str, sentence: str
) -> None:
    client = serve(max_image_pixels=64 * 64)
    sent = {name: (f"{name}.png", content) for name, content in files.items()}
    answer = client.post(EDITS, data={"prompt": "a", "user": "x"}, files=sent or {"x": ("x", b"")})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param and sentence in error["message"], error
    assert not engine.drawn


# ---- refusals


def test_full_queue(serve: Serve, engine: StubEngine) -> None:
    client = serve(queue=0)
    engine.gate.clear()
    with ThreadPoolExecutor(1) as others:
        running = others.submit(client.post, GENERATIONS, json={"prompt": "a"})
        wait_until(lambda: engine.drawn)
        assert "\nzimage_running 1.0\n" in client.get("/metrics").text
        sent = {"image": ("a.png", image_file())}
        for answer in (
            client.post(GENERATIONS, json={"prompt": "a"}),
            client.post(GENERATIONS, json={"prompt": "a", "stream": True}),
            client.post(EDITS, data={"prompt": "a"}, files=sent),
        ):
            assert answer.status_code == 429
            assert int(answer.headers["retry-after"]) >= 1
            error = answer.json()["error"]
            assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
        engine.gate.set()
        assert running.result().status_code == 200


def test_deadline(serve: Serve, engine: StubEngine) -> None:
    client = serve(timeout=0.2)
    engine.gate.clear()
    answer = client.post(GENERATIONS, json={"prompt": "a"})
    assert answer.status_code == 504 and answer.json()["error"]["code"] == "timeout"
    assert "within 0.2 s" in answer.json()["error"]["message"]
    engine.gate.set()
    assert client.post(GENERATIONS, json={"prompt": "a", "steps": 1}).status_code == 200


def test_png_of_a_url_is_the_same_file(serve: Serve) -> None:
    client = serve()
    fields = {"prompt": "a", "seed": 1}
    (inline,) = client.post(GENERATIONS, json=fields).json()["data"]
    (linked,) = client.post(GENERATIONS, json={**fields, "response_format": "url"}).json()["data"]
    assert base64.b64decode(inline["b64_json"]) == base64.b64decode(linked["url"].split(",")[1])
