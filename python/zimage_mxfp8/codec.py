"""MXFP8 encoding and decoding of arrays: NumPy arrays and torch tensors, on the CPU or on CUDA.

Format: OCP Microscaling Formats v1.0, E4M3 elements in blocks of 32 along the last axis, one E8M0
scale a block, with NVIDIA's round-up scale. Scales are in the 128x4 blocked layout that
Blackwell's tensor cores read.

torch is never imported from here: a tensor is recognised by its type, and its own module serves
it. Tensors on a CUDA device are worked on there, on torch's current stream. NumPy has no bfloat16
or float8 of its own; arrays with the types of ml_dtypes are understood.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from . import _core
from .dtypes import FLOAT_NAMES, DTypeName
from .errors import InvalidArgumentError, NonFiniteError
from .optional_packages import needed

CODES, SCALES = "float8_e4m3fn", "float8_e8m0fnu"  # dtypes of codes and scales, beside uint8

__all__ = ["MXFP8Array", "dequantize", "from_blocked", "quantize", "to_blocked"]


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def padded_shape(shape: tuple[int, int]) -> tuple[int, int]:
    """Shape of the codes of a matrix: both sizes rounded up to a multiple of 32."""
    rows, cols = shape
    return _round_up(rows, 32), _round_up(cols, 32)


def scale_shape(shape: tuple[int, int]) -> tuple[int, int]:
    """Shape of the blocked scales of a matrix (`shape` before padding)."""
    rows, cols = padded_shape(shape)
    return _round_up(rows, 128), _round_up(cols // 32, 4)


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


def _torch_of(array: object) -> Any:
    """The torch module if `array` is a torch tensor, else None."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and isinstance(array, torch.Tensor) else None


def kind_of(array: Any) -> str:
    """Library, device and dtype of an array, for `repr`."""
    if is_tensor(array):
        return f"torch on {array.device}, {str(array.dtype).removeprefix('torch.')}"
    return f"NumPy, {array.dtype}" if isinstance(array, np.ndarray) else type(array).__name__


def is_tensor(array: object) -> bool:
    """Whether `array` is a torch tensor."""
    return _torch_of(array) is not None


def on_cuda(array: Any) -> bool:
    """Whether `array` is a torch tensor on a CUDA device."""
    return _torch_of(array) is not None and array.device.type == "cuda"


def require_cpu(array: Any, name: str) -> None:
    """Refuse a tensor that is not in host memory."""
    if _torch_of(array) is not None and array.device.type != "cpu":
        raise InvalidArgumentError(
            f"{name} is on {array.device}; move it to the CPU first ({name}.cpu())"
        )


class _Exporter:
    """A tensor of another device than the current one, from which alone torch exports memory."""

    def __init__(self, tensor: Any, torch: Any) -> None:
        self._tensor, self._torch = tensor, torch

    def __dlpack_device__(self) -> Any:
        return self._tensor.__dlpack_device__()

    def __dlpack__(self, stream: int) -> Any:
        with self._torch.cuda.device(self._tensor.device):
            return self._tensor.__dlpack__(stream=stream)


def _exportable(argument: Any) -> Any:
    """An argument of the core, with tensors that it can import whatever device is current."""
    if isinstance(argument, tuple):
        return tuple(map(_exportable, argument))
    if not on_cuda(argument):
        return argument
    torch = _torch_of(argument)
    current = argument.device.index == torch.cuda.current_device()
    return argument if current else _Exporter(argument, torch)


def call_core(function: Callable[..., None], *arguments: Any, like: Any) -> None:
    """Call a function of the core on torch's current stream of the device of `like`, or the CPU."""
    torch = _torch_of(like)
    stream = torch.cuda.current_stream(like.device).cuda_stream if on_cuda(like) else 0
    function(*map(_exportable, arguments), stream)


def _tensor(array: Any, torch: Any, name: str) -> Any:
    """A tensor whose memory holds its values: dense, on the CPU or CUDA, nothing lazy."""
    if array.layout != torch.strided or array.is_nested:
        raise InvalidArgumentError(f"{name} must be a dense tensor")
    if not on_cuda(array):
        require_cpu(array, name)
    return array.detach().resolve_neg()


def _array(array: Any, name: str, kinds: str) -> Any:
    """A plain NumPy array in native byte order."""
    if not isinstance(array, np.ndarray) or isinstance(array, np.ma.MaskedArray):
        raise InvalidArgumentError(f"{name} must be {kinds}, not {type(array).__name__}")
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


_KINDS = "a NumPy array or a torch tensor"


def plain(array: Any, name: str, kinds: str = _KINDS) -> tuple[Any, str]:
    """An array as something that the core accepts, and the name of its dtype."""
    torch = _torch_of(array)
    if torch is not None:
        tensor = _tensor(array, torch, name)
        usable = tensor.dim() != 2 or _rows_are_usable(tensor.shape, tensor.stride())
        dtype = str(tensor.dtype).removeprefix("torch.")
        return (tensor if usable else tensor.contiguous()), dtype
    array = _array(array, name, kinds)
    dtype = array.dtype.name
    if array.ndim == 2:
        strides = tuple(stride // array.itemsize for stride in array.strides)
        if not _rows_are_usable(array.shape, strides):
            array = np.ascontiguousarray(array)
    # bfloat16 from ml_dtypes does not export a buffer: pass the bits.
    return (array.view(np.uint16) if dtype == "bfloat16" else array), dtype


def vector(array: Any, dtype: str, size: int, name: str) -> Any:
    """A vector of that dtype and size as something that the core accepts."""
    values, found = plain(array, name)
    if found != dtype:
        raise InvalidArgumentError(f"{name} must be {dtype}, not {found}")
    if tuple(values.shape) != (size,):
        raise InvalidArgumentError(f"{name} must be [{size}], not {list(values.shape)}")
    if _torch_of(values) is None:
        return np.ascontiguousarray(values)
    return aligned(values.contiguous())


def aligned(tensor: Any) -> Any:
    """A tensor, or a copy of it, that begins at a multiple of 16 bytes, as CUDA kernels need it."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _rows_are_usable(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the core can read a matrix in place: elements of a row adjacent, rows apart."""
    rows, cols = shape
    return (cols <= 1 or strides[1] == 1) and (rows <= 1 or strides[0] >= cols)


def as_bytes(array: Any, dtype: str, name: str) -> Any:
    """Codes or scales, uint8 or `dtype`, as a C-contiguous array of uint8 that the core accepts."""
    torch = _torch_of(array)
    values = _array(array, name, _KINDS) if torch is None else _tensor(array, torch, name)
    found = values.dtype.name if torch is None else str(values.dtype).removeprefix("torch.")
    if found not in ("uint8", dtype):
        raise InvalidArgumentError(f"{name} must be uint8 or {dtype}, not {found}")
    if torch is not None:
        return values.contiguous().view(torch.uint8)
    return np.ascontiguousarray(values).view(np.uint8)


def mxfp8_parts(array: Any, name: str) -> tuple[Any, Any, int, int]:
    """Codes, scales, rows and columns of an `MXFP8Array`, as the core accepts them.

    Raises:
        InvalidArgumentError: not an `MXFP8Array`, or its parts do not belong together.
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


def dimensions(shape: Any, what: str) -> tuple[int, int]:
    """Two sizes."""
    try:
        rows, cols = (operator.index(size) for size in shape)
    except (TypeError, ValueError):
        rows, cols = -1, -1
    if not (0 <= rows < 2**40 and 0 <= cols < 2**40):
        raise InvalidArgumentError(f"{what} must be two sizes, not {str(shape)[:40]}")
    return rows, cols


def thread_count(threads: Any) -> int:
    """A number of threads."""
    try:
        number = operator.index(threads)
    except TypeError:
        number = -1
    if not 0 <= number < 2**31:
        raise InvalidArgumentError("threads must be 0 (one a core) or more")
    return number


def empty(shape: tuple[int, ...], dtype: str, like: Any) -> Any:
    """A new array of the kind (NumPy or torch) and on the device of `like`.

    bfloat16 in NumPy is uint16: its bits.
    """
    torch = _torch_of(like)
    if torch is not None:
        return torch.empty(shape, dtype=getattr(torch, dtype), device=like.device)
    return np.empty(shape, "uint16" if dtype == "bfloat16" else dtype)


def as_float8(codes: Any) -> Any:
    """Codes as users get them: NumPy uint8 as it is, a torch tensor as float8_e4m3fn."""
    torch = _torch_of(codes)
    return codes if torch is None else codes.view(torch.float8_e4m3fn)


def as_result(array: Any, dtype: DTypeName) -> Any:
    """What `empty` gave, as users get it: the bits of bfloat16 in NumPy as ml_dtypes's type."""
    bits = dtype == "bfloat16" and isinstance(array, np.ndarray)
    return array.view(bfloat16_type()) if bits else array


def require_2d(array: Any, name: str) -> tuple[int, int]:
    """The shape of an array, which must be a matrix."""
    if len(array.shape) != 2:
        raise InvalidArgumentError(f"{name} must have 2 dimensions, not {len(array.shape)}")
    rows, cols = array.shape
    return int(rows), int(cols)


def quantize(
    array: Any, *, threads: int = 0, nonfinite: Literal["error", "encode"] | None = None
) -> MXFP8Array:
    """Encode a matrix in MXFP8.

    Scale byte: `clamp(ceil(log2(amax / 448)) + 127, 0, 254)`. Codes: `x * 2^(127 - byte)` to
    nearest even. The bytes depend neither on the processor, nor on the device, nor on `threads`.

    Args:
        array: [N, K] of bfloat16, float16 or float32; a NumPy array or a torch tensor. A tensor
            on a CUDA device is encoded there, on torch's current stream.
        threads: threads to use on the CPU; 0 means one a core.
        nonfinite: what to do with NaN and infinity: raise an "error", or "encode" their blocks as
            scale 255 and codes 0x7F, which every reader takes for NaN. By default an error on the
            CPU, and encoded on CUDA, where "error" has to wait for the device.

    Returns:
        An `MXFP8Array` of the same kind (NumPy or torch) and on the same device as `array`.

    Raises:
        InvalidArgumentError: not a matrix, or another dtype or device.
        NonFiniteError: `array` has a NaN or an infinity; the error has its row and column.
        UnsupportedError: a CUDA tensor, and this build has no CUDA.
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
        array: what `quantize` gave, or codes and scales from a file.
        dtype: "bfloat16", "float16" or "float32" (or the NumPy or torch dtype of that name).
            Exact but for values outside the range of bfloat16 or float16, which are rounded to
            nearest even. bfloat16 in NumPy needs the ml_dtypes package.
        threads: threads to use; 0 means one a core.

    Returns:
        [N, K] of `dtype`, NumPy or torch and on the device as the codes are.

    Raises:
        InvalidArgumentError: codes or scales do not have the shapes that `array.shape` asks for,
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
    """Row-major block scales [rows, blocks] -> the 128x4 blocked layout, padded with 0.

    Returns uint8 [roundup(rows, 128), roundup(blocks, 4)], NumPy or torch as `scales` is.

    Raises:
        InvalidArgumentError: not a matrix of 1-byte elements.
    """
    row_major = as_bytes(scales, SCALES, "scales")
    require_cpu(row_major, "scales")
    rows, cols = require_2d(row_major, "scales")
    blocked = empty((_round_up(rows, 128), _round_up(cols, 4)), "uint8", like=row_major)
    _core.to_blocked(row_major, blocked)
    return blocked


def from_blocked(blocked: Any, rows: int, cols: int) -> Any:
    """The 128x4 blocked layout -> row-major block scales [rows, cols], without the padding.

    `blocked` has roundup(rows, 128) * roundup(cols, 4) bytes in any shape.

    Raises:
        InvalidArgumentError: another number of bytes, or a negative size.
    """
    rows, cols = dimensions((rows, cols), "rows and cols")
    tiles = as_bytes(blocked, SCALES, "blocked")
    require_cpu(tiles, "blocked")
    wanted, found = _round_up(rows, 128) * _round_up(cols, 4), math.prod(tiles.shape)
    if found != wanted:
        raise InvalidArgumentError(f"blocked must have {wanted} bytes, not {found}")
    row_major = empty((rows, cols), "uint8", like=tiles)
    _core.from_blocked(tiles, row_major)
    return row_major


def dtype_name(dtype: Any, what: str) -> DTypeName:
    """The name of a NumPy or torch dtype, which must be bfloat16, float16 or float32."""
    text = np.dtype(dtype).name if isinstance(dtype, (type, np.dtype)) else str(dtype)
    text = text.removeprefix("torch.")
    for name in FLOAT_NAMES.values():
        if text == name:
            return name
    raise InvalidArgumentError(f"{what} must be bfloat16, float16 or float32, not {text}")


def bfloat16_type() -> Any:
    """NumPy's type for bfloat16, which ml_dtypes has."""
    with needed("analysis", "bfloat16 in NumPy"):
        import ml_dtypes
    return ml_dtypes.bfloat16
