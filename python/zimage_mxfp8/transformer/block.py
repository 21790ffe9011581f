"""A block of the transformer, and stacks of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..ops.fused import Form
from . import ops
from .attention import attend
from .linear import (
    Linear,
    multiply,
    multiply_and_gate,
    multiply_and_rotate,
    workspace,
)
from .ops import Activation
from .sequence import Segment


@dataclass(frozen=True)
class Modulation:
    """A block's modulation, [items, dim] each, before 1 + scale and tanh(gate); None for none."""

    scale_attention: torch.Tensor | None = None
    gate_attention: torch.Tensor | None = None
    scale_ffn: torch.Tensor | None = None
    gate_ffn: torch.Tensor | None = None


class Block(nn.Module):
    """Attention and feed-forward, each between two RMSNorms.

    Attributes:
        ffn_in: w1 and w3, stacked if they can be, otherwise as two layers.
    """

    q_norm: torch.Tensor
    k_norm: torch.Tensor
    attention_norm1: torch.Tensor
    attention_norm2: torch.Tensor
    ffn_norm1: torch.Tensor
    ffn_norm2: torch.Tensor

    def __init__(
        self,
        qkv: Linear,
        out: Linear,
        ffn_in: Sequence[Linear],
        ffn_out: Linear,
        norms: dict[str, torch.Tensor],
        heads: int,
    ) -> None:
        super().__init__()
        self.qkv, self.out, self.ffn_out = qkv, out, ffn_out
        self.ffn_in = nn.ModuleList(ffn_in)
        for name, weight in norms.items():
            self.register_buffer(name, weight)
        self._heads = heads

    @property
    def ffn_forms(self) -> set[Form]:
        """The forms in which w1 and w3 take their input."""
        return {layer.form for layer in self.ffn_in}  # type: ignore[misc]

    def attention(self, h: Activation, part: Segment) -> torch.Tensor:
        """Attention of normalised activations."""
        qkv = multiply_and_rotate(
            self.qkv, h, self.q_norm, self.k_norm, part.rotations, self._heads
        )
        attended = attend(qkv, self._heads, part.lengths)
        del qkv  # the largest matrix here
        return multiply(self.out, ops.encode(attended, {self.out.form}))

    def feed_forward(self, h: Activation) -> torch.Tensor:
        """w2(silu(w1 h) * w3 h)."""
        layers: list[Linear] = list(self.ffn_in)  # type: ignore[arg-type]
        return multiply(self.ffn_out, multiply_and_gate(layers, h, {self.ffn_out.form}))

    def working_nbytes(self, tokens: int, ragged: bool) -> int:
        """Bytes that are in use on a CUDA device at most, beside the weights and `x`.

        Args:
            tokens: of all items.
            ragged: whether items differ in length.
        """
        return max(self._attention_nbytes(tokens, ragged), self._feed_forward_nbytes(tokens))

    def _attention_nbytes(self, tokens: int, ragged: bool) -> int:
        dim, dtype = len(self.attention_norm1), self.attention_norm1.dtype
        given = ops.form_nbytes(self.qkv.form, tokens * dim, dtype)
        qkv = tokens * self.qkv.out_features * dtype.itemsize
        result = tokens * dim * dtype.itemsize
        first = qkv + workspace(self.qkv, tokens)
        # What items of different length give is joined in a matrix of its own.
        between = qkv + (2 * result if ragged else result)
        last = (
            result
            + ops.form_nbytes(self.out.form, tokens * dim, dtype)
            + workspace(self.out, tokens)
            + result
        )
        return given + max(first, between, last)

    def _feed_forward_nbytes(self, tokens: int) -> int:
        dim, dtype = len(self.attention_norm1), self.attention_norm1.dtype
        device = self.attention_norm1.device
        width = sum(layer.out_features for layer in self.ffn_in)  # type: ignore[misc]
        given = sum(ops.form_nbytes(form, tokens * dim, dtype) for form in self.ffn_forms)
        products = tokens * width * dtype.itemsize
        first = products + max(workspace(layer, tokens) for layer in self.ffn_in)  # type: ignore[arg-type]
        gated = ops.result_nbytes(self.ffn_out.form, tokens * width // 2, dtype, device)
        # torch's silu_multiply has as much again; the fused one writes its result alone.
        between = products + (products if dtype == torch.float32 else gated)
        last = gated + workspace(self.ffn_out, tokens) + tokens * dim * dtype.itemsize
        return given + max(first, between, last)


def run_blocks(
    blocks: Sequence[Block],
    x: torch.Tensor,
    modulations: Sequence[Modulation],
    part: Segment,
) -> None:
    """Run blocks one after another, in place on x [tokens, dim].

    The norm at a block's start is fused with the end of the block before it.
    """
    h: Activation = {}
    for i, block in enumerate(blocks):
        m = modulations[i]
        if i == 0:
            h = ops.norm_modulate(
                x,
                block.attention_norm1,
                m.scale_attention,
                part.items,
                {block.qkv.form},
            )
        h = ops.add_norm_modulate(
            x,
            block.attention(h, part),
            block.attention_norm2,
            m.gate_attention,
            block.ffn_norm1,
            m.scale_ffn,
            part.items,
            block.ffn_forms,
        )
        y, gate = block.feed_forward(h), m.gate_ffn
        if i + 1 == len(blocks):
            ops.add_norm(x, y, block.ffn_norm2, gate, part.items)
            return
        following, after = blocks[i + 1], modulations[i + 1]
        h = ops.add_norm_modulate(
            x,
            y,
            block.ffn_norm2,
            gate,
            following.attention_norm1,
            after.scale_attention,
            part.items,
            {following.qkv.form},
        )
