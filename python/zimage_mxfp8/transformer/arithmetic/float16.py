"""GEMMs in float16 with inputs and results beyond its range.

Float16 ends at 65504, which sums in the feed-forward may exceed. So each row of the input is scaled
by a power of two, which is exact, and the scale is undone in float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import tiles
from .torch_codec import power_of_two

_HALVES = 126  # the exponent field of float32 for numbers from 0.5 to 1
_LARGEST = 126  # exponent: 2^126 and its reciprocal are normal numbers of float32


def multiply(
    x: torch.Tensor,
    gemm: Callable[[torch.Tensor], torch.Tensor],
    dtype: torch.dtype,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply rows that are scaled to a maximum from 0.5 to 1.

    Args:
        x: float16 or float32 [..., K]. An element below 2^-24 times its row's maximum may count as
            0.
        gemm: takes float16 [M, K] to float16 [M, N].
        dtype: of the result.
        bias: [N] or None, added in float32.

    Returns:
        [..., N] of `dtype`.
    """
    rows = x.reshape(-1, x.shape[-1])
    count, columns = rows.shape
    scaled = torch.empty(rows.shape, dtype=torch.float16, device=x.device)
    scales = torch.empty((count, 1), dtype=torch.float32, device=x.device)
    for tile in tiles.row_tiles(count, columns, tiles.TILE):
        part = rows[tile].float()
        maximum = part.abs().amax(1, keepdim=True)
        exponents = (maximum.view(torch.int32) >> 23).sub_(_HALVES).clamp_(-_LARGEST, _LARGEST)
        scaled[tile] = part * power_of_two(-exponents)
        scales[tile] = power_of_two(exponents)
    products = gemm(scaled)
    out = products if dtype == torch.float16 else torch.empty_like(products, dtype=dtype)
    for tile in tiles.row_tiles(count, products.shape[1], tiles.TILE):
        part = products[tile].float().mul_(scales[tile])
        out[tile] = part if bias is None else part.add_(bias.float())
    return out.view(*x.shape[:-1], products.shape[1])


def workspace(tokens: int, shape: tuple[int, int], dtype: torch.dtype) -> int:
    """Return the bytes that `multiply` takes for x [tokens, K] and N rows of weights, at most.

    Args:
        tokens: M.
        shape: [N, K].
        dtype: of the result.
    """
    rows, columns = shape
    halves = columns + (0 if dtype == torch.float16 else rows)
    temporaries = 2 * min(tokens * max(shape), tiles.TILE) * torch.float32.itemsize
    return tokens * halves * torch.float16.itemsize + temporaries
