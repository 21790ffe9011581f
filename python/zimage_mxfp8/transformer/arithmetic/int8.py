"""INT8 of rotated operands by torch, on the CPU and where the core has no kernels for it.

Both operands are multiplied along K by the same orthonormal matrix, a Hadamard matrix per block of
columns, which leaves their product as it is and spreads outliers over the block (QuaRot, Ashkboos
et al., 2024, arXiv:2404.00456). Then each row is rounded to -127..127 with one scale. Sums are in
int32, so they are exact on every device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch.nn.functional import pad

from ...layout import SCALE_TILE_ROWS
from ...ops.codec import MXFP8Array
from ...ops.gemm import Int8Array, WithRowScales
from . import tiles, torch_codec, torch_gemm

LARGEST = 127  # of the codes; -128 is not used
_SMALLEST_MAXIMUM = 2.0**-100  # of a row; below it codes and scale are 0
# Columns that are rotated together, as the core's kernels do it. On the small trained model images
# were closer with 32 than with up to 128 or without a rotation (docs/methodology.md).
MAX_BLOCK = 32
_FIRST = (7, 5)  # compute capability with INT8 tensor cores
_FEWEST_ROWS, _ALIGNMENT = 32, 8  # rows, and divisor of columns, that torch's GEMM takes on CUDA


def rotation_block(columns: int) -> int:
    """Return the columns that are rotated together: a power of two up to `MAX_BLOCK`."""
    return min(columns & -columns, MAX_BLOCK)


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


def decode(
    weights: Int8Array, signs: torch.Tensor | None, tile: slice = slice(None)
) -> torch.Tensor:
    """Decode a matrix or some of its rows and rotate them back: float32 [rows, K].

    Args:
        weights: [N, K].
        signs: the Hadamard matrix that rotated them; None for that of `quantize_rotated`.
        tile: the rows.
    """
    rotated = weights.codes[tile].float().mul_(weights.scales[tile, None])
    return rotate_columns(rotated) if signs is None else rotate(rotated, signs)


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


def _add_and_subtract(matrix: torch.Tensor) -> torch.Tensor:
    """Multiply blocks of columns by Sylvester's Hadamard matrix of 1 and -1, in float32.

    The sums are those of a butterfly over columns 1, 2, 4, ... apart, as in the core's kernels.
    """
    sums = matrix.float().unflatten(1, (-1, rotation_block(matrix.shape[1])))
    step = 1
    while step < sums.shape[2]:
        low, high = sums.unflatten(2, (-1, 2, step)).unbind(3)
        sums = torch.stack((low + high, low - high), dim=3).flatten(2)
        step *= 2
    result: torch.Tensor = sums.flatten(1)
    return result


def rotate_columns(matrix: torch.Tensor) -> torch.Tensor:
    """Rotate as `quantize_rotated` does: float32 [rows, K]; a second time rotates back."""
    rotated: torch.Tensor = _add_and_subtract(matrix).mul_(_of_rotation(matrix.shape[1]))
    return rotated


def _of_rotation(columns: int) -> float:
    return float(rotation_block(columns) ** -0.5)


def quantize(matrix: torch.Tensor, factor: float = 1.0) -> Int8Array:
    """Round each row of a float32 matrix times a factor; one that is not finite has scale NaN."""
    largest = matrix.abs().amax(1)
    is_finite, is_zero = largest.isfinite(), largest < _SMALLEST_MAXIMUM
    factors = torch.where(is_zero | ~is_finite, 0.0, LARGEST / largest)
    scales = torch.where(is_zero, 0.0, largest / LARGEST * factor).where(is_finite, torch.nan)
    codes = (matrix * factors[:, None]).nan_to_num_(0, 0, 0).round_()
    return Int8Array(codes.to(torch.int8), scales)


def quantize_rotated(matrix: torch.Tensor) -> Int8Array:
    """Rotate and round a matrix [rows, K], some rows at a time: `ops.fused.quantize_rotated`."""
    factor = _of_rotation(matrix.shape[1])
    return _in_tiles(
        tuple(matrix.shape),
        1,
        matrix.device,
        lambda tile: quantize(_add_and_subtract(matrix[tile]), factor),
    )


def encode(matrix: torch.Tensor, signs: torch.Tensor) -> Int8Array:
    """Rotate by any Hadamard matrix and round a matrix [rows, K], some rows at a time."""
    return _in_tiles(
        tuple(matrix.shape), 1, matrix.device, lambda tile: quantize(rotate(matrix[tile], signs))
    )


def encode_weights(
    weights: MXFP8Array,
    decode_rows: Callable[[MXFP8Array, torch.dtype], torch.Tensor],
    encode_rows: Callable[[torch.Tensor], Int8Array],
) -> Int8Array:
    """Decode MXFP8 weights [N, K] and encode them, some rows at a time.

    Args:
        weights: the weights.
        decode_rows: `dequantize` of an `Arithmetic`. bfloat16 holds decoded MXFP8 exactly.
        encode_rows: its `quantize_int8`.
    """

    def encoded(tile: slice) -> Int8Array:
        return encode_rows(decode_rows(torch_codec.rows_of(weights, tile), torch.bfloat16))

    return _in_tiles(weights.shape, SCALE_TILE_ROWS, weights.codes.device, encoded)


def _in_tiles(
    shape: tuple[int, ...],
    multiple: int,
    device: torch.device,
    encoded: Callable[[slice], Int8Array],
) -> Int8Array:
    """Return a matrix, whose rows `encoded` returns in tiles of `multiple` rows."""
    rows, columns = shape
    codes = torch.empty(shape, dtype=torch.int8, device=device)
    scales = torch.empty(rows, device=device)
    for tile in tiles.row_tiles(rows, columns, tiles.TILE, multiple):
        part = encoded(tile)
        codes[tile], scales[tile] = part.codes, part.scales
    return Int8Array(codes, scales)


def multiply(x: WithRowScales, weights: WithRowScales, dtype: torch.dtype) -> torch.Tensor:
    """Multiply x [M, K] with weights [N, K]: [M, N] of `dtype`, some rows at a time."""
    tokens, rows = len(x.codes), len(weights.codes)
    out = torch.empty((tokens, rows), dtype=dtype, device=x.codes.device)
    for tile in tiles.row_tiles(tokens, rows, tiles.TILE, _FEWEST_ROWS):
        sums = integer_sums(x.codes[tile], weights.codes)
        out[tile] = sums.float().mul_(x.scales[tile, None]).mul_(weights.scales)
    return out


def multiply_weight_only(x: torch.Tensor, weights: Int8Array, signs: torch.Tensor) -> torch.Tensor:
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
    """Return the bytes that `multiply` takes for x [tokens, K] and weights [N, K]."""
    return 2 * min(tokens * shape[0], tiles.TILE) * torch.float32.itemsize


def encoding_workspace(tokens: int, columns: int) -> int:
    """Return the bytes that `encode` takes for a matrix [tokens, columns], with its result."""
    rotating = 3 * min(tokens * columns, tiles.TILE) * torch.float32.itemsize
    return tokens * (columns + torch.float32.itemsize) + rotating


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
