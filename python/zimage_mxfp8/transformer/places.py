"""Where the layers of the table are in a transformer that is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..zimage.layers import ZIMAGE
from ..zimage.rows import Layer, Stack
from ..zimage.table import LayerTable
from .block import Block
from .linear import Linear


@dataclass(frozen=True, eq=False)
class LinearPlace:
    """A layer of the table in a `Linear`, which may stack several.

    Attributes:
        linear: which.
        first: the first of the layer's rows there.
        rows: number of the layer's rows.
    """

    linear: Linear
    first: int
    rows: int

    def slice(self, rows: slice) -> slice:
        """Return the place of some of the layer's rows."""
        return slice(self.first + rows.start, self.first + rows.stop)


def linear_places(
    stacks: Mapping[str, Sequence[Block]],
    modulation: Linear,
    outside: Mapping[str, Linear],
    table: LayerTable = ZIMAGE,
) -> dict[str, LinearPlace]:
    """Return the place of each layer that has a matrix, by its name in ComfyUI's layout.

    Args:
        stacks: blocks by the stack's name.
        modulation: all blocks' modulations, stacked in the order of the table's stacks.
        outside: layers outside the stacks by name.
        table: the model's layers.
    """
    places = {name: LinearPlace(x, 0, x.out_features) for name, x in outside.items()}
    modulated: list[str] = []
    for stack in table.stacks:
        for i, block in enumerate(stacks[stack.name]):
            name = f"{stack.name}.{i}."
            for slot, layers in table.linears().items():
                found = getattr(block, slot)
                linears = [found] if isinstance(found, Linear) else list(found)
                names = [name + layer.name for layer in layers]
                places |= _stacked(names, linears)
            modulated += [name + layer.name for layer in _modulations(table, stack)]
    return places | _stacked(modulated, [modulation])


def _modulations(table: LayerTable, stack: Stack) -> list[Layer]:
    return table.modulations() if stack.modulated else []


def _stacked(names: Sequence[str], linears: Sequence[Linear]) -> dict[str, LinearPlace]:
    """Layers of the same shape in one `Linear` for all of them, or in one each."""
    if len(linears) == len(names):
        pairs = zip(names, linears, strict=True)
        return {name: LinearPlace(x, 0, x.out_features) for name, x in pairs}
    (linear,) = linears
    rows = linear.out_features // max(len(names), 1)
    return {name: LinearPlace(linear, i * rows, rows) for i, name in enumerate(names)}


def norm_places(
    stacks: Mapping[str, Sequence[Block]],
    outside: Mapping[str, torch.Tensor],
    table: LayerTable = ZIMAGE,
) -> dict[str, torch.Tensor]:
    """Return the vector of each norm, by its layer's name in ComfyUI's layout."""
    places = dict(outside)
    for stack in table.stacks:
        for i, block in enumerate(stacks[stack.name]):
            for layer in table.norms():
                places[f"{stack.name}.{i}.{layer.name}"] = getattr(block, layer.slot)
    return places
