"""Operations that can be the epilogue of a linear layer's GEMM.

A layer that can fuse one calls `gemm`, any other `apply` on its result.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Set
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..ops.fused import ActivationFormat
from ..ops.gemm import Int8Array, RowScaledArray
from ..ops.low_rank import LowRankAddend
from ..zimage.constants import NORM_EPS
from . import fused_kernels, ops
from .ops import PLAIN, Activation

Operand = RowScaledArray | Int8Array  # of the GEMMs that take epilogues


class Epilogue(ABC):
    """An operation that follows a GEMM.

    Attributes:
        name: in the core's table of epilogues.
    """

    name: ClassVar[str]

    @property
    def written_format(self) -> ActivationFormat:
        """The format in which the core writes the result."""
        return PLAIN

    @abstractmethod
    def gemm(
        self, a: Operand, b: Operand, addend: LowRankAddend | None, kernel: str | None = None
    ) -> Any:
        """Compute a B^T, the addend and the operation in one call of the core.

        Args:
            a: [M, K].
            b: [N, K].
            addend: what is added, or None.
            kernel: its name; by default the one of least cost.

        Returns:
            What `apply` returns.
        """

    @abstractmethod
    def apply(self, result: torch.Tensor) -> Any:
        """Compute the operation on a GEMM's result [M, N], which it may overwrite."""


@dataclass(frozen=True, eq=False)
class RotateHeads(Epilogue):
    """Norm and rotary embedding of the heads of q and k, see `ops.rotate_heads`.

    Attributes:
        q_weight: [128].
        k_weight: [128].
        rotations: float32 [M, 64, 2].
        q_heads: number of heads of q.
        k_heads: number of heads of k.
        out: memory [M, N] for the result of `gemm`; None for new memory.
    """

    q_weight: torch.Tensor
    k_weight: torch.Tensor
    rotations: torch.Tensor
    q_heads: int
    k_heads: int
    out: torch.Tensor | None = None
    name: ClassVar[str] = "rotate_heads"

    def gemm(
        self, a: Operand, b: Operand, addend: LowRankAddend | None, kernel: str | None = None
    ) -> Any:
        """Multiply, norm and rotate: [M, N]."""
        weights, heads = (self.q_weight, self.k_weight), (self.q_heads, self.k_heads)
        arguments = (*weights, self.rotations, *heads, NORM_EPS)
        return fused_kernels.gemm_with_epilogue(
            self.name, a, b, addend, kernel, *arguments, out=self.out
        )

    def apply(self, result: torch.Tensor) -> torch.Tensor:
        """Norm and rotate [M, N] in place, and return it."""
        weights, heads = (self.q_weight, self.k_weight), (self.q_heads, self.k_heads)
        ops.rotate_heads(result, *weights, self.rotations, *heads)
        return result


@dataclass(frozen=True, eq=False)
class SiluMultiply(Epilogue):
    """silu(gate) * up, see `ops.silu_multiply`.

    Attributes:
        output_formats: the formats of the result.
    """

    output_formats: Set[ActivationFormat]
    name: ClassVar[str] = "silu_multiply"

    @property
    def written_format(self) -> ActivationFormat:
        """The only format of the result, or the one that others are made of."""
        return next(iter(self.output_formats)) if len(self.output_formats) == 1 else PLAIN

    def gemm(
        self, a: Operand, b: Operand, addend: LowRankAddend | None, kernel: str | None = None
    ) -> Activation:
        """Multiply with gate and up, one above the other [2 * C, K], and multiply the results."""
        written = self.written_format
        result = fused_kernels.gemm_with_epilogue(self.name, a, b, addend, kernel, written)
        if self.output_formats == {written}:
            return {written: result}
        return ops.encode(result, self.output_formats)

    def apply(self, result: torch.Tensor) -> Activation:
        """Multiply the halves of [M, 2 * C]: gate and up side by side."""
        gate, up = result.chunk(2, dim=1)
        return ops.silu_multiply(gate, up, self.output_formats)
