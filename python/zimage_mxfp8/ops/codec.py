"""MXFP8 encoding and decoding of arrays: NumPy arrays and torch tensors, on the CPU or on CUDA.

Format: OCP Microscaling Formats v1.0, E4M3 elements in blocks of 32 along the last axis, one E8M0
scale per block, with NVIDIA's round-up scale. Scales are in the 128x4 blocked layout that
Blackwell's tensor cores read.

Tensors on a CUDA device are processed there, on torch's current stream.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from .. import _core
from ..errors import InvalidArgumentError, NonFiniteError
from ..layout import SCALE_TILE_ROWS, padded_shape, round_up, scale_shape
from .arrays import (
    CODES,
    SCALES,
    as_bytes,
    as_float8,
    as_result,
    call_core,
    dimensions,
    dtype_name,
    empty,
    kind_of,
    on_cuda,
    plain,
    require_2d,
    require_cpu,
    thread_count,
)

__all__ = ["MXFP8Array", "dequantize", "from_blocked", "quantize", "to_blocked"]


@dataclass(frozen=True, eq=False, repr=False)  # arrays have no single truth value
class MXFP8Array:
    """A matrix in MXFP8.

    Attributes:
        codes: E4M3 bit patterns, [roundup(N, 32), roundup(K, 32)], row-major. A NumPy array of
            uint8 (`codes.view(ml_dtypes.float8_e4m3fn)` for numbers) or a torch tensor of
            float8_e4m3fn.
        scales: E8M0 bytes, [roundup(N, 128), roundup(ceil(K / 32), 4)] in the 128x4 blocked
            layout, uint8.
        shape: (N, K) of the matrix, without padding.
    """

    codes: Any
    scales: Any
    shape: tuple[int, int]

    def __repr__(self) -> str:
        return f"MXFP8Array({'x'.join(map(str, self.shape))}, {kind_of(self.codes)})"

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and the scales."""
        return int(np.prod(self.codes.shape)) + int(np.prod(self.scales.shape))


def mxfp8_parts(array: Any, name: str) -> tuple[Any, Any, int, int]:
    """Return codes, scales, rows and columns of an `MXFP8Array`, as the core accepts them.

    Raises:
        InvalidArgumentError: if it is not an `MXFP8Array`, or its parts do not fit together.
    """
    if not isinstance(array, MXFP8Array):
        raise InvalidArgumentError(f"{name} must be an MXFP8Array, not {type(array).__name__}")
    rows, cols = dimensions(array.shape, f"the shape of {name}")
    codes = as_bytes(array.codes, CODES, f"codes of {name}")
    scales = as_bytes(array.scales, SCALES, f"scales of {name}")
    for what, given, expected in (
        ("codes", codes, padded_shape((rows, cols))),
        ("scales", scales, scale_shape((rows, cols))),
    ):
        if tuple(given.shape) != expected:
            raise InvalidArgumentError(
                f"{what} of a {rows}x{cols} matrix must be {list(expected)}, "
                f"not {list(given.shape)}"
            )
    return codes, scales, rows, cols


def quantize(
    array: Any, *, threads: int = 0, nonfinite: Literal["error", "encode"] | None = None
) -> MXFP8Array:
    """Encode a matrix in MXFP8.

    Scale byte: `clamp(ceil(log2(amax / 448)) + 127, 0, 254)`. Codes: `x * 2^(127 - byte)` to
    nearest even. The bytes depend neither on the processor, nor on the device, nor on `threads`.

    Args:
        array: [N, K] of bfloat16, float16 or float32; a NumPy array or a torch tensor. A tensor
            on a CUDA device is encoded there, on torch's current stream.
        threads: threads to use on the CPU; 0 means one per core.
        nonfinite: what to do with NaN and infinity: raise an "error", or "encode" their blocks as
            scale 255 and codes 0x7F, which every reader decodes to NaN. By default an error on the
            CPU, and encoded on CUDA, where "error" has to wait for the device.

    Returns:
        An `MXFP8Array` of the same kind (NumPy or torch) and on the same device as `array`.

    Raises:
        InvalidArgumentError: if `array` is not a matrix, or has an unsupported dtype or device.
        NonFiniteError: `array` has a NaN or an infinity; the error has its row and column.
        UnsupportedError: if `array` is a CUDA tensor and this build has no CUDA.
    """
    if nonfinite is not None and str(nonfinite) not in ("error", "encode"):
        raise InvalidArgumentError('nonfinite must be "error" or "encode"')
    threads = thread_count(threads)
    source, dtype = plain(array, "array")
    name = dtype_name(dtype, "array")
    shape = require_2d(source, "array")
    codes = empty(padded_shape(shape), "uint8", like=source)
    scales = empty(scale_shape(shape), "uint8", like=source)
    try:
        call_core(_core.quantize, source, name, codes, scales, threads, like=source)
    except NonFiniteError:
        if nonfinite != "encode":
            raise
    if nonfinite == "error" and on_cuda(source) and bool((scales == 255).any()):
        quantize(source.cpu(), threads=threads)  # raises, and names the place
    return MXFP8Array(as_float8(codes), scales, shape)


def dequantize(array: MXFP8Array, dtype: Any = "float32", *, threads: int = 0) -> Any:
    """Decode a matrix from MXFP8: `e4m3(code) * 2^(byte - 127)`.

    Args:
        array: the result of `quantize`, or codes and scales from a file.
        dtype: "bfloat16", "float16" or "float32" (or the NumPy or torch dtype of that name). Exact
            except for values outside the range of bfloat16 or float16, which are rounded to nearest
            even. bfloat16 in NumPy needs the ml_dtypes package.
        threads: threads to use; 0 means one per core.

    Returns:
        [N, K] of `dtype`, NumPy or torch like the codes, on the same device.

    Raises:
        InvalidArgumentError: codes or scales do not have the shapes that follow from `array.shape`,
            or are on different devices.
        MissingExtraError: bfloat16 in NumPy without ml_dtypes.
    """
    name = dtype_name(dtype, "dtype")
    codes, scales, rows, cols = mxfp8_parts(array, "array")
    threads = thread_count(threads)
    target = empty((rows, cols), name, like=codes)
    call_core(_core.dequantize, codes, scales, target, name, threads, like=codes)
    return as_result(target, name)


def to_blocked(scales: Any) -> Any:
    """Reorder row-major block scales [rows, blocks] to the 128x4 blocked layout, padded with 0.

    The result is uint8 [roundup(rows, 128), roundup(blocks, 4)], NumPy or torch like `scales`.

    Raises:
        InvalidArgumentError: if `scales` is not a matrix of 1-byte elements.
    """
    row_major = as_bytes(scales, SCALES, "scales")
    require_cpu(row_major, "scales")
    rows, cols = require_2d(row_major, "scales")
    blocked = empty((round_up(rows, SCALE_TILE_ROWS), round_up(cols, 4)), "uint8", like=row_major)
    _core.to_blocked(row_major, blocked)
    return blocked


def from_blocked(blocked: Any, rows: int, cols: int) -> Any:
    """Return block scales in the 128x4 blocked layout as row-major [rows, cols], without padding.

    `blocked` has roundup(rows, 128) * roundup(cols, 4) bytes in any shape.

    Raises:
        InvalidArgumentError: if `blocked` has another number of bytes, or a size is negative.
    """
    rows, cols = dimensions((rows, cols), "rows and cols")
    tiles = as_bytes(blocked, SCALES, "blocked")
    require_cpu(tiles, "blocked")
    wanted, found = round_up(rows, SCALE_TILE_ROWS) * round_up(cols, 4), math.prod(tiles.shape)
    if found != wanted:
        raise InvalidArgumentError(f"blocked must have {wanted} bytes, not {found}")
    row_major = empty((rows, cols), "uint8", like=tiles)
    _core.from_blocked(tiles, row_major)
    return row_major
