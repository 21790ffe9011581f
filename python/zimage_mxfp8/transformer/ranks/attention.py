"""Attention over tokens that ranks share.

Each rank computes the rows of its tokens, after a gathering of the keys and values of all tokens
(as in Llama 3's context parallelism, arXiv:2407.21783, section 3.3.2).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...zimage.constants import HEAD_DIM
from ..attention import attend_rows
from .shares import Shares

_TILE = 128  # queries that a multiprocessor takes at a time, in cuDNN's attention on Hopper


def heads_to_gather_first(heads: int, tokens: int, multiprocessors: int) -> int:
    """Return how many heads are gathered before the others.

    Half of them if possible: their attention takes as long as the gathering of the others, or
    longer. But the multiprocessors take tiles of a head in waves, and another number of heads, a
    quarter at least, is chosen if the waves of both groups are fewer.

    Args:
        heads: number of heads.
        tokens: of the rank that has most of them.
        multiprocessors: of a device.
    """
    tiles = -(-tokens // _TILE)

    def waves(first: int) -> int:
        return sum(-(-part * tiles // multiprocessors) for part in (first, heads - first))

    return min(range(heads // 2, (heads - 1) // 4, -1), key=waves, default=0)


class SharedAttention:
    """The softmax attention of each item over its own tokens, which ranks share.

    Keys and values are gathered from `send` on, so that queries can be computed meanwhile. The
    heads are two groups, see `heads_to_gather_first`: the attention of the first is computed while
    those of the second are gathered. Numbers of tokens may differ from rank to rank.
    """

    def __init__(
        self, heads: int, lengths: Sequence[int], shares: Shares, dtype: torch.dtype
    ) -> None:
        """Prepare memory.

        Args:
            heads: number of heads.
            lengths: tokens of each item on all ranks; items follow one another.
            shares: tokens of each rank.
            dtype: of keys and values.
        """
        self._heads = heads
        self._lengths = lengths
        self._rows = shares.rows_of(lengths)
        first = heads_to_gather_first(heads, max(shares.counts), shares.group.multiprocessors)
        groups = slice(0, first), slice(first, heads)
        self._groups = [group for group in groups if group.start < group.stop]
        shape = 2, heads, HEAD_DIM
        self._gathering = shares.group.gathering(shares.counts, shape, dtype, self._groups)

    def memory(self, first: int, width: int) -> torch.Tensor | None:
        """Return memory for an argument of `send`, which need not be copied from there.

        Args:
            first: 0 if it begins with keys, 1 if with values.
            width: of the argument.

        Returns:
            [tokens of this rank, width], or None.
        """
        own = self._gathering.own
        return None if own is None else own[:, first:].flatten(1)[:, :width]

    def send(self, columns: torch.Tensor) -> None:
        """Begin to gather keys, then values, or both at once.

        Args:
            columns: k, v, or both side by side, [tokens of this rank, heads * 128] each.
        """
        self._gathering.send(columns.unflatten(1, (-1, self._heads, HEAD_DIM)))

    def attend(self, q: torch.Tensor) -> list[torch.Tensor]:
        """Compute the attention of queries, after `send`.

        Args:
            q: [tokens of this rank, heads * 128].

        Returns:
            The attention of one or two groups of heads, [tokens of this rank, heads * 128] each.
        """
        queries = q.unflatten(1, (self._heads, HEAD_DIM))
        return [
            attend_rows(queries[:, group], keys_and_values, self._rows, self._lengths)
            for group, keys_and_values in zip(self._groups, self._gathering.groups(), strict=True)
        ]
