"""A block of the transformer, and stacks of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from ..ops.fused import ActivationFormat
from ..zimage.constants import HEAD_DIM
from . import ops
from .attention import attend
from .epilogue import RotateHeads, SiluMultiply
from .linear import Linear
from .ops import Activation, ScaledMatrix
from .ranks.attention import SharedAttention
from .ranks.shares import Shares
from .sequence import Segment


@dataclass(frozen=True)
class Modulation:
    """A block's modulation, [items, dim] each, before 1 + scale and tanh(gate), or None."""

    scale_attention: torch.Tensor | None = None
    gate_attention: torch.Tensor | None = None
    scale_ffn: torch.Tensor | None = None
    gate_ffn: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class InputNorm:
    """The norm at a block's start, which is fused with the end of the block before it.

    Attributes:
        weight: [dim].
        scale: [items, dim], the modulation before 1 + scale; None without modulation.
        formats: the formats of the result.
    """

    weight: torch.Tensor
    scale: torch.Tensor | None
    formats: frozenset[ActivationFormat]


@dataclass(eq=False)
class BlockState:
    """Activations between two blocks.

    Blocks write to it, so that no reference keeps the memory of a used activation.

    Attributes:
        x: the residual stream [tokens, dim], written in place.
        normed: x after the input norm of the next block; empty after the last one.
    """

    x: torch.Tensor
    normed: Activation


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
        for layer in (qkv, *ffn_in):  # assumed: their inputs are normalised
            layer.is_in_range = True
        for name, weight in norms.items():
            self.register_buffer(name, weight)
        self._heads = heads

    def input_norm(self, modulation: Modulation) -> InputNorm:
        """Return the norm of `BlockState.normed` as `forward` takes it."""
        formats = self.qkv.input_formats
        return InputNorm(self.attention_norm1, modulation.scale_attention, formats)

    def forward(
        self,
        state: BlockState,
        modulation: Modulation,
        part: Segment,
        following: InputNorm | None,
        addends: Sequence[ScaledMatrix] = (),
    ) -> BlockState:
        """Run the block, then the norm of the block that follows.

        Args:
            state: activations, replaced in place.
            modulation: modulation of this block.
            part: the tokens.
            following: the next block's `input_norm`; None after the last block.
            addends: added to the block's result, [tokens, dim] each.

        Returns:
            `state`.
        """
        x, items = state.x, part.items
        state.normed = ops.add_norm_modulate(
            x,
            self.attention(state.normed, part),
            self.attention_norm2,
            modulation.gate_attention,
            self.ffn_norm1,
            modulation.scale_ffn,
            items,
            self.ffn_input_formats,
        )
        y, gate = self.feed_forward(state.normed), modulation.gate_ffn
        if following is None:
            ops.add_norm(x, y, self.ffn_norm2, gate, items, addends)
            state.normed = {}
        else:
            state.normed = ops.add_norm_modulate(
                x,
                y,
                self.ffn_norm2,
                gate,
                following.weight,
                following.scale,
                items,
                following.formats,
                addends,
            )
        return state

    @property
    def ffn_input_formats(self) -> frozenset[ActivationFormat]:
        """The formats in which w1 and w3 take their input."""
        return frozenset().union(*(layer.input_formats for layer in self._ffn_in))

    @property
    def _ffn_in(self) -> list[Linear]:
        return list(self.ffn_in)  # type: ignore[arg-type]

    def reserve(self, part: Segment) -> None:
        """Reserve memory for the keys and values of all ranks, for attention over a part."""
        if part.shares is not None:
            shape = 2, self._heads, HEAD_DIM
            part.shares.group.reserve(sum(part.lengths), shape, self.qkv.result_dtype)

    def attention(self, h: Activation, part: Segment) -> torch.Tensor:
        """Compute the attention of normalised activations."""
        if part.shares is None:
            attended = [attend(self._qkv(h, part), self._heads, part.lengths)]
        else:
            attended = self._attend_across(h, part, part.shares)
        out: torch.Tensor = self.out(self.out.encode(*attended))
        return out

    def _qkv(self, h: Activation, part: Segment) -> torch.Tensor:
        qkv: torch.Tensor = self.qkv(h, self._rotation(part, self._heads, self._heads))
        return qkv

    def _rotation(
        self, part: Segment, q_heads: int, k_heads: int, out: torch.Tensor | None = None
    ) -> RotateHeads:
        return RotateHeads(self.q_norm, self.k_norm, part.rotations, q_heads, k_heads, out)

    def _attend_across(self, h: Activation, part: Segment, shares: Shares) -> list[torch.Tensor]:
        """Compute keys and values before queries if possible, as they have to be sent.

        Returns:
            The attention of groups of heads, which are side by side.
        """
        heads, width = self._heads, self._heads * HEAD_DIM
        attention = SharedAttention(heads, part.lengths, shares, self.qkv.result_dtype)
        q = self.qkv.part(slice(width))
        # Where GEMMs have epilogues, keys are on their way while values are computed. In the other
        # modes smaller GEMMs may take another kernel, and nothing was measured.
        pieces = [slice(width, 3 * width)]
        if self.qkv.takes_epilogues:
            pieces = [slice(width, 2 * width), slice(2 * width, 3 * width)]
        others = [self.qkv.part(piece) for piece in pieces]
        if q is None or None in others:
            qkv = self._qkv(h, part)
            attention.send(qkv[:, width:])
            return attention.attend(qkv[:, :width])
        for i, layer in enumerate(filter(None, others)):
            out = attention.memory(i, layer.out_features)
            attention.send(layer(h, self._rotation(part, 0, 0 if i else heads, out)))
        return attention.attend(q(h, self._rotation(part, heads, 0)))

    def feed_forward(self, h: Activation) -> torch.Tensor:
        """Compute w2(silu(w1 h) * w3 h)."""
        layers, formats = self._ffn_in, self.ffn_out.input_formats
        if len(layers) == 1:
            gated = layers[0](h, SiluMultiply(formats))
        else:
            gated = ops.silu_multiply(layers[0](h), layers[1](h), formats)
        out: torch.Tensor = self.ffn_out(gated)
        return out

    def working_nbytes(self, tokens: int, ragged: bool) -> int:
        """Return the peak bytes on a CUDA device in addition to the weights and `x`.

        Args:
            tokens: tokens of all items.
            ragged: whether items differ in length.
        """
        return max(self._attention_nbytes(tokens, ragged), self._feed_forward_nbytes(tokens))

    def _attention_nbytes(self, tokens: int, ragged: bool) -> int:
        dim, dtype = len(self.attention_norm1), self.attention_norm1.dtype
        given = ops.activation_nbytes(self.qkv.input_formats, tokens * dim, dtype)
        qkv = tokens * self.qkv.out_features * dtype.itemsize
        attended = tokens * dim * dtype.itemsize
        result = tokens * dim * self.out.result_dtype.itemsize
        first = qkv + self.qkv.workspace_nbytes(tokens)
        # The results of items of different length are joined in another matrix.
        between = qkv + (2 * attended if ragged else attended)
        encoded = ops.activation_nbytes(self.out.input_formats, tokens * dim, dtype)
        last = attended + encoded + self.out.workspace_nbytes(tokens) + result
        return given + max(first, between, last)

    def _feed_forward_nbytes(self, tokens: int) -> int:
        dim, dtype = len(self.attention_norm1), self.attention_norm1.dtype
        device, layers = self.attention_norm1.device, self._ffn_in
        width = sum(layer.out_features for layer in layers)
        given = ops.activation_nbytes(self.ffn_input_formats, tokens * dim, dtype)
        gate_up = tokens * width * dtype.itemsize
        gated = ops.result_nbytes(self.ffn_out.input_formats, tokens * width // 2, dtype, device)
        silu_multiply = SiluMultiply(self.ffn_out.input_formats)
        if len(layers) == 1 and layers[0].takes_epilogues:
            first = between = gated + layers[0].workspace_nbytes(tokens, silu_multiply)
        else:
            first = gate_up + max(layer.workspace_nbytes(tokens) for layer in layers)
            # torch's silu_multiply takes the same again; the fused one writes only its result.
            between = gate_up + (gate_up if dtype == torch.float32 else gated)
        result = tokens * dim * self.ffn_out.result_dtype.itemsize
        last = gated + self.ffn_out.workspace_nbytes(tokens) + result
        return given + max(first, between, last)


class Hints(Protocol):
    """What a ControlNet adds to results of the blocks of a stack."""

    @property
    def places(self) -> Collection[int]:
        """Numbers of the blocks that a hint is added after, in order."""

    def next_hint(self, tokens: int) -> ScaledMatrix:
        """Compute the next hint, [tokens, dim]; called once for each place, in order."""


def split_modulations(stacked: torch.Tensor, dim: int) -> list[Modulation]:
    """Return the modulation of each block from those of all blocks, [items, blocks * 4 * dim]."""
    parts = stacked.unflatten(1, (stacked.shape[1] // (4 * dim), 4, dim)).unbind(1)
    return [Modulation(*block.unbind(1)) for block in parts]


def run_blocks(
    blocks: Sequence[Block],
    x: torch.Tensor,
    modulations: Sequence[Modulation],
    part: Segment,
    hints: Sequence[Hints] = (),
) -> torch.Tensor:
    """Run blocks one after another on x [tokens, dim], which they write to, and return it.

    The input norm of each is fused with the end of the one before, and so are hints.
    """
    norms = [block.input_norm(m) for block, m in zip(blocks, modulations, strict=True)]
    if not norms:
        return x
    first, *following = norms
    state = BlockState(
        x, ops.norm_modulate(x, first.weight, first.scale, part.items, first.formats)
    )
    parts = zip(blocks, modulations, [*following, None], strict=True)
    for place, (block, modulation, norm) in enumerate(parts):
        addends = [each.next_hint(len(x)) for each in hints if place in each.places]
        state = block(state, modulation, part, norm, addends)
    return state.x
