"""Adapters: branches that can be attached to a linear layer."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import torch
from torch import nn

from ..ops.fused import ActivationFormat
from ..ops.low_rank import LowRankAddend
from .ops import PLAIN, Activation


class Adapter(nn.Module):
    """Base class of branches parallel to a linear layer, such as low-rank ones.

    `linear.adapter = adapter` attaches it, and None detaches it. A layer with an adapter does not
    fuse its epilogue, because the adapter changes the result before the epilogue. Tensors of an
    adapter belong in parameters or buffers, so that they move with the model. Other numbers must
    not change while it is attached: CUDA graphs keep the old ones.

    Attributes:
        input_formats: the formats of the layer's input that the adapter reads. The layer requests
            them in addition to its own.
    """

    input_formats: Set[ActivationFormat] = frozenset({PLAIN})

    def forward(self, activation: Activation, result: torch.Tensor) -> torch.Tensor:
        """Add the branch to the layer's result.

        Args:
            activation: the layer's input [M, K] in `input_formats` and in the layer's own format;
                [K] for the final layer's modulation.
            result: [M, N] in the layer's `result_dtype`, without the branch; may be written to. N
                counts the rows of all matrices that the layer stacks: q, k and v, or w1 and w3.

        Returns:
            [M, N].
        """
        raise NotImplementedError

    def workspace_nbytes(self, tokens: int) -> int:  # noqa: ARG002 - for subclasses
        """Return the bytes that `forward` takes on a CUDA device in addition to its arguments."""
        return 0


class FusedAdapter(Adapter):
    """Base class of adapters that the layer's GEMM adds.

    The layer keeps its fused epilogue, and its input needs no other format. A layer takes them if
    `takes_fused_adapters`; `forward` is not called.

    Attributes:
        rank: of the addend.
    """

    input_formats: Set[ActivationFormat] = frozenset()
    rank: int

    def addend(self, x: Any) -> LowRankAddend:
        """Return the branch for the layer's input [M, K], which is in the layer's own format."""
        raise NotImplementedError
