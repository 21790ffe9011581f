"""Attention over tokens that ranks share (Jacobs et al., arXiv:2309.14509)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...zimage.constants import HEAD_DIM
from ..attention import attend
from .shares import Shares, even


def attend_across(
    qkv: torch.Tensor, heads: int, lengths: Sequence[int], shares: Shares
) -> torch.Tensor:
    """Compute the softmax attention of each item over its own tokens, which ranks share.

    One exchange gives each rank all tokens of some heads, another one all heads of its tokens back.
    Numbers of heads and tokens may differ from rank to rank; nothing is padded.

    Args:
        qkv: [tokens of this rank, 3 * heads * 128]: q, k and v side by side.
        heads: number of heads, at least one for each rank.
        lengths: tokens of each item on all ranks; items follow one another.
        shares: tokens of each rank.

    Returns:
        [tokens of this rank, heads * 128].
    """
    group, tokens, here = shares.group, shares.counts, len(qkv)
    of_ranks = even(heads, group.size)
    own = of_ranks[group.rank]
    row = 3 * HEAD_DIM
    sent = [here * row * count for count in of_ranks]
    buffer = qkv.new_empty(qkv.numel())
    parts = qkv.unflatten(1, (3, heads, HEAD_DIM)).split(of_ranks, dim=2)
    for target, part in zip(buffer.split(sent), parts, strict=True):
        target.view(part.shape).copy_(part)
    received = group.exchange(buffer, sent, [count * row * own for count in tokens])
    del buffer
    attended = attend(received.view(sum(tokens), row * own), own, lengths)
    del received
    sent = [count * own * HEAD_DIM for count in tokens]
    back = [here * count * HEAD_DIM for count in of_ranks]
    blocks = group.exchange(attended.flatten(), sent, back).split(back)
    return torch.cat([block.view(here, -1) for block in blocks], dim=1)
