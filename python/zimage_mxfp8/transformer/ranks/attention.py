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


class SharedAttention:
    """The softmax attention of each item over its own tokens, which ranks share.

    Keys and values are gathered from its beginning on, so that queries can be computed meanwhile.
    The heads are two groups: the attention of the first is computed while those of the second are
    gathered. Numbers of tokens may differ from rank to rank.
    """

    def __init__(
        self, kv: torch.Tensor, heads: int, lengths: Sequence[int], shares: Shares
    ) -> None:
        """Begin.

        Args:
            kv: [tokens of this rank, 2 * heads * 128]: k and v side by side.
            heads: number of heads.
            lengths: tokens of each item on all ranks; items follow one another.
            shares: tokens of each rank.
        """
        self._heads = heads
        self._lengths = lengths
        self._rows = shares.rows_of(lengths)
        half = heads // 2
        self._groups = [group for group in (slice(half), slice(half, heads)) if group.stop > 0]
        parts = kv.unflatten(1, (2, heads, HEAD_DIM))
        of_groups = [parts[:, :, group] for group in self._groups]
        self._gathered = shares.group.gather_each(of_groups, shares.counts)

    def attend(self, q: torch.Tensor) -> torch.Tensor:
        """Return the attention [tokens of this rank, heads * 128] of queries of that shape."""
        queries = q.unflatten(1, (self._heads, HEAD_DIM))
        attended = [
            attend_rows(queries[:, group], keys_and_values, self._rows, self._lengths)
            for group, keys_and_values in zip(self._groups, self._gathered, strict=True)
        ]
        return torch.cat(attended, dim=1)
