"""The gathering of rows of all ranks, of one group of their columns after another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch


class Gathering(Protocol):
    """Rows [n, heads, width] that each rank gets from all others, in groups of heads."""

    @property
    def own(self) -> torch.Tensor | None:
        """Memory [rows of this rank, n, heads, width] for what `send` is given.

        What is there need not be copied. None if there is no such memory.
        """

    def send(self, columns: torch.Tensor) -> None:
        """Begin to gather some of the n columns of all rows.

        Args:
            columns: [rows of this rank, c, heads, width], the next c columns. The last two
                dimensions are contiguous. It must not change before the last group is there.
        """

    def groups(self) -> Iterator[torch.Tensor]:
        """Return the rows of all ranks, once all columns have been sent.

        Returns:
            [rows of all ranks, n, heads of the group, width] of each group, for work that the
            current stream is given from then on. All are to be taken.
        """
