"""The gathering of rows of all ranks, of one group of their columns after another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch


class Gathering(Protocol):
    """Rows [n, heads, width] that each rank gets from all others.

    Attributes:
        own: memory [rows of this rank, n, heads, width] for the argument of `begin`, which need not
            be copied from there; None if there is none.
    """

    own: torch.Tensor | None

    def begin(self, rows: torch.Tensor, groups: Sequence[slice]) -> Iterator[torch.Tensor]:
        """Begin to gather groups of heads, one after another. Every rank calls this once.

        Args:
            rows: [rows of this rank, n, heads, width], of which the last two are contiguous. They
                must not change before the last group has been returned.
            groups: of heads.

        Returns:
            [rows of all ranks, n, heads of the group, width] of each group, for work that the
            current stream is given from then on. All are to be taken.
        """
