"""Adding adapters to weights: W + w dW, in float64, for some rows at a time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from .branches import Branch, Delta, Dense

Double = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Change:
    """What one adapter at a weight does to some rows of a tensor.

    Attributes:
        rows: which, of the tensor.
        delta: dW of those rows, in float64; a vector for a bias or a norm.
        scale: w.
        magnitude: m of DoRA, per row [rows, 1] or per column [1, columns]; None otherwise.
        norms: of the columns of W + w dW, [1, columns], for a magnitude per column.
    """

    rows: slice
    delta: Delta
    scale: float
    magnitude: Double | None = None
    norms: Double | None = None

    def add(self, total: Double, weight: Double, begin: int) -> None:
        """Add it to the tensor's rows from `begin` on.

        DoRA is m (W + w dW) / |W + w dW| - W, as PEFT computes it. Changes are relative to the
        original weight, so that their order does not matter.

        Args:
            total: those rows, changed in place.
            weight: the same rows of the original.
            begin: number of the first row.
        """
        low, high = max(begin, self.rows.start), min(begin + len(total), self.rows.stop)
        if low >= high:
            return
        there = slice(low - begin, high - begin)
        change = self._scaled(slice(low - self.rows.start, high - self.rows.start))
        if self.magnitude is None:
            total[there] += change
            return
        changed = weight[there] + change
        if self.norms is not None:
            factor = self.magnitude / self.norms
        else:
            own = self.magnitude[low - self.rows.start : high - self.rows.start]
            factor = own / np.linalg.norm(changed, axis=1, keepdims=True)
        total[there] += factor * changed - weight[there]

    def with_column_norms(self, parts: Iterable[tuple[int, Double]]) -> Change:
        """Return it with the norms of the columns of W + w dW.

        Args:
            parts: first row and rows of the original weight, from all of `rows` in order.
        """
        assert self.magnitude is not None
        squares = np.zeros(self.magnitude.shape)
        for begin, weight in parts:
            own = slice(begin - self.rows.start, begin - self.rows.start + len(weight))
            squares += np.square(weight + self._scaled(own)).sum(axis=0, keepdims=True)
        return replace(self, norms=np.sqrt(squares))

    def _scaled(self, rows: slice) -> Double:
        scaled: Double = np.multiply(self.delta.dense(rows), self.scale, dtype=np.float64)
        return scaled


def weight_change(branch: Branch, scale: float, rows: slice) -> Change | None:
    """Return what a branch does to a weight; None if it changes the bias alone."""
    if branch.matrix is None:
        return None
    magnitude = None if branch.magnitude is None else branch.magnitude.astype(np.float64)
    return Change(rows, branch.matrix.in_double(), scale, magnitude)


def bias_change(branch: Branch, scale: float, rows: slice) -> Change | None:
    """Return what a branch does to a bias; None if nothing."""
    return None if branch.bias is None else Change(rows, Dense(branch.bias), scale)
