"""The queue in front of an engine: threads that draw, and jobs whose events asyncio awaits."""

from __future__ import annotations

import asyncio
import threading
import time
import traceback
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from statistics import median
from typing import Literal, Protocol

from ..errors import CheckpointError, Error, UsageError
from .engine import Drawing, DrawRequest, Engine, EngineLostError, Preview, Progress, Waiting

_FIRST_GUESS = 5.0  # seconds of a drawing, before any has ended
_REMEMBERED = 16  # drawings, for the guess
Outcome = Literal["done", "failed", "refused", "stopped"]


class QueueFullError(Exception):
    """As many jobs wait as the queue holds.

    Attributes:
        retry_after: seconds after which there may be room.
    """

    def __init__(self, retry_after: int) -> None:
        super().__init__()
        self.retry_after = retry_after


class StoppingError(Exception):
    """The server stops, and begins nothing new."""


class StoppedError(Exception):
    """A drawing that was stopped: its client went away, or asked for it."""


class DeadlineError(Exception):
    """A drawing that was not finished in time.

    Attributes:
        seconds: the time that it had.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds


@dataclass(frozen=True)
class Queued:
    """Other jobs come first.

    Attributes:
        ahead: their number.
    """

    ahead: int


@dataclass(frozen=True)
class Done:
    """The end of a job.

    Attributes:
        drawing: its images.
    """

    drawing: Drawing


@dataclass(frozen=True)
class Failed:
    """The end of a job without images.

    Attributes:
        error: the reason, without its traceback, which would keep tensors alive.
    """

    error: Exception


Event = Queued | Progress | Preview | Done | Failed


class Observer(Protocol):
    """Is told what the drawing threads do; called from those threads."""

    def stage_ended(self, stage: str, seconds: float) -> None:
        """Note that a stage of a drawing is over."""

    def step_done(self) -> None:
        """Note that a step is over."""

    def job_ended(self, outcome: Outcome) -> None:
        """Note the end of a job that was drawn, or begun."""

    def failed(self, detail: str, request_id: str = "") -> None:
        """Note a failed drawing or warm-up: a sentence, or the traceback of an unforeseen error."""


class Job:
    """A request in the queue. Made by `JobQueue.submit`.

    Attributes:
        request: what to draw.
        request_id: for the log.
        progress: the latest progress; None before the first.
        is_waiting: whether the engine has it and cannot begin yet, see `Waiting`.
    """

    def __init__(
        self, queue: JobQueue, request: DrawRequest, seconds: float, request_id: str
    ) -> None:
        self.request = request
        self.request_id = request_id
        self.progress: Progress | None = None
        self.is_waiting = False
        self._queue = queue
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._stopped = threading.Event()

    @property
    def is_stopped(self) -> bool:
        """Whether nobody waits for the job any more."""
        return self._stopped.is_set()

    def stop(self) -> None:
        """Stop drawing after the current step, or never begin. Any thread may call it."""
        self._stopped.set()
        if self._queue.forget(self):
            self.tell(Failed(StoppedError()))

    def tell(self, event: Event) -> None:
        """Hand an event to the reader. Any thread may call it."""
        if isinstance(event, Progress):
            self.progress = event
        with suppress(RuntimeError):  # the loop has ended, and with it the reader
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def events(self) -> AsyncIterator[Event]:
        """Yield the job's events; the last one is `Done` or `Failed`. Closing this stops the job.

        Read it once, in the loop that submitted the job.
        """
        try:
            event: Event | None = None
            while not isinstance(event, (Done, Failed)):
                left = self._deadline - time.monotonic()
                try:
                    event = await asyncio.wait_for(self._events.get(), max(0.0, left))
                except asyncio.TimeoutError:
                    event = Failed(DeadlineError(self._seconds))
                yield event
        finally:
            self.stop()


class JobQueue:
    """Jobs in order, and the threads that draw them: one for each of the engine's places.

    Args:
        engine: draws.
        limit: jobs that may wait behind those that are drawn.
        observer: is told what happens.
    """

    def __init__(self, engine: Engine, limit: int, observer: Observer) -> None:
        self._engine = engine
        self._limit = limit
        self._observer = observer
        self._waiting: deque[Job] = deque()
        self._in_hand: dict[Job, None] = {}  # of the engine, in the order in which they came
        self._changed = threading.Condition()
        self._is_ready = self._is_stopping = False
        self._durations: deque[float] = deque(maxlen=_REMEMBERED)
        self._thread = threading.Thread(target=self._work, name="drawing", daemon=True)
        self._on_broken: Callable[[Exception], object] = lambda _: None

    @property
    def waiting(self) -> int:
        """Number of jobs that wait, here or at the engine."""
        with self._changed:
            return len(self._waiting) + sum(job.is_waiting for job in self._in_hand)

    @property
    def running(self) -> tuple[Job, ...]:
        """The jobs that are drawn, in the order in which they came."""
        with self._changed:
            return tuple(job for job in self._in_hand if not job.is_waiting)

    @property
    def is_ready(self) -> bool:
        """Whether the engine is warm and jobs are accepted."""
        return self._is_ready and not self._is_stopping

    def start(self, on_broken: Callable[[Exception], object] = lambda _: None) -> None:
        """Start to warm the engine up, and then to draw.

        Args:
            on_broken: called from a thread if the engine cannot be warmed up, or cannot free memory
                after a failed drawing. Nothing more is drawn then.
        """
        self._on_broken = on_broken
        self._thread.start()

    def submit(self, request: DrawRequest, seconds: float, request_id: str = "") -> Job:
        """Append a job. Call it in an event loop.

        Args:
            request: what to draw.
            seconds: time for waiting and drawing together.
            request_id: for the observer, if the drawing fails.

        Raises:
            QueueFullError: too many jobs wait.
            StoppingError: `stop` was called.
        """
        with self._changed:
            ahead = self.check_room()
            job = Job(self, request, seconds, request_id)
            self._waiting.append(job)
            if ahead:
                job.tell(Queued(ahead))
            self._changed.notify_all()
        return job

    def check_room(self) -> int:
        """Return the number of jobs that must end before, or raise as `submit` does.

        For callers that first do work which a refusal would waste.
        """
        with self._changed:
            if self._is_stopping:
                raise StoppingError
            places = self._engine.places
            count = len(self._waiting) + len(self._in_hand)
            if count >= places + self._limit:
                raise QueueFullError(self._retry_after())
            return max(0, count - places + 1)

    def forget(self, job: Job) -> bool:
        """Drop a job that waits; return whether it did."""
        with self._changed:
            try:
                self._waiting.remove(job)
            except ValueError:
                return False
        return True

    def stop(self, *, now: bool = False) -> None:
        """Accept nothing more and fail what waits. What is drawn is finished, unless `now`."""
        with self._changed:
            self._is_stopping = True
            waiting = list(self._waiting)
            self._waiting.clear()
            at_engine = [job for job in self._in_hand if job.is_waiting]
            running = [job for job in self._in_hand if not job.is_waiting]
            self._changed.notify_all()
        for job in (*waiting, *at_engine):
            job.tell(Failed(StoppingError()))
        for job in (*at_engine, *(running if now else ())):
            job.stop()

    def join(self, seconds: float | None = None) -> bool:
        """Wait for drawing to end after `stop`, if it was started; return whether it has."""
        if self._thread.ident is not None:
            self._thread.join(seconds)
        return not self._thread.is_alive()

    def _retry_after(self) -> int:
        duration = median(self._durations) if self._durations else _FIRST_GUESS
        # One drawing makes room for one.
        return min(60, max(1, round(duration / self._engine.places)))

    # ---- the drawing threads

    def _work(self) -> None:
        try:
            self._engine.warm_up()
        except Exception as error:  # a broken model
            self._break(error)
            return
        self._is_ready = True
        others = [
            threading.Thread(target=self._draw_all, name=f"drawing-{place}", daemon=True)
            for place in range(1, self._engine.places)
        ]
        for thread in others:
            thread.start()
        self._draw_all()
        for thread in others:
            thread.join()

    def _break(self, error: Exception) -> None:
        """Draw nothing more."""
        self._observer.failed(_detail(error))
        self._on_broken(without_frames(error))
        self.stop()

    def _draw_all(self) -> None:
        while (job := self._next()) is not None:
            end = self._run(job)
            with self._changed:  # before the client asks again, for whom there is room now
                del self._in_hand[job]
            job.tell(end)
            del job, end  # with their images, until the next one comes

    def _next(self) -> Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_stopping)
            if not self._waiting:
                return None
            job = self._waiting.popleft()
            self._in_hand[job] = None
            return job

    def _run(self, job: Job) -> Done | Failed:
        """Draw a job; return its end, which is told once there is room for another."""
        begin = time.monotonic()
        stages = _Stages(self._observer)

        def report(update: Progress | Preview | Waiting) -> None:
            nonlocal begin, stages
            if job.is_stopped:
                raise StoppedError
            job.is_waiting = isinstance(update, Waiting)
            if isinstance(update, Waiting):
                if self._is_stopping:  # the engine may have nothing left that can draw it
                    raise StoppingError
                stages.end()
                begin, stages = time.monotonic(), _Stages(self._observer)
                return
            if isinstance(update, Progress):
                stages.enter(update)
            job.tell(update)

        outcome: Outcome = "failed"
        end: Done | Failed
        try:
            drawing = self._engine.draw(job.request, report)
            end, outcome = Done(drawing), "done"
        except (StoppedError, StoppingError) as error:
            end, outcome = Failed(without_frames(error)), "stopped"
        except Exception as error:  # of the engine; other requests are none the worse
            if is_of_request(error, job.request):
                outcome = "refused"
            else:
                self._observer.failed(_detail(error), job.request_id)
            end = Failed(without_frames(error))
        stages.end()
        if outcome == "done":
            self._durations.append(time.monotonic() - begin)
        elif outcome != "stopped":
            try:
                self._engine.free_memory()
            except Exception as error:  # a device that is broken, until the process has ended
                self._break(error)
        self._observer.job_ended(outcome)
        return end


class _Stages:
    """Times the stages of a drawing: each lasts from the last report of the one before to its own.

    "denoising" reports for the first time when its first step is over.
    """

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._stage = ""
        self._begin = self._latest = time.monotonic()

    def enter(self, progress: Progress) -> None:
        """Take a report."""
        if progress.stage != self._stage:
            self.end()
            self._stage = progress.stage
        if progress.stage == "denoising" and progress.done:
            self._observer.step_done()
        self._latest = time.monotonic()

    def end(self) -> None:
        """Count the stage that goes on, if one does."""
        if self._stage:
            self._observer.stage_ended(self._stage, self._latest - self._begin)
        self._begin = self._latest


def is_of_request(error: Exception, request: DrawRequest) -> bool:
    """Return whether a drawing failed for a value or an adapter that the client chose."""
    return isinstance(error, UsageError) or (
        isinstance(error, CheckpointError) and bool(request.settings.loras)
    )


def _detail(error: Exception) -> str:
    if isinstance(error, (EngineLostError, Error)):
        return str(error)
    return "".join(traceback.format_exception(error))


def without_frames(error: Exception) -> Exception:
    """Return an error without its causes and the frames that they passed, and their tensors.

    A frame that refers to its own error is freed only when garbage is collected.
    """
    each: BaseException | None = error
    while each is not None:
        cause = each.__cause__ or each.__context__
        each.__traceback__ = each.__context__ = each.__cause__ = None
        each = cause
    return error
