"""INT8 GEMMs of rotated operands by torch, on the CPU and on CUDA devices with INT8 tensor cores.

Both operands are multiplied along K by the same orthonormal matrix, a Hadamard matrix per block of
columns, which leaves their product as it is and spreads outliers over the block (QuaRot, Ashkboos
et al., 2024, arXiv:2404.00456). Then each row is rounded to -127..127 with one scale. Sums are in
int32, so they are exact on every device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch.nn.functional import pad

from ...layout import SCALE_TILE_ROWS
from ...ops.codec import MXFP8Array
from . import tiles, torch_codec, torch_gemm
from .torch_codec import dequantize

LARGEST = 127  # of the codes; -128 is not used
# Columns that are rotated together. On the small trained model images were closer with 32 than with
# up to 128 or without a rotation (docs/methodology.md).
MAX_BLOCK = 32
_FIRST = (7, 5)  # compute capability with INT8 tensor cores
_FEWEST_ROWS, _ALIGNMENT = 32, 8  # rows, and divisor of columns, that torch's GEMM takes on CUDA


@dataclass(frozen=True, eq=False)
class Int8Matrix:
    """A rotated matrix in INT8 with one scale per row.

    Attributes:
        codes: int8 [rows, K].
        scales: float32 [rows].
    """

    codes: torch.Tensor
    scales: torch.Tensor


def rotation_block(columns: int) -> int:
    """Return the columns that are rotated together: a power of two up to `MAX_BLOCK`."""
    return min(columns & -columns, MAX_BLOCK)


def hadamard(size: int) -> torch.Tensor:
    """Return Sylvester's Hadamard matrix of a power of two, int8 [size, size] of 1 and -1."""
    matrix = torch.ones(1, 1, dtype=torch.int8)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def regular_hadamard(size: int) -> torch.Tensor:
    """Return the Hadamard matrix by which INT8 ConvRot files are rotated, int8 [size, size].

    It is the Kronecker power of a symmetric 4x4 matrix with the same sum in all rows; `size` is a
    power of 4, or 1 for no rotation.
    """
    base = 1 - 2 * torch.eye(4, dtype=torch.int8).flip(1)
    matrix = torch.ones(1, 1, dtype=torch.int8)
    while len(matrix) < size:
        matrix = torch.kron(matrix, base)
    return matrix


def decode(weights: Int8Matrix, signs: torch.Tensor, tile: slice = slice(None)) -> torch.Tensor:
    """Decode a matrix or some of its rows and rotate them back: float32 [rows, K]."""
    return rotate(weights.codes[tile].float().mul_(weights.scales[tile, None]), signs)


def rotate(matrix: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """Rotate blocks of columns; a second time rotates back.

    Args:
        matrix: [rows, K].
        signs: a Hadamard matrix, int8 [block, block], with a block that divides K.

    Returns:
        float32 [rows, K].
    """
    size = len(signs)
    blocks = matrix.float().unflatten(1, (-1, size))
    rotated: torch.Tensor = (blocks @ signs.float()).flatten(1).mul_(size**-0.5)
    return rotated


def quantize(matrix: torch.Tensor) -> Int8Matrix:
    """Round each row of a float32 matrix; one with NaN or infinity gets such a scale."""
    scales = matrix.abs().amax(1) / LARGEST
    inverse = torch.where(scales > 0, 1 / scales, 0.0)
    codes = (matrix * inverse[:, None]).nan_to_num_(0, 0, 0).round_().clamp_(-LARGEST, LARGEST)
    return Int8Matrix(codes.to(torch.int8), scales)


def encode(matrix: torch.Tensor, signs: torch.Tensor) -> Int8Matrix:
    """Rotate and round a matrix [rows, K], some rows at a time."""
    rows, columns = matrix.shape
    return _encode((rows, columns), 1, lambda tile: matrix[tile], signs)


def encode_weights(weights: MXFP8Array, signs: torch.Tensor) -> Int8Matrix:
    """Decode MXFP8 weights [N, K], rotate and round them, some rows at a time."""

    def decoded(tile: slice) -> torch.Tensor:
        return dequantize(torch_codec.rows_of(weights, tile), torch.float32)

    return _encode(weights.shape, SCALE_TILE_ROWS, decoded, signs)


def _encode(
    shape: tuple[int, int],
    multiple: int,
    rows_of: Callable[[slice], torch.Tensor],
    signs: torch.Tensor,
) -> Int8Matrix:
    """Rotate and round a matrix, whose rows `rows_of` returns in tiles of `multiple` rows."""
    rows, columns = shape
    codes = torch.empty(shape, dtype=torch.int8, device=signs.device)
    scales = torch.empty(rows, device=signs.device)
    for tile in tiles.row_tiles(rows, columns, tiles.TILE, multiple):
        part = quantize(rotate(rows_of(tile), signs))
        codes[tile], scales[tile] = part.codes, part.scales
    return Int8Matrix(codes, scales)


def multiply(x: Int8Matrix, weights: Int8Matrix, dtype: torch.dtype) -> torch.Tensor:
    """Multiply x [M, K] with weights [N, K]: [M, N] of `dtype`, some rows at a time."""
    tokens, rows = len(x.codes), len(weights.codes)
    out = torch.empty((tokens, rows), dtype=dtype, device=x.codes.device)
    for tile in tiles.row_tiles(tokens, rows, tiles.TILE, _FEWEST_ROWS):
        sums = integer_sums(x.codes[tile], weights.codes)
        out[tile] = sums.float().mul_(x.scales[tile, None]).mul_(weights.scales)
    return out


def multiply_weight_only(x: torch.Tensor, weights: Int8Matrix, signs: torch.Tensor) -> torch.Tensor:
    """Multiply x [M, K] with decoded weights [N, K]: [M, N] of x's dtype, some rows at a time."""
    rows, columns = weights.codes.shape
    out = x.new_empty(len(x), rows)
    for tile in tiles.row_tiles(rows, columns, tiles.TILE, 1):
        out[:, tile] = x @ decode(weights, signs, tile).to(x.dtype).t()
    return out


def weight_only_workspace(tokens: int, shape: tuple[int, int]) -> int:
    """Return the bytes that `multiply_weight_only` takes for weights [N, K], at most."""
    decoding = 3 * min(shape[0] * shape[1], tiles.TILE) * torch.float32.itemsize
    return decoding + tokens * min(shape[0], max(1, tiles.TILE // shape[1])) * 4


def integer_sums(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Multiply int8 [M, K] with int8 [N, K]: int32 [M, N]."""
    rows, columns = len(a), len(b)
    if a.is_cuda:
        depth = -a.shape[1] % _ALIGNMENT
        a = _padded(a, max(_FEWEST_ROWS - rows, 0), depth)
        b = _padded(b, -columns % _ALIGNMENT, depth)
    sums: torch.Tensor = torch._int_mm(a, b.t())
    return sums[:rows, :columns]


def _padded(matrix: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Append zeros; without any, return the matrix itself, which torch's `pad` would copy."""
    return pad(matrix, (0, columns, 0, rows)) if rows or columns else matrix


def workspace(tokens: int, shape: tuple[int, int]) -> int:
    """Return the bytes that `encode` and `multiply` take for x [tokens, K] and weights [N, K]."""
    rows, columns = shape
    encoding = 3 * min(tokens * columns, tiles.TILE) * torch.float32.itemsize
    multiplying = 2 * min(tokens * rows, tiles.TILE) * torch.float32.itemsize
    return tokens * (columns + torch.float32.itemsize) + max(encoding, multiplying)


@cache
def unsupported(device: int) -> str:
    """Return why torch does not multiply INT8 on a device; "" if it does.

    Args:
        device: index of a CUDA device, or -1 for the CPU.
    """
    return "" if device < 0 else torch_gemm.unsupported(device, _FIRST, "INT8", "", _try)


def _try(place: torch.device) -> str:
    """Return the error of a GEMM; "" if it succeeds."""
    ones = torch.ones((64, 64), dtype=torch.int8, device=place)
    try:
        is_right = bool((integer_sums(ones, ones) == 64).all())
    except (RuntimeError, AttributeError) as error:
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return "" if is_right else "the result is wrong"
