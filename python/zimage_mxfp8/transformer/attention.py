"""Attention over packed sequences, through torch's scaled_dot_product_attention."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..system import devices
from ..zimage.constants import HEAD_DIM

# In order of speed on Hopper.
_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


@cache
def has_cudnn_attention(device: torch.device) -> bool:
    """Return whether cuDNN's attention runs on a CUDA device; warn once if it should but fails."""
    q = torch.zeros(1, 1, 64, HEAD_DIM, dtype=torch.bfloat16, device=device)
    try:
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            warnings.simplefilter("ignore")  # torch explains at length why it fails
            F.scaled_dot_product_attention(q, q, q)
    except RuntimeError:
        if devices.capability(device.index)[0] >= 9:
            warnings.warn(
                "torch cannot use cuDNN's attention here, so attention takes about twice as long; "
                f"cuDNN is {torch.backends.cudnn.version()}, and another one than torch's on the "
                "library path is the usual cause",
                stacklevel=2,
            )
        return False
    return True


def attend(qkv: torch.Tensor, heads: int, lengths: Sequence[int]) -> torch.Tensor:
    """Compute the softmax attention of each item over its own tokens.

    Args:
        qkv: [M, 3 * heads * 128]: q, k and v side by side, M the sum of `lengths`.
        heads: number of heads.
        lengths: tokens of each item; items follow one another.

    Returns:
        [M, heads * 128].
    """
    parts = qkv.unflatten(1, (3, heads, HEAD_DIM))
    return attend_rows(parts[:, 0], parts[:, 1:], lengths, lengths)


def attend_rows(
    q: torch.Tensor, kv: torch.Tensor, rows: Sequence[int], lengths: Sequence[int]
) -> torch.Tensor:
    """Compute rows of the softmax attention of each item over its own tokens.

    Args:
        q: [M, heads, 128], M the sum of `rows`.
        kv: [N, 2, heads, 128], keys and values, N the sum of `lengths`.
        rows: rows of each item; items follow one another.
        lengths: tokens of each item.

    Returns:
        [M, heads * 128].
    """
    items = len(lengths)
    if len(set(rows)) == 1 and len(set(lengths)) == 1 and rows[0]:
        q, kv = q.unflatten(0, (items, rows[0])), kv.unflatten(0, (items, lengths[0]))
        return _attend(q, kv).flatten(0, 1)
    parts = zip(q.split(list(rows)), kv.split(list(lengths)), strict=True)
    attended = [_attend(of_q[None], of_kv[None])[0] for of_q, of_kv in parts if len(of_q)]
    return torch.cat(attended) if attended else q.new_empty(0, q.shape[1] * HEAD_DIM)


def _attend(q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
    """Compute attention of [B, M, heads, 128] to [B, N, 2, heads, 128]: [B, M, heads * 128]."""
    q = q.transpose(1, 2)
    k, v = kv.permute(2, 0, 3, 1, 4)
    if not q.is_cuda:
        out = F.scaled_dot_product_attention(q, k, v)
    else:
        backends = _BACKENDS if has_cudnn_attention(q.device) else _BACKENDS[1:]
        with sdpa_kernel(backends, set_priority=True):
            out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).flatten(2)
