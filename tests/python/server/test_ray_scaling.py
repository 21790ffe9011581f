"""Replicas that Ray Serve starts and ends as requests come, on two CPUs of this machine."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

import helpers
import zimage_mxfp8 as zm
from helpers.ray_model import NotingModel
from helpers.serving import Log, wait_until
from zimage_mxfp8.server.engine import DrawRequest
from zimage_mxfp8.server.request_log import LogWriter

with warnings.catch_warnings():  # Ray uses what its own requirements deprecate
    warnings.simplefilter("ignore")
    from ray import serve
    from ray.serve import Application

    from zimage_mxfp8.server.ray import application, cluster
    from zimage_mxfp8.server.ray.cluster import drawing, joined, replicas_for
    from zimage_mxfp8.server.ray.engine import RayEngine

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # likewise

NAME = "scaling"
SECONDS = 1.0  # of load, or without, until there is a replica more, or one less


def impatient_application(*arguments: object) -> Application:
    """The application with other delays than half a minute and ten minutes."""
    made = application.drawing_application(*arguments)  # type: ignore[arg-type]
    scaling = made._bound_deployment._deployment_config.autoscaling_config
    scaling.upscale_delay_s = scaling.downscale_delay_s = SECONDS
    scaling.metrics_interval_s = scaling.look_back_period_s = SECONDS / 2
    return made


@pytest.fixture
def engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[RayEngine, NotingModel]]:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(Path(helpers.__file__).parents[1]))  # of replicas
    monkeypatch.setattr(cluster, "drawing_application", impatient_application)
    model = NotingModel(tmp_path / "notes.txt")
    model.notes.touch()
    with ExitStack() as stack:
        writer = LogWriter(Log())
        stack.callback(writer.close)
        stack.enter_context(joined(writer, lambda: None, cpus=2))
        replicas = replicas_for(2, "cpu", scaling=True)
        yield stack.enter_context(drawing(model, replicas, 30, NAME)), model  # type: ignore[arg-type]


def running_replicas() -> int:
    deployment = serve.status().applications[NAME].deployments["Replica"]
    return deployment.replica_states.get("RUNNING", 0)


def test_replicas_come_with_requests_and_go_without(
    engine: tuple[RayEngine, NotingModel],
) -> None:
    """Nothing is lost or drawn twice while a replica starts, nor while one ends."""
    drawer, model = engine
    assert running_replicas() == 1
    seeds = iter(range(10_000))
    drawn: list[int] = []
    done = threading.Event()

    def draw() -> None:
        seed = next(seeds)
        settings = zm.GenerationSettings("a", steps=3, width=64, height=48, seed=seed)
        image = drawer.draw(DrawRequest(settings), lambda _: None).images[0]
        assert image.getpixel((0, 0))[0] == seed % 256
        drawn.append(seed)

    def keep_drawing() -> None:
        while not done.is_set():
            draw()

    def have_drawn() -> int:
        return len({process for process, _ in model.noted("end")})

    for clients, replicas in ((4, 2), (1, 1)):
        done.clear()
        with ThreadPoolExecutor(clients) as pool:
            asking = [pool.submit(keep_drawing) for _ in range(clients)]
            try:
                wait_until(
                    lambda wanted=replicas: running_replicas() == wanted and have_drawn() == 2,
                    seconds=120,
                    pause=0.25,
                )
            finally:
                done.set()
            for each in asking:
                each.result()
    draw()
    for what in ("begin", "end"):
        assert sorted(seed for _, seed in model.noted(what)) == sorted(drawn)
    assert os.getpid() not in {process for process, _ in model.noted("begin")}
