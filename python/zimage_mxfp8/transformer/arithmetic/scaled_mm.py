"""FP8 GEMMs with a scale per row through `torch._scaled_mm`, which not every device has."""

from __future__ import annotations

from functools import cache

import torch

from ...ops.gemm import RowScaledArray, WithRowScales
from . import tiles, torch_gemm

_FIRST = (8, 9)  # compute capability with FP8 tensor cores


@cache
def unsupported(device: int) -> str:
    """Return why torch does not multiply FP8 with a scale per row on a CUDA device; "" if it does.

    Args:
        device: its index.
    """
    return torch_gemm.unsupported(device, _FIRST, "FP8", " with a scale per row", _try)


def _try(place: torch.device) -> str:
    """Return the error of a GEMM; "" if it succeeds."""
    size = 128
    codes = torch.ones((size, size), device=place).to(torch.float8_e4m3fn)
    operand = RowScaledArray(codes, torch.full((size,), 0.5, device=place))
    try:
        is_right = bool((_multiply(operand, operand) == size * 0.5 * 0.5).all())
    except (RuntimeError, TypeError, AttributeError, ValueError) as error:
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return "" if is_right else "the result is wrong"


def multiply(x: WithRowScales, weights: WithRowScales, dtype: torch.dtype) -> torch.Tensor:
    """Multiply x [M, K] with weights [N, K]: [M, N] of `dtype`.

    FP8 tensor cores do it if the result is bfloat16 on CUDA: torch has no other dtype there.
    """
    if dtype == torch.bfloat16 and x.codes.is_cuda:
        return _multiply(x, weights)
    return multiply_decoded(x, weights, dtype)


def _multiply(x: WithRowScales, weights: WithRowScales) -> torch.Tensor:
    out: torch.Tensor = torch._scaled_mm(
        x.codes.view(torch.float8_e4m3fn),
        weights.codes.view(torch.float8_e4m3fn).t(),
        scale_a=x.scales[:, None],
        scale_b=weights.scales[None, :],
        out_dtype=torch.bfloat16,
        use_fast_accum=True,  # like the core's GEMM: the error is far below that of FP8 itself
    )
    return out


def multiply_decoded(x: WithRowScales, weights: WithRowScales, dtype: torch.dtype) -> torch.Tensor:
    """Multiply as `multiply` does, with decoded operands and sums in float32, on any device."""
    rows, columns = weights.shape
    out = torch.empty((x.shape[0], rows), dtype=torch.float32, device=x.codes.device)
    wide = x.codes.view(torch.float8_e4m3fn).float()
    for tile in tiles.row_tiles(rows, columns, tiles.TILE):
        decoded = weights.codes[tile].view(torch.float8_e4m3fn).float()
        torch.mm(wide, decoded.t(), out=out[:, tile])
    return out.mul_(x.scales[:, None]).mul_(weights.scales).to(dtype)


def workspace(tokens: int, shape: tuple[int, int], dtype: torch.dtype) -> int:
    """Return the bytes that `multiply` takes on CUDA for x [tokens, K] and weights [N, K]."""
    if dtype == torch.bfloat16:
        return 0
    rounded = 0 if dtype == torch.float32 else tokens * shape[0]
    decoded = tokens * shape[1] + min(shape[0] * shape[1], tiles.TILE)
    return (decoded + rounded) * torch.float32.itemsize
