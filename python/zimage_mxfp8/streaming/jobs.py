"""Streaming work from checkpoint to checkpoint: jobs, each of which reads, computes and writes.

Workers take jobs in order, so that the reading of one overlaps with the arithmetic and the writing
of others. Every job has its own place in the output: the bytes do not depend on the order of the
workers. Memory is bounded by workers times chunk size.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .. import _core
from ..checkpoint.output import AtomicFile
from ..checkpoint.source import SourceTensor
from ..errors import UnsupportedError
from ..layout import padded_shape
from .worker import Worker

CHUNK_BYTES = 16 << 20
_MAX_WORKERS = 16  # more would only wait for the memory bus


@dataclass(frozen=True)
class Progress:
    """Progress of a long operation, given to callbacks.

    Attributes:
        done: finished bytes of the input.
        total: bytes of the input.
        tensor: the tensor of the last finished job.
    """

    done: int
    total: int
    tensor: str


ProgressCallback = Callable[[Progress], object]


@dataclass(frozen=True)
class StageProgress:
    """State of an analysis that goes through stages, given to progress callbacks.

    Attributes:
        stage: the work that goes on.
        what: the item that was finished last; empty when the stage begins.
        done: items of all stages that are finished.
        total: items of all stages; 0 while that is not known.
    """

    stage: str
    what: str
    done: int
    total: int


StageCallback = Callable[[StageProgress], object]
# Checks a tensor's bytes from a position on, and raises if they are invalid.
ByteCheck = Callable[[SourceTensor, int, npt.NDArray[np.uint8]], None]


@dataclass(frozen=True)
class Job:
    """A piece of work.

    Attributes:
        tensor: name of the tensor that it is part of.
        nbytes: bytes of the input that it covers, for progress.
        run: does the work, on a worker's thread.
    """

    tensor: str
    nbytes: int
    run: Callable[[Worker], None]


def row_chunks(tensor: SourceTensor) -> list[tuple[int, int]]:
    """Split a matrix into row ranges of about `CHUNK_BYTES`, each a multiple of 128 rows.

    128 rows make one tile row of the blocked scales, so the codes and the scales of a chunk are
    contiguous in the output.
    """
    rows, cols = tensor.shape
    code_cols = padded_shape((1, cols))[1]  # for narrow matrices more than the source has
    row_bytes = max(tensor.nbytes // max(rows, 1), code_cols, 1)
    step = max(CHUNK_BYTES // (row_bytes * 128), 1) * 128
    return [(begin, min(begin + step, rows)) for begin in range(0, rows, step)]


def byte_chunks(tensor: SourceTensor) -> list[tuple[int, int]]:
    """Split a tensor's bytes into ranges of `CHUNK_BYTES`."""
    return [
        (begin, min(begin + CHUNK_BYTES, tensor.nbytes))
        for begin in range(0, tensor.nbytes, CHUNK_BYTES)
    ]


def header_job(header: bytes) -> Job:
    """Return the job that writes the first bytes of a file."""
    data = np.frombuffer(header, np.uint8)
    return Job("", 0, lambda worker: worker.write(0, data))


def copy_jobs(tensor: SourceTensor, position: int, check: ByteCheck | None = None) -> list[Job]:
    """Return the jobs that copy a tensor unchanged to a position of the output.

    `check` sees each chunk before it is written.
    """

    def job(begin: int, end: int) -> Job:
        def run(worker: Worker) -> None:
            data = worker.read(tensor, begin, end - begin, position=position + begin)
            if check is not None:
                check(tensor, begin, data)
            worker.write(position + begin, data)

        return Job(tensor.name, end - begin, run)

    return [job(begin, end) for begin, end in byte_chunks(tensor)]


def _join(thread: threading.Thread) -> None:
    """Wait for a thread despite any Ctrl-C, because it writes to a file that will be deleted."""
    while thread.is_alive():
        with contextlib.suppress(KeyboardInterrupt):
            thread.join()


def run_jobs(
    jobs: Sequence[Job],
    output: AtomicFile | None,
    *,
    threads: int = 0,
    progress: ProgressCallback | None = None,
) -> None:
    """Run jobs on `threads` cores (0: all) and report progress from the calling thread.

    An exception of a job is raised again; of several, that of the first job, so that the same input
    gives the same error. No job starts after a failure.
    """
    cores = threads or _core.default_threads()
    workers = max(min(cores + 1, _MAX_WORKERS, len(jobs)), 1)  # one more to keep the disk busy
    numbers = iter(range(len(jobs)))
    lock, stop = threading.Lock(), threading.Event()
    failures: dict[int, BaseException] = {}
    finished: queue.SimpleQueue[Job | None] = queue.SimpleQueue()

    def work() -> None:
        worker: Worker | None = None
        number: int | None = None
        try:
            worker = Worker(output)
            while not stop.is_set():
                with lock:
                    number = next(numbers, None)
                if number is None:
                    worker.flush()
                    return
                jobs[number].run(worker)
                finished.put(jobs[number])
        except BaseException as error:  # handed to the calling thread
            failures[len(jobs) if number is None else number] = error
            stop.set()
        finally:
            if worker is not None:
                worker.close()
            finished.put(None)

    pool: list[threading.Thread] = []
    total = sum(job.nbytes for job in jobs)
    done = 0
    try:
        for i in range(workers):
            thread = threading.Thread(target=work, name=f"zimage-mxfp8-{i}")
            try:
                thread.start()
            except RuntimeError:  # the system has no more threads; those that started go on
                if not pool:
                    raise UnsupportedError(
                        "the system cannot start a thread", "close other programs"
                    ) from None
                break
            pool.append(thread)
        running = len(pool)
        while running:
            job = finished.get()
            if job is None:
                running -= 1
                continue
            done += job.nbytes
            if progress is not None:
                progress(Progress(done, total, job.tensor))
    finally:  # also when the callback raises, or on Ctrl-C
        stop.set()
        for thread in pool:
            _join(thread)
    if failures:
        raise failures[min(failures)]
