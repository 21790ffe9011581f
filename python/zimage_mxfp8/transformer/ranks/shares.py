"""The division of tokens among ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .group import RankGroup


def even(total: int, parts: int) -> tuple[int, ...]:
    """Divide a number into parts that differ by 1 at most, the larger ones first."""
    return tuple(total // parts + (part < total % parts) for part in range(parts))


def overlaps(
    lengths: Sequence[int], counts: Sequence[int], begin: int, end: int
) -> tuple[slice, ...]:
    """Return where the first tokens of each item are among the tokens from `begin` to `end`.

    Args:
        lengths: tokens of each item; items follow one another.
        counts: how many first tokens of each item are looked for.
        begin: the first token of a range of the sequence.
        end: the token after the range.

    Returns:
        Slices of the range, empty ones for items that have no such token in it.
    """
    found, start = [], 0
    for length, count in zip(lengths, counts, strict=True):
        first, last = max(start, begin), min(start + count, end)
        found.append(slice(first - begin, max(first, last) - begin))
        start += length
    return tuple(found)


@dataclass(frozen=True)
class Shares:
    """The tokens of each rank of a group: consecutive ones of a sequence.

    Attributes:
        group: the ranks.
        counts: number of tokens of each.
    """

    group: RankGroup
    counts: tuple[int, ...]

    @property
    def here(self) -> slice:
        """The tokens of this rank."""
        begin = sum(self.counts[: self.group.rank])
        return slice(begin, begin + self.counts[self.group.rank])

    def rows_of(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """Return how many tokens of each item this rank has.

        Args:
            lengths: tokens of each item on all ranks; items follow one another.
        """
        parts = overlaps(lengths, lengths, self.here.start, self.here.stop)
        return tuple(part.stop - part.start for part in parts)

    def whole(self, x: torch.Tensor) -> torch.Tensor:
        """Return the tokens [n, C] of all ranks from those of this rank."""
        return self.group.whole(x, self.counts)
