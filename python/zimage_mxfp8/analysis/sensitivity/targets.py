"""The layers that a recipe may quantise, in a model with plain weights, and their rounding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ...layout import padded_shape, scale_shape
from ...transformer import arithmetic
from ...transformer.linear import PlainLinear
from ...transformer.model import ZImageTransformer
from ...transformer.places import linear_places
from ...zimage.layers import ZIMAGE
from ...zimage.table import LayerTable


@dataclass(frozen=True)
class Target:
    """A linear layer.

    Attributes:
        name: name of the layer in the ComfyUI layout, such as "layers.0.attention.qkv".
        stack: name of its stack of blocks.
        block: its number there.
        kind: its name in the block, such as "attention.qkv".
        shape: (N, K).
        module: name of the module of the model that computes it; "" for modulations.
        rows: its rows in that module's weight, or in the stacked modulations'.
    """

    name: str
    stack: str
    block: int
    kind: str
    shape: tuple[int, int]
    module: str
    rows: tuple[int, int]

    @property
    def saved(self) -> int:
        """Bytes that MXFP8 saves, against BF16."""
        rows, columns = self.shape
        codes, scales = padded_shape(self.shape), scale_shape(self.shape)
        return 2 * rows * columns - codes[0] * codes[1] - scales[0] * scales[1]


def find_targets(model: ZImageTransformer, table: LayerTable = ZIMAGE) -> list[Target]:
    """Return all linear layers of the blocks, in order of the forward pass within each stack."""
    stacks = {stack.name: getattr(model, stack.name) for stack in table.stacks}
    places = linear_places(stacks, model.modulation, {}, table)
    modules = {module: name for name, module in model.named_modules()}
    modules[model.modulation] = ""
    linears = [layer for of_slot in table.linears().values() for layer in of_slot]
    targets = []
    for stack in table.stacks:
        layers = [*linears, *table.modulations()] if stack.modulated else linears
        for number in range(len(stacks[stack.name])):
            for layer in layers:
                name = f"{stack.name}.{number}.{layer.name}"
                place = places[name]
                assert isinstance(place.linear, PlainLinear)
                shape = (place.rows, place.linear.weight.shape[1])
                rows = (place.first, place.first + place.rows)
                module = modules[place.linear]
                targets.append(Target(name, stack.name, number, layer.name, shape, module, rows))
    return targets


def round_to_mxfp8(matrix: torch.Tensor) -> torch.Tensor:
    """Round a matrix to MXFP8, and return it in its own dtype."""
    of_device = arithmetic.on(matrix.device)
    return of_device.dequantize(of_device.quantize(matrix), matrix.dtype)


@contextmanager
def quantized(model: ZImageTransformer, targets: Iterable[Target]) -> Iterator[None]:
    """Make layers compute as block-scaled tensor cores do: weights and activations in MXFP8.

    For modulations only the weights are rounded, as in the compute modes. Weights are rounded when
    they are used, so that no second copy of the model is needed.
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
            setattr(module, attribute, _RoundingLinear(layer, places))
            restore.callback(setattr, module, attribute, layer)
        yield


class _RoundingLinear(PlainLinear):
    """A layer that rounds some of its rows, and its input for them, to MXFP8."""

    def __init__(self, layer: PlainLinear, places: list[tuple[int, int]]) -> None:
        super().__init__(layer.weight, layer.bias)
        self._places = places

    def _gemm(self, x: torch.Tensor) -> torch.Tensor:
        result = super()._gemm(x)
        rounded = round_to_mxfp8(x)
        for begin, end in self._places:
            result[:, begin:end] = F.linear(rounded, round_to_mxfp8(self.weight[begin:end]))
        return result
