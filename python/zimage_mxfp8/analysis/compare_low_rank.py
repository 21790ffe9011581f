"""Low-rank branches beside a quantised matrix: what rank r in 16 bits still gains.

Two ways to have one, W being the matrix and Q the format:

- on the residual: Q(W) + L with L the best rank-r approximation of W - Q(W). Its squared error is
  |W - Q(W)|^2 less the squares of the r largest singular values (Eckart, Young).
- SVDQuant's (Li et al., arXiv:2411.05007): L is the best rank-r approximation of W, and W - L is
  quantised. Its smoothing, which moves outliers of activations into the weights, needs activations
  and is left out.

Singular values come from randomised block Krylov iteration (Musco, Musco, NIPS 2015; Halko,
Martinsson, Tropp, SIAM Review 53, 2011, for the plain one) with a fixed seed. They can only be too
small, so what a branch on the residual gains is a lower bound. Noise, whose singular values are
all alike, is the hardest case: there the bound is some per cent low.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from .. import _core
from ..checkpoint.source import SourceTensor
from ..pipeline import Job, Lane, run_jobs
from ..rows import read_rows
from .compare_report import LowRankError
from .formats import BASE_FORMATS, FORMATS, Doubles, Floats, measure, residual

RANKS: Final = (16, 32)
STEPS: Final = 1 + len(BASE_FORMATS) + len(RANKS)  # of `measure_low_rank`
MOST_ELEMENTS: Final = 80_000_000  # of a matrix; twice in float32 they stay well under 1 GiB
_OVERSAMPLING: Final = 8
_ITERATIONS: Final = 3
_NEGLIGIBLE: Final = 1e-12  # of a squared length; float32 has 24 bits
_ROWS: Final = 256  # that one thread works on at once
_BRANCH_BITS: Final = 16


def leading_triplets(matrix: Floats, rank: int, seed: int = 0) -> tuple[Floats, Doubles, Floats]:
    """The largest singular values of a matrix and their vectors, nearly.

    Args:
        matrix: [N, K].
        rank: how many, at most min(N, K).
        seed: of the random start.

    Returns:
        U [N, rank], singular values [rank], V^T [rank, K].
    """
    rows, cols = matrix.shape
    size = min(rank + _OVERSAMPLING, rows, cols)
    start = np.random.default_rng(seed).standard_normal((cols, size), dtype=np.float32)
    blocks = [_orthonormal(matrix @ start)]
    for _ in range(_ITERATIONS):
        blocks.append(_orthonormal(matrix @ _orthonormal(matrix.T @ blocks[-1])))
    basis = _orthonormal(np.concatenate(blocks, axis=1))
    small = (basis.T @ matrix).astype(np.float64)
    squares, left = np.linalg.eigh(small @ small.T)
    left = left[:, ::-1][:, :rank]
    values = np.sqrt(np.maximum(squares[::-1][:rank], 0.0))
    right = (left.T @ small) / np.where(values > 0, values, 1.0)[:, np.newaxis]
    return (basis @ left).astype(np.float32), values, right.astype(np.float32)


def _orthonormal(vectors: Floats) -> Floats:
    """An orthonormal basis of the columns of a tall matrix, less directions lost in rounding.

    From the eigenvectors of the small Gram matrix, in float64: all large operations are products.
    LAPACK's QR spends most of its time waiting for threads where cores are busy.
    """
    tall = vectors.astype(np.float64)
    squares, directions = np.linalg.eigh(tall.T @ tall)
    kept = squares > _NEGLIGIBLE * squares.max(initial=0.0)
    basis: Doubles = tall @ (directions[:, kept] / np.sqrt(squares[kept]))
    return basis.astype(np.float32)


def measure_low_rank(
    tensor: SourceTensor, group: str, threads: int, step: Callable[[], object]
) -> list[LowRankError]:
    """Measure every format with branches of `RANKS` on every row of a matrix.

    Takes eight bytes a weight. NumPy's linear algebra uses threads of its own besides.

    Args:
        tensor: the matrix, finite.
        group: its group.
        threads: cores to use; 0 means all.
        step: called `STEPS` times, as the work goes on.
    """
    rows, cols = shape = (tensor.shape[0], tensor.shape[1])
    weights, other = np.empty(shape, np.float32), np.empty(shape, np.float32)

    def each(work: Callable[[Lane, slice], None]) -> None:
        def job(part: slice) -> Job:
            return Job(tensor.name, 0, lambda lane: work(lane, part))

        parts = [slice(begin, min(begin + _ROWS, rows)) for begin in range(0, rows, _ROWS)]
        run_jobs([job(part) for part in parts], None, threads=threads)

    def read(lane: Lane, part: slice) -> None:
        _, matrix, dtype = read_rows(lane, tensor, part.start, part.stop, False)
        _core.cast(matrix, dtype, weights[part], "float32", 1)

    each(read)
    signal = _squares(weights) or 1.0
    plain = _measure_all(weights, each)
    step()
    after_residual: dict[tuple[str, int], float] = {}
    largest = _largest(weights)
    for name in BASE_FORMATS:

        def quantise(_: Lane, part: slice, name: str = name) -> None:
            residual(weights[part], name, largest, other[part])

        each(quantise)
        values = leading_triplets(other, min(max(RANKS), rows, cols))[1]
        energies = np.square(values)
        for rank in RANKS:
            left = plain[name] - float(energies[:rank].sum())
            after_residual[name, rank] = 0.0 if rank >= min(shape) else max(left, 0.0)
        step()
    u, values, vt = leading_triplets(weights, min(max(RANKS), rows, cols))
    after_svdquant: dict[int, dict[str, float]] = {}
    for rank in RANKS:
        scaled = u[:, :rank] * values[:rank].astype(np.float32)

        def subtract(_: Lane, part: slice, scaled: Floats = scaled, rank: int = rank) -> None:
            np.subtract(weights[part], scaled[part] @ vt[:rank], out=other[part])

        each(subtract)
        after_svdquant[rank] = _measure_all(other, each)
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
            after_svdquant[rank][name] / signal,
        )
        for name in BASE_FORMATS
        for rank in RANKS
    ]


def _measure_all(
    matrix: Floats, each: Callable[[Callable[[Lane, slice], None]], None]
) -> dict[str, float]:
    """Format name -> sum of squared errors of a whole matrix."""
    largest = _largest(matrix)
    found: dict[int, dict[str, float]] = {}

    def work(_: Lane, part: slice) -> None:
        found[part.start] = measure(matrix[part], largest)

    each(work)
    # In row order, so that the sums do not depend on which thread came first.
    return {name: sum(found[begin][name] for begin in sorted(found)) for name in BASE_FORMATS}


def _largest(matrix: Floats) -> float:
    return float(max(matrix.max(), -matrix.min()))


def _squares(matrix: Floats) -> float:
    return sum(float(np.square(row, dtype=np.float64).sum()) for row in matrix)
