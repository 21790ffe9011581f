"""Hostile requests and failing drawings: an answer for that client, and the server goes on."""

from __future__ import annotations

import base64
import gc
import io
import json
import os
import socket
import threading
import time
import urllib.error
import urllib.request
import weakref
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import zimage_mxfp8 as zm
from helpers.serving import Log, Serve, StubEngine, image_file, serving, wait_until
from zimage_mxfp8.generation.images import decode_image
from zimage_mxfp8.server import middleware, service
from zimage_mxfp8.server.request_errors import RequestError

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
TEXT, IMAGE = "/sdapi/v1/txt2img", "/sdapi/v1/img2img"
JSON = {"Content-Type": "application/json"}


def png_of_size(width: int, height: int) -> bytes:
    """A small file whose header promises many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data).to_bytes(4, "big")
        return len(data).to_bytes(4, "big") + kind + data + checksum

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


HOSTILE = {
    "no JSON": b"{",
    "no object": b"[]",
    "no text": b"\xff\xfe",
    "deep JSON": b"[" * 90_000,
    "deep object": b'{"prompt":' * 50_000,
    "NaN": b'{"prompt": "a", "guidance_scale": NaN}',
    "infinity": b'{"prompt": "a", "strength": 1e999}',
    "long number": b'{"prompt": "a", "seed": ' + b"9" * 10_000 + b"}",
    "100 megapixels": b'{"prompt": "a", "size": "10000x10000"}',
    "long size": b'{"prompt": "a", "size": "' + b"1" * 100_000 + b'"}',
    "long prompt": json.dumps({"prompt": "x" * (1 << 20)}).encode(),
    "prompt of another type": b'{"prompt": {"a": [1]}}',
    "surrogate": rb'{"prompt": "\ud800"}',
    "many LoRAs": json.dumps({"prompt": "a", "lora": ["x"] * 10_000}).encode(),
    "many LoRAs of another type": json.dumps({"prompt": "a", "lora": [1] * 90_000}).encode(),
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
def test_hostile_bodies(serve: Serve, engine: StubEngine, body: bytes) -> None:
    client = serve()
    answer = client.post(GENERATIONS, content=body, headers=JSON)
    assert answer.status_code == 400, answer.text[:300]
    assert len(answer.text) < 1000 and answer.json()["error"]["message"]
    assert "Traceback" not in answer.text and "/python" not in answer.text
    answer = client.post(TEXT, content=body, headers=JSON)
    # There sizes are two fields and the others are unknown, so that some bodies are harmless.
    assert answer.status_code in (200, 400)
    assert client.post(GENERATIONS, json={"prompt": "a"}).status_code == 200


@pytest.mark.parametrize("lora", ["\ud800", "x" * 256, "[" * 5000, ["\ud800"], [{"name": ""}] * 17])
def test_names_of_loras_that_cannot_be_used(serve: Serve, engine: StubEngine, lora: object) -> None:
    client = serve()
    body = json.dumps({"prompt": "a", "lora": lora})
    answers = [client.post(GENERATIONS, content=body, headers=JSON)]
    text = lora if isinstance(lora, str) else json.dumps(lora)
    if text != "\ud800":  # a form cannot hold it
        form = {"prompt": "a", "lora": text}
        answers.append(client.post(EDITS, data=form, files={"image": ("a.png", image_file())}))
    for answer in answers:
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == "lora" and len(answer.text) < 1000
    assert not engine.drawn


@pytest.mark.parametrize("element", [1, "x", {}, {"name": 1}])
def test_many_loras_are_refused_by_their_number(
    serve: Serve, engine: StubEngine, element: object
) -> None:
    """Errors about each element would take minutes and the machine's memory."""
    client = serve()
    form = {"prompt": "a", "lora": json.dumps([element] * 1000)}
    for count, answer in (
        (20_000, client.post(GENERATIONS, json={"prompt": "a", "lora": [element] * 20_000})),
        (1000, client.post(EDITS, data=form, files={"image": ("a.png", image_file())})),
    ):
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["message"] == f"lora must be at most 16 LoRAs, not {count}"
        assert error["param"] == "lora"
    assert not engine.drawn


def test_long_json_in_a_form_is_not_parsed(serve: Serve, engine: StubEngine) -> None:
    form = {"prompt": "a", "lora": "[" + "[]," * 6000 + "[]]"}
    answer = serve().post(EDITS, data=form, files={"image": ("a.png", image_file())})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "lora must have at most 16,384 characters of JSON"
    assert not engine.drawn


@pytest.mark.parametrize("kind", ["undefined", "punycode", "no such", "latin-1", "utf-8", "UTF8"])
@pytest.mark.parametrize("text", [b"a..\xff", b"a" * 500_000], ids=["no UTF-8", "long"])
def test_charsets_of_forms(serve: Serve, kind: str, text: bytes) -> None:
    """Decoding half a megabyte of punycode takes half a minute."""
    part = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n' + text + b"\r\n--x--\r\n"
    headers = {"Content-Type": f"multipart/form-data; boundary=x; charset={kind}"}
    answer = serve().post(EDITS, content=part, headers=headers)
    assert answer.status_code == 400, answer.text
    message = answer.json()["error"]["message"]
    if kind.lower() not in ("utf-8", "utf8"):
        assert message == "the form's charset must be UTF-8"
    elif len(text) > 10:
        assert message == "prompt must have at most 32,000 characters"
    else:  # taken as Latin-1
        assert message == "image must be a file of the form (multipart/form-data)"


@pytest.mark.parametrize(
    "body",
    [
        "é".encode("latin-1").join([b'{"prompt": "', b'"}']),
        b"\xff",
        b'{"seed": ' + b"9" * 5000 + b"}",
    ],
)
def test_bodies_that_are_not_json(serve: Serve, body: bytes) -> None:
    answer = serve().post(GENERATIONS, content=body, headers=JSON)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == (
        "the body is not JSON in UTF-8; it must be a JSON object"
    )


def test_paths_are_not_redirected(serve: Serve) -> None:
    headers = {"X-Forwarded-Proto": "https"}
    answer = serve().post(f"{GENERATIONS}/", json={"prompt": "a"}, headers=headers)
    assert answer.status_code == 404 and "location" not in answer.headers


def test_a_refused_body_is_freed(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only by a collection of garbage, which may be long in coming."""
    made: list[weakref.ref[Exception]] = []

    class NotedError(RequestError):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            made.append(weakref.ref(self))

    client = serve(max_body_bytes=100_000)
    monkeypatch.setattr(middleware, "RequestError", NotedError)
    pieces = (b"x" * 10_000 for _ in range(20))
    gc.collect()
    gc.disable()
    try:
        assert client.post(GENERATIONS, content=pieces, headers=JSON).status_code == 413
        wait_until(lambda: made and made[0]() is None)
    finally:
        gc.enable()


@pytest.mark.parametrize("scale", ["nan", "-inf", "inf", "-Infinity"])
def test_cfg_scales_that_are_no_numbers(serve: Serve, engine: StubEngine, scale: str) -> None:
    answer = serve().post(TEXT, json={"prompt": "a", "cfg_scale": scale})
    assert answer.status_code == 400
    assert answer.json()["detail"] == "cfg_scale must be a finite number"
    assert not engine.drawn


def test_large_sizes_by_two_fields(serve: Serve, engine: StubEngine) -> None:
    answer = serve().post(TEXT, json={"prompt": "a", "width": 10_000, "height": 10_000})
    assert answer.status_code == 400
    assert answer.json()["detail"].endswith("must be a multiple of 16 up to 8192, not 10000")
    assert not engine.drawn


def test_many_large_images(serve: Serve, engine: StubEngine) -> None:
    client = serve()
    body = {"prompt": "a", "n": 10, "size": "1024x1024"}
    assert client.post(GENERATIONS, json=body).status_code == 200
    for n, size, status in ((10, "1040x1024", 400), (3, "2048x2048", 400), (2, "2048x2048", 200)):
        answer = client.post(GENERATIONS, json={"prompt": "a", "n": n, "size": size})
        assert answer.status_code == status, (n, size)
    error = client.post(GENERATIONS, json={"prompt": "a", "n": 3, "size": "2048x2048"}).json()
    assert error["error"]["param"] == "n"
    assert error["error"]["message"] == (
        "n times the pixels of an image must be at most 10,485,760, and 3 x 2048x2048 are "
        "12,582,912"
    )
    body = {"prompt": "a", "n_iter": 5, "batch_size": 2, "width": 2048, "height": 2048}
    answer = client.post(TEXT, json=body)
    assert answer.status_code == 400
    assert answer.json()["detail"].startswith("batch_size times the pixels")
    assert len(engine.drawn) == 2


def test_many_large_bodies_at_a_time(engine: StubEngine) -> None:
    """Sixteen are held, and no more may be but small ones."""
    body = json.dumps({"prompt": "a", "unknown": "x" * 99_970}).encode()
    assert len(body) == 100_000
    engine.gate.clear()
    with (
        serving(engine, queue=20, max_body_bytes=100_000) as address,
        ThreadPoolExecutor(20) as clients,
    ):

        def ask(body: bytes = body) -> tuple[int, str | None, bytes]:
            request = urllib.request.Request(f"{address}{GENERATIONS}", body, JSON)
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    return answer.status, None, answer.read()
            except urllib.error.HTTPError as error:
                return error.code, error.headers["Retry-After"], error.read()

        asked = [clients.submit(ask) for _ in range(18)]
        try:
            wait_until(lambda: sum(each.done() for each in asked) == 2)
            assert ask(b'{"prompt": ""}')[0] == 400
        finally:
            engine.gate.set()
        answers = [each.result() for each in asked]
        assert [status for status, *_ in answers].count(200) == 16
        for status, retry_after, content in answers:
            if status != 200:
                assert (status, retry_after) == (503, "5")
                assert json.loads(content)["error"]["code"] == "too_many_uploads"
        assert ask()[0] == 200


@pytest.mark.parametrize("kind", ["application/json", "Application/Problem+JSON; charset=utf-8"])
@pytest.mark.parametrize("path", [GENERATIONS, TEXT])
def test_many_values(serve: Serve, engine: StubEngine, path: str, kind: str) -> None:
    """The parser holds up all other requests."""
    client = serve()

    def ask(count: int):
        body = json.dumps({"prompt": "a", "others": [{}] * count}).encode()
        pieces = (body[i : i + 10_000] for i in range(0, len(body), 10_000))
        return client.post(path, content=pieces, headers={"Content-Type": kind})

    assert ask(49_000).status_code == 200
    drawn = len(engine.drawn)
    answer = ask(51_000)
    assert answer.status_code == 413
    assert "the JSON has more than 100,000 commas and brackets" in answer.text
    assert len(engine.drawn) == drawn


def test_ten_thousand_fields(serve: Serve) -> None:
    client = serve()
    fields = {f"x{i}": "1" for i in range(10_000)}
    assert client.post(GENERATIONS, json={"prompt": "a", **fields}).status_code == 200
    sent = {"image": ("a.png", image_file())}
    answer = client.post(EDITS, data={"prompt": "a", **fields}, files=sent)
    assert answer.status_code == 400 and "Too many fields" in answer.json()["error"]["message"]
    many = [("image[]", ("a.png", b"x"))] * 1000
    answer = client.post(EDITS, data={"prompt": "a"}, files=many)
    assert answer.status_code == 400 and "Too many files" in answer.json()["error"]["message"]
    answer = client.post(EDITS, data={"prompt": "x" * (2 << 20)}, files=sent)
    assert answer.status_code == 400


def test_invisible_characters_are_text(serve: Serve, engine: StubEngine) -> None:
    prompt = "a\u200b\u202e\0\U000e0001fox"
    assert serve().post(GENERATIONS, json={"prompt": prompt}).status_code == 200
    assert engine.drawn[0].settings.prompt == prompt


@pytest.mark.parametrize("is_declared", [True, False])
def test_huge_bodies(serve: Serve, engine: StubEngine, is_declared: bool) -> None:
    client = serve(max_body_bytes=100_000)

    def pieces() -> Iterator[bytes]:
        for _ in range(1000):
            yield b"x" * 10_000

    form = {"Content-Type": "multipart/form-data; boundary=x"}
    length = {"Content-Length": "10000000"} if is_declared else {}
    for path, kind in ((GENERATIONS, JSON), (EDITS, form), (TEXT, JSON)):
        answer = client.post(path, content=pieces(), headers={**kind, **length})
        assert answer.status_code == 413, answer.text
        document = answer.json()
        said = document["detail"] if path == TEXT else document["error"]["message"]
        assert said == "the request has more than 100,000 bytes"
        assert (document["error"] if path == TEXT else document["error"]["code"]) == (
            "request_too_large"
        )
    multipart = {"image": ("a.png", b"x" * 200_000)}
    assert client.post(EDITS, data={"prompt": "a"}, files=multipart).status_code == 413
    assert not engine.drawn


BROKEN = {
    "header alone": png_of_size(64, 48)[:40],
    "many pixels": png_of_size(100_000, 100_000),
    "less data than pixels": png_of_size(2000, 2000),
    "no pixels": png_of_size(0, 0),
    "wrong checksum": image_file()[:-20] + b"x" * 20,
    "cut JPEG": image_file(kind="JPEG")[:300],
    "cut GIF": image_file(kind="GIF", mode="L")[:50],
    "cut WebP": image_file(kind="WEBP")[:60],
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n",
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_broken_images(serve: Serve, engine: StubEngine, content: bytes) -> None:
    client = serve()
    answer = client.post(EDITS, data={"prompt": "a"}, files={"image": ("a.png", content)})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["code"] == "invalid_image" and not engine.drawn


def test_images_with_changed_bytes(serve: Serve) -> None:
    """Whatever a decoder makes of them, the answer is an image or a refusal."""
    client = serve()
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP"):
        whole = image_file((32, 32), kind=kind)
        for place in range(0, min(len(whole), 600), 7):
            content = whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :]
            answer = client.post(
                EDITS,
                data={"prompt": "a", "size": "16x16", "steps": "1"},
                files={"image": ("a", content)},
            )
            assert answer.status_code in (200, 400), (kind, place, answer.text)


def jpeg_with_exif(*entries: tuple[int, int, int, int]) -> bytes:
    """A JPEG file with EXIF tags: number, type, count and value of each (TIFF 6.0, section 2)."""
    directory = len(entries).to_bytes(2, "little")
    for tag, kind, count, value in entries:
        directory += tag.to_bytes(2, "little") + kind.to_bytes(2, "little")
        directory += count.to_bytes(4, "little") + value.to_bytes(4, "little")
    tiff = b"II*\0" + (8).to_bytes(4, "little") + directory + bytes(4)
    exif = b"Exif\0\0" + tiff
    segment = b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif
    whole = image_file((64, 48), kind="JPEG")
    return whole[:2] + segment + whole[2:]


WIDTH, PHOTOMETRIC, ORIENTATION, RESOLUTION = 0x100, 0x106, 0x112, 0x11A
DOCUMENT = 0x10D
ASCII, SHORT, RATIONAL, FLOAT, DOUBLE = 2, 3, 5, 11, 12


def test_images_are_drawn_upright(serve: Serve, engine: StubEngine) -> None:
    content = jpeg_with_exif((ORIENTATION, SHORT, 1, 6))  # a quarter turn
    answer = serve().post(EDITS, data={"prompt": "a"}, files={"image": ("a.jpg", content)})
    assert answer.status_code == 200
    sent = engine.drawn[0].settings.init_image
    stored = Image.open(io.BytesIO(content))
    assert isinstance(sent, Image.Image) and sent.size == (48, 64)
    assert sent.getpixel((47, 0)) == stored.getpixel((0, 0))


@pytest.mark.parametrize(
    "entry",
    [
        (WIDTH, ASCII, 1, 0x31),
        (RESOLUTION, ASCII, 1, 0x31),
        (PHOTOMETRIC, SHORT, 2, 0),
        (DOCUMENT, RATIONAL, 1, 0),
        (DOCUMENT, FLOAT, 1, 0),
        (0xB205, DOUBLE, 1, 0),
    ],
)
def test_tags_of_images_that_are_damaged(
    serve: Serve, engine: StubEngine, entry: tuple[int, int, int, int]
) -> None:
    content = jpeg_with_exif(*sorted([entry, (ORIENTATION, SHORT, 1, 6)]))
    image = base64.b64encode(content).decode()
    client = serve()
    for answer in (
        client.post(EDITS, data={"prompt": "a"}, files={"image": ("a.jpg", content)}),
        client.post(IMAGE, json={"prompt": "a", "init_images": [image]}),
    ):
        assert answer.status_code == 400
        assert "EXIF data is damaged; save it again" in answer.text
    assert not engine.drawn


def test_few_images_are_decoded_at_a_time(
    serve: Serve, engine: StubEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that the queue has no room for are not decoded at all."""
    lock, begun = threading.Lock(), 0
    at_a_time: list[int] = []
    now: set[int] = set()

    def decode(*arguments: Any) -> Image.Image:
        nonlocal begun
        with lock:
            begun += 1
            now.add(threading.get_ident())
            at_a_time.append(len(now))
        time.sleep(0.05)
        with lock:
            now.remove(threading.get_ident())
        return decode_image(*arguments)

    monkeypatch.setattr(service, "decode_image", decode)
    client = serve(queue=2)
    engine.gate.clear()
    sent = {"image": ("a.png", image_file())}
    with ThreadPoolExecutor(12) as clients:
        asked = [
            clients.submit(client.post, EDITS, data={"prompt": "a"}, files=sent) for _ in range(12)
        ]
        wait_until(lambda: sum(each.done() for each in asked) == 9)
        assert begun <= 4 and max(at_a_time) <= 2
        engine.gate.set()
        statuses = sorted(each.result(30).status_code for each in asked)
    assert statuses == [200] * 3 + [429] * 9


def test_an_image_in_floats_is_refused(serve: Serve) -> None:
    buffer = io.BytesIO()
    Image.new("F", (16, 16)).save(buffer, "TIFF")
    answer = serve().post(
        EDITS, data={"prompt": "a"}, files={"image": ("a.tiff", buffer.getvalue())}
    )
    assert answer.status_code == 400


@contextmanager
def unread(path: Path, content: bytes) -> Iterator[None]:
    """A named pipe whose content must still be there at the end of the block."""

    def write() -> None:
        with suppress(BrokenPipeError):
            path.write_bytes(content)  # waits for a reader

    os.mkfifo(path)
    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        thread.join(30)
        found = os.read(reader, 2 * len(content))
        os.close(reader)
    assert found == content


SENT = {
    "image of edits": lambda text: (EDITS, {"data": {"prompt": "a", "image": text}}),
    "images of edits": lambda text: (EDITS, {"data": {"prompt": "a", "image[]": text}}),
    "mask of edits": lambda text: (
        EDITS,
        {"data": {"prompt": "a", "mask": text}, "files": {"image": ("a.png", image_file())}},
    ),
    "name of a file": lambda text: (
        EDITS,
        {"data": {"prompt": "a"}, "files": {"image": (text, b"x")}},
    ),
    "init_images": lambda text: (IMAGE, {"json": {"prompt": "a", "init_images": [text]}}),
    "mask": lambda text: (
        IMAGE,
        {
            "json": {
                "prompt": "a",
                "init_images": [base64.b64encode(image_file()).decode()],
                "mask": text,
            }
        },
    ),
}


@pytest.mark.parametrize("sent", SENT.values(), ids=SENT)
def test_urls_and_paths_are_not_opened(
    serve: Serve,
    engine: StubEngine,
    tmp_path: Path,
    sent: Callable[[str], tuple[str, dict[str, Any]]],
) -> None:
    client = serve()
    pipe = tmp_path / "a.png"
    with socket.create_server(("127.0.0.1", 0)) as listener, unread(pipe, image_file()):
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/a.png"
        for text in (url, str(pipe), f"file://{pipe}"):
            path, options = sent(text)
            assert client.post(path, **options).status_code == 400, text
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):  # nobody has connected
            listener.accept()
    assert not engine.drawn


FAILURES = {
    "out of memory": (zm.CudaError("cuda:0 ran out of memory", "close others"), "out_of_memory"),
    "no host memory": (MemoryError(), "out_of_memory"),
    "NaN": (zm.GenerationError("the image became NaN in step 1 of 8", 1), "not_finite"),
    "bug": (KeyError("/srv/secret/path"), "internal_error"),
    "file": (zm.CheckpointError("/srv/secret/vae cannot be read"), "internal_error"),
}


@pytest.mark.parametrize(("failure", "code"), FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("stream", [False, True])
def test_failing_drawings(
    serve: Serve, engine: StubEngine, log: Log, failure: Exception, code: str, stream: bool
) -> None:
    client = serve()
    engine.failure = failure
    answer = client.post(GENERATIONS, json={"prompt": "a", "stream": stream})
    if stream:  # the first step had been done, and with it the status
        assert answer.status_code == 200
        last = answer.text.strip().split("\n\n")[-1]
        assert last.startswith("event: error\n")
        error = json.loads(last.partition("data: ")[2])["error"]
    else:
        assert answer.status_code == 500 and answer.headers["x-should-retry"] == "false"
        error = answer.json()["error"]
    assert error["code"] == code and error["type"] == "server_error"
    assert "secret" not in answer.text and "Traceback" not in answer.text
    wait_until(lambda: any(line.get("error") == code for line in log.lines()))
    failures = [line for line in log.lines() if line.get("event") == "failure"]
    assert [line["id"] for line in failures] == [answer.headers["x-request-id"]]
    assert failures[0]["detail"].strip().endswith(str(failure))
    engine.failure = None
    assert client.post(GENERATIONS, json={"prompt": "a"}).status_code == 200


def test_a_defect_of_the_server_itself(
    serve: Serve, engine: StubEngine, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("/srv/secret/path")

    client = serve()
    with monkeypatch.context() as patch:
        patch.setattr(service.Service, "settings", fail)
        answer = client.post(GENERATIONS, json={"prompt": "a"})
    assert answer.status_code == 500 and "secret" not in answer.text
    assert answer.json()["error"]["code"] == "internal_error"
    wait_until(lambda: any(line.get("error") == "internal_error" for line in log.lines()))
    (failure,) = (line for line in log.lines() if line.get("event") == "failure")
    assert failure["id"] == answer.headers["x-request-id"]
    assert failure["detail"].endswith("KeyError: '/srv/secret/path'\n")
    assert client.post(GENERATIONS, json={"prompt": "a"}).status_code == 200


def test_a_failure_before_the_first_step_keeps_its_status(serve: Serve, engine: StubEngine) -> None:
    def fail(*_: object) -> None:
        raise zm.CudaError("no memory")

    engine.draw = fail  # type: ignore[method-assign,assignment]
    answer = serve().post(GENERATIONS, json={"prompt": "a", "stream": True})
    assert answer.status_code == 500 and answer.json()["error"]["code"] == "out_of_memory"


def test_a_lora_that_does_not_fit_is_named_without_its_path(
    serve: Serve, engine: StubEngine, log: Log, tmp_path: Path
) -> None:
    file = tmp_path / "ink.safetensors"
    file.touch()
    engine.failure = zm.CheckpointError(f"{file} is for another model")
    client = serve(lora_dir=tmp_path)
    answer = client.post(GENERATIONS, json={"prompt": "a", "lora": "ink"})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("invalid_lora", "lora")
    assert error["message"] == "ink.safetensors is for another model"
    metrics = client.get("/metrics").text
    assert 'zimage_jobs_total{outcome="failed"} 0.0' in metrics
    assert 'zimage_jobs_total{outcome="refused"} 1.0' in metrics
    assert engine.freed == 1
    wait_until(lambda: any(line.get("route") == "/metrics" for line in log.lines()))
    assert not any("event" in line for line in log.lines())
