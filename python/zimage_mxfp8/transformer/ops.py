"""The work between the products, on plain torch tensors of any device.

On CUDA in BF16 the core's fused kernels do it (`zimage_mxfp8.fused`); elsewhere torch does. Either
way arithmetic is in float32 and results are rounded once.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F

from .. import fused
from ..codec import quantize
from ..fused import Form
from ..matmul import quantize_rows
from .config import HEAD_DIM, NORM_EPS

# A matrix of activations in each of the forms that its consumers take.
Activation = dict[Form, Any]

_BLOCK = 32  # products take widths that are multiples of it


def encode(matrix: torch.Tensor, forms: Collection[Form]) -> Activation:
    """A matrix [M, C] in other forms; 8-bit ones have their width rounded up to 32, with zeros."""
    return {form: _encode(matrix, form) for form in forms}


def _encode(matrix: torch.Tensor, form: Form) -> Any:
    if form == "bfloat16":
        return matrix
    matrix = pad_columns(matrix, -(-matrix.shape[1] // _BLOCK) * _BLOCK)
    return quantize_rows(matrix) if form == "row-scaled" else quantize(matrix, nonfinite="encode")


def form_nbytes(form: Form, elements: int, dtype: torch.dtype) -> int:
    """Bytes of a matrix of `dtype` in a form, without the scales of its rows and its padding."""
    if form == "bfloat16":  # or what stands for it
        return elements * dtype.itemsize
    return elements if form == "row-scaled" else elements + elements // _BLOCK


def pad_columns(matrix: torch.Tensor, columns: int) -> torch.Tensor:
    """Zeros to the right, up to so many columns."""
    return F.pad(matrix, (0, columns - matrix.shape[1])) if matrix.shape[1] < columns else matrix


def _fusable(matrix: torch.Tensor) -> bool:
    return matrix.is_cuda and matrix.dtype == torch.bfloat16


def _fused_form(columns: int, forms: Collection[Form]) -> Form:
    """The form for a fused kernel to write; others are made of BF16."""
    return next(iter(forms)) if len(forms) == 1 and columns % _BLOCK == 0 else "bfloat16"


def _others(result: Any, form: Form, forms: Collection[Form]) -> Activation:
    return {form: result} if set(forms) == {form} else encode(result, forms)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + NORM_EPS) * weight.float()


def _of_items(factors: torch.Tensor, items: torch.Tensor | None) -> torch.Tensor:
    """Rows [M, C] (or [1, C]) of factors [I, C]."""
    return (factors if items is None else factors[items.long()]).float()


def silu_multiply(gate: torch.Tensor, up: torch.Tensor, forms: Collection[Form]) -> Activation:
    """silu(gate) * up, both [M, C]."""
    if _fusable(gate):
        form = _fused_form(gate.shape[1], forms)
        return _others(fused.silu_multiply(gate, up, form), form, forms)
    return encode((F.silu(gate.float()) * up.float()).to(gate.dtype), forms)


def norm_modulate(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    items: torch.Tensor | None,
    forms: Collection[Form],
) -> Activation:
    """RMSNorm(x) * weight * (1 + scale of the row's item).

    Args:
        x: [M, C].
        weight: [C].
        scale: [I, C], or None for no modulation.
        items: int32 [M], the item of each row; None if I is 1.
        forms: those to return.
    """
    if _fusable(x):
        form = _fused_form(x.shape[1], forms)
        return _others(fused.norm_modulate(x, weight, scale, items, form, NORM_EPS), form, forms)
    result = _rms_norm(x, weight)
    if scale is not None:
        result = result * (1 + _of_items(scale, items))
    return encode(result.to(x.dtype), forms)


def add_norm(
    x: torch.Tensor,
    y: torch.Tensor,
    weight: torch.Tensor,
    gate: torch.Tensor | None,
    items: torch.Tensor | None,
) -> None:
    """In place x += tanh(gate of the row's item) * RMSNorm(y) * weight; without gate, times 1."""
    if _fusable(x):
        fused.add_norm_modulate(x, y, weight, gate, None, None, items, "bfloat16", NORM_EPS)
        return
    change = _rms_norm(y, weight)
    if gate is not None:
        change = change * _of_items(gate, items).tanh()
    x.copy_(x.float() + change)


def add_norm_modulate(
    x: torch.Tensor,
    y: torch.Tensor,
    weight: torch.Tensor,
    gate: torch.Tensor | None,
    next_weight: torch.Tensor,
    next_scale: torch.Tensor | None,
    items: torch.Tensor | None,
    forms: Collection[Form],
) -> Activation:
    """`add_norm`, then `norm_modulate` of the new x with the `next_` arguments."""
    if _fusable(x):
        form = _fused_form(x.shape[1], forms)
        result = fused.add_norm_modulate(
            x, y, weight, gate, next_weight, next_scale, items, form, NORM_EPS
        )
        return _others(result, form, forms)
    add_norm(x, y, weight, gate, items)
    return norm_modulate(x, next_weight, next_scale, items, forms)


def rotate_heads(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    rotations: torch.Tensor,
    heads: int,
) -> None:
    """In place, for each head of q and k: RMSNorm, times weight, then rotary embedding.

    Args:
        qkv: [M, 3 * heads * 128]: q, k and v side by side.
        q_weight: [128]; so is `k_weight`.
        rotations: float32 [M, 64, 2]: cosine and sine for each pair of adjacent elements.
        heads: their number.
    """
    if _fusable(qkv):
        fused.rotate_heads(qkv, q_weight, k_weight, rotations, heads, NORM_EPS)
        return
    parts = qkv.unflatten(1, (3, heads, HEAD_DIM))
    turn = torch.view_as_complex(rotations)[:, None, :]
    for part, weight in ((parts[:, 0], q_weight), (parts[:, 1], k_weight)):
        pairs = torch.view_as_complex(_rms_norm(part, weight).unflatten(-1, (-1, 2)))
        part.copy_(torch.view_as_real(pairs * turn).flatten(-2))
