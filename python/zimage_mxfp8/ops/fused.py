"""Operations of Z-Image's DiT between its GEMMs, on CUDA: one pass over memory each.

Arguments are torch tensors of bfloat16 on one CUDA device; the work goes to torch's current stream
and can be captured in a CUDA graph. The arithmetic is float32, and every result is rounded to
bfloat16 once. An activation comes back in the format that the next GEMM takes:

    bfloat16    a tensor [M, C]
    row-scaled  a RowScaledArray, with the bytes of quantize_rows() over the bfloat16 result
    mxfp8       an MXFP8Array, with the bytes of quantize() over the bfloat16 result
    int8        an Int8Array, with the bytes of quantize_rotated() over the bfloat16 result; C is a
                multiple of 32

C is 1 to 16384. NaN and infinity are encoded as by quantize() on CUDA and quantize_rows(). All
functions raise InvalidArgumentError for shapes, dtypes, devices and strides that do not fit
together, and UnsupportedError in a build without CUDA.
"""

from __future__ import annotations

import operator
from typing import Any, Literal

from .. import _core
from ..errors import InvalidArgumentError
from ..layout import padded_shape, scale_shape
from ..zimage.constants import HEAD_DIM
from .arrays import as_float8, call_core, empty, is_tensor, plain, require_2d, vector
from .codec import MXFP8Array
from .gemm import Int8Array, RowScaledArray

__all__ = [
    "ActivationFormat",
    "add_norm_modulate",
    "norm_modulate",
    "quantize_rotated",
    "rotate_heads",
    "silu_multiply",
]

ActivationFormat = Literal["bfloat16", "row-scaled", "mxfp8", "int8"]


def _matrix(array: Any, name: str) -> Any:
    """Return a matrix of bfloat16 as the core reads it."""
    if not is_tensor(array):
        raise InvalidArgumentError(f"{name} must be a torch tensor, not {type(array).__name__}")
    values, dtype = plain(array, name)
    if dtype != "bfloat16":
        raise InvalidArgumentError(f"{name} must be bfloat16, not {dtype}")
    require_2d(values, name)
    return values


def _written_matrix(array: Any, name: str) -> Any:
    """Return a matrix of bfloat16 that the core can write in place, without a copy."""
    values = _matrix(array, name)
    if values.data_ptr() != array.data_ptr():
        raise InvalidArgumentError(
            f"{name} is written in place: the elements of a row must be adjacent, and rows apart"
        )
    return values


def _optional_matrix(array: Any, name: str) -> Any:
    return None if array is None else _matrix(array, name)


def _items(items: Any, rows: int) -> Any:
    return None if items is None else vector(items, "int32", rows, "items")


def as_eps(eps: Any) -> float:
    """Check and return the number that is added to a mean of squares."""
    try:
        return float(eps)
    except (TypeError, ValueError, OverflowError):
        raise InvalidArgumentError("eps must be a number") from None


def as_whole(number: Any, name: str) -> int:
    """Check and return a whole number."""
    try:
        return operator.index(number)
    except TypeError:
        raise InvalidArgumentError(f"{name} must be a whole number") from None


def as_heads(heads: Any, name: str) -> int:
    """Check and return a number of heads."""
    count = as_whole(heads, name)
    if not 0 <= count < 2**20:
        raise InvalidArgumentError(f"{name} must be 0 to {2**20 - 1}, not {count}")
    return count


def as_rotations(rotations: Any, rows: int) -> Any:
    """Return the pairs of cosine and sine per row, [rows, 64, 2], as the core takes them."""
    pairs, dtype = plain(rotations, "rotations")
    wanted = (rows, HEAD_DIM // 2, 2)
    if dtype != "float32" or tuple(pairs.shape) != wanted:
        raise InvalidArgumentError(
            f"rotations must be float32 {list(wanted)}, not {dtype} {list(pairs.shape)}"
        )
    return pairs.reshape(rows, HEAD_DIM)


class ActivationMemory:
    """Memory for an activation to compute.

    Attributes:
        parts: as the core takes it.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        output_format: ActivationFormat,
        like: Any,
        out: Any = None,
    ) -> None:
        """Take new memory, or that of a matrix.

        Args:
            shape: of the activation.
            output_format: its format; bfloat16 with `out`.
            like: a tensor on its device.
            out: the matrix, of bfloat16; None for new memory.
        """
        rows, cols = shape
        self.shape = shape
        self._format = str(output_format)
        self.scales = None
        if out is not None:
            self.values = _written_matrix(out, "out")
            if tuple(out.shape) != shape:
                raise InvalidArgumentError(f"out must be {list(shape)}, not {list(out.shape)}")
        elif self._format == "bfloat16":
            self.values = empty(shape, "bfloat16", like=like)
        elif self._format in ("row-scaled", "int8"):
            self.values = empty(shape, "int8" if self._format == "int8" else "uint8", like=like)
            self.scales = empty((rows,), "float32", like=like)
        elif self._format == "mxfp8":
            self.values = empty(padded_shape(shape), "uint8", like=like)
            self.scales = empty(scale_shape(shape), "uint8", like=like)
        else:
            raise InvalidArgumentError("output_format must be bfloat16, row-scaled, mxfp8 or int8")
        self.parts = (self._format, self.values, self.scales, rows, cols)

    def result(self) -> Any:
        """Return the activation, as users get it."""
        if self._format == "bfloat16":
            return self.values
        if self._format == "int8":
            return Int8Array(self.values, self.scales)
        codes = as_float8(self.values)
        if self._format == "row-scaled":
            return RowScaledArray(codes, self.scales)
        return MXFP8Array(codes, self.scales, self.shape)


def quantize_rotated(matrix: Any) -> Int8Array:
    """Rotate the rows of a matrix and encode them in INT8, with one scale per row.

    Every 32 columns are multiplied by Sylvester's Hadamard matrix / sqrt(32). Then `scale = amax /
    127` in float32, codes `x * (127 / amax)` to nearest even; csrc/include/zimage_mxfp8/rotated.h
    has each rounding. A row of zeros, or nearly so, becomes zeros; one with NaN or infinity gets
    the scale NaN.

    Args:
        matrix: [M, C] of bfloat16, C a multiple of 32 up to 16384.
    """
    matrix = _matrix(matrix, "matrix")
    target = ActivationMemory(require_2d(matrix, "matrix"), "int8", matrix)
    call_core(_core.quantize_rotated, matrix, target.parts, like=matrix)
    result: Int8Array = target.result()
    return result


def join_columns(left: Any, right: Any, output_format: ActivationFormat = "bfloat16") -> Any:
    """Put two matrices side by side, `left` first.

    Args:
        left: [M, L].
        right: [M, R].
        output_format: the format of the result, [M, L + R].
    """
    left, right = _matrix(left, "left"), _matrix(right, "right")
    rows, columns = require_2d(left, "left")
    shape = rows, columns + require_2d(right, "right")[1]
    target = ActivationMemory(shape, output_format, left)
    call_core(_core.join_columns, left, right, target.parts, like=left)
    return target.result()


def silu_multiply(gate: Any, up: Any, output_format: ActivationFormat = "bfloat16") -> Any:
    """Compute silu(gate) * up.

    Args:
        gate: [M, C]; `gate` and `up` may be the halves of one matrix [M, 2 C].
        up: [M, C].
        output_format: the format of the result.
    """
    gate, up = _matrix(gate, "gate"), _matrix(up, "up")
    target = ActivationMemory(require_2d(gate, "the activation"), output_format, gate)
    call_core(_core.silu_multiply, gate, up, target.parts, like=gate)
    return target.result()


def norm_modulate(
    x: Any,
    weight: Any,
    scale: Any = None,
    items: Any = None,
    output_format: ActivationFormat = "bfloat16",
    eps: float = 1e-5,
) -> Any:
    """Compute RMSNorm(x) * weight * (1 + scale[item]).

    Args:
        x: [M, C].
        weight: [C] of bfloat16.
        scale: [I, C], one row per item (element of the batch), or None for no modulation.
        items: [M] of int32, the item of each row, or None if there is only one. A row with an item
            outside [0, I) becomes NaN.
        output_format: the format of the result.
        eps: added to the mean of the squares.
    """
    x = _matrix(x, "x")
    rows, cols = require_2d(x, "x")
    target = ActivationMemory((rows, cols), output_format, x)
    call_core(
        _core.norm_modulate,
        x,
        vector(weight, "bfloat16", cols, "weight"),
        _optional_matrix(scale, "scale"),
        _items(items, rows),
        as_eps(eps),
        target.parts,
        like=x,
    )
    return target.result()


def add_norm_modulate(
    x: Any,
    y: Any,
    norm_weight: Any,
    gate: Any = None,
    next_weight: Any = None,
    next_scale: Any = None,
    items: Any = None,
    output_format: ActivationFormat = "bfloat16",
    eps: float = 1e-5,
    addend: Any = None,
    addend_factor: Any = None,
) -> Any:
    """Add tanh(gate[item]) * RMSNorm(y) * norm_weight to x in place, and norm the result.

    Args:
        x: [M, C], written.
        y: [M, C].
        norm_weight: [C] of bfloat16.
        gate: [I, C], one row per item, or None for a factor of 1.
        next_weight: [C] of bfloat16, the weight of the norm that follows; None for no norm.
        next_scale: [I, C], its modulation, or None.
        items: as in `norm_modulate`.
        output_format: the format of the result.
        eps: added to the mean of the squares, in both norms.
        addend: [M, C] of bfloat16, added to x too, multiplied by `addend_factor`, before x is
            rounded; None to add nothing.
        addend_factor: [1] of float32; None without an `addend`.

    Returns:
        `norm_modulate(x, next_weight, next_scale, items, output_format, eps)` of the new x, or
        None without a `next_weight`.
    """
    x, y = _written_matrix(x, "x"), _matrix(y, "y")
    rows, cols = require_2d(x, "x")
    if next_weight is None and next_scale is not None:
        raise InvalidArgumentError("next_scale needs a next_weight")
    shape = (rows, cols)
    target = None if next_weight is None else ActivationMemory(shape, output_format, x)
    call_core(
        _core.add_norm_modulate,
        x,
        y,
        vector(norm_weight, "bfloat16", cols, "norm_weight"),
        _optional_matrix(gate, "gate"),
        None if next_weight is None else vector(next_weight, "bfloat16", cols, "next_weight"),
        _optional_matrix(next_scale, "next_scale"),
        _items(items, rows),
        as_eps(eps),
        None if target is None else target.parts,
        _optional_matrix(addend, "addend"),
        None if addend_factor is None else vector(addend_factor, "float32", 1, "addend_factor"),
        like=x,
    )
    return None if target is None else target.result()


def rotate_heads(
    matrix: Any,
    q_weight: Any,
    k_weight: Any,
    rotations: Any,
    q_heads: int,
    k_heads: int,
    eps: float = 1e-5,
) -> None:
    """Norm and rotate the heads of q and k in place.

    Every head becomes RMSNorm(head) * weight, and then its adjacent pairs, taken as complex
    numbers, are multiplied with those of `rotations`; rounded once, at the end.

    Args:
        matrix: [M, heads * 128], written: the heads of q, those of k, and others, such as those of
            v, which do not change.
        q_weight: [128] of bfloat16.
        k_weight: [128] of bfloat16.
        rotations: [M, 64, 2] of float32: cosine and sine for each pair.
        q_heads: number of heads of q.
        k_heads: number of heads of k.
        eps: added to the mean of the squares.
    """
    matrix = _written_matrix(matrix, "the matrix")
    rows, _ = require_2d(matrix, "the matrix")
    call_core(
        _core.rotate_heads,
        matrix,
        vector(q_weight, "bfloat16", HEAD_DIM, "q_weight"),
        vector(k_weight, "bfloat16", HEAD_DIM, "k_weight"),
        as_rotations(rotations, rows),
        as_heads(q_heads, "q_heads"),
        as_heads(k_heads, "k_heads"),
        as_eps(eps),
        like=matrix,
    )
