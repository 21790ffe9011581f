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


def attend_across(
    qkv: torch.Tensor, heads: int, lengths: Sequence[int], shares: Shares
) -> torch.Tensor:
    """Compute the softmax attention of each item over its own tokens, which ranks share.

    The heads are two groups, a small one first: its attention is computed while keys and values of
    the large one are gathered. Numbers of tokens may differ from rank to rank.

    Args:
        qkv: [tokens of this rank, 3 * heads * 128]: q, k and v side by side.
        heads: number of heads.
        lengths: tokens of each item on all ranks; items follow one another.
        shares: tokens of each rank.

    Returns:
        [tokens of this rank, heads * 128].
    """
    parts = qkv.unflatten(1, (3, heads, HEAD_DIM))
    # A quarter of 30 heads fills a GPU of 132 multiprocessors once at 1024x1024 on two GPUs.
    first = heads // 4
    groups = [group for group in (slice(first), slice(first, heads)) if group.stop > 0]
    rows = shares.rows_of(lengths)
    gathered = shares.group.gather_each([parts[:, 1:, group] for group in groups], shares.counts)
    attended = [
        attend_rows(parts[:, 0, group], keys_and_values, rows, lengths)
        for group, keys_and_values in zip(groups, gathered, strict=True)
    ]
    return torch.cat(attended, dim=1)
