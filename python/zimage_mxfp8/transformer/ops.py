"""The work between the GEMMs, on plain torch tensors of any device.

On CUDA in BF16 the core's fused kernels do it (`zimage_mxfp8.ops.fused`) if this build has them;
otherwise torch does, on some rows at a time. Either way arithmetic is in float32 and results are
rounded once. In a model of float16 only the results of some GEMMs are in float16, see
`Linear.is_in_range`; x, y and results that are not encoded are in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..ops.fused import ActivationFormat
from ..system import devices
from ..zimage.constants import HEAD_DIM, NORM_EPS
from . import arithmetic
from . import fused_kernels as fused
from .arithmetic import int8, tiles
from .floating_dtype import sums_dtype

# A matrix of activations in all formats that its consumers take.
Activation = dict[ActivationFormat, Any]
# The format without encoding; in a model in float32 or float16 it means float32.
PLAIN: ActivationFormat = "bfloat16"

_BLOCK = 32  # 8-bit GEMMs take widths that are multiples of it
_TEMPORARIES = 3  # float32 matrices that an operation by torch holds at the same time


@dataclass(frozen=True, eq=False)
class ScaledMatrix:
    """A matrix with one factor for all of its elements.

    Attributes:
        matrix: [M, C].
        factor: float32 [1].
    """

    matrix: torch.Tensor
    factor: torch.Tensor


def encode(matrix: torch.Tensor, formats: Set[ActivationFormat]) -> Activation:
    """Encode a matrix [M, C]; 8-bit formats have its width rounded up to 32, with zeros."""
    return {each: _encode(matrix, each) for each in formats}


def encode_joined(parts: Sequence[torch.Tensor], formats: Set[ActivationFormat]) -> Activation:
    """Encode one or two matrices [M, C] side by side, see `encode`."""
    if len(parts) == 1:
        return encode(parts[0], formats)
    left, right = parts
    if not _fusable(left) or torch.compiler.is_compiling():
        return encode(torch.cat((left, right), dim=1), formats)
    written = _fused_format(left.shape[1] + right.shape[1], formats)
    return _others(fused.join_columns(left, right, written), written, formats)


def _encode(matrix: torch.Tensor, to: ActivationFormat) -> Any:
    if to == PLAIN:
        return matrix
    matrix = pad_columns(matrix, -(-matrix.shape[1] // _BLOCK) * _BLOCK)
    of_device = arithmetic.on(matrix.device)
    if to == "int8":
        return of_device.quantize_int8(matrix)
    return of_device.quantize_rows(matrix) if to == "row-scaled" else of_device.quantize(matrix)


def decode(matrix: Any, written: ActivationFormat) -> torch.Tensor:
    """Decode a matrix [M, C] in a format of `encode` to float32 [M, C], with its padding.

    INT8 is rotated back.
    """
    if written == PLAIN:
        plain: torch.Tensor = matrix
        return plain.float()
    device = matrix.codes.device
    if written == "int8":
        return int8.decode(matrix, None)
    if written == "row-scaled":
        values: torch.Tensor = matrix.codes.view(torch.float8_e4m3fn).float()
        return values.mul_(matrix.scales[:, None])
    return arithmetic.on(device).dequantize(matrix, torch.float32)


def activation_nbytes(formats: Set[ActivationFormat], elements: int, dtype: torch.dtype) -> int:
    """Return the bytes of a matrix in some formats, without row scales and padding.

    Args:
        formats: the formats.
        elements: of the matrix.
        dtype: of the model.
    """
    nbytes = {
        PLAIN: elements * sums_dtype(dtype).itemsize,
        "row-scaled": elements,
        "int8": elements,
        "mxfp8": elements + elements // _BLOCK,
    }
    return sum(nbytes[each] for each in formats)


def result_nbytes(
    formats: Set[ActivationFormat], elements: int, dtype: torch.dtype, device: torch.device
) -> int:
    """Return the bytes of a result in some formats, with the matrix that torch encodes."""
    if len(formats) > 1 or not _has_kernels(dtype, device):
        formats = formats | {PLAIN}
    return activation_nbytes(formats, elements, dtype)


def pad_columns(matrix: torch.Tensor, columns: int) -> torch.Tensor:
    """Append zeros on the right, up to a number of columns."""
    return F.pad(matrix, (0, columns - matrix.shape[1])) if matrix.shape[1] < columns else matrix


def _fusable(matrix: torch.Tensor) -> bool:
    return _has_kernels(matrix.dtype, matrix.device)


def _has_kernels(dtype: torch.dtype, device: torch.device) -> bool:
    return dtype == torch.bfloat16 and devices.has_fused_kernels(device)


def _tiles(matrix: torch.Tensor) -> Iterator[slice]:
    """Return tiles of rows to compute together, to bound the float32 copies of BF16 rows."""
    if matrix.dtype == torch.float32:
        return iter([slice(0, len(matrix))])
    return tiles.row_tiles(len(matrix), matrix.shape[1], tiles.TILE)


def temporaries_nbytes(elements: int, dtype: torch.dtype, device: torch.device) -> int:
    """Return the peak bytes of torch's temporaries for a number of elements; kernels need none."""
    if dtype == torch.float32 or _has_kernels(dtype, device):
        return 0
    return _TEMPORARIES * min(elements, tiles.TILE) * torch.float32.itemsize


def _fused_format(columns: int, formats: Set[ActivationFormat]) -> ActivationFormat:
    """Return the format for a fused kernel to write; others are encoded from BF16."""
    return next(iter(formats)) if len(formats) == 1 and columns % _BLOCK == 0 else PLAIN


def _others(result: Any, written: ActivationFormat, formats: Set[ActivationFormat]) -> Activation:
    return {written: result} if formats == {written} else encode(result, formats)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + NORM_EPS)
    return normal.mul_(weight.float())


def _of_items(factors: torch.Tensor, items: torch.Tensor | None, rows: slice) -> torch.Tensor:
    """Return the factors [I, C] of some rows: [M, C] or [1, C]."""
    return (factors if items is None else factors[items[rows].long()]).float()


def silu_multiply(
    gate: torch.Tensor, up: torch.Tensor, formats: Set[ActivationFormat]
) -> Activation:
    """Compute silu(gate) * up, both [M, C]."""
    if _fusable(gate):
        written = _fused_format(gate.shape[1], formats)
        return _others(fused.silu_multiply(gate, up, written), written, formats)
    result = torch.empty(gate.shape, dtype=sums_dtype(gate.dtype), device=gate.device)
    for rows in _tiles(gate):
        result[rows] = F.silu(gate[rows].float()).mul_(up[rows].float())
    return encode(result, formats)


def norm_modulate(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    items: torch.Tensor | None,
    formats: Set[ActivationFormat],
) -> Activation:
    """Compute RMSNorm(x) * weight * (1 + scale of the row's item).

    Args:
        x: [M, C].
        weight: [C].
        scale: [I, C], or None for no modulation.
        items: int32 [M], the item of each row; None if I is 1.
        formats: formats of the result.
    """
    if _fusable(x):
        written = _fused_format(x.shape[1], formats)
        return _others(
            fused.norm_modulate(x, weight, scale, items, written, NORM_EPS), written, formats
        )
    result = torch.empty_like(x)
    for rows in _tiles(x):
        normal = _rms_norm(x[rows], weight)
        if scale is not None:
            normal.mul_(1 + _of_items(scale, items, rows))
        result[rows] = normal
    return encode(result, formats)


def add_norm(
    x: torch.Tensor,
    y: torch.Tensor,
    weight: torch.Tensor,
    gate: torch.Tensor | None,
    items: torch.Tensor | None,
    addends: Sequence[ScaledMatrix] = (),
) -> None:
    """Add tanh(gate of the row's item) * RMSNorm(y) * weight to x in place; gate None: factor 1.

    Addends are added too, before x is rounded.
    """
    if _fusable(x):
        added = _sum(addends)
        fused.add_norm_modulate(x, y, weight, gate, None, None, items, PLAIN, NORM_EPS, *added)
        return
    for rows in _tiles(x):
        change = _rms_norm(y[rows], weight)
        if gate is not None:
            change.mul_(_of_items(gate, items, rows).tanh())
        change.add_(x[rows])
        for each in addends:
            change.add_(each.matrix[rows].float() * each.factor)
        x[rows] = change


def _sum(addends: Sequence[ScaledMatrix]) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
    """Return the addend of a kernel and its factor. The sum of several is rounded first."""
    if not addends:
        return None, None
    first, *others = addends
    if not others:
        return first.matrix, first.factor
    total = first.matrix.float().mul_(first.factor)
    for each in others:
        total.addcmul_(each.matrix, each.factor)
    return total.to(first.matrix.dtype), torch.ones_like(first.factor)


def add_norm_modulate(
    x: torch.Tensor,
    y: torch.Tensor,
    weight: torch.Tensor,
    gate: torch.Tensor | None,
    next_weight: torch.Tensor,
    next_scale: torch.Tensor | None,
    items: torch.Tensor | None,
    formats: Set[ActivationFormat],
    addends: Sequence[ScaledMatrix] = (),
) -> Activation:
    """Compute `add_norm`, then `norm_modulate` of the new x with the `next_` arguments."""
    if _fusable(x):
        written = _fused_format(x.shape[1], formats)
        norms = weight, gate, next_weight, next_scale
        result = fused.add_norm_modulate(x, y, *norms, items, written, NORM_EPS, *_sum(addends))
        return _others(result, written, formats)
    add_norm(x, y, weight, gate, items, addends)
    return norm_modulate(x, next_weight, next_scale, items, formats)


def rotate_heads(
    matrix: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    rotations: torch.Tensor,
    q_heads: int,
    k_heads: int,
) -> None:
    """Norm each head of q and k, multiply it by a weight and rotate it, in place.

    Args:
        matrix: [M, heads * 128]: the heads of q, those of k, and others, such as those of v.
        q_weight: [128].
        k_weight: [128].
        rotations: float32 [M, 64, 2]: cosine and sine for each pair of adjacent elements.
        q_heads: number of heads of q.
        k_heads: number of heads of k.
    """
    if q_heads + k_heads == 0:
        return
    if _fusable(matrix):
        fused.rotate_heads(matrix, q_weight, k_weight, rotations, q_heads, k_heads, NORM_EPS)
        return
    turns = torch.view_as_complex(rotations)[:, None, :]
    for rows in _tiles(matrix):
        heads = matrix[rows].unflatten(1, (-1, HEAD_DIM))
        q, k, _ = heads.split((q_heads, k_heads, heads.shape[1] - q_heads - k_heads), dim=1)
        for part, weight in ((q, q_weight), (k, k_weight)):
            pairs = torch.view_as_complex(_rms_norm(part, weight).unflatten(-1, (-1, 2)))
            part.copy_(torch.view_as_real(pairs * turns[rows]).flatten(-2))
