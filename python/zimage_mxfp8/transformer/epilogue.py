"""Operations that can be the epilogue of a linear layer's GEMM.

A layer that cannot fuse one calls `apply` on its result.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import TypeAlias

import torch

from ..ops.fused import ActivationFormat
from . import ops
from .ops import Activation


@dataclass(frozen=True, eq=False)
class RotateHeads:
    """Norm and rotary embedding of the heads of q and k, see `ops.rotate_heads`.

    Attributes:
        q_weight: [128].
        k_weight: [128].
        rotations: float32 [M, 64, 2].
        heads: number of heads of each of q, k and v.
    """

    q_weight: torch.Tensor
    k_weight: torch.Tensor
    rotations: torch.Tensor
    heads: int

    def apply(self, qkv: torch.Tensor) -> torch.Tensor:
        """Norm and rotate [M, 3 * heads * 128] in place, and return it."""
        ops.rotate_heads(qkv, self.q_weight, self.k_weight, self.rotations, self.heads)
        return qkv


@dataclass(frozen=True, eq=False)
class SiluMultiply:
    """silu(gate) * up, see `ops.silu_multiply`.

    Attributes:
        output_formats: the formats of the result.
    """

    output_formats: Set[ActivationFormat]

    def apply(self, gate_up: torch.Tensor) -> Activation:
        """Multiply the halves of [M, 2 * C]: gate and up side by side."""
        gate, up = gate_up.chunk(2, dim=1)
        return ops.silu_multiply(gate, up, self.output_formats)


Epilogue: TypeAlias = RotateHeads | SiluMultiply
