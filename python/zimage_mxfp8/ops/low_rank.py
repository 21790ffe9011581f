"""Low-rank addends of GEMMs on Hopper: A B^T + (A D^T) E^T in one GEMM and a narrow one.

`narrow_gemm` computes A D^T, with a small rank, and the GEMMs of `gemm_epilogues` add the product
of that and E. Arguments are torch tensors on one CUDA device; the work goes to torch's current
stream and can be captured in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .. import _core
from ..errors import InvalidArgumentError
from .arrays import aligned, call_core, empty, on_cuda, plain, require_2d, vector
from .gemm import cuda_operands

__all__ = ["NARROW_ROWS", "LowRankAddend", "narrow_gemm"]

NARROW_ROWS = 32  # the rank of a narrow GEMM is a multiple of it


@dataclass(frozen=True, eq=False, repr=False)  # arrays have no single truth value
class LowRankAddend:
    """X U^T, which a GEMM of A and B adds to its sums.

    Row-scaled A and B are scaled afterwards: to add Y Z^T, X is Y divided by A's scales and U is Z
    divided by B's. To the products of INT8, and of bfloat16 and MXFP8, X U^T itself is added.

    Attributes:
        x: [M, rank] of bfloat16.
        u: [N, rank] of bfloat16. The rank is a multiple of 8.
    """

    x: Any
    u: Any

    def parts(self) -> tuple[Any, Any]:
        """Return X and U as the core takes them.

        Raises:
            InvalidArgumentError: not two matrices of bfloat16 on CUDA with one width.
        """
        matrices = []
        for array, name in ((self.x, "x of the addend"), (self.u, "u of the addend")):
            matrix, dtype = plain(array, name)
            if dtype != "bfloat16" or not on_cuda(matrix):
                raise InvalidArgumentError(f"{name} must be bfloat16 on a CUDA device, not {dtype}")
            require_2d(matrix, name)
            matrices.append(aligned(matrix))
        x, u = matrices
        if x.shape[1] != u.shape[1]:
            raise InvalidArgumentError(
                f"the addend's x is {list(x.shape)} and u is {list(u.shape)}: their widths differ"
            )
        return x, u


def narrow_gemm(a: Any, down: Any, factors: Any) -> Any:
    """Compute factors * A D^T for a small rank, for the x of a `LowRankAddend`.

    Sums are those of the tensor cores; the result is rounded once.

    Args:
        a: [M, K] on CUDA, of bfloat16, an `Int8Array`, or a `RowScaledArray`, of which the scales
            are not used. K is a multiple of 32.
        down: D [rank, K] of bfloat16. For an 8-bit `a` a matrix of its format [2 rank, K] with D as
            a sum of two terms whose rows alternate: row r of D is the sum of rows 2 r and 2 r + 1.
            Encode D, and then what that encoding left out. The rank is a multiple of 32.
        factors: [rank] of float32.

    Returns:
        [M, rank] of bfloat16.

    Raises:
        InvalidArgumentError: shapes, dtypes or devices that do not fit together.
        UnsupportedError: the device is not of compute capability 9.0, or the build lacks 90a.
    """
    first, second = cuda_operands(a, down, ("a", "down"))
    has_terms = second[0] in ("row-scaled", "int8")
    rank = second[3] // 2 if has_terms else second[3]
    of_rank = vector(factors, "float32", rank, "factors")
    result = empty((first[3], rank), "bfloat16", like=first[1])
    call_core(_core.narrow_gemm, first, second, of_rank, result, like=first[1])
    return result
