"""Replicas of Ray Serve behind the server's queue, on this machine."""

from __future__ import annotations

import asyncio
import gc
import io
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import openai
import pytest
from PIL import Image

import helpers
import zimage_mxfp8 as zm
from helpers.ray_model import NotingEngine, NotingModel
from helpers.serving import Log, decoded, image_file, serving, wait_until
from zimage_mxfp8.generation.small_model import FOLDER, TRANSFORMER
from zimage_mxfp8.server.engine import (
    Drawing,
    DrawRequest,
    EngineLostError,
    Preview,
    Progress,
    Report,
    Waiting,
)
from zimage_mxfp8.server.jobs import StoppedError
from zimage_mxfp8.server.request_log import LogWriter

with warnings.catch_warnings():  # Ray uses what its own requirements deprecate
    warnings.simplefilter("ignore")
    from ray import serve
    from ray.serve import Application

    from zimage_mxfp8.server.ray import cluster
    from zimage_mxfp8.server.ray.application import Replicas, drawing_application
    from zimage_mxfp8.server.ray.cluster import drawing, joined, replicas_for
    from zimage_mxfp8.server.ray.engine import RayEngine
    from zimage_mxfp8.server.ray.replica import Failure, Replica

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # likewise


CPUS = 4  # that Ray is told to have: two replicas for most tests, two for one that scales
SCALING = "scaling"  # name of an application
SCALE_SECONDS = 1.0  # of load, or without, until there is a replica more, or one less


@dataclass
class Running:
    """A server with two replicas."""

    address: str
    engine: RayEngine
    model: NotingModel
    log: Log

    def client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=f"{self.address}/v1", api_key="none", max_retries=0, timeout=60
        )


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The one Ray of this process: a second one may not start, or miss what Ray Serve reports."""
    notes = tmp_path_factory.mktemp("ray") / "notes.txt"
    notes.touch()
    model = NotingModel(notes)
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("PYTHONPATH", str(Path(helpers.__file__).parents[1]))  # of replicas
        writer = LogWriter(Log())
        stack.callback(writer.close)
        stack.enter_context(joined(writer, lambda: None, cpus=CPUS))
        replicas = replicas_for(2, "cpu", scaling=False)
        engine = stack.enter_context(drawing(model, replicas, 30, "test"))  # type: ignore[arg-type]
        log = Log()
        yield Running(stack.enter_context(serving(engine, log, queue=8)), engine, model, log)


@pytest.fixture
def notes(running: Running) -> Path:
    """An empty file of what replicas note."""
    running.model.notes.write_text("")
    return running.model.notes


def request(seed: int | None, steps: int = 3, **options: object) -> DrawRequest:
    settings = {"width": 64, "height": 48, "steps": steps, "seed": seed}
    return DrawRequest(zm.GenerationSettings("a", **settings), **options)  # type: ignore[arg-type]


def test_requests_are_drawn_at_a_time_by_two_processes(running: Running, notes: Path) -> None:
    async def work() -> list[bytes]:
        async with running.client() as client:
            made = await asyncio.gather(
                *(
                    client.images.generate(prompt="a", size="64x48", extra_body={"seed": seed})
                    for seed in (1, 2)
                )
            )
        return [decoded(each.data[0].b64_json).tobytes() for each in made]

    assert asyncio.run(work()) == [bytes((seed, 0, 0)) * (64 * 48) for seed in (1, 2)]
    assert len({process for process, _ in running.model.noted("end")}) == 2


def test_images_go_to_replicas_and_back(running: Running) -> None:
    sent = image_file((64, 48))
    mask = io.BytesIO()
    Image.new("RGBA", (64, 48), (0, 0, 0, 0)).save(mask, "PNG")

    async def work() -> bytes:
        async with running.client() as client:
            made = await client.images.edit(
                image=("a.png", sent), mask=("m.png", mask.getvalue()), prompt="a"
            )
        return decoded(made.data[0].b64_json).tobytes()

    assert asyncio.run(work()) == Image.open(io.BytesIO(sent)).tobytes()


@pytest.mark.parametrize(
    ("prompt", "status", "words"),
    [
        ("usage", 400, "num_inference_steps must be fewer"),
        ("nan", 500, "the image is NaN"),
        ("memory", 500, "the server has too little memory"),
        ("defect", 500, "the server failed"),
        ("rank", 503, "the machine or process that drew this is gone"),
        ("error of a rank", 500, "the server failed"),
    ],
)
def test_errors_of_replicas_keep_their_kind(
    running: Running, notes: Path, prompt: str, status: int, words: str
) -> None:
    async def work() -> None:
        async with running.client() as client:
            with pytest.raises(openai.APIStatusError, match=words) as error:
                await client.images.generate(prompt=prompt)
            assert error.value.status_code == status

    asyncio.run(work())
    assert len(running.model.noted("begin")) == (2 if prompt == "rank" else 1)
    if prompt == "defect":
        wait_until(lambda: "a defect" in running.log.getvalue())
        assert "ray_model.py" in running.log.getvalue()  # of the replica's traceback


def test_50_clients_at_once(running: Running, notes: Path) -> None:
    """Two are drawn and eight wait; whoever gets an image was drawn once, the others never."""

    async def one(client: openai.AsyncOpenAI, seed: int) -> int:
        try:
            made = await client.images.generate(prompt="a", extra_body={"seed": seed})
        except openai.RateLimitError as error:
            assert int(error.response.headers["Retry-After"]) >= 1
            return 429
        assert decoded(made.data[0].b64_json).getpixel((0, 0)) == (seed, 0, 0)
        return 200

    async def work() -> dict[int, int]:
        async with running.client() as client:
            found = await asyncio.gather(*(one(client, seed) for seed in range(50)))
        return dict(enumerate(found))

    found = asyncio.run(work())
    served = sorted(seed for seed, status in found.items() if status == 200)
    assert len(served) >= 10
    assert sorted(seed for _, seed in running.model.noted("end")) == served


@pytest.mark.parametrize("seed", [7, None])
def test_a_drawing_whose_replica_is_killed_is_repeated_once(
    running: Running, notes: Path, seed: int | None
) -> None:
    """With its own seed, or with the one that was drawn for it."""
    told: list[object] = []

    def report(update: Progress | Preview | Waiting) -> None:
        told.append(update)
        if update == Progress("denoising", 4, 6) and len(running.model.noted("begin")) == 1:
            os.kill(running.model.noted("begin")[0][0], signal.SIGKILL)

    made = running.engine.draw(request(seed, 6, previews=2), report)
    begun = running.model.noted("begin")
    (first, second), (used, again) = zip(*begun, strict=True)
    assert used == again == made.metadata[0]["seed"] and first != second
    assert seed in (used, None)
    assert made.images[0].getpixel((0, 0)) == (used % 256, 0, 0)
    assert running.model.noted("end") == begun[1:]
    assert [each.number for each in told if isinstance(each, Preview)] == [0, 1]
    assert told[-1] == Progress("denoising", 6, 6)


def test_a_drawing_is_given_up_when_its_second_replica_is_killed(
    running: Running, notes: Path
) -> None:
    killed: Counter[int] = Counter()

    def report(update: Progress | Preview | Waiting) -> None:
        process = (running.model.noted("begin") or [(0, 0)])[-1][0]
        if isinstance(update, Progress) and update.done == 2 and not killed[process]:
            killed[process] += 1
            os.kill(process, signal.SIGKILL)

    with pytest.raises(EngineLostError):
        running.engine.draw(request(8, 100), report)
    assert len(running.model.noted("begin")) == 2 and running.model.noted("end") == []
    # Both are replaced.
    assert running.engine.draw(request(9), lambda _: None).images


def test_a_stopped_drawing_frees_its_replica(running: Running, notes: Path) -> None:
    def report(update: Progress | Preview | Waiting) -> None:
        if update == Progress("denoising", 2, 1000):
            raise StoppedError

    with pytest.raises(StoppedError):
        running.engine.draw(request(1, 1000), report)
    for seed in (2, 3):  # on either replica
        running.engine.draw(request(seed), lambda _: None)
    assert [seed for _, seed in running.model.noted("end")] == [2, 3]


def test_requests_go_where_their_adapters_are_loaded(running: Running, notes: Path) -> None:
    settings = request(0).settings
    processes: set[int] = set()
    for seconds in (1, 3, 9):  # until Ray knows what is loaded where
        file = Path(f"after {seconds} s.safetensors")
        with_it = DrawRequest(replace(settings, loras=((file, 1.0),)))
        running.engine.draw(with_it, lambda _: None)
        time.sleep(seconds)
        for _ in range(11):  # by one process: by chance in one of 2,048 times
            running.engine.draw(with_it, lambda _: None)
        processes = {process for process, _ in running.model.noted("end")[-12:]}
        if len(processes) == 1:
            break
    assert len(processes) == 1


def impatient_application(*arguments: object) -> Application:
    """The application with other delays than half a minute and ten minutes."""
    made = drawing_application(*arguments)  # type: ignore[arg-type]
    scaling = made._bound_deployment._deployment_config.autoscaling_config
    scaling.upscale_delay_s = scaling.downscale_delay_s = SCALE_SECONDS
    scaling.metrics_interval_s = scaling.look_back_period_s = SCALE_SECONDS / 2
    return made


@pytest.fixture
def scaling(
    running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[RayEngine, NotingModel]]:
    """An application beside the server's, with one replica or two."""
    monkeypatch.setattr(cluster, "drawing_application", impatient_application)
    model = NotingModel(tmp_path / "notes.txt")
    model.notes.touch()
    replicas = replicas_for(2, "cpu", scaling=True)
    with drawing(model, replicas, 30, SCALING) as engine:  # type: ignore[arg-type]
        engine.warm_up()  # as servers do, or handles' first uses by several threads collide
        yield engine, model


def running_replicas() -> int:
    deployment = serve.status().applications[SCALING].deployments["Replica"]
    return deployment.replica_states.get("RUNNING", 0)


def test_replicas_come_with_requests_and_go_without(scaling: tuple[RayEngine, NotingModel]) -> None:
    """Nothing is lost or drawn twice while a replica starts, nor while one ends."""
    engine, model = scaling
    assert running_replicas() == 1
    seeds = iter(range(10_000))
    drawn: list[int] = []
    done = threading.Event()

    def draw() -> None:
        seed = next(seeds)
        image = engine.draw(request(seed), lambda _: None).images[0]
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


class BrokenEngine(NotingEngine):
    """An engine whose device fails, in a drawing and when its memory is to be freed."""

    def draw(self, request: DrawRequest, report: Report) -> Drawing:
        tensor = np.zeros(3)
        self.tensor = weakref.ref(tensor)
        raise zm.CudaError("an illegal access")

    def free_memory(self) -> None:
        gc.collect()
        assert self.tensor() is None
        raise zm.CudaError("an illegal access")


def test_a_replica_whose_device_is_broken_asks_to_be_replaced(notes: Path) -> None:
    class Broken(NotingModel):
        def load(self) -> NotingEngine:
            return BrokenEngine(self.notes)

    replica = Replica(Broken(notes))  # type: ignore[arg-type]
    replica.check_health()

    async def work() -> list[object]:
        return [event async for event in replica.draw(request(1))]

    (failure,) = asyncio.run(work())
    assert isinstance(failure, Failure) and isinstance(failure.error, zm.CudaError)
    with pytest.raises(RuntimeError, match="the device is broken: an illegal access"):
        replica.check_health()


def test_a_cluster_that_is_too_small(running: Running) -> None:
    with pytest.raises(zm.UsageError, match=f"must be at most {CPUS}: each has a CPU of its own"):
        replicas_for(CPUS + 1, None, scaling=False)
    with pytest.raises(zm.UsageError, match="device cannot be cuda: the cluster has no GPU"):
        replicas_for(1, "cuda", scaling=False)
    assert replicas_for(None, None, scaling=True) == Replicas(1, 1, gpus=0)
    with pytest.raises(zm.UnsupportedError, match="2 GPUs are asked for each replica, and the cl"):
        replicas_for(None, None, scaling=False, gpus_per_replica=2)


def test_a_stop_of_all_processes_at_once(tmp_path: Path) -> None:
    """A service manager sends the signal to Ray's processes too, so there is no cluster to ask."""
    words = [sys.executable, "-m", "zimage_mxfp8", "serve", "--ray", "--replicas", "1"]
    words += ["--device", "cpu", "--port", "0", "--model-dir", str(FOLDER)]
    words += ["--transformer", str(TRANSFORMER)]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=log, start_new_session=True, text=True
        )
    try:
        assert process.stdout is not None
        assert "is served at http://127.0.0.1:" in process.stdout.readline()
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(timeout=55) == 0  # Ray gives up after 60 seconds
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
