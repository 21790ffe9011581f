"""A low-rank adapter, as a front end could bring one: the package knows only its base class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from zimage_mxfp8.transformer.adapter import Adapter
from zimage_mxfp8.transformer.ops import PLAIN, Activation


@dataclass(frozen=True)
class Branch:
    """scale * B A for some rows of a layer: A is [rank, K] and B [rows, rank]."""

    rows: slice
    a: torch.Tensor
    b: torch.Tensor
    scale: float

    @property
    def delta(self) -> torch.Tensor:
        """The dense matrix [rows, K] that this stands for."""
        return self.scale * (self.b @ self.a)


class LowRankAdapter(Adapter):
    """Adds scale * (x A^T) B^T to the rows of each branch."""

    def __init__(self, branches: Sequence[Branch]) -> None:
        super().__init__()
        self._layout = [(branch.rows, branch.scale) for branch in branches]
        for i, branch in enumerate(branches):
            self.register_buffer(f"a{i}", branch.a)
            self.register_buffer(f"b{i}", branch.b)

    def forward(self, activation: Activation, result: torch.Tensor) -> torch.Tensor:
        x = activation[PLAIN]
        for i, (rows, scale) in enumerate(self._layout):
            narrow = F.linear(x, getattr(self, f"a{i}"))
            result[..., rows].add_(F.linear(narrow, getattr(self, f"b{i}")), alpha=scale)
        return result

    def workspace_nbytes(self, tokens: int) -> int:
        return max(
            tokens * sum(getattr(self, f"b{i}").shape) * getattr(self, f"b{i}").itemsize
            for i in range(len(self._layout))
        )
