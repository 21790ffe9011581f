"""MXFP8 and row-scaled FP8 by torch operations, on any device.

The bytes are those of the core, except for the bits of NaN. Nothing here waits for the device, so
that CUDA graphs can hold it. Float32 subnormals must not be flushed to zero, which torch does on
the CPU only after `torch.set_flush_denormal` and never on CUDA.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...layout import MXFP8_BLOCK, SCALE_TILE_ROWS, padded_shape, scale_shape
from ...ops.codec import MXFP8Array
from ...ops.gemm import RowScaledArray
from . import tiles

_MAXIMUM = 448.0  # of E4M3
_NAN_CODE, _NAN_BYTE = 0x7F, 255
_SMALLEST_ROW_MAXIMUM = 2.0**-100  # a row with a smaller one becomes zeros
# 448 * 2^-127 as float32 bits: a block with a smaller maximum becomes zeros.
_TINY_BITS = (8 << 23) | 0x600000
_MANTISSA_OF_MAXIMUM = 0x600000  # 448 is 1.75 * 2^8
_MAX_UP, _MAX_DOWN = 17, 19  # binary places between the smallest code and the largest, and zero


# ---- Scales


def to_blocked(scales: torch.Tensor) -> torch.Tensor:
    """Reorder row-major scales [rows, blocks] to the 128x4 blocked layout, padded with 0."""
    rows, blocks = scales.shape
    padded = F.pad(scales, (0, -blocks % 4, 0, -rows % SCALE_TILE_ROWS))
    tiles = padded.reshape(padded.shape[0] // SCALE_TILE_ROWS, 4, 32, padded.shape[1] // 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).reshape(padded.shape)


def from_blocked(scales: torch.Tensor, rows: int, blocks: int) -> torch.Tensor:
    """Return row-major scales [rows, blocks] of blocked [roundup(rows), roundup(blocks)]."""
    tiles = scales.reshape(scales.shape[0] // SCALE_TILE_ROWS, scales.shape[1] // 4, 32, 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).reshape(scales.shape)[:rows, :blocks]


def _scale_values(scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return 2^(byte - 127) for E8M0 bytes, NaN for 255."""
    # The exponent field of bfloat16. 0 stands for 2^-127, a subnormal: half of the smallest normal
    # number. The same bit makes NaN of the infinity that 255 would be.
    is_special = scales + 1 <= 1  # 0 and, as bytes wrap around, 255
    bits = (scales.to(torch.int16) << 7) | (is_special.to(torch.int16) << 6)
    return bits.view(torch.bfloat16).to(dtype)


# ---- MXFP8


def rows_of(array: MXFP8Array, rows: slice) -> MXFP8Array:
    """Return some rows of a matrix, from a multiple of 128 on, as a view."""
    end = -(-rows.stop // SCALE_TILE_ROWS) * SCALE_TILE_ROWS
    codes, scales = array.codes[rows], array.scales[rows.start : end]
    return MXFP8Array(codes, scales, (rows.stop - rows.start, array.shape[1]))


def dequantize(array: MXFP8Array, dtype: torch.dtype) -> torch.Tensor:
    """Decode a matrix from MXFP8; exact if the dtype has the value, else rounded once."""
    if dtype == torch.float16:  # it lacks many scales, and bfloat16 has all values
        return dequantize(array, torch.bfloat16).to(dtype)
    rows, columns = array.shape
    codes = array.codes.view(torch.float8_e4m3fn)
    values = codes.to(dtype)
    blocks = values.unflatten(1, (-1, MXFP8_BLOCK))
    scales = from_blocked(array.scales.view(torch.uint8), *blocks.shape[:2])
    blocks.mul_(_scale_values(scales, dtype)[..., None])
    result: torch.Tensor = values[:rows, :columns].contiguous()
    return result


def quantize(matrix: torch.Tensor) -> MXFP8Array:
    """Encode a matrix in MXFP8; blocks with NaN or infinity become NaN."""
    rows, columns = shape = (matrix.shape[0], matrix.shape[1])
    code_rows, code_columns = padded_shape(shape)
    device = matrix.device
    codes = torch.zeros((code_rows, code_columns), dtype=torch.uint8, device=device)
    scales = torch.zeros((code_rows, code_columns // MXFP8_BLOCK), dtype=torch.uint8, device=device)
    for tile in tiles.row_tiles(rows, code_columns, tiles.TILE):
        part = F.pad(matrix[tile], (0, code_columns - columns))
        codes[tile], scales[tile] = _encode_blocks(part.unflatten(1, (-1, MXFP8_BLOCK)))
    blocked = to_blocked(scales)
    assert blocked.shape == scale_shape(shape)
    return MXFP8Array(codes.view(torch.float8_e4m3fn), blocked, shape)


def _encode_blocks(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes [rows, columns] and scale bytes [rows, blocks] of [rows, blocks, 32]."""
    amax = torch.linalg.vector_norm(blocks, torch.inf, dim=2).float()  # NaN if there is one
    bits = amax.view(torch.int32)
    is_sound = amax < torch.inf
    is_tiny = bits < _TINY_BITS  # bits of NaN may be negative
    byte = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > _MANTISSA_OF_MAXIMUM).int()
    byte = torch.where(is_sound & ~is_tiny, byte, 0)
    factor = ((254 - byte) << 23).view(torch.float32)  # 2^(127 - byte)
    codes = (blocks * factor[..., None]).to(torch.float8_e4m3fn).view(torch.uint8)
    # Includes the signs of zeros and of NaN.
    keeps = is_sound & ~is_tiny
    codes = torch.where(keeps[..., None], codes, _filler(is_sound, _NAN_CODE)[..., None])
    byte = torch.where(is_sound, byte, _NAN_BYTE)
    return codes.flatten(1), byte.to(torch.uint8)


def _filler(is_sound: torch.Tensor, code: int) -> torch.Tensor:
    """Return bytes: 0 for finite values, else a code."""
    return (~is_sound).to(torch.uint8) * code


# ---- E4M3 with a scale per row


def quantize_rows(matrix: torch.Tensor) -> RowScaledArray:
    """Encode a matrix in E4M3 with a scale per row."""
    rows, columns = matrix.shape
    codes = torch.empty((rows, columns), dtype=torch.uint8, device=matrix.device)
    scales = torch.empty(rows, dtype=torch.float32, device=matrix.device)
    # A tensor on the device, not a Python number: torch replaces division by or of a Python number
    # by multiplication with a reciprocal, which may differ from the quotient in the last bit.
    maximum = torch.full((), _MAXIMUM, device=matrix.device)
    for tile in tiles.row_tiles(rows, columns, tiles.TILE):
        part = matrix[tile]
        amax = torch.linalg.vector_norm(part, torch.inf, dim=1).float()  # NaN if there is one
        is_finite = amax < torch.inf
        is_sound = amax >= _SMALLEST_ROW_MAXIMUM
        keeps = is_sound & is_finite
        encoded = (part * (maximum / amax)[:, None]).to(torch.float8_e4m3fn).view(torch.uint8)
        filler = _filler(is_finite, _NAN_CODE)
        torch.where(keeps[:, None], encoded, filler[:, None], out=codes[tile])
        scale = torch.where(is_sound, amax / maximum, 0.0)
        scales[tile] = torch.where(is_finite, scale, torch.nan)
    return RowScaledArray(codes.view(torch.float8_e4m3fn), scales)


def fold(array: MXFP8Array) -> tuple[RowScaledArray, torch.Tensor]:
    """Fold the block scales of an MXFP8 matrix into one power of two per row.

    Returns:
        The row-scaled matrix and the change of each row, float64 [N, 3], as `ops.gemm.fold_async`
        gives them, for `fold_stats`.
    """
    rows, columns = array.shape
    device = array.codes.device
    codes = torch.empty((rows, columns), dtype=torch.uint8, device=device)
    scales = torch.empty(rows, dtype=torch.float32, device=device)
    statistics = torch.empty((rows, 3), dtype=torch.float64, device=device)
    for tile in tiles.row_tiles(rows, columns, tiles.TILE, SCALE_TILE_ROWS):
        _fold_rows(rows_of(array, tile), codes[tile], scales[tile], statistics[tile])
    return RowScaledArray(codes.view(torch.float8_e4m3fn), scales), statistics


def _fold_rows(
    array: MXFP8Array, codes: torch.Tensor, scales: torch.Tensor, statistics: torch.Tensor
) -> None:
    rows, columns = array.shape
    blocks = array.codes[:rows].view(torch.uint8).unflatten(1, (-1, MXFP8_BLOCK))
    bytes_ = from_blocked(array.scales.view(torch.uint8), *blocks.shape[:2]).int()
    largest = (blocks & 0x7F).amax(2).int()
    is_nan = (largest == _NAN_CODE) | (bytes_ == _NAN_BYTE)
    # The smallest scale that no block overflows; at least 2^-126, a float32 normal.
    lowest = torch.where((largest == 0) | is_nan, 0, bytes_ - _headroom(largest))
    row_byte = lowest.amax(1).clamp(min=1)
    up = (bytes_ - row_byte[:, None]).clamp(-_MAX_DOWN, _MAX_UP)
    values = blocks.view(torch.float8_e4m3fn).float()
    folded = (values * power_of_two(up)[..., None]).to(torch.float8_e4m3fn)
    codes.copy_(folded.view(torch.uint8).flatten(1)[:, :columns])
    scales.copy_(power_of_two(row_byte - 127))

    # Errors are exact in float32; their squares, and sums over any scales, need float64.
    errors = (values - folded.float() * power_of_two(-up)[..., None]).flatten(1)[:, :columns]
    values = values.flatten(1)[:, :columns]
    statistics[:, 0] = (errors != 0).sum(1)
    weights = power_of_two((bytes_ - 127).clamp(max=127)).double().square()
    for column, matrix in ((1, errors), (2, values)):
        squares = F.pad(matrix, (0, -columns % MXFP8_BLOCK)).double().square_()
        statistics[:, column] = (squares.unflatten(1, (-1, MXFP8_BLOCK)).sum(2) * weights).sum(1)
    _mark_nan(statistics, is_nan, columns)


def _mark_nan(statistics: torch.Tensor, is_nan: torch.Tensor, columns: int) -> None:
    """Store the first and last column of the first block with NaN in each row's statistics."""
    begin = is_nan.int().argmax(1) * MXFP8_BLOCK
    where = (begin, (begin + MXFP8_BLOCK - 1).clamp(max=columns - 1), begin.double() * torch.nan)
    marks = torch.stack([mark.double() for mark in where], dim=1)
    statistics.copy_(torch.where(is_nan.any(1)[:, None], marks, statistics))


def _headroom(magnitude: torch.Tensor) -> torch.Tensor:
    """Return the largest h for which a code's value times 2^h is 448 at most; codes from 1 on."""
    # value = m * 2^e with m in [1, 2): h is 8 - e, less 1 if m is above 1.75.
    bits = magnitude.to(torch.uint8).view(torch.float8_e4m3fn).float().view(torch.int32)
    return 8 - ((bits >> 23) - 127) - ((bits & 0x7FFFFF) > _MANTISSA_OF_MAXIMUM).int()


def power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """Return 2^exponent as float32, for exponents from -127 to 127."""
    bits = ((exponent + 127) << 23).int()
    return torch.where(exponent == -127, 1 << 22, bits).int().view(torch.float32)
