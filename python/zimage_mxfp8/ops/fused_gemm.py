"""Products of row-scaled FP8 fused with what Z-Image's DiT computes next; Hopper only.

The sums of a product are rounded to bfloat16 and stay on the chip; there they are scaled and the
operation of `fused` is done, both in float32, and the result is rounded once more. Arguments are
torch tensors on one CUDA device; the work goes to torch's current stream and can be captured in a
CUDA graph.

Everything raises InvalidArgumentError for shapes, dtypes and devices that do not go together, and
UnsupportedError where `unsupported` gives a reason.
"""

from __future__ import annotations

from typing import Any

from .. import _core
from ..errors import InvalidArgumentError
from ..zimage.constants import HEAD_DIM
from .arrays import aligned, call_core, empty, on_cuda, vector
from .fused import as_eps, as_heads, as_rotations, as_whole
from .gemm import RowScaledArray, row_scaled_parts

__all__ = ["gemm_rotate_heads", "gemm_silu_multiply", "is_faster", "unsupported"]


def unsupported(device: int) -> str:
    """Why a device does not have these operations; "" if it has.

    Args:
        device: index of a CUDA device, or -1 for the CPU.

    Raises:
        UnsupportedError: there is no such device.
    """
    return _core.fused_gemm_unsupported(_whole(device, "device"))


def is_faster(rows: int, b_rows: int, device: int) -> bool:
    """Whether these are faster than a product and an operation of its own.

    Args:
        rows: M, of `a`.
        b_rows: of `b`.
        device: as in `unsupported`; without these operations they are not.

    Raises:
        UnsupportedError: there is no such device.
    """
    return _core.prefers_fused_gemm(
        _whole(rows, "rows"), _whole(b_rows, "b_rows"), _whole(device, "device")
    )


def _whole(number: Any, name: str) -> int:
    whole = as_whole(number, name)
    if abs(whole) >= 2**31:
        raise InvalidArgumentError(f"{name} must be below 2^31")
    return whole


def _operands(a: Any, b: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    parts = []
    for array, name in ((a, "a"), (b, "b")):
        if not isinstance(array, RowScaledArray):
            raise InvalidArgumentError(
                f"{name} must be a RowScaledArray, not {type(array).__name__}"
            )
        codes, *others = row_scaled_parts(array, name)
        if not on_cuda(codes):
            raise InvalidArgumentError(f"{name} must be on a CUDA device")
        parts.append((aligned(codes), *others))
    return parts[0], parts[1]


def gemm_silu_multiply(a: RowScaledArray, b: RowScaledArray) -> Any:
    """Compute silu(a G^T) * (a U^T), where G is the upper and U the lower half of `b`.

    Args:
        a: [M, K], K a multiple of 16.
        b: [2 C, K], C a multiple of 8.

    Returns:
        [M, C] of bfloat16.
    """
    first, second = _operands(a, b)
    target = empty((first[2], second[2] // 2), "bfloat16", like=first[0])
    call_core(_core.gemm_silu_multiply, first[:2], second[:2], target, like=first[0])
    return target


def gemm_rotate_heads(
    a: RowScaledArray,
    b: RowScaledArray,
    q_weight: Any,
    k_weight: Any,
    rotations: Any,
    heads: int,
    eps: float = 1e-5,
) -> Any:
    """Compute a B^T, and norm and rotate its heads of q and k (see `fused.rotate_heads`).

    Args:
        a: [M, K], K a multiple of 16.
        b: [3 * heads * 128, K].
        q_weight: [128] of bfloat16.
        k_weight: [128] of bfloat16.
        rotations: [M, 64, 2] of float32: cosine and sine for each pair.
        heads: of each of q, k and v.
        eps: added to the mean of the squares.

    Returns:
        [M, 3 * heads * 128] of bfloat16: the heads of q, of k and of v.
    """
    first, second = _operands(a, b)
    target = empty((first[2], second[2]), "bfloat16", like=first[0])
    call_core(
        _core.gemm_rotate_heads,
        first[:2],
        second[:2],
        vector(q_weight, "bfloat16", HEAD_DIM, "q_weight"),
        vector(k_weight, "bfloat16", HEAD_DIM, "k_weight"),
        aligned(as_rotations(rotations, first[2])),
        as_heads(heads),
        as_eps(eps),
        target,
        like=first[0],
    )
    return target
