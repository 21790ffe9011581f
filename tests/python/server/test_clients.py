"""A real server, and clients over sockets: openai-python, slow ones, and ones that go away."""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
from uvicorn.protocols.http.h11_impl import H11Protocol

import zimage_mxfp8 as zm
from helpers.documents import GUIDE, text_of
from helpers.serving import (
    Log,
    StubEngine,
    decoded,
    image_file,
    noisy,
    request_of,
    serving,
    wait_until,
)
from zimage_mxfp8.generation.images import decode_image
from zimage_mxfp8.server import a1111_api, service
from zimage_mxfp8.server.options import ServerOptions


@pytest.fixture
def address(engine: StubEngine, log: Log) -> Iterator[str]:
    with serving(engine, log, queue=1) as address:
        yield address
        engine.gate.set()


def client_of(address: str, key: str = "none", retries: int = 0) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=retries, timeout=30)


@pytest.fixture
def client(address: str) -> Iterator[openai.OpenAI]:
    with client_of(address) as client:
        yield client


# ---- openai-python


def test_openai_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["stub"]
    assert client.models.retrieve("stub").owned_by == "zimage-mxfp8"


def test_openai_generate(client: openai.OpenAI, engine: StubEngine) -> None:
    made = client.images.generate(
        prompt="a fox",
        model="stub",
        n=2,
        size="96x32",  # type: ignore[call-overload]
        extra_body={"seed": 3, "num_inference_steps": 4},
    )
    images = [decoded(image.b64_json) for image in made.data]
    assert [image.size for image in images] == [(96, 32)] * 2
    assert [image.getpixel((0, 0)) for image in images] == [(3, 0, 0), (4, 0, 0)]
    assert (made.size, made.output_format) == ("96x32", "png")
    assert engine.drawn[0].settings.steps == 4


def test_openai_edit(client: openai.OpenAI, engine: StubEngine) -> None:
    made = client.images.edit(
        image=("a.png", image_file()),
        mask=("m.png", image_file(mode="RGBA")),
        prompt="a",
        extra_body={"strength": 0.5},
    )
    assert decoded(made.data[0].b64_json).size == (64, 48)
    settings = engine.drawn[0].settings
    assert settings.init_image is not None and settings.mask_image is not None
    assert settings.strength == 0.5


def test_openai_edit_with_loras(engine: StubEngine, tmp_path: Path) -> None:
    """Its forms have other fields for each shape of a value, unlike its JSON."""
    ink, oil = tmp_path / "ink.safetensors", tmp_path / "oil.safetensors"
    ink.touch()
    oil.touch()
    with serving(engine, lora_dir=tmp_path) as address, client_of(address) as client:

        def loras(given: object) -> Any:
            client.images.edit(
                image=("a.png", image_file()), prompt="a", extra_body={"lora": given}
            )
            return engine.drawn[-1].settings.loras

        several = [{"name": "ink", "scale": 0.5}, {"name": "oil", "scale": 0.25}]
        assert loras("ink") == ((ink, 1.0),)
        assert loras({"name": "ink", "scale": 0.5}) == ((ink, 0.5),)
        assert loras(["oil", "ink"]) == ((oil, 1.0), (ink, 1.0))
        assert loras(json.dumps(several)) == ((ink, 0.5), (oil, 0.25))
        assert loras([json.dumps(several[0]), "oil"]) == ((ink, 0.5), (oil, 1.0))
        with pytest.raises(openai.BadRequestError, match="as one text of JSON") as bad:
            loras(several)
        assert bad.value.param == "lora"


def test_openai_stream(client: openai.OpenAI) -> None:
    events = list(client.images.generate(prompt="a", stream=True, partial_images=2))
    assert [event.type for event in events] == ["image_generation.partial_image"] * 2 + [
        "image_generation.completed"
    ]
    assert type(events[0]).__name__ == "ImageGenPartialImageEvent"
    assert events[1].partial_image_index == 1
    assert decoded(events[2].b64_json).size == (64, 48)
    edited = list(client.images.edit(image=("a.png", image_file()), prompt="a", stream=True))
    assert [type(event).__name__ for event in edited] == ["ImageEditCompletedEvent"]


def test_openai_events_arrive_while_the_image_is_drawn(
    client: openai.OpenAI, engine: StubEngine
) -> None:
    engine.pause_at = 3
    stream = client.images.generate(prompt="a", stream=True, partial_images=1)
    assert next(stream).type == "image_generation.partial_image"
    assert engine.steps == 2
    engine.gate.set()
    engine.pause_at = None
    assert next(stream).type == "image_generation.completed"


def test_openai_exceptions(address: str, client: openai.OpenAI, engine: StubEngine) -> None:
    with pytest.raises(openai.BadRequestError, match="size must be a multiple of 16") as bad:
        client.images.generate(prompt="a", size="65x64")  # type: ignore[call-overload]
    assert (bad.value.param, bad.value.code) == ("size", "invalid_value")
    with pytest.raises(openai.NotFoundError, match="this server has stub"):
        client.images.generate(prompt="a", model="gpt-image-2")
    with pytest.raises(openai.BadRequestError, match="size"):
        client.images.generate(prompt="a", size="1x1", stream=True)  # type: ignore[call-overload]
    engine.failure = zm.GenerationError("the image became NaN", 1)
    with client_of(address, retries=2) as retrying:
        drawn = len(engine.drawn)
        with pytest.raises(openai.InternalServerError, match="became NaN"):
            retrying.images.generate(prompt="a")
        assert len(engine.drawn) == drawn + 1  # it would fail again
    with pytest.raises(openai.APIError, match="became NaN"):
        list(client.images.generate(prompt="a", stream=True))


def test_openai_refusals_of_a_full_queue(address: str, engine: StubEngine) -> None:
    engine.gate.clear()
    with ThreadPoolExecutor(8) as others, client_of(address) as client:
        running = others.submit(client.images.generate, prompt="a")
        wait_until(lambda: engine.drawn)
        requests = [
            others.submit(client.images.generate, prompt="a", stream=is_stream)
            for is_stream in (False, True, False, True)
        ]
        wait_until(lambda: sum(request.done() for request in requests) >= 3)
        engine.gate.set()
        errors = [request.exception() for request in requests]
        assert running.exception() is None
    assert sorted(type(error).__name__ for error in errors) == [
        *["NoneType"],
        *["RateLimitError"] * 3,
    ]


def test_openai_api_key(engine: StubEngine) -> None:
    with serving(engine, api_key="s3cret") as address:
        with client_of(address) as wrong, pytest.raises(openai.AuthenticationError):
            wrong.images.generate(prompt="a")
        with client_of(address, "s3cret") as right:
            assert right.images.generate(prompt="a").data


def test_fifty_clients_at_once(engine: StubEngine) -> None:
    """Nobody hangs; each gets an image, or the refusal that tells when to come again."""
    with serving(engine, queue=8) as address, ThreadPoolExecutor(50) as others:

        def ask(i: int) -> int:
            with client_of(address) as client:
                try:
                    made = client.images.generate(prompt="a", extra_body={"seed": i})
                except openai.RateLimitError:
                    return 429
                assert decoded(made.data[0].b64_json).getpixel((0, 0)) == (i, 0, 0)
                return 200

        statuses = list(others.map(ask, range(50)))
    assert statuses.count(200) == len(engine.drawn) >= 9
    assert set(statuses) <= {200, 429}


# ---- sockets


def connect(address: str) -> socket.socket:
    return socket.create_connection((urlsplit(address).hostname, urlsplit(address).port), 30)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("is_half", [False, True])
def test_a_client_that_goes_away_stops_its_drawing_within_a_step(
    address: str, engine: StubEngine, log: Log, stream: bool, is_half: bool
) -> None:
    """Closed, or half-closed: it says that it sends nothing more, as interrupted programs do."""
    engine.pause_at = 5
    connection = connect(address)
    connection.sendall(request_of({"prompt": "a", "steps": 1000, "stream": stream}))
    wait_until(lambda: engine.steps == 4)
    if is_half:
        connection.shutdown(socket.SHUT_WR)
    else:
        connection.close()
    wait_until(lambda: [line for line in log.lines() if line["status"] == 499])
    engine.pause_at = None
    engine.gate.set()
    with client_of(address) as other:
        assert other.images.generate(prompt="b", extra_body={"steps": 1}).data
    assert engine.steps == 4 + 1 + 1  # the step that had begun, and the other's
    connection.close()


def test_a_client_that_goes_away_while_it_waits(address: str, engine: StubEngine) -> None:
    engine.gate.clear()
    with connect(address) as running:
        running.sendall(request_of({"prompt": "a", "steps": 1}))
        wait_until(lambda: engine.drawn)
        with connect(address) as waiting:
            waiting.sendall(request_of({"prompt": "b", "steps": 1, "stream": True}))
            assert b"1 ahead in the queue" in waiting.recv(10_000) + waiting.recv(10_000)
        wait_until(lambda: b"zimage_queue_length 0.0" in metrics_of(address))
        engine.gate.set()
        assert b"200 OK" in running.recv(10_000)
    assert len(engine.drawn) == 1


def metrics_of(address: str) -> bytes:
    with connect(address) as connection:
        connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        found = b""
        while piece := connection.recv(100_000):
            found += piece
    return found


UNFINISHED = {
    "JSON": ("/v1/images/generations", "application/json", b'{"prompt":'),
    "form": ("/v1/images/edits", "multipart/form-data; boundary=x", b"--x\r\n"),
    "A1111": ("/sdapi/v1/txt2img", "application/json", b'{"prompt":'),
}


@pytest.mark.parametrize(("path", "kind", "begin"), UNFINISHED.values(), ids=UNFINISHED)
def test_a_client_that_goes_away_while_it_sends(
    address: str, log: Log, path: str, kind: str, begin: bytes
) -> None:
    """It is logged as 499, and counts neither as a failure nor as a refusal."""
    with connect(address) as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n"
        connection.sendall(f"{head}Content-Length: 5000\r\n\r\n".encode() + begin)
        time.sleep(0.05)
    wait_until(log.getvalue)
    (line,) = log.lines()
    assert (line["route"], line["status"]) == (path, 499) and "error" not in line
    assert b"zimage_refusals_total{" not in metrics_of(address)


@pytest.mark.parametrize(("seconds", "status"), [(60.0, 200), (0.0, 409)])
def test_an_interrupt_after_its_client_has_gone_stops_no_other(
    address: str,
    engine: StubEngine,
    log: Log,
    monkeypatch: pytest.MonkeyPatch,
    seconds: float,
    status: int,
) -> None:
    """As SillyTavern sends it, which closes the connection of the drawing, too; later it may."""
    monkeypatch.setattr(a1111_api, "_SECONDS_TO_INTERRUPT", seconds)
    engine.pause_at = 2
    path = "/sdapi/v1/txt2img"
    first, second = connect(address), connect(address)
    with first, second:
        first.sendall(request_of({"prompt": "a", "steps": 1000}, path))
        wait_until(lambda: engine.steps == 1)
        second.sendall(request_of({"prompt": "b", "steps": 3}, path))
        wait_until(lambda: b"zimage_queue_length 1.0" in metrics_of(address))
        first.close()
        wait_until(lambda: [line for line in log.lines() if line["status"] == 499])
        engine.gate.set()
        wait_until(lambda: engine.steps == 3)  # the second one waits at its second step
        with connect(address) as other:
            other.sendall(request_of({}, "/sdapi/v1/interrupt"))
            assert other.recv(10_000).startswith(b"HTTP/1.1 200 ")
        engine.pause_at = None
        engine.gate.set()
        assert second.recv(10_000).startswith(b"HTTP/1.1 %d " % status)


def test_clients_that_go_away_before_their_images_are_decoded(
    address: str, engine: StubEngine, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_decode = threading.Event()
    decoded: list[str] = []

    def decode(content: bytes, what: str, pixels: int) -> Any:
        decoded.append(what)
        assert may_decode.wait(30)
        return decode_image(content, what, pixels)

    monkeypatch.setattr(service, "decode_image", decode)
    sent = request_of(
        {"prompt": "a", "steps": 1, "init_images": [base64.b64encode(image_file()).decode()]},
        "/sdapi/v1/img2img",
    )
    with contextlib.ExitStack() as stack:
        staying = [stack.enter_context(connect(address)) for _ in range(2)]
        for each in staying:
            each.sendall(sent)
        wait_until(lambda: len(decoded) == 2)
        leaving = [stack.enter_context(connect(address)) for _ in range(5)]
        for each in leaving:
            each.sendall(sent)
            each.close()
        wait_until(lambda: [line["status"] for line in log.lines()] == [499] * 5)
        may_decode.set()
        for each in staying:
            assert each.recv(10_000).startswith(b"HTTP/1.1 200 ")
    assert len(decoded) == len(engine.drawn) == 2


def test_slow_clients_do_not_keep_others_waiting(engine: StubEngine, log: Log) -> None:
    """One sends its request and never ends; one does not read its images."""
    with serving(engine, log, transfer_timeout=0.5) as address:
        sender, reader = connect(address), connect(address)
        sender.sendall(request_of({"prompt": "a"})[:-5])
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        large = {"prompt": "a", "n": 10, "size": "1024x1024", "output_format": "jpeg"}
        engine.draw = noisy(engine)  # type: ignore[method-assign]
        reader.sendall(request_of({**large, "stream": True, "steps": 1}))
        with client_of(address) as client:
            assert client.images.generate(prompt="b", extra_body={"steps": 1}).data
        assert b"408 Request Timeout" in sender.recv(10_000)
        wait_until(lambda: sorted(x["status"] for x in log.lines()) == [200, 408, 499])
        sender.close()
        reader.close()


def is_established(server: str, client: socket.socket) -> bool:
    """Whether the server's side of a connection is open (proc_net_tcp.txt of Linux)."""
    ports = urlsplit(server).port, client.getsockname()[1]
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, remote, state, *_ = line.split()
        if tuple(int(each.rpartition(":")[2], 16) for each in (local, remote)) == ports:
            return state == "01"
    return False


def test_clients_that_read_nothing_are_cut_off(engine: StubEngine) -> None:
    with serving(engine, transfer_timeout=0.5) as address, connect(address) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 400)
        assert is_established(address, connection)
        wait_until(lambda: not is_established(address, connection))


def test_little_is_received_at_a_time(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a body of small chunks leaves time for others."""
    received: list[int] = []
    receive = H11Protocol.data_received

    def noting(self: H11Protocol, data: bytes) -> None:
        received.append(len(data))
        receive(self, data)

    monkeypatch.setattr(H11Protocol, "data_received", noting)
    body = request_of({"prompt": "a", "unknown": "x" * 2_000_000})
    with connect(address) as connection:
        connection.sendall(body)
        assert connection.recv(100).startswith(b"HTTP/1.1 200 ")
    assert sum(received) == len(body) and max(received) <= 16_384


def test_requests_whose_headers_never_end_do_not_use_up_the_connections(
    engine: StubEngine,
) -> None:
    with (
        serving(engine, transfer_timeout=0.5) as address,
        contextlib.ExitStack() as connections,
    ):
        held = [connections.enter_context(connect(address)) for _ in range(130)]
        for each in held:
            each.sendall(b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\n")
        with client_of(address) as client:
            with pytest.raises(openai.InternalServerError) as refused:
                client.images.generate(prompt="a")
            assert refused.value.status_code == 503
            assert [each.recv(1) for each in held] == [b""] * len(held)
            assert client.images.generate(prompt="a").data


def test_a_second_request_may_not_be_slow_either(engine: StubEngine) -> None:
    with serving(engine, transfer_timeout=0.5) as address, connect(address) as connection:
        for _ in range(2):
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = b""
            while not answer.endswith(b"}"):
                answer += connection.recv(10_000)
            assert answer.startswith(b"HTTP/1.1 200 ")
        connection.sendall(b"GET /healthz HTTP/1.1\r\n")
        begin = time.monotonic()
        assert connection.recv(1) == b""
        assert time.monotonic() - begin < 4  # uvicorn's own limit between requests is 5 s


def test_what_is_no_http(address: str) -> None:
    for content in (b"\x16\x03\x01\x02\0\x01\0\x01", b"GET / HTTP/9.9\r\n\r\n", b"\0" * 100_000):
        with connect(address) as connection, contextlib.suppress(ConnectionError):
            connection.sendall(content)
            answer = connection.recv(10_000)
            assert b"Traceback" not in answer and b"500" not in answer
    with client_of(address) as client:
        assert client.images.generate(prompt="a").data


def test_a_body_is_refused_while_it_comes_in(engine: StubEngine) -> None:
    with serving(engine, max_body_bytes=100_000) as address, connect(address) as connection:
        connection.sendall(
            b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 1 << 30:
                connection.sendall(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
                sent += 0x10000
                time.sleep(0.001)
        assert sent < 1 << 27
        with contextlib.suppress(ConnectionError):  # the answer may be lost with the connection
            assert b"413" in connection.recv(10_000)


def test_a_file_that_does_not_stay_in_memory(address: str) -> None:
    large = image_file((1000, 1000))
    assert len(large) > 2 << 20
    with client_of(address) as client:
        assert client.images.edit(image=("a.png", large), prompt="a", size="16x16").data  # type: ignore[call-overload]


# ---- refusals of requests that are still sent


def refused_upload(address: str, count: int, declared: int) -> bytes:
    """The answer to a request without a key, after `count` of its `declared` bytes were sent."""
    parts = urlsplit(address)
    with socket.create_connection((parts.hostname, parts.port), 30) as connection:
        connection.sendall(
            b"POST /v1/images/edits HTTP/1.1\r\nHost: localhost\r\n"
            + f"Content-Length: {declared}\r\n\r\n".encode()
        )
        for _ in range(count >> 16):
            connection.sendall(bytes(1 << 16))
        answer = b""
        while piece := connection.recv(1 << 16):
            answer += piece
    return answer


def test_an_early_refusal_of_a_large_upload_is_read(engine: StubEngine) -> None:
    with serving(engine, api_key="x") as address:
        answer = refused_upload(address, 8 << 20, 8 << 20)
    assert answer.startswith(b"HTTP/1.1 401 ") and b"the API key is missing" in answer


def test_an_upload_to_a_full_queue_is_refused_with_an_answer(engine: StubEngine) -> None:
    engine.gate.clear()
    with (
        serving(engine, queue=0) as address,
        ThreadPoolExecutor(1) as others,
        client_of(address) as client,
    ):
        running = others.submit(client.images.generate, prompt="a")
        wait_until(lambda: engine.drawn)
        answer = refused_upload(address, 8 << 20, 8 << 20)
        engine.gate.set()
        assert running.result(30).data
    assert answer.startswith(b"HTTP/1.1 429 ") and b"too many requests wait" in answer


def test_the_limits_are_those_of_the_guide(engine: StubEngine) -> None:
    row = next(x for x in text_of(GUIDE / "serving.md").splitlines() if x.startswith("| 408, 413"))
    assert "within a minute" in row and "more than 64 MiB" in row
    options = ServerOptions()
    assert (options.transfer_timeout, options.max_body_bytes) == (60, 64 << 20)
    with serving(engine) as address, connect(address) as connection:
        head = b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\n"
        connection.sendall(
            head + b"Content-Type: application/json\r\nContent-Length: 1073741824\r\n\r\n"
        )
        assert connection.recv(10_000).startswith(b"HTTP/1.1 413 ")


def test_a_refused_upload_is_not_read_for_ever(engine: StubEngine) -> None:
    with serving(engine, api_key="x", transfer_timeout=0.3) as address:
        assert refused_upload(address, 1 << 16, 8 << 20).startswith(b"HTTP/1.1 401 ")
    with (
        serving(engine, api_key="x", max_body_bytes=1 << 20) as address,
        pytest.raises(ConnectionError),
    ):
        refused_upload(address, 64 << 20, 64 << 20)
