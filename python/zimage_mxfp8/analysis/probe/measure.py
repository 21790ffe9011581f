"""Reading weights once (F32: twice) for their metrics, in chunks, on all cores."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from ... import _core
from ...checkpoint.source import SourceTensor
from ...dtypes import FLOAT_NAMES
from ...errors import NonFiniteError
from ...streaming.jobs import Job, Progress, ProgressCallback, row_chunks, run_jobs
from ...streaming.rows import read_rows
from ...streaming.worker import Worker
from .weight_metrics import (
    BIT_PATTERNS,
    Moments,
    WeightMetrics,
    count_outliers,
    metrics_of_counts,
    moments_of,
    pattern_values,
)


def measure(
    tensors: Sequence[SourceTensor],
    outlier_sigma: float,
    *,
    threads: int = 0,
    progress: ProgressCallback | None = None,
) -> dict[str, WeightMetrics]:
    """Return the metrics of non-empty matrices in BF16, F16 or F32, by name.

    Raises:
        NonFiniteError: NaN or Inf; the sentence names tensor, row and column.
        CheckpointError: a file cannot be read.
    """
    narrow = _NarrowWeights([t for t in tensors if t.dtype != "F32"], outlier_sigma)
    wide = _WideWeights([t for t in tensors if t.dtype == "F32"], outlier_sigma)
    rounds = (narrow.jobs() + wide.jobs(), wide.jobs_again())
    total = sum(job.nbytes for jobs in rounds for job in jobs)
    done = 0
    for jobs in rounds:
        run_jobs(jobs, None, threads=threads, progress=_shifted(progress, done, total))
        done += sum(job.nbytes for job in jobs)
    return narrow.metrics | wide.metrics()


def _shifted(progress: ProgressCallback | None, done: int, total: int) -> ProgressCallback | None:
    """Return a callback for one of several rounds; `done` of `total` bytes were read before."""
    if progress is None:
        return None
    return lambda now: progress(Progress(done + now.done, total, now.tensor))


def _jobs(
    tensors: Iterable[SourceTensor], work: Callable[[Worker, SourceTensor, int, int], None]
) -> list[Job]:
    """Return a job for each range of rows: `work(worker, tensor, first row, end)`."""

    def job(tensor: SourceTensor, begin: int, end: int) -> Job:
        nbytes = (end - begin) * (tensor.nbytes // tensor.shape[0])
        return Job(tensor.name, nbytes, lambda worker: work(worker, tensor, begin, end))

    return [job(tensor, *rows) for tensor in tensors for rows in row_chunks(tensor)]


def _check_finite(tensor: SourceTensor, matrix: npt.NDArray[np.generic], first_row: int) -> None:
    at = _core.find_nonfinite(matrix, FLOAT_NAMES[tensor.dtype], 1)
    if at is not None:
        row = first_row + at[0]
        raise NonFiniteError(
            f'{tensor.segments[0].path}: tensor "{tensor.name}" has NaN or Inf at row {row}, '
            f"column {at[1]}",
            row,
            at[1],
            "such a weight has no statistics: download the checkpoint again",
        )


class _NarrowWeights:
    """Measurement of BF16 and F16: counts of the 65536 bit patterns give all metrics."""

    def __init__(self, tensors: Sequence[SourceTensor], outlier_sigma: float) -> None:
        self._tensors = tensors
        self._sigma = outlier_sigma
        self._lock = threading.Lock()
        self._counts: dict[str, npt.NDArray[np.uint64]] = {}  # of tensors in progress
        self._rows_left = {tensor.name: tensor.shape[0] for tensor in tensors}
        self.metrics: dict[str, WeightMetrics] = {}

    def jobs(self) -> list[Job]:
        return _jobs(self._tensors, self._count)

    def _count(self, worker: Worker, tensor: SourceTensor, begin: int, end: int) -> None:
        _, matrix, dtype = read_rows(worker, tensor, begin, end, False)
        counts = worker.scratch.take("counts", BIT_PATTERNS * 8).view(np.uint64)
        counts[:] = 0
        _core.count_bit_patterns(matrix, dtype, counts, 1)
        if counts[~np.isfinite(pattern_values(dtype))].any():
            _check_finite(tensor, matrix, begin)
        whole = self._add(tensor, counts, end - begin)
        if whole is not None:
            self.metrics[tensor.name] = metrics_of_counts(whole, dtype, tensor.shape, self._sigma)

    def _add(
        self, tensor: SourceTensor, counts: npt.NDArray[np.uint64], rows: int
    ) -> npt.NDArray[np.uint64] | None:
        """Add the counts of some rows; return those of the whole tensor once they are complete."""
        with self._lock:
            if tensor.name in self._counts:
                self._counts[tensor.name] += counts
            else:
                self._counts[tensor.name] = counts.copy()
            self._rows_left[tensor.name] -= rows
            return None if self._rows_left[tensor.name] else self._counts.pop(tensor.name)


class _WideWeights:
    """Measurement of F32: moments in float64 in a first round, outliers in a second."""

    def __init__(self, tensors: Sequence[SourceTensor], outlier_sigma: float) -> None:
        self._tensors = tensors
        self._sigma = outlier_sigma
        # By tensor and first row, so that they can be merged in order: the result does not depend
        # on the order of the workers.
        self._moments: dict[str, dict[int, Moments]] = {tensor.name: {} for tensor in tensors}
        self._outliers: dict[str, dict[int, int]] = {tensor.name: {} for tensor in tensors}
        self._whole: dict[str, Moments] = {}

    def jobs(self) -> list[Job]:
        return _jobs(self._tensors, self._sum)

    def jobs_again(self) -> list[Job]:
        return _jobs(self._tensors, self._look_for_outliers)

    def _sum(self, worker: Worker, tensor: SourceTensor, begin: int, end: int) -> None:
        data, matrix, _ = read_rows(worker, tensor, begin, end, False)
        _check_finite(tensor, matrix, begin)
        self._moments[tensor.name][begin] = moments_of(data.view(np.float32))

    def _look_for_outliers(
        self, worker: Worker, tensor: SourceTensor, begin: int, end: int
    ) -> None:
        data, _, _ = read_rows(worker, tensor, begin, end, False)
        whole = self._merged(tensor.name)
        self._outliers[tensor.name][begin] = count_outliers(
            data.view(np.float32), whole.mean, self._sigma * whole.std
        )

    def _merged(self, name: str) -> Moments:
        if name not in self._whole:
            parts = self._moments[name]
            first, *others = sorted(parts)
            whole = parts[first]
            for row in others:
                whole = whole.merge(parts[row])
            self._whole[name] = whole
        return self._whole[name]

    def metrics(self) -> dict[str, WeightMetrics]:
        return {
            tensor.name: self._merged(tensor.name).metrics(
                tensor.shape, sum(self._outliers[tensor.name].values())
            )
            for tensor in self._tensors
        }
