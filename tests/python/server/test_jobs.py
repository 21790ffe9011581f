"""The queue and its events, without HTTP."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

import pytest

import zimage_mxfp8 as zm
from helpers.serving import StubEngine, wait_until
from zimage_mxfp8.server.engine import Drawing, DrawRequest, Preview, Progress, Report, Waiting
from zimage_mxfp8.server.jobs import (
    DeadlineError,
    Done,
    Event,
    Failed,
    Job,
    JobQueue,
    Queued,
    QueueFullError,
    StoppedError,
    StoppingError,
)


class Notes:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, float]] = []
        self.steps = 0
        self.outcomes: list[str] = []
        self.details: list[str] = []

    def stage_ended(self, stage: str, seconds: float) -> None:
        self.stages.append((stage, seconds))

    def step_done(self) -> None:
        self.steps += 1

    def job_ended(self, outcome: str) -> None:
        self.outcomes.append(outcome)

    def failed(self, detail: str, request_id: str = "") -> None:
        self.details.append(detail)


@pytest.fixture
def notes() -> Notes:
    return Notes()


@pytest.fixture
def start(engine: StubEngine, notes: Notes) -> Iterator[Callable[..., JobQueue]]:
    queues: list[JobQueue] = []

    def make(limit: int = 2, **options: Any) -> JobQueue:
        queue = JobQueue(engine, limit, notes)
        queue.start(**options)
        queues.append(queue)
        return queue

    yield make
    engine.gate.set()
    for queue in queues:
        queue.stop(now=True)
        assert queue.join(30)


def request(steps: int = 3, **options: Any) -> DrawRequest:
    return DrawRequest(zm.GenerationSettings("a", steps=steps, seed=1), **options)


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 30))


async def all_of(events: AsyncIterator[Event]) -> list[Event]:
    return [event async for event in events]


def test_events_of_a_job(start: Callable[..., JobQueue], notes: Notes) -> None:
    async def work() -> list[Event]:
        return await all_of(start().submit(request(previews=1), 30).events())

    events = run(work())
    assert [e for e in events if isinstance(e, Progress)] == [
        Progress("encoding", 0, 1),
        Progress("encoding", 1, 1),
        *(Progress("denoising", i, 3) for i in (1, 2, 3)),
    ]
    assert [e.number for e in events if isinstance(e, Preview)] == [0]
    assert isinstance(events[-1], Done) and len(events[-1].drawing.images) == 1
    assert (notes.steps, notes.outcomes, notes.details) == (3, ["done"], [])


def test_time_of_a_step_is_the_stage_of_steps(
    start: Callable[..., JobQueue], engine: StubEngine, notes: Notes
) -> None:
    """Although denoising reports for the first time after its first step."""
    engine.gate.clear()

    async def work() -> None:
        job = start().submit(request(1), 30)
        await asyncio.sleep(0.3)
        engine.gate.set()
        await all_of(job.events())

    run(work())
    times = dict(notes.stages)
    assert list(times) == ["encoding", "denoising"]
    assert times["denoising"] > 0.2 > times["encoding"]


def test_jobs_come_in_order_and_the_queue_is_bounded(
    start: Callable[..., JobQueue], engine: StubEngine
) -> None:
    engine.gate.clear()

    async def work() -> None:
        queue = start(limit=2)
        first = queue.submit(request(5), 30)
        await asyncio.to_thread(wait_until, lambda: queue.running == (first,))
        others = [queue.submit(request(steps), 30) for steps in (6, 7)]
        assert queue.waiting == 2
        for refused in (lambda: queue.submit(request(), 30), queue.check_room):
            with pytest.raises(QueueFullError) as error:
                refused()
            assert error.value.retry_after >= 1
        engine.gate.set()
        found = await asyncio.gather(*(all_of(job.events()) for job in (first, *others)))
        assert [type(events[-1]) for events in found] == [Done] * 3
        assert [events[0] for events in found[1:]] == [Queued(1), Queued(2)]
        assert [drawn.settings.steps for drawn in engine.drawn] == [5, 6, 7]

    run(work())


def test_jobs_in_several_places(
    start: Callable[..., JobQueue], engine: StubEngine, notes: Notes
) -> None:
    engine.places = 3
    engine.gate.clear()

    async def work() -> None:
        queue = start(limit=2)
        jobs = [queue.submit(request(steps), 30) for steps in (4, 5, 6, 7, 8)]
        await asyncio.to_thread(wait_until, lambda: len(engine.drawn) == 3)
        assert set(queue.running) == set(jobs[:3]) and queue.waiting == 2
        with pytest.raises(QueueFullError):
            queue.submit(request(), 30)
        jobs[1].stop()
        engine.gate.set()
        found = await asyncio.gather(*(all_of(job.events()) for job in jobs))
        assert [type(events[-1]) for events in found] == [Done, Failed, Done, Done, Done]
        assert found[3][0] == Queued(1) and found[4][0] == Queued(2)

    run(work())
    assert sorted(notes.outcomes) == ["done"] * 4 + ["stopped"]


class BusyEngine(StubEngine):
    """An engine that waits before it draws, until its gate opens."""

    def __init__(self) -> None:
        super().__init__()
        self.is_busy = threading.Event()

    def draw(self, request: DrawRequest, report: Report) -> Drawing:
        while not self.gate.wait(0.01):
            report(Waiting())
            self.is_busy.set()
        return super().draw(request, report)


def test_a_drawing_that_has_to_wait_again_after_a_stop(notes: Notes) -> None:
    """As if its replica died and none were to come."""
    engine = BusyEngine()
    queue = JobQueue(engine, 1, notes)
    draw = engine.draw

    def begin(request: DrawRequest, report: Report) -> Drawing:
        report(Progress("denoising", 1, 3))
        queue.stop()
        engine.gate.clear()
        return draw(request, report)

    engine.draw = begin  # type: ignore[method-assign]
    queue.start()

    async def work() -> Event:
        return (await all_of(queue.submit(request(), 30).events()))[-1]

    end = run(work())
    assert isinstance(end, Failed) and isinstance(end.error, StoppingError)
    assert queue.join(30) and notes.outcomes == ["stopped"] and notes.details == []


@pytest.mark.parametrize("how", ["drawn", "stopped", "the queue stops"])
def test_a_job_that_waits_at_the_engine(notes: Notes, how: str) -> None:
    engine = BusyEngine()
    queue = JobQueue(engine, 1, notes)
    queue.start()

    async def work() -> Event:
        engine.gate.clear()
        job = queue.submit(request(), 30)
        await asyncio.to_thread(engine.is_busy.wait, 30)
        assert (queue.running, queue.waiting) == ((), 1)
        if how == "drawn":
            engine.gate.set()
        elif how == "stopped":
            job.stop()
        else:
            queue.stop()
        return (await all_of(job.events()))[-1]

    end = run(work())
    queue.stop()
    assert queue.join(30)
    if how == "drawn":
        assert isinstance(end, Done) and notes.outcomes == ["done"]
        return
    expected = StoppedError if how == "stopped" else StoppingError
    assert isinstance(end, Failed) and isinstance(end.error, expected)
    assert (engine.drawn, notes.outcomes) == ([], ["stopped"])


def test_a_reader_that_goes_away_stops_the_engine_within_a_step(
    start: Callable[..., JobQueue], engine: StubEngine, notes: Notes
) -> None:
    async def work() -> None:
        queue = start()
        engine.pause_at = 3
        events = queue.submit(request(1000), 30).events()
        async for event in events:
            if event == Progress("denoising", 2, 1000):
                break
        done = engine.steps
        await events.aclose()  # type: ignore[attr-defined]
        engine.pause_at = None
        engine.gate.set()
        after = await all_of(queue.submit(request(1), 30).events())
        assert isinstance(after[-1], Done)
        assert engine.steps <= done + 1 + 1  # the step that had begun, and the new job's

    run(work())
    assert notes.outcomes == ["stopped", "done"]


def test_a_job_that_waits_leaves_the_queue(
    start: Callable[..., JobQueue], engine: StubEngine
) -> None:
    engine.gate.clear()

    async def work() -> None:
        queue = start(limit=1)
        running = queue.submit(request(), 30)
        await asyncio.to_thread(wait_until, lambda: queue.running == (running,))
        waiting = queue.submit(request(), 30)
        waiting.stop()
        assert queue.waiting == 0
        (last,) = (await all_of(waiting.events()))[-1:]
        assert isinstance(last, Failed) and isinstance(last.error, StoppedError)
        queue.submit(request(), 30)  # there is room again

    run(work())
    assert len(engine.drawn) == 1


def test_deadline_while_waiting_and_while_drawing(
    start: Callable[..., JobQueue], engine: StubEngine, notes: Notes
) -> None:
    engine.gate.clear()

    async def work() -> None:
        queue = start()
        for job in [queue.submit(request(100), 0.1) for _ in range(2)]:
            last = (await all_of(job.events()))[-1]
            assert isinstance(last, Failed) and isinstance(last.error, DeadlineError)
            assert last.error.seconds == 0.1
        assert queue.waiting == 0
        engine.gate.set()
        assert isinstance((await all_of(queue.submit(request(), 30).events()))[-1], Done)

    run(work())
    assert notes.outcomes == ["stopped", "done"]


@pytest.mark.parametrize(
    ("error", "detail"),
    [
        (zm.GenerationError("the image is NaN", 1), "the image is NaN"),
        (
            zm.CudaError("cuda:0 ran out of memory", "close other programs"),
            "ran out of memory; clo",
        ),
        (MemoryError(), "Traceback"),
        (KeyError("x"), "Traceback"),
    ],
)
def test_errors_end_one_job_only(
    start: Callable[..., JobQueue],
    engine: StubEngine,
    notes: Notes,
    error: Exception,
    detail: str,
) -> None:
    engine.failure = error

    async def work() -> None:
        queue = start()
        last = (await all_of(queue.submit(request(), 30).events()))[-1]
        assert isinstance(last, Failed) and last.error is error
        assert last.error.__traceback__ is None
        engine.failure = None
        assert isinstance((await all_of(queue.submit(request(), 30).events()))[-1], Done)

    run(work())
    assert notes.outcomes == ["failed", "done"] and engine.freed == 1
    (found,) = notes.details
    assert detail in found


def test_there_is_room_once_the_end_is_told(
    start: Callable[..., JobQueue], engine: StubEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    running_at_end: list[object] = []
    tell = Job.tell

    def watched(job: Job, event: Event) -> None:
        if isinstance(event, (Done, Failed)):
            running_at_end.append(queue.running)
        tell(job, event)

    monkeypatch.setattr(Job, "tell", watched)
    queue = start(limit=0)

    async def work() -> None:
        assert isinstance((await all_of(queue.submit(request(), 30).events()))[-1], Done)
        engine.failure = KeyError("x")
        assert isinstance((await all_of(queue.submit(request(), 30).events()))[-1], Failed)

    run(work())
    assert running_at_end == [(), ()]


def test_a_failure_keeps_nothing_of_the_drawing_alive(start: Callable[..., JobQueue]) -> None:
    class Tensor:
        pass

    kept: list[weakref.ref[Tensor]] = []

    class Greedy(StubEngine):
        def draw(self, request: DrawRequest, report: Report) -> Drawing:
            tensor = Tensor()
            kept.append(weakref.ref(tensor))
            try:
                raise RuntimeError("no memory")
            except RuntimeError:
                raise zm.CudaError("no memory") from None

        def free_memory(self) -> None:
            gc.collect()
            assert kept[0]() is None

    notes = Notes()
    queue = JobQueue(Greedy(), 1, notes)
    queue.start()

    async def work() -> None:
        assert isinstance((await all_of(queue.submit(request(), 30).events()))[-1], Failed)

    run(work())
    queue.stop()
    assert queue.join(30) and notes.details == ["no memory"]


def test_a_device_that_is_broken_draws_nothing_more(
    start: Callable[..., JobQueue], engine: StubEngine, notes: Notes
) -> None:
    def fail() -> None:
        raise zm.CudaError("an illegal access")

    engine.failure = KeyError("of the drawing")
    engine.free_memory = fail  # type: ignore[method-assign]
    broken: list[Exception] = []

    async def work() -> None:
        queue = start(on_broken=broken.append)
        job = queue.submit(request(), 30)
        assert isinstance((await all_of(job.events()))[-1].error, KeyError)  # type: ignore[union-attr]
        assert not queue.is_ready
        with pytest.raises(StoppingError):
            queue.submit(request(), 30)
        assert await asyncio.to_thread(queue.join, 30)

    run(work())
    assert isinstance(broken[0], zm.CudaError) and notes.details[-1] == "an illegal access"


def test_stop_finishes_what_is_drawn(start: Callable[..., JobQueue], engine: StubEngine) -> None:
    engine.gate.clear()

    async def work() -> None:
        queue = start()
        running = queue.submit(request(), 30)
        await asyncio.to_thread(wait_until, lambda: queue.running == (running,))
        waiting = queue.submit(request(), 30)
        queue.stop()
        assert not queue.is_ready
        with pytest.raises(StoppingError):
            queue.submit(request(), 30)
        engine.gate.set()
        assert isinstance((await all_of(running.events()))[-1], Done)
        last = (await all_of(waiting.events()))[-1]
        assert isinstance(last, Failed) and isinstance(last.error, StoppingError)
        assert await asyncio.to_thread(queue.join, 30)

    run(work())


def test_stop_now_stops_what_is_drawn(start: Callable[..., JobQueue], engine: StubEngine) -> None:
    async def work() -> None:
        queue = start()
        job = queue.submit(request(1000), 30)
        engine.gate.clear()
        await asyncio.to_thread(wait_until, lambda: queue.running == (job,))
        queue.stop(now=True)
        engine.gate.set()
        assert isinstance((await all_of(job.events()))[-1].error, StoppedError)  # type: ignore[union-attr]

    run(work())
    assert engine.steps < 1000


def test_the_queue_is_ready_after_the_warm_up(
    start: Callable[..., JobQueue], engine: StubEngine
) -> None:
    warm = threading.Event()
    engine.on_warm_up = lambda: warm.wait(30)
    queue = start()
    time.sleep(0.05)
    assert not queue.is_ready
    warm.set()
    wait_until(lambda: queue.is_ready)


def test_an_engine_that_cannot_be_warmed_up(
    start: Callable[..., JobQueue], engine: StubEngine, notes: Notes
) -> None:
    def fail() -> None:
        raise zm.CudaError("no memory")

    engine.on_warm_up = fail
    broken: list[Exception] = []
    queue = start(on_broken=broken.append)
    assert queue.join(30) and not queue.is_ready
    assert isinstance(broken[0], zm.CudaError) and notes.details == ["no memory"]
