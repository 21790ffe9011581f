"""Low-rank branches parallel to a quantised matrix, and the error that they remove.

Two ways to add one, with W the matrix and Q the format:

- on the residual: Q(W) + L with L the best rank-r approximation of W - Q(W). Its squared error is
  |W - Q(W)|^2 less the squares of the r largest singular values (Eckart, Young).
- SVDQuant's (Li et al., arXiv:2411.05007): L is the best rank-r approximation of W, and W - L is
  quantised. Its smoothing, which moves outliers of activations into the weights, needs activations
  and is left out.

Singular values come from randomised block Krylov iteration (Musco, Musco, NIPS 2015; Halko,
Martinsson, Tropp, SIAM Review 53, 2011, for the plain one) with a fixed seed. They can only be too
small, so the measured gain of a branch on the residual is a lower bound. Noise, where all singular
values are similar, is the hardest case: there the bound is a few per cent low.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final, TypeVar

import numpy as np

from ... import _core
from ...checkpoint.source import SourceTensor
from ...streaming.jobs import Job, run_jobs
from ...streaming.rows import read_rows
from ...streaming.worker import Worker
from .formats import BASE_FORMATS, FORMATS, Doubles, Floats, measure_base, residual
from .report import LowRankError

RANKS: Final = (16, 32)
STEPS: Final = len(BASE_FORMATS) + len(RANKS)  # of `measure_low_rank`
MAX_ELEMENTS: Final = 80_000_000  # of a matrix; twice in float32 they stay well under 1 GiB
_BLOCKS: Final = 5  # of the Krylov basis
_NEGLIGIBLE: Final = 1e-10  # of a squared length; rounding errors of float32 reach 1e-11
_ROWS: Final = 512  # that one thread quantises at once
_PRODUCT_ROWS: Final = 1024  # of a GEMM; BLAS copies the other factor once per job
_BRANCH_BITS: Final = 16
_T = TypeVar("_T")


def leading_triplets(
    matrix: Floats, rank: int, *, threads: int = 0, seed: int = 0
) -> tuple[Floats, Doubles, Floats]:
    """Return approximations of the largest singular values of a matrix and their vectors.

    Args:
        matrix: [N, K].
        rank: number of singular values, at most min(N, K).
        threads: cores to use; 0 means all.
        seed: seed of the random start.

    Returns:
        U times the singular values [N, rank], these values [rank], V^T [rank, K].
    """
    start = np.random.default_rng(seed).standard_normal((matrix.shape[1], rank), dtype=np.float32)
    block = basis = _orthonormal(start)
    image = images = _product(matrix, block, threads)
    for _ in range(_BLOCKS - 1):
        block = _product(matrix.T, _orthonormal(image), threads)
        for _ in range(2):  # once leaves rounding errors in, twice is enough (Parlett, Kahan)
            longest = np.square(block, dtype=np.float64).sum(axis=0).max(initial=0.0)
            block -= basis @ (basis.T @ block)
            block = _orthonormal(block, _NEGLIGIBLE * float(longest))
        basis = np.concatenate([basis, block], axis=1)
        image = _product(matrix, block, threads)
        images = np.concatenate([images, image], axis=1)
    tall = images.astype(np.float64)
    squares, vectors = np.linalg.eigh(tall.T @ tall)
    values = np.sqrt(np.maximum(squares[::-1][:rank], 0.0))
    leading = vectors[:, ::-1][:, :rank].astype(np.float32)
    return images @ leading, values, (basis @ leading).T


def _product(left: Floats, right: Floats, threads: int, out: Floats | None = None) -> Floats:
    """Return `left @ right`, computed on threads of this package if BLAS has only one.

    BLAS's own threads wait for one another by spinning. If other programs use the cores too, that
    takes more processor time than the work.
    """
    if out is None:
        out = np.empty((left.shape[0], right.shape[1]), np.float32)
    if os.environ.get("OPENBLAS_NUM_THREADS") != "1":
        return np.matmul(left, right, out=out)

    def work(_: Worker, part: slice) -> None:
        np.matmul(left[part], right, out=out[part])

    _on_rows(left.shape[0], _PRODUCT_ROWS, threads, work)
    return out


def _orthonormal(vectors: Floats, least: float = 0.0) -> Floats:
    """Return an orthonormal basis of a tall matrix's columns, less directions lost in rounding.

    It comes from the eigenvectors of the small Gram matrix, in float64, so that all large
    operations are GEMMs. LAPACK's QR spends most of its time waiting for threads when cores are
    busy.

    Args:
        vectors: the columns.
        least: squared length up to which a direction consists of rounding errors, if that is more
            than the length that is negligible compared with the longest one.
    """
    tall = vectors.astype(np.float64)
    squares, directions = np.linalg.eigh(tall.T @ tall)
    kept = squares > max(least, _NEGLIGIBLE * squares.max(initial=0.0))
    basis: Doubles = tall @ (directions[:, kept] / np.sqrt(squares[kept]))
    return basis.astype(np.float32)


def measure_low_rank(
    tensor: SourceTensor, group: str, memory: Floats, threads: int, step: Callable[[], object]
) -> list[LowRankError]:
    """Measure every format with branches of `RANKS` on every row of a matrix.

    Args:
        tensor: the matrix, finite.
        group: its group.
        memory: [2, at least N * K], overwritten. It is reused for one matrix after another, because
            the system is slow to give fresh memory.
        threads: cores to use; 0 means all.
        step: called `STEPS` times, as the work goes on.
    """
    rows, cols = shape = (tensor.shape[0], tensor.shape[1])
    weights, other = (half[: rows * cols].reshape(shape) for half in memory)

    def read(worker: Worker, part: slice) -> tuple[float, float]:
        _, matrix, dtype = read_rows(worker, tensor, part.start, part.stop, False)
        _core.cast(matrix, dtype, weights[part], "float32", 1)
        signal = np.einsum("ij,ij->", weights[part], weights[part], dtype=np.float64)
        return float(signal), _largest(weights[part])

    found = _on_rows(rows, _ROWS, threads, read)
    signal = sum(squares for squares, _ in found) or 1.0
    largest = max(values for _, values in found)
    most = min(max(RANKS), rows, cols)
    plain: dict[str, float] = {}
    after_residual: dict[tuple[str, int], float] = {}
    for name in BASE_FORMATS:

        def quantise(_: Worker, part: slice, name: str = name) -> float:
            return residual(weights[part], name, largest, other[part])

        plain[name] = sum(_on_rows(rows, _ROWS, threads, quantise))
        energies = np.square(leading_triplets(other, most, threads=threads)[1])
        for rank in RANKS:
            left = plain[name] - float(energies[:rank].sum())
            after_residual[name, rank] = 0.0 if rank >= min(shape) else max(left, 0.0)
        step()
    scaled, _, vt = leading_triplets(weights, most, threads=threads)
    after_svdquant: dict[tuple[str, int], float] = {}
    for rank in RANKS:
        _product(scaled[:, :rank], vt[:rank], threads, other)

        def subtract(_: Worker, part: slice) -> float:
            np.subtract(weights[part], other[part], out=other[part])
            return _largest(other[part])

        rest_largest = max(_on_rows(rows, _ROWS, threads, subtract))

        def requantise(_: Worker, part: slice, largest: float = rest_largest) -> dict[str, float]:
            return measure_base(other[part], largest)

        errors = _on_rows(rows, _ROWS, threads, requantise)
        for name in BASE_FORMATS:
            after_svdquant[name, rank] = sum(error[name] for error in errors)
        step()
    return [
        LowRankError(
            tensor.name,
            group,
            name,
            rank,
            (FORMATS[name].bits(shape) + _BRANCH_BITS * rank * (rows + cols)) / (rows * cols),
            plain[name] / signal,
            after_residual[name, rank] / signal,
            after_svdquant[name, rank] / signal,
        )
        for name in BASE_FORMATS
        for rank in RANKS
    ]


def _on_rows(rows: int, step: int, threads: int, work: Callable[[Worker, slice], _T]) -> list[_T]:
    """Return the results of `work` per `step` rows, in order: sums do not depend on threads."""
    found: dict[int, _T] = {}

    def job(part: slice) -> Job:
        def run(worker: Worker) -> None:
            found[part.start] = work(worker, part)

        return Job("", 0, run)

    parts = [slice(begin, min(begin + step, rows)) for begin in range(0, rows, step)]
    run_jobs([job(part) for part in parts], None, threads=threads)
    return [found[part.start] for part in parts]


def _largest(matrix: Floats) -> float:
    return float(max(matrix.max(), -matrix.min()))
