"""`zimage-mxfp8 serve` as a process: addresses, keys, signals and exit codes."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

import zimage_mxfp8 as zm
from helpers.commands import Run
from helpers.images import fails
from helpers.serving import Log, StubEngine, noisy, request_of, wait_until
from zimage_mxfp8.cli import serve as command
from zimage_mxfp8.cli.main import main
from zimage_mxfp8.server.options import ServerOptions
from zimage_mxfp8.server.request_log import LogWriter
from zimage_mxfp8.server.run import run_server

Start = Callable[..., "tuple[subprocess.Popen[str], str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts the command, and returns the process and its address when it is ready."""
    processes = []

    def run(
        *options: object, stderr: Any = subprocess.PIPE, **variables: str
    ) -> tuple[subprocess.Popen[str], str]:
        words = ["serve", "--port", "0", "--device", "cpu", *map(str, options)]
        process = subprocess.Popen(
            [sys.executable, "-m", "zimage_mxfp8.cli.main", *words],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env={**os.environ, **variables},
            cwd=tmp_path,
        )
        processes.append(process)
        line = process.stdout.readline()
        found = re.fullmatch(r"small_model is served at (http://127\.0\.0\.1:\d+)\n", line)
        assert found, process.communicate()
        return process, found[1]

    yield run
    for process in processes:
        process.kill()
        process.communicate()


def client_of(address: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=60)


@pytest.mark.slow
def test_first_signal_finishes_what_is_drawn_and_refuses_the_rest(start: Start) -> None:
    process, address = start(ZIMAGE_MXFP8_API_KEY="s3cret")
    with client_of(address, "s3cret") as client:
        assert client.models.list().data[0].id == "small_model"
        with pytest.raises(openai.AuthenticationError), client_of(address) as stranger:
            stranger.models.list()
        long = {"num_inference_steps": 14}
        stream = client.images.generate(prompt="a", stream=True, partial_images=3, extra_body=long)
        next(stream)
        other = client.images.generate(prompt="b", stream=True, extra_body=long)
        process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="the server is stopping"):
            list(other)
        with pytest.raises(openai.InternalServerError) as refused:
            client.images.generate(prompt="c")
        assert refused.value.status_code == 503
        assert list(stream)[-1].type == "image_generation.completed"
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "")
    stages = [line for line in err.splitlines() if line.startswith("zimage-mxfp8: ")]
    assert stages[0].endswith("without --model-dir, serving the small trained model of the package")
    log = [json.loads(line) for line in err.splitlines() if not line.startswith("zimage-mxfp8: ")]
    (stopping,) = [line for line in log if "event" in line]
    assert (
        stopping["event"] == "stopping" and "until what is drawn is finished" in stopping["detail"]
    )
    requests = [line for line in log if "status" in line]
    assert [line["status"] for line in requests] == [200, 401, 200, 503, 200]
    assert [line.get("error") for line in requests] == [
        *(None, "invalid_api_key", "stopping", "stopping", None),
    ]


@pytest.mark.slow
def test_a_full_disk_from_the_beginning(start: Start) -> None:
    """Lines of progress cannot be written either."""
    with Path("/dev/full").open("w") as full:
        _, address = start(stderr=full)
    with client_of(address) as client:
        assert client.images.generate(prompt="a", extra_body={"steps": 1}).data
    with urllib.request.urlopen(f"{address}/metrics") as answer:
        assert "zimage_log_lines_dropped 1.0\n" in answer.read().decode()


def test_third_signal_ends_a_server_whose_step_does_not_end() -> None:
    program = """
import socket, sys, threading
from helpers.serving import StubEngine
from zimage_mxfp8.server.options import ServerOptions
from zimage_mxfp8.server.request_log import LogWriter
from zimage_mxfp8.server.run import run_server

class StuckEngine(StubEngine):
    def warm_up(self):
        print("stuck", flush=True)
        threading.Event().wait()

with socket.create_server(("127.0.0.1", 0)) as listener:
    run_server(StuckEngine(), ServerOptions(), listener, LogWriter(sys.stderr), print)
"""
    helpers = Path(__file__).parents[1]
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(helpers), *filter(None, sys.path)])},
    ) as process:
        assert process.stdout and process.stderr
        assert process.stdout.readline() == "stuck\n"
        process.send_signal(signal.SIGINT)
        assert json.loads(process.stderr.readline())["event"] == "stopping"

        def is_ended_by_signals() -> bool:
            process.send_signal(signal.SIGINT)
            return process.poll() is not None

        try:
            wait_until(is_ended_by_signals)
        finally:
            process.kill()
        assert process.returncode == 130


# ---- errors before anything is loaded


def refused(capsys: pytest.CaptureFixture[str], *options: object) -> tuple[int, str, str]:
    code = main(["serve", *map(str, options)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls that would load the model."""
    calls: list[Any] = []
    monkeypatch.setattr(command, "_engine", calls.append)
    monkeypatch.delenv("ZIMAGE_MXFP8_API_KEY", raising=False)
    return calls


def test_an_address_in_brackets_is_that_of_urls(
    loads: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts: list[str] = []

    def listener(host: str, _port: int) -> None:
        hosts.append(host)
        raise zm.UnsupportedError("enough is known")

    monkeypatch.setattr(command, "_listener", listener)
    assert main(["serve", "--host", "[::1]"]) == 1
    assert hosts == ["::1"] and not loads


def test_other_hosts_need_a_key(loads: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.com"):
        fails(
            refused(capsys, "--host", host),
            2,
            f"--host {host} lets other machines in, which needs an API key; set "
            "ZIMAGE_MXFP8_API_KEY or --api-key",
        )
    for key in ("", " x", "é", "a\nb"):
        fails(refused(capsys, "--api-key", key), 2, "must be printable ASCII")
    assert not loads


def test_arguments(loads: list[Any], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    fails(refused(capsys, "--transformer", "x.safetensors"), 2, "--transformer needs --model-dir")
    fails(refused(capsys, "--lora-dir", tmp_path / "none"), 2, "--lora-dir", "is not a folder")
    fails(refused(capsys, "--port", 99_999), 2, "--port 99999 cannot be used: ports end at 65535")
    fails(refused(capsys, "--host", "no such host", "--api-key", "x"), 2, "--host no such host")
    fails(refused(capsys, "--replicas", 2), 2, "--replicas needs --ray")
    words = (
        "--device cuda:1 cannot be used with --ray, which gives each replica a GPU; leave it out"
    )
    fails(refused(capsys, "--ray", "--device", "cuda:1"), 2, words)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        sentence = f"--port {port} of 127.0.0.1 cannot be used: Address already in use"
        fails(refused(capsys, "--port", port), 2, sentence)
    assert not loads


def test_a_port_is_taken_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds: list[tuple[int, str, str]] = []

    def load(arguments: argparse.Namespace) -> None:
        if not seconds:  # the first server loads; the second one is started
            seconds.append((-1, "", ""))
            seconds.append(refused(capsys, "--port", arguments.port))
        raise zm.CheckpointError("there is no model")

    monkeypatch.setattr(command, "_engine", load)
    monkeypatch.delenv("ZIMAGE_MXFP8_API_KEY", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    fails(refused(capsys, "--port", port), 1, "there is no model")
    sentence = f"--port {port} of 127.0.0.1 cannot be used: Address already in use"
    fails(seconds[1], 2, sentence)


def test_limits_of_pixels(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found: list[tuple[int, int]] = []

    def load(arguments: argparse.Namespace) -> None:
        options = command._options(arguments)
        found.append((options.max_image_pixels, options.max_request_pixels))
        raise zm.CheckpointError("there is no model")

    monkeypatch.setattr(command, "_engine", load)
    monkeypatch.delenv("ZIMAGE_MXFP8_API_KEY", raising=False)
    for options in (
        (),
        ("--max-image-pixels", 256),
        ("--max-image-pixels", 20_000_000),
        ("--max-request-pixels", 512),
    ):
        assert refused(capsys, "--port", 0, *options)[0] == 1
    default, request = 2048 * 2048, 10 * 1024 * 1024
    assert found == [
        (default, request),
        (256, request),
        (20_000_000, 20_000_000),
        (default, 512),
    ]


def test_wrong_models_end_with_a_sentence(cli: Run, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    result = cli("serve", "--port", 0, "--model-dir", "model")
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith("zimage-mxfp8: error: model ")


@pytest.mark.parametrize(
    ("package", "options", "extra"), [("fastapi", (), "serve"), ("ray", ("--ray",), "ray")]
)
def test_a_missing_package_is_named(
    cli: Run, tmp_path: Path, package: str, options: tuple[str, ...], extra: str
) -> None:
    (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError(name={package!r})")
    result = cli("serve", "--port", 0, *options, env={"PYTHONPATH": str(tmp_path)})
    assert result.returncode == 1
    assert f'run pip install "zimage-mxfp8[{extra}]"' in result.stderr.splitlines()[-1]


def test_a_cluster_that_is_not_there(cli: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    for value, words in {
        address: f"there is no Ray at {address}: ",
        "ray://x": 'RAY_ADDRESS is "ray://x", and must be HOST:PORT of a cluster',
    }.items():
        result = cli("serve", "--ray", "--port", 0, env={"RAY_ADDRESS": value})
        assert (result.returncode, result.stdout) == (1, "")
        assert words in result.stderr.splitlines()[-1]
        assert result.stderr.splitlines()[-1].endswith("or unset RAY_ADDRESS")


# ---- the server of the command, in this process


def test_an_engine_that_cannot_be_warmed_up_ends_the_server(engine: StubEngine, log: Log) -> None:
    def fail() -> None:
        raise zm.CudaError("cuda:0 ran out of memory")

    engine.on_warm_up = fail
    writer = LogWriter(log)
    ready: list[bool] = []
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        pytest.raises(zm.CudaError, match="ran out of memory"),
    ):
        run_server(engine, ServerOptions(), listener, writer, lambda: ready.append(True))
    writer.close()
    assert not ready
    assert [line["detail"] for line in log.lines()] == ["cuda:0 ran out of memory"]


def test_a_server_that_cannot_listen_waits_for_the_warm_up(engine: StubEngine, log: Log) -> None:
    ended = threading.Event()

    def warm_up() -> None:
        time.sleep(0.2)
        ended.set()

    engine.on_warm_up = warm_up
    writer = LogWriter(log)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pass
    with pytest.raises(OSError, match="Bad file descriptor"):
        run_server(engine, ServerOptions(), listener, writer, lambda: None)
    writer.close()
    assert ended.is_set()


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        (b"\x16\x03\x01\r\n\r\n", "Invalid HTTP request"),  # TLS
        (
            b"POST /v1/images/edits HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 4\r\n"
            b"Content-Type: multipart/form-data; boundary=a\r\nConnection: close\r\n\r\nbbbb",
            "boundary",
        ),
    ],
    ids=["uvicorn", "python-multipart"],
)
def test_what_libraries_say_is_in_the_log(
    sent: bytes,
    told: str,
    engine: StubEngine,
    log: Log,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(logging._levelToName, logging.WARNING, "MINIMAL")  # as convert_to_quant
    writer = LogWriter(log)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def disturb() -> None:
            with socket.create_connection(listener.getsockname()) as connection:
                connection.sendall(sent)
                connection.recv(1000)
            signal.raise_signal(signal.SIGTERM)

        run_server(
            engine,
            ServerOptions(),
            listener,
            writer,
            lambda: threading.Thread(target=disturb).start(),
        )
    writer.close()
    warning, *_, stopping = log.lines()
    assert warning["event"] == "warning" and told in warning["detail"]
    assert (stopping["event"], stopping["detail"]) == ("stopping", "now")
    assert capfd.readouterr().err == ""


def test_a_device_that_breaks_ends_the_server(engine: StubEngine, log: Log) -> None:
    """Its supervisor starts another one."""

    def fail() -> None:
        raise zm.CudaError("cuda:0 cannot be used any more")

    engine.failure = RuntimeError("an illegal access")
    engine.free_memory = fail  # type: ignore[method-assign]
    writer = LogWriter(log)

    def ask(port: int) -> None:
        with client_of(f"http://127.0.0.1:{port}") as client:
            with pytest.raises(openai.InternalServerError) as error:
                client.images.generate(prompt="a")
            statuses.append(error.value.status_code)

    statuses: list[int] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=ask, args=listener.getsockname()[1:])
        with pytest.raises(zm.CudaError, match="cannot be used any more"):
            run_server(engine, ServerOptions(), listener, writer, thread.start)
        thread.join(30)
    writer.close()
    assert statuses == [500]


def serve_and(
    ask: Callable[[tuple[str, int], threading.Event], None],
    engine: StubEngine,
    log: Log,
    seconds: float,
) -> None:
    """Serve until the signals that `ask` raises in a thread.

    Args:
        ask: gets the address, and an event that is set when the server has ended.
        engine: draws.
        log: of the server.
        seconds: that transfers may take.
    """
    ended = threading.Event()
    writer = LogWriter(log)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=ask, args=[listener.getsockname(), ended])
        run_server(engine, ServerOptions(transfer_timeout=seconds), listener, writer, thread.start)
        ended.set()
        thread.join(30)
    writer.close()


def post(address: tuple[str, int], fields: dict[str, Any]) -> socket.socket:
    connection = socket.create_connection(address)
    connection.sendall(request_of(fields))
    return connection


def test_a_stop_does_not_wait_for_requests_that_are_sent_slowly(
    engine: StubEngine, log: Log
) -> None:
    ends: list[bytes] = []

    def ask(address: tuple[str, int], _: threading.Event) -> None:
        with socket.create_connection(address) as connection:
            connection.sendall(
                b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Type: application/json\r\nContent-Length: 5000\r\n"
                b"Expect: 100-continue\r\n\r\n"
            )
            assert connection.recv(1000).startswith(b"HTTP/1.1 100 ")
            signal.raise_signal(signal.SIGTERM)
            ends.append(connection.recv(100))

    serve_and(ask, engine, log, seconds=3)
    assert ends == [b""]
    # After the timeout there would be a 408.
    assert [line.get("status", line.get("event")) for line in log.lines()] == ["stopping", 499]


@pytest.mark.parametrize("is_drawing", [False, True])
def test_second_signal_does_not_wait_for_readers(
    engine: StubEngine, log: Log, is_drawing: bool
) -> None:
    engine.draw = noisy(engine)  # type: ignore[method-assign]
    answers: list[bytes] = []

    def ask(address: tuple[str, int], ended: threading.Event) -> None:
        large = {"prompt": "a", "n": 10, "size": "1024x1024", "stream": True, "steps": 1}
        with post(address, large) as reader:
            found = b""
            while b"b64_json" not in found:  # an image begins, and is not read
                found += reader.recv(1000)
            if is_drawing:
                engine.pause_at = 2
                other = post(address, {"prompt": "b", "steps": 1000})
                wait_until(lambda: engine.steps == 2)
            for count in (1, 2):
                signal.raise_signal(signal.SIGTERM)
                if is_drawing:
                    wait_until(lambda count=count: log.getvalue().count('"stopping"') == count)
                else:
                    wait_until(lambda: '"stopping"' in log.getvalue())
            if is_drawing:
                engine.pause_at = None
                engine.gate.set()
                with other:
                    answers.append(other.recv(10_000)[:12])
            ended.wait(30)

    serve_and(ask, engine, log, seconds=20)
    # After the timeout the client that does not read would be a 499.
    statuses = [line["status"] for line in log.lines() if "status" in line]
    assert sorted(statuses) == ([200, 409] if is_drawing else [200])
    assert answers == ([b"HTTP/1.1 409"] if is_drawing else [])
    assert {line["event"] for line in log.lines() if "event" in line} == {"stopping"}


def test_second_signal_stops_what_is_drawn(engine: StubEngine, log: Log) -> None:
    engine.pause_at = 3
    writer = LogWriter(log)
    errors: list[BaseException | None] = []

    def ask(port: int) -> None:
        with client_of(f"http://127.0.0.1:{port}") as client, ThreadPoolExecutor(1) as others:
            asked = others.submit(
                client.images.generate, prompt="a", extra_body={"num_inference_steps": 1000}
            )
            wait_until(lambda: engine.steps == 2)
            for count in (1, 2):
                signal.raise_signal(signal.SIGINT)
                wait_until(lambda count=count: log.getvalue().count('"stopping"') == count)
            engine.pause_at = None
            engine.gate.set()
            errors.append(asked.exception(30))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=ask, args=listener.getsockname()[1:])
        run_server(engine, ServerOptions(), listener, writer, thread.start)
        thread.join(30)
    writer.close()
    assert isinstance(errors[0], openai.ConflictError) and "interrupted" in str(errors[0])
    assert engine.steps == 3
