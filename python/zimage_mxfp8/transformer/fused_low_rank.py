"""The branch of adapters that an FP8 layer's GEMM adds itself, see `ops.low_rank`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..ops.gemm import RowScaledArray
from ..ops.low_rank import NARROW_ROWS, LowRankAddend
from . import fused_kernels
from .adapter import FusedAdapter
from .low_rank import Addend, SharedAdapter


def can_fuse(addends: Sequence[Addend]) -> bool:
    """Return whether all addends are low-rank and nothing else."""
    return all(x.down is not None and x.bias is None and x.norms is None for x in addends)


class FusedLowRankAdapter(SharedAdapter, FusedAdapter):
    """Gives the addends of all loaded adapters to the layer's GEMM, each in columns of its own.

    Attributes:
        down: float16 [rank, K]; rows are divided by a power of two, so that nothing overflows.
        up: bfloat16 [N, rank], divided by the scales of the layer's rows, which are powers of two.
        powers: those by which `down` was divided; 0 for columns of zeros at the end.
    """

    down: torch.Tensor
    up: torch.Tensor

    def __init__(self, addends: Sequence[Addend], weights: RowScaledArray) -> None:
        """Take low-rank addends, and the layer's weights [N, K]."""
        super().__init__(addends)
        rows, columns = weights.shape
        device = weights.codes.device
        ranks = [0 if x.down is None else len(x.down) for x in addends]
        self.rank = -(-sum(ranks) // NARROW_ROWS) * NARROW_ROWS
        down = torch.zeros(self.rank, columns, device=device)
        up = torch.zeros(rows, self.rank, device=device)
        begin = 0
        for x, rank in zip(addends, ranks, strict=True):
            assert x.down is not None
            assert x.up is not None
            down[begin : begin + rank, : x.down.shape[1]] = x.down.to(down)
            up[x.rows, begin : begin + rank] = x.up.to(up)
            begin += rank
        largest = down.abs().amax(1)
        powers = torch.exp2(torch.where(largest > 0, largest, 1).log2().floor())
        self.register_buffer("down", (down / powers[:, None]).half())
        self.register_buffer("up", (up / weights.scales[:, None]).bfloat16())
        powers[begin:] = 0
        members = [i for i, rank in enumerate(ranks) for _ in range(rank)]
        self._register_weights([*members, *[0] * (self.rank - begin)], powers)

    @property
    def is_finite(self) -> bool:
        """Whether `up` is; divided by a very small scale it need not be."""
        return bool(self.up.isfinite().all())

    def addend(self, x: RowScaledArray) -> LowRankAddend:
        """Return the branch for the layer's input [M, K]."""
        return LowRankAddend(fused_kernels.narrow_gemm(x, self.down, self.scales), self.up)

    def workspace_nbytes(self, tokens: int) -> int:
        """Return the bytes of the narrow GEMM's result."""
        return tokens * self.rank * self.up.itemsize
