"""Rounding of some layers of a model with plain weights, as a compute mode rounds them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F

from ...transformer import arithmetic, ops
from ...transformer.compute import Compute
from ...transformer.linear import PlainLinear, quantized_linear
from ...transformer.model import ZImageTransformer
from .targets import Target


def round_to_mxfp8(matrix: torch.Tensor) -> torch.Tensor:
    """Round a matrix to MXFP8, and return it in its own dtype."""
    of_device = arithmetic.on(matrix.device)
    return of_device.dequantize(of_device.quantize(matrix), matrix.dtype)


@contextmanager
def quantized(
    model: ZImageTransformer, targets: Iterable[Target], compute: Compute
) -> Iterator[None]:
    """Make layers compute with the weights and activations of a compute mode.

    For modulations only the weights are rounded, to MXFP8, as in the compute modes. Weights are
    rounded when they are used, so that no second copy of the model is needed.
    """
    rows: dict[str, list[tuple[int, int]]] = {}
    with ExitStack() as restore:
        for target in targets:
            if target.module:
                rows.setdefault(target.module, []).append(target.rows)
            else:
                weight = model.modulation.weight[slice(*target.rows)]
                before = weight.clone()
                weight.copy_(round_to_mxfp8(weight))
                restore.callback(weight.copy_, before)
        for name, places in rows.items():
            parent, _, attribute = name.rpartition(".")
            module, layer = model.get_submodule(parent), model.get_submodule(name)
            assert isinstance(layer, PlainLinear)
            setattr(module, attribute, _RoundingLinear(layer, places, compute))
            restore.callback(setattr, module, attribute, layer)
        yield


class _RoundingLinear(PlainLinear):
    """A layer that rounds some of its rows, and its input for them, as a compute mode does."""

    def __init__(self, layer: PlainLinear, places: list[tuple[int, int]], compute: Compute) -> None:
        super().__init__(layer.weight, layer.bias)
        self._places, self._compute = places, compute

    def _gemm(self, x: torch.Tensor) -> torch.Tensor:
        result = super()._gemm(x)
        for begin, end in self._places:
            result[:, begin:end] = _multiply_rounded(x, self.weight[begin:end], self._compute)
        return result


def _multiply_rounded(x: torch.Tensor, weight: torch.Tensor, compute: Compute) -> torch.Tensor:
    """Multiply x [M, K] with weights [N, K] after the rounding of a mode: [M, N] of x's dtype.

    Products are of decoded operands, so that every device has every mode.
    """
    encoded = arithmetic.on(weight.device).quantize(weight)
    codes = encoded.codes.view(torch.uint8)
    layer, _ = quantized_linear(codes, encoded.scales, len(weight), compute, x.dtype)
    ((written, activation),) = layer.encode(x).items()
    weights = layer.decode().to(x.dtype)
    rounded = ops.decode(activation, written).to(x.dtype)
    return F.linear(ops.pad_columns(rounded, weights.shape[1]), weights)
