"""GEMMs with an epilogue of Z-Image's DiT, silu_multiply or rotate_heads; CUDA only.

If a kernel of the device fuses the epilogue and has the least cost, the sums stay on the
chip: they are rounded to bfloat16, then scaled, then comes the operation of `fused`, both in
float32; the result is rounded once more. Otherwise the operation is a launch of its own. Arguments
are torch tensors on one CUDA device; the work goes to torch's current stream and can be captured in
a CUDA graph.

All functions raise InvalidArgumentError for shapes, dtypes and devices that do not fit together,
and UnsupportedError if the device has no kernel for the operands.
"""

from __future__ import annotations

from typing import Any

from .. import _core
from ..errors import InvalidArgumentError
from ..zimage.constants import HEAD_DIM
from .arrays import aligned, call_core, empty, on_cuda, vector
from .fused import (
    ActivationFormat,
    ActivationMemory,
    as_eps,
    as_heads,
    as_rotations,
)
from .gemm import Operand, choose, operands

__all__ = ["gemm_rotate_heads", "gemm_silu_multiply", "workspace_nbytes"]


def _operands(a: Any, b: Any) -> tuple[Operand, Operand]:
    first, second = operands(a, b)
    for operand, name in ((first, "a"), (second, "b")):
        if not on_cuda(operand[1]):
            raise InvalidArgumentError(f"{name} must be on a CUDA device")
    return (first[0], aligned(first[1]), *first[2:]), (second[0], aligned(second[1]), *second[2:])


def _problem(
    a: Operand, b: Operand, epilogue: str, output_format: str = "bfloat16"
) -> _core.GemmProblem:
    return _core.GemmProblem(
        a[3], b[3], a[4], a[0], b[0], "bfloat16", False, epilogue=epilogue, d_format=output_format
    )


def workspace_nbytes(
    epilogue: str, tokens: int, shape: tuple[int, int], output_format: ActivationFormat, device: int
) -> int:
    """Return the bytes that a GEMM of row-scaled operands with an epilogue takes.

    Args:
        epilogue: "silu_multiply" or "rotate_heads".
        tokens: M.
        shape: (N, K) of the weights.
        output_format: format of the result.
        device: index of a CUDA device that has a kernel for it.
    """
    problem = _core.GemmProblem(
        tokens, *shape, "row-scaled", "row-scaled", "bfloat16", False, epilogue, output_format
    )
    return _core.gemm_workspace_size(_core.choose_gemm(problem, device), problem, device)


def gemm_silu_multiply(
    a: Any, b: Any, output_format: ActivationFormat = "bfloat16", *, kernel: str | None = None
) -> Any:
    """Compute silu(a G^T) * (a U^T), where G is the upper and U the lower half of `b`.

    Args:
        a: [M, K] on CUDA, an operand of `gemm`. K is a multiple of 32.
        b: [2 C, K], likewise. C is a multiple of 8.
        output_format: format of the result.
        kernel: name of the kernel; by default the one of least cost.

    Returns:
        [M, C] in that format.
    """
    first, second = _operands(a, b)
    target = ActivationMemory((first[3], second[3] // 2), output_format, like=first[1])
    chosen, workspace = choose(
        _problem(first, second, "silu_multiply", output_format), first, kernel
    )
    call_core(
        _core.gemm_silu_multiply, chosen, first, second, target.parts, workspace, like=first[1]
    )
    return target.result()


def gemm_rotate_heads(
    a: Any,
    b: Any,
    q_weight: Any,
    k_weight: Any,
    rotations: Any,
    heads: int,
    eps: float = 1e-5,
    *,
    kernel: str | None = None,
) -> Any:
    """Compute a B^T, and norm and rotate its heads of q and k (see `fused.rotate_heads`).

    Args:
        a: [M, K] on CUDA, an operand of `gemm`. K is a multiple of 32.
        b: [3 * heads * 128, K], likewise.
        q_weight: [128] of bfloat16.
        k_weight: [128] of bfloat16.
        rotations: [M, 64, 2] of float32: cosine and sine for each pair.
        heads: number of heads of each of q, k and v.
        eps: added to the mean of the squares.
        kernel: name of the kernel; by default the one of least cost.

    Returns:
        [M, 3 * heads * 128] of bfloat16: the heads of q, of k and of v.
    """
    first, second = _operands(a, b)
    q = vector(q_weight, "bfloat16", HEAD_DIM, "q_weight")
    k = vector(k_weight, "bfloat16", HEAD_DIM, "k_weight")
    pairs = aligned(as_rotations(rotations, first[3]))
    chosen, workspace = choose(_problem(first, second, "rotate_heads"), first, kernel)
    target = empty((first[3], second[3]), "bfloat16", like=first[1])
    call_core(
        _core.gemm_rotate_heads,
        chosen,
        first,
        second,
        q,
        k,
        pairs,
        as_heads(heads),
        as_eps(eps),
        target,
        workspace,
        like=first[1],
    )
    return target
