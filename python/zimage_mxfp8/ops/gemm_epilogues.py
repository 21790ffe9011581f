"""GEMMs with an epilogue of Z-Image's DiT, a low-rank addend, or both; CUDA only.

If a kernel of the device fuses the epilogue and has the least cost, the sums stay on the
chip. Those of row-scaled operands are rounded to bfloat16, then scaled, then comes the operation of
`fused`, both in float32; the result is rounded once more. Those of INT8 are scaled and rounded, so
that the result is the same as from two launches. Otherwise the operation is a launch of its own.
Arguments are torch tensors on one CUDA device; the work goes to torch's current stream and can be
captured in a CUDA graph.

All functions raise InvalidArgumentError for shapes, dtypes and devices that do not fit together,
and UnsupportedError if the device has no kernel for the operands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .. import _core
from ..zimage.constants import HEAD_DIM
from .arrays import aligned, call_core, vector
from .fused import (
    ActivationFormat,
    ActivationMemory,
    as_eps,
    as_heads,
    as_rotations,
)
from .gemm import Operand, choice, choose, cuda_operands
from .low_rank import LowRankAddend

__all__ = [
    "EPILOGUES",
    "GemmEpilogue",
    "gemm_low_rank",
    "gemm_rotate_heads",
    "gemm_silu_multiply",
    "plan",
]


_ROWS = {row.name: row for row in _core.gemm_epilogues()}


@dataclass(frozen=True)
class GemmEpilogue:
    """An epilogue of the core's table, as Python calls it.

    Attributes:
        name: in the table.
        gemm: a function of this module. It takes the operands and the epilogue's arguments, of
            which the last is the format of the result if the epilogue encodes.
        schema: these arguments in the language of torch.library.
        rows_per_column: rows of the weights for each column of the result.
        encodes: whether the result may be encoded.
    """

    name: str
    gemm: Callable[..., Any]
    schema: str
    rows_per_column: int
    encodes: bool

    def output_format(self, arguments: Sequence[Any]) -> ActivationFormat:
        """Return the format of the result for arguments that `gemm` takes after the operands."""
        output_format: ActivationFormat = arguments[-1] if self.encodes else "bfloat16"
        return output_format


def _gemm(
    epilogue: str,
    a: Operand,
    b: Operand,
    arguments: tuple[Any, ...],
    output_format: ActivationFormat,
    addend: LowRankAddend | None,
    kernel: str | None,
    out: Any = None,
) -> Any:
    """Run the core, with the arguments of the epilogue's struct in gemm.h."""
    low_rank = None if addend is None else addend.parts()
    rank = 0 if low_rank is None else low_rank[0].shape[1]
    shape = a[3], b[3] // _ROWS[epilogue].rows_per_column
    target = ActivationMemory(shape, output_format, a[1], out)
    problem = (a[3], b[3], a[4], a[0], b[0], "bfloat16", False, epilogue, output_format, rank)
    chosen, workspace = choose(problem, a, kernel)
    call = _core.gemm_with_epilogue
    call_core(call, chosen, a, b, low_rank, epilogue, arguments, target.parts, workspace, like=a[1])
    return target.result()


def plan(
    epilogue: str,
    operands: ActivationFormat,
    tokens: int,
    shape: tuple[int, int],
    output_format: ActivationFormat,
    device: int,
    addend_rank: int = 0,
) -> tuple[str, int]:
    """Return the kernel of least cost for a GEMM with an epilogue, and the bytes that it takes.

    Args:
        epilogue: a key of `EPILOGUES`, or "none".
        operands: the format of both operands.
        tokens: M.
        shape: (N, K) of the weights.
        output_format: format of the result.
        device: index of a CUDA device that has a kernel for it.
        addend_rank: of the addend; 0 without one.
    """
    plain = (tokens, *shape, operands, operands, "bfloat16", False)
    problem = (*plain, epilogue, output_format, addend_rank)
    return choice(problem, device)


def gemm_low_rank(a: Any, b: Any, addend: LowRankAddend, *, kernel: str | None = None) -> Any:
    """Compute a b^T with a low-rank addend.

    Args:
        a: [M, K] on CUDA, a `RowScaledArray`, an `Int8Array` or of bfloat16. K is a multiple of 32.
        b: [N, K] of the same format, or an `MXFP8Array` if `a` is of bfloat16. N is a multiple of
            8.
        addend: what is added, see `LowRankAddend`.
        kernel: name of the kernel; by default the one of least cost.

    Returns:
        [M, N] of bfloat16.
    """
    first, second = cuda_operands(a, b)
    return _gemm("none", first, second, (), "bfloat16", addend, kernel)


def gemm_silu_multiply(
    a: Any,
    b: Any,
    output_format: ActivationFormat = "bfloat16",
    *,
    addend: LowRankAddend | None = None,
    kernel: str | None = None,
) -> Any:
    """Compute silu(a G^T) * (a U^T), where G is the upper and U the lower half of `b`.

    Args:
        a: [M, K] on CUDA, an operand of `gemm`. K is a multiple of 32.
        b: [2 C, K], likewise. C is a multiple of 8.
        output_format: format of the result.
        addend: what is added to both products, [M, rank] and [2 C, rank]; see `LowRankAddend`.
        kernel: name of the kernel; by default the one of least cost.

    Returns:
        [M, C] in that format.
    """
    first, second = cuda_operands(a, b)
    return _gemm("silu_multiply", first, second, (), output_format, addend, kernel)


def gemm_rotate_heads(
    a: Any,
    b: Any,
    q_weight: Any,
    k_weight: Any,
    rotations: Any,
    q_heads: int,
    k_heads: int,
    eps: float = 1e-5,
    *,
    addend: LowRankAddend | None = None,
    kernel: str | None = None,
    out: Any = None,
) -> Any:
    """Compute a B^T, and norm and rotate its heads of q and k (see `fused.rotate_heads`).

    Args:
        a: [M, K] on CUDA, an operand of `gemm`. K is a multiple of 32.
        b: [heads * 128, K], likewise: the heads of q, those of k, and others, such as those of v.
        q_weight: [128] of bfloat16.
        k_weight: [128] of bfloat16.
        rotations: [M, 64, 2] of float32: cosine and sine for each pair.
        q_heads: number of heads of q.
        k_heads: number of heads of k.
        eps: added to the mean of the squares.
        addend: what is added to the product, see `LowRankAddend`.
        kernel: name of the kernel; by default the one of least cost.
        out: [M, heads * 128] of bfloat16 to write the result to; by default new memory.

    Returns:
        [M, heads * 128] of bfloat16.
    """
    first, second = cuda_operands(a, b)
    q = vector(q_weight, "bfloat16", HEAD_DIM, "q_weight")
    k = vector(k_weight, "bfloat16", HEAD_DIM, "k_weight")
    pairs = aligned(as_rotations(rotations, first[3]))
    heads = (as_heads(q_heads, "q_heads"), as_heads(k_heads, "k_heads"))
    arguments = (q, k, pairs, *heads, as_eps(eps))
    return _gemm("rotate_heads", first, second, arguments, "bfloat16", addend, kernel, out)


# The function and the schema of each.
_CALLS: dict[str, tuple[Callable[..., Any], str]] = {
    "silu_multiply": (gemm_silu_multiply, "str output_format"),
    "rotate_heads": (
        gemm_rotate_heads,
        "Tensor q_weight, Tensor k_weight, Tensor rotations, SymInt q_heads, SymInt k_heads, "
        "float eps",
    ),
}
EPILOGUES = {
    name: GemmEpilogue(name, *call, _ROWS[name].rows_per_column, _ROWS[name].encodes)
    for name, call in _CALLS.items()
}
