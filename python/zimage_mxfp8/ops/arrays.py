"""Conversion of NumPy arrays and torch tensors for the core: dtypes, strides and streams.

This module never imports torch: it recognises a tensor by its type, and takes torch from the loaded
modules. NumPy has no bfloat16 or float8; the types of ml_dtypes are supported.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from ..dtypes import FLOAT_NAMES, DTypeName
from ..errors import InvalidArgumentError
from ..system.optional_packages import needed

CODES, SCALES = (
    "float8_e4m3fn",
    "float8_e8m0fnu",
)  # dtypes of codes and scales, in addition to uint8


def _torch_of(array: object) -> Any:
    """Return the torch module if `array` is a torch tensor, else None."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and isinstance(array, torch.Tensor) else None


def kind_of(array: Any) -> str:
    """Return library, device and dtype of an array, for `repr`."""
    if is_tensor(array):
        return f"torch on {array.device}, {str(array.dtype).removeprefix('torch.')}"
    return f"NumPy, {array.dtype}" if isinstance(array, np.ndarray) else type(array).__name__


def is_tensor(array: object) -> bool:
    """Return whether `array` is a torch tensor."""
    return _torch_of(array) is not None


def on_cuda(array: Any) -> bool:
    """Return whether `array` is a torch tensor on a CUDA device."""
    return _torch_of(array) is not None and array.device.type == "cuda"


def require_cpu(array: Any, name: str) -> None:
    """Raise unless a tensor is in host memory."""
    if _torch_of(array) is not None and array.device.type != "cpu":
        raise InvalidArgumentError(
            f"{name} is on {array.device}; move it to the CPU first ({name}.cpu())"
        )


class _Exporter:
    """A tensor on another device than the current one; torch exports memory of the latter only."""

    def __init__(self, tensor: Any, torch: Any) -> None:
        self._tensor, self._torch = tensor, torch

    def __dlpack_device__(self) -> Any:
        return self._tensor.__dlpack_device__()

    def __dlpack__(self, stream: int) -> Any:
        with self._torch.cuda.device(self._tensor.device):
            return self._tensor.__dlpack__(stream=stream)


def _exportable(argument: Any) -> Any:
    """Wrap tensors in an argument, so that the core can import them from any device."""
    if isinstance(argument, tuple):
        return tuple(map(_exportable, argument))
    if not on_cuda(argument):
        return argument
    torch = _torch_of(argument)
    current = argument.device.index == torch.cuda.current_device()
    return argument if current else _Exporter(argument, torch)


@cache
def _may_have_another_device() -> bool:
    """Return whether a tensor can be on another CUDA device than the current one."""
    count: int = sys.modules["torch"].cuda.device_count()
    return count > 1


def call_core(function: Callable[..., None], *arguments: Any, like: Any) -> None:
    """Call a function of the core on torch's current stream of the device of `like`, or the CPU."""
    torch = _torch_of(like)
    on_device = torch is not None and like.is_cuda
    stream = torch.cuda.current_stream(like.device).cuda_stream if on_device else 0
    # Looking at each part of each argument takes longer than most calls.
    if on_device and _may_have_another_device():
        arguments = tuple(map(_exportable, arguments))
    function(*arguments, stream)


def _tensor(array: Any, torch: Any, name: str) -> Any:
    """Return a tensor with its values in memory: dense, on the CPU or CUDA, not lazy."""
    if array.layout != torch.strided or array.is_nested:
        raise InvalidArgumentError(f"{name} must be a dense tensor")
    if not on_cuda(array):
        require_cpu(array, name)
    return array.detach().resolve_neg()


def _array(array: Any, name: str, kinds: str) -> Any:
    """Return a plain NumPy array in native byte order."""
    if not isinstance(array, np.ndarray) or isinstance(array, np.ma.MaskedArray):
        raise InvalidArgumentError(f"{name} must be {kinds}, not {type(array).__name__}")
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


_KINDS = "a NumPy array or a torch tensor"


def plain(array: Any, name: str, kinds: str = _KINDS) -> tuple[Any, str]:
    """Return an array that the core accepts, and the name of its dtype."""
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
    """Return a vector of that dtype and size that the core accepts."""
    values, found = plain(array, name)
    if found != dtype:
        raise InvalidArgumentError(f"{name} must be {dtype}, not {found}")
    if tuple(values.shape) != (size,):
        raise InvalidArgumentError(f"{name} must be [{size}], not {list(values.shape)}")
    if _torch_of(values) is None:
        return np.ascontiguousarray(values)
    return aligned(values.contiguous())


def aligned(tensor: Any) -> Any:
    """Return a tensor, copied if necessary, that begins at a multiple of 16 bytes."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _rows_are_usable(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Return whether the core can read a matrix in place: adjacent elements, separate rows."""
    rows, cols = shape
    return (cols <= 1 or strides[1] == 1) and (rows <= 1 or strides[0] >= cols)


def as_bytes(array: Any, dtype: str, name: str) -> Any:
    """Return codes or scales, uint8 or `dtype`, as a C-contiguous array of uint8 for the core."""
    torch = _torch_of(array)
    values = _array(array, name, _KINDS) if torch is None else _tensor(array, torch, name)
    found = values.dtype.name if torch is None else str(values.dtype).removeprefix("torch.")
    if found not in ("uint8", dtype):
        raise InvalidArgumentError(f"{name} must be uint8 or {dtype}, not {found}")
    if torch is not None:
        return values.contiguous().view(torch.uint8)
    return np.ascontiguousarray(values).view(np.uint8)


def dimensions(shape: Any, what: str) -> tuple[int, int]:
    """Check and return two sizes."""
    try:
        rows, cols = (operator.index(size) for size in shape)
    except (TypeError, ValueError):
        rows, cols = -1, -1
    if not (0 <= rows < 2**40 and 0 <= cols < 2**40):
        raise InvalidArgumentError(f"{what} must be two sizes, not {str(shape)[:40]}")
    return rows, cols


def thread_count(threads: Any) -> int:
    """Return a number of threads."""
    try:
        number = operator.index(threads)
    except TypeError:
        number = -1
    if not 0 <= number < 2**31:
        raise InvalidArgumentError("threads must be 0 (one per core) or more")
    return number


def empty(shape: tuple[int, ...], dtype: str, like: Any) -> Any:
    """Return a new array of the kind (NumPy or torch) and on the device of `like`.

    bfloat16 in NumPy is uint16: its bits.
    """
    torch = _torch_of(like)
    if torch is not None:
        return torch.empty(shape, dtype=getattr(torch, dtype), device=like.device)
    return np.empty(shape, "uint16" if dtype == "bfloat16" else dtype)


def as_float8(codes: Any) -> Any:
    """Return codes as users get them: NumPy uint8 unchanged, a torch tensor as float8_e4m3fn."""
    torch = _torch_of(codes)
    return codes if torch is None else codes.view(torch.float8_e4m3fn)


def as_result(array: Any, dtype: DTypeName) -> Any:
    """Return an array of `empty` as users get it: bits of bfloat16 in NumPy as ml_dtypes's type."""
    bits = dtype == "bfloat16" and isinstance(array, np.ndarray)
    return array.view(bfloat16_type()) if bits else array


def require_2d(array: Any, name: str) -> tuple[int, int]:
    """Return the shape of an array, which must be a matrix."""
    if len(array.shape) != 2:
        raise InvalidArgumentError(f"{name} must have 2 dimensions, not {len(array.shape)}")
    rows, cols = array.shape
    return int(rows), int(cols)


def dtype_name(dtype: Any, what: str) -> DTypeName:
    """Return the name of a NumPy or torch dtype, which must be bfloat16, float16 or float32."""
    text = np.dtype(dtype).name if isinstance(dtype, (type, np.dtype)) else str(dtype)
    text = text.removeprefix("torch.")
    for name in FLOAT_NAMES.values():
        if text == name:
            return name
    raise InvalidArgumentError(f"{what} must be bfloat16, float16 or float32, not {text}")


def bfloat16_type() -> Any:
    """Return NumPy's type for bfloat16, from ml_dtypes."""
    with needed("analysis", "bfloat16 in NumPy"):
        import ml_dtypes
    return ml_dtypes.bfloat16
