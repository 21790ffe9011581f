"""Linear layers without bias, in the forms that the compute modes need.

Each takes activations in one form (see `compute.Form`) and gives [M, N] in the model's dtype.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import PrecisionLossError
from ..ops import fused_gemm
from ..ops.codec import MXFP8Array
from ..ops.fused import Form
from ..ops.gemm import FoldStats, RowScaledArray
from ..system import devices
from ..zimage.constants import NORM_EPS
from . import arithmetic, ops
from .compute import Compute
from .ops import Activation, pad_columns


class Linear(nn.Module):
    """A linear layer.

    Attributes:
        form: the form of the activations that it takes.
        out_features: N.
        kind: a word for it in tables.
    """

    form: Form = "bfloat16"
    kind: str

    def __init__(self, out_features: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features = out_features
        self.dtype = dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return sum(buffer.nbytes for buffer in self.buffers())


class PlainLinear(Linear):
    """Weights as they were before quantisation, [N, K]."""

    kind = "plain"
    weight: torch.Tensor

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__(weight.shape[0], weight.dtype)
        self.register_buffer("weight", weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[M, K] -> [M, N]."""
        return F.linear(x, self.weight)


class _MXFP8Linear(Linear):
    """Weights in MXFP8. Their padding to multiples of 32 takes part, as zeros."""

    codes: torch.Tensor
    scales: torch.Tensor

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor, n: int, dtype: torch.dtype):
        super().__init__(n, dtype)
        # As bytes, which nn.Module.to(dtype) leaves alone.
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    def _weights(self) -> MXFP8Array:
        rows, columns = self.codes.shape
        return MXFP8Array(self.codes, self.scales, (rows, columns))


class WeightOnlyLinear(_MXFP8Linear):
    """Decoded weights, which is exact; activations as they are."""

    kind = "weight-only"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[M, K] -> [M, N]."""
        x = pad_columns(x, self.codes.shape[1])
        out = arithmetic.on(x.device).multiply_weight_only(x, self._weights())
        return out[:, : self.out_features]


class BlockScaledLinear(_MXFP8Linear):
    """MXFP8 weights times MXFP8 activations."""

    kind = "block-scaled"
    form: Form = "mxfp8"

    def __init__(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        n: int,
        dtype: torch.dtype,
        emulated: bool,
    ) -> None:
        super().__init__(codes, scales, n, dtype)
        self.emulated = emulated

    def forward(self, x: MXFP8Array) -> torch.Tensor:
        """[M, K] -> [M, N]."""
        rows, columns = x.shape[0], self.codes.shape[1]
        a = MXFP8Array(x.codes, x.scales, (rows, columns))
        of_device = arithmetic.on(self.codes.device)
        multiply = of_device.multiply_decoded if self.emulated else of_device.multiply_mxfp8
        return multiply(a, self._weights(), self.dtype)[:, : self.out_features]


class FP8Linear(Linear):
    """Weights in E4M3 with one power of two a row; activations likewise, scaled per token."""

    kind = "fp8"
    form: Form = "row-scaled"
    codes: torch.Tensor
    scale_bits: torch.Tensor

    def __init__(self, weights: RowScaledArray, n: int, dtype: torch.dtype) -> None:
        super().__init__(n, dtype)
        self.register_buffer("codes", weights.codes.view(torch.uint8))
        # As integers, which nn.Module.to(dtype) leaves alone.
        self.register_buffer("scale_bits", weights.scales.view(torch.int32))

    @property
    def weights(self) -> RowScaledArray:
        """[N, K], with padding to multiples of 32 of both."""
        return RowScaledArray(self.codes, self.scale_bits.view(torch.float32))

    def fuses_epilogue(self, tokens: int) -> bool:
        """Whether a product with so many is fused with what follows it (see `fused_gemm`)."""
        device = self.codes.device
        return (
            self.dtype == torch.bfloat16
            and len(self.codes) == self.out_features
            and devices.has_fused_kernels(device)
            and fused_gemm.is_faster(tokens, self.out_features, device.index)
        )

    def forward(self, x: RowScaledArray) -> torch.Tensor:
        """[M, K] -> [M, N]."""
        multiply = arithmetic.on(self.codes.device).multiply_row_scaled
        return multiply(x, self.weights, self.dtype)[:, : self.out_features]


def quantized_linear(
    codes: torch.Tensor, scales: torch.Tensor, n: int, compute: Compute, dtype: torch.dtype
) -> tuple[Linear, FoldStats | None]:
    """The layer for a compute mode, and what folding changed in it.

    A layer whose scales cannot be folded within the bound of `fold` stays exact.

    Args:
        codes: E4M3 bytes [roundup(N, 32), roundup(K, 32)].
        scales: E8M0 bytes in the blocked layout.
        n: N.
        compute: the mode.
        dtype: of the activations and results that are not encoded.
    """
    if compute == "weight-only":
        return WeightOnlyLinear(codes, scales, n, dtype), None
    if compute != "fp8":
        return BlockScaledLinear(codes, scales, n, dtype, compute == "mxfp8-emulated"), None
    rows, columns = codes.shape
    try:
        folded, stats = arithmetic.on(codes.device).fold(MXFP8Array(codes, scales, (rows, columns)))
    except PrecisionLossError:
        return WeightOnlyLinear(codes, scales, n, dtype), None
    return FP8Linear(folded, n, dtype), stats


def multiply(layer: Linear, activation: Activation) -> torch.Tensor:
    """A layer's product with activations, of which it takes its own form."""
    out: torch.Tensor = layer(activation[layer.form])
    return out


def multiply_and_rotate(
    layer: Linear,
    activation: Activation,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    rotations: torch.Tensor,
    heads: int,
) -> torch.Tensor:
    """`multiply`, then `ops.rotate_heads`."""
    if isinstance(layer, FP8Linear) and layer.fuses_epilogue(len(rotations)):
        out: torch.Tensor = fused_gemm.gemm_rotate_heads(
            activation[layer.form], layer.weights, q_weight, k_weight, rotations, heads, NORM_EPS
        )
        return out
    qkv = multiply(layer, activation)
    ops.rotate_heads(qkv, q_weight, k_weight, rotations, heads)
    return qkv


def fuses_gate(layers: Sequence[Linear], tokens: int) -> bool:
    """Whether `multiply_and_gate` keeps the products on the chip: half as much reaches memory."""
    return (
        len(layers) == 1 and isinstance(layers[0], FP8Linear) and layers[0].fuses_epilogue(tokens)
    )


def multiply_and_gate(
    layers: Sequence[Linear], activation: Activation, forms: Collection[Form]
) -> Activation:
    """The products of w1 and w3, stacked in one layer or apart, then `ops.silu_multiply`."""
    first = layers[0]
    x = activation[first.form]
    if isinstance(first, FP8Linear) and fuses_gate(layers, x.shape[0]):
        return ops.encode(fused_gemm.gemm_silu_multiply(x, first.weights), forms)
    products = [multiply(layer, activation) for layer in layers]
    gate, up = products if len(products) == 2 else products[0].chunk(2, dim=1)
    return ops.silu_multiply(gate, up, forms)


def workspace(layer: Linear, tokens: int) -> int:
    """Bytes that a layer's product takes on a CUDA device beside its operands and its result."""
    if isinstance(layer, PlainLinear):
        return 0
    codes, dtype = layer.codes, layer.dtype
    assert isinstance(codes, torch.Tensor)
    rows, columns = codes.shape
    of_device = arithmetic.on(codes.device)
    if isinstance(layer, WeightOnlyLinear):
        return of_device.weight_only_workspace((rows, columns), dtype)
    if isinstance(layer, FP8Linear):
        return of_device.row_scaled_workspace(tokens, (rows, columns), dtype, codes.device)
    if isinstance(layer, BlockScaledLinear) and layer.emulated:
        return of_device.decoded_workspace(tokens, (rows, columns), dtype, codes.device)
    return 0
