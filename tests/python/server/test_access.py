"""Who may ask, what the log and the metrics say, and what the server tells of itself."""

from __future__ import annotations

import base64
import re
import threading
from functools import partial

import pytest
from starlette.testclient import TestClient

from helpers.serving import Log, Serve, StubEngine, wait_until

GENERATIONS = "/v1/images/generations"


def basic(text: str) -> str:
    return f"Basic {base64.b64encode(text.encode()).decode()}"


def test_api_key(serve: Serve, engine: StubEngine) -> None:
    client = serve(api_key="s3cret")
    for path in ("/v1/models", "/sdapi/v1/samplers", "/metrics", "/none"):
        for value in (
            None,
            "Bearer wrong",
            "Bearer",
            "s3cret",
            basic("s3cret"),
            "Basic %",
            "Bearer é",
        ):
            headers = {} if value is None else {"Authorization": value.encode("latin-1")}
            answer = client.get(path, headers=headers)
            assert answer.status_code == 401, (path, value)
            assert "invalid_api_key" in answer.text and "s3cret" not in answer.text
    assert client.post(GENERATIONS, json={"prompt": "a"}).status_code == 401
    assert not engine.drawn
    for value in ("Bearer s3cret", "bearer s3cret", basic("user:s3cret"), basic(":s3cret")):
        answer = client.get("/v1/models", headers={"Authorization": value, "Host": "example.com"})
        assert answer.status_code == 200
    for path in ("/", "/healthz", "/readyz"):
        assert client.get(path).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost:8000"}, 200),
        ({"Host": "127.0.0.1:8000"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": "localhost:8000", "Origin": "http://localhost:8000"}, 200),
        ({"Host": "localhost:8000", "Origin": "http://localhost:9000"}, 403),
        ({"Host": "localhost:8000", "Origin": "https://example.com"}, 403),
        ({"Host": "localhost:8000", "Origin": "null"}, 403),
        ({"Host": "rebound.example.com:8000"}, 403),
        ({"Host": "[::1"}, 403),
    ],
)
def test_foreign_pages_do_not_reach_a_server_without_a_key(
    serve: Serve, headers: dict[str, str], status: int
) -> None:
    client = serve()
    assert client.get("/v1/models", headers=headers).status_code == status
    assert client.get("/healthz", headers=headers).status_code == 200


def test_log(serve: Serve, log: Log) -> None:
    client = serve()
    answer = client.post(
        GENERATIONS, json={"prompt": "a secret fox", "n": 2, "steps": 3, "stream": True}
    )
    client.get("/v1/models/secret")
    client.get("/secret")
    wait_until(lambda: len(log.lines()) == 3)
    drawn, *others = log.lines()
    assert drawn["id"] == answer.headers["x-request-id"]
    assert (drawn["method"], drawn["route"], drawn["status"]) == ("POST", GENERATIONS, 200)
    assert (drawn["size"], drawn["steps"], drawn["n"]) == ("64x48", 3, 2)
    assert drawn["seconds"] >= 0 and drawn["time"] > 1.7e9
    assert [line["route"] for line in others] == ["/v1/models/{name:path}", "other"]
    assert [line["error"] for line in others] == ["model_not_found", "not_found"]
    assert "secret" not in log.getvalue()


class FullDisk(Log):
    def write(self, _text: str) -> int:
        raise OSError(28, "No space left on device")


class SlowReader(Log):
    def __init__(self, reader: threading.Event) -> None:
        super().__init__()
        self._reader = reader

    def write(self, text: str) -> int:
        self._reader.wait(30)
        return super().write(text)


class TestLogThatCannotBeWritten:
    @pytest.fixture
    def log(self) -> Log:
        return FullDisk()

    def test_requests_are_answered(self, serve: Serve) -> None:
        client = serve()
        assert client.post(GENERATIONS, json={"prompt": "a"}).status_code == 200
        # This asks again and again, which drops lines too.
        wait_until(lambda: re.search(r"_log_lines_dropped [1-9]", client.get("/metrics").text))


class TestLogThatIsNotRead:
    @pytest.fixture
    def log(self, reader: threading.Event) -> Log:
        return SlowReader(reader)

    @pytest.fixture
    def reader(self) -> threading.Event:
        return threading.Event()

    def test_requests_are_answered(self, serve: Serve, reader: threading.Event) -> None:
        client = serve()
        for _ in range(3):
            assert client.post(GENERATIONS, json={"prompt": "a"}).status_code == 200
        reader.set()


def metric(client: TestClient, line: str) -> float:
    (found,) = [x for x in client.get("/metrics").text.splitlines() if x.startswith(line + " ")]
    return float(found.split()[-1])


def test_metrics(serve: Serve, engine: StubEngine) -> None:
    client = serve()
    value = partial(metric, client)

    assert value('zimage_jobs_total{outcome="done"}') == 0
    assert value("zimage_ready") == 1
    client.post(GENERATIONS, json={"prompt": "a", "steps": 3})
    client.post(GENERATIONS, json={"prompt": "a", "n": 99})
    client.post(GENERATIONS, json={"prompt": "a", "n": 99})
    engine.failure = KeyError("x")
    assert client.post(GENERATIONS, json={"prompt": "a"}).status_code == 500
    assert value('zimage_jobs_total{outcome="done"}') == 1
    assert value('zimage_jobs_total{outcome="failed"}') == 1
    assert value("zimage_steps_total") == 4
    assert value('zimage_refusals_total{reason="invalid_value"}') == 2
    assert value('zimage_refusals_total{reason="internal_error"}') == 1
    assert value('zimage_stage_seconds_count{stage="denoising"}') == 2
    assert value("zimage_queue_length") == value("zimage_running") == 0
    assert value('zimage_device_memory_bytes{kind="allocated"}') == 123


def test_health_and_readiness(serve: Serve, engine: StubEngine) -> None:
    client = serve()
    assert client.get("/healthz").json() == {"status": "ok"}
    for path in ("/", "/healthz"):  # as uptime probes ask
        answer = client.head(path)
        assert (answer.status_code, answer.content) == (200, b"")
    assert client.get("/readyz").json() == {"ready": True}
    client.app.state.queue.stop()  # type: ignore[attr-defined]
    assert client.get("/readyz").status_code == 503
    assert client.get("/healthz").status_code == 200
    answer = client.post(GENERATIONS, json={"prompt": "a"})
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "stopping"
    assert answer.headers["retry-after"]


def test_a_server_is_not_ready_before_it_is_warm(serve: Serve, engine: StubEngine) -> None:
    engine.gate.clear()
    engine.on_warm_up = lambda: engine.gate.wait(30)
    client = serve(wait=False)
    assert client.get("/healthz").status_code == 200
    answer = client.get("/readyz")
    assert (answer.status_code, answer.json()) == (503, {"ready": False})
    assert metric(client, "zimage_ready") == 0
    engine.gate.set()
    wait_until(lambda: client.get("/readyz").status_code == 200)
    assert client.get("/readyz").json() == {"ready": True}
    assert metric(client, "zimage_ready") == 1


def test_the_page_comes_with_a_policy(serve: Serve) -> None:
    answer = serve(api_key="x").get("/")
    assert answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "http" not in policy
