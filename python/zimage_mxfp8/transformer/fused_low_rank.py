"""The branch of adapters that a layer's GEMM adds itself, see `ops.low_rank`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..ops.codec import MXFP8Array
from ..ops.gemm import Int8Array, RowScaledArray, quantize_rows
from ..ops.low_rank import NARROW_ROWS, LowRankAddend
from . import fused_kernels
from .adapter import FusedAdapter
from .arithmetic import int8
from .linear import FP8Linear, Int8Linear, Linear, WeightOnlyLinear
from .low_rank import Addend, SharedAdapter
from .ops import pad_columns


def fused_adapter(linear: Linear, addends: Sequence[Addend]) -> SharedAdapter | None:
    """Return the branch that the layer's GEMM adds, or None if it cannot add these addends."""
    if not linear.takes_fused_adapters or not can_fuse(addends):
        return None
    if isinstance(linear, WeightOnlyLinear):
        return WeightOnlyLowRankAdapter(addends, linear.weights)
    if isinstance(linear, Int8Linear):
        return Int8LowRankAdapter(addends, linear.weights)
    assert isinstance(linear, FP8Linear)
    adapter = FP8LowRankAdapter(addends, linear.weights)
    return adapter if adapter.is_finite else None


def can_fuse(addends: Sequence[Addend]) -> bool:
    """Return whether all addends are low-rank and nothing else."""
    return all(x.down is not None and x.bias is None and x.norms is None for x in addends)


def two_terms(matrix: torch.Tensor) -> RowScaledArray:
    """Encode a matrix as a sum of two row-scaled ones whose rows alternate.

    Together they are as exact as bfloat16.

    Args:
        matrix: [N, K] of float32.

    Returns:
        [2 N, K]: row n of the matrix is the sum of rows 2 n and 2 n + 1.
    """
    return RowScaledArray(*_two_terms(matrix, quantize_rows))


def two_int8_terms(matrix: torch.Tensor) -> Int8Array:
    """Rotate a matrix and encode it as a sum of two INT8 ones, see `two_terms`.

    Args:
        matrix: [N, K] of float32, K a multiple of 32.

    Returns:
        [2 N, K]: row n of the rotated matrix is the sum of rows 2 n and 2 n + 1.
    """
    return Int8Array(*_two_terms(int8.rotate_columns(matrix), int8.quantize))


def _two_terms(
    matrix: torch.Tensor, encode: Callable[[torch.Tensor], Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes and scales of a matrix and of what its encoding left out, row by row."""
    first = encode(matrix)
    second = encode(matrix - first.codes.float() * first.scales[:, None])
    codes, scales = (
        torch.stack((getattr(first, part), getattr(second, part)), dim=1).flatten(0, 1)
        for part in ("codes", "scales")
    )
    return codes, scales


class _FusedLowRankAdapter(SharedAdapter, FusedAdapter):
    """Gives the addends of all loaded adapters to the layer's GEMM, each in columns of its own.

    Attributes:
        up: bfloat16 [N, rank], with columns of zeros at the end.
    """

    up: torch.Tensor

    def __init__(self, addends: Sequence[Addend], up: torch.Tensor) -> None:
        """Take low-rank addends and `up`."""
        super().__init__(addends)
        self.rank = up.shape[1]
        self.register_buffer("up", up)
        members = [i for i, x in enumerate(addends) for _ in range(_rank(x))]
        powers = torch.ones(self.rank, device=up.device)
        powers[len(members) :] = 0
        self._register_weights([*members, *[0] * (self.rank - len(members))], powers)

    def workspace_nbytes(self, tokens: int) -> int:
        """Return the bytes of the narrow GEMM's result."""
        return tokens * self.rank * self.up.itemsize


class _EightBitLowRankAdapter(_FusedLowRankAdapter):
    """The branch of a layer whose input has codes and a scale per row.

    Attributes:
        down_codes: [2 rank, K], see `two_terms`.
        down_scale_bits: their scales, as integers, which nn.Module.to(dtype) leaves alone.
    """

    down_codes: torch.Tensor
    down_scale_bits: torch.Tensor

    def __init__(
        self, addends: Sequence[Addend], up: torch.Tensor, down: RowScaledArray | Int8Array
    ) -> None:
        """Take low-rank addends, `up`, and the first factors in two terms."""
        super().__init__(addends, up)
        is_int8 = isinstance(down, Int8Array)
        self.register_buffer("down_codes", down.codes if is_int8 else down.codes.view(torch.uint8))
        self.register_buffer("down_scale_bits", down.scales.view(torch.int32))

    @property
    def down(self) -> Any:
        """The first factors [2 rank, K] in two terms."""
        raise NotImplementedError

    def addend(self, x: Any) -> LowRankAddend:
        """Return the branch for the layer's input [M, K]."""
        return LowRankAddend(fused_kernels.narrow_gemm(x, self.down, self.scales), self.up)


class FP8LowRankAdapter(_EightBitLowRankAdapter):
    """The branch of an `FP8Linear`; `up` is divided by the scales of the layer's rows."""

    def __init__(self, addends: Sequence[Addend], weights: RowScaledArray) -> None:
        """Take low-rank addends, and the layer's weights [N, K]."""
        down, up = _factors(addends, weights.shape, weights.codes.device)
        super().__init__(addends, (up / weights.scales[:, None]).bfloat16(), two_terms(down))

    @property
    def down(self) -> RowScaledArray:
        """The first factors [2 rank, K], see `two_terms`."""
        return RowScaledArray(self.down_codes, self.down_scale_bits.view(torch.float32))

    @property
    def is_finite(self) -> bool:
        """Whether `up` is; divided by a very small scale it need not be."""
        return bool(self.up.isfinite().all())


class Int8LowRankAdapter(_EightBitLowRankAdapter):
    """The branch of an `Int8Linear`."""

    def __init__(self, addends: Sequence[Addend], weights: Int8Array) -> None:
        """Take low-rank addends, and the layer's weights [N, K]."""
        down, up = _factors(addends, weights.shape, weights.codes.device)
        super().__init__(addends, up.bfloat16(), two_int8_terms(down))

    @property
    def down(self) -> Int8Array:
        """The first factors, rotated [2 rank, K], see `two_int8_terms`."""
        return Int8Array(self.down_codes, self.down_scale_bits.view(torch.float32))


class WeightOnlyLowRankAdapter(_FusedLowRankAdapter):
    """The branch of a `WeightOnlyLinear`.

    Attributes:
        down: bfloat16 [rank, K].
    """

    down: torch.Tensor

    def __init__(self, addends: Sequence[Addend], weights: MXFP8Array) -> None:
        """Take low-rank addends, and the layer's weights [N, K]."""
        down, up = _factors(addends, weights.shape, weights.codes.device)
        super().__init__(addends, up.bfloat16())
        self.register_buffer("down", down.bfloat16())

    def addend(self, x: torch.Tensor) -> LowRankAddend:
        """Return the branch for the layer's input [M, K] of bfloat16."""
        x = pad_columns(x, self.down.shape[1])
        return LowRankAddend(fused_kernels.narrow_gemm(x, self.down, self.scales), self.up)


def _rank(addend: Addend) -> int:
    return 0 if addend.down is None else len(addend.down)


def _factors(
    addends: Sequence[Addend], shape: tuple[int, int], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factors of all addends in float32: [rank, K] and [N, rank], for weights [N, K]."""
    rank = -(-sum(map(_rank, addends)) // NARROW_ROWS) * NARROW_ROWS
    down = torch.zeros(rank, shape[1], device=device)
    up = torch.zeros(shape[0], rank, device=device)
    begin = 0
    for x in addends:
        assert x.down is not None
        assert x.up is not None
        end = begin + _rank(x)
        down[begin:end, : x.down.shape[1]] = x.down.to(down)
        up[x.rows, begin:end] = x.up.to(up)
        begin = end
    return down, up
