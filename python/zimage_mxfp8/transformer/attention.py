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
    if all(length == lengths[0] for length in lengths):
        return _attend(parts.unflatten(0, (len(lengths), lengths[0]))).flatten(0, 1)
    return torch.cat([_attend(part[None])[0] for part in parts.split(list(lengths))])


def _attend(parts: torch.Tensor) -> torch.Tensor:
    """Compute attention of [B, S, 3, heads, 128]: [B, S, heads * 128]."""
    q, k, v = parts.permute(2, 0, 3, 1, 4)
    if not parts.is_cuda:
        out = F.scaled_dot_product_attention(q, k, v)
    else:
        backends = _BACKENDS if has_cudnn_attention(parts.device) else _BACKENDS[1:]
        with sdpa_kernel(backends, set_priority=True):
            out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).flatten(2)
