"""Plots of layers by their place: blocks from the left, types of layers from the top."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from ...checkpoint.quantization import WEIGHT_SUFFIX
from ...zimage.layers import ZIMAGE
from .figures import Cells, Grid, heat_map
from .page import Figure

_TITLES = {stack.name: stack.title for stack in ZIMAGE.stacks}

Layer = TypeVar("Layer")


@dataclass(frozen=True)
class RowRange:
    """Where a layer is.

    Attributes:
        stack: name of its stack of blocks.
        block: number of the block there.
        kind: the layer's name in the block, such as "attention.qkv".
    """

    stack: str
    block: int
    kind: str


def by_place(layers: Mapping[str, Layer]) -> dict[RowRange, Layer]:
    """Layers by their place instead of their name, or their weight's; without those in no block."""
    places = (
        (ZIMAGE.split(name.removesuffix(WEIGHT_SUFFIX)), layer) for name, layer in layers.items()
    )
    return {RowRange(*at): layer for at, layer in places if at}


@dataclass(frozen=True)
class Metric(Generic[Layer]):
    """A figure that every layer has.

    Attributes:
        title: of its plot.
        unit: of its colours.
        digits: decimals that it is shown with.
        value: its value; None where there is none.
    """

    title: str
    unit: str
    digits: int
    value: Callable[[Layer], float | None]


class BlockMap(Generic[Layer]):
    """Layers by their place, to be drawn by their figures.

    Args:
        layers: what is known of each.

    Attributes:
        grid: names of the blocks and of the layer types.
    """

    def __init__(self, layers: Mapping[RowRange, Layer]) -> None:
        kinds = {place.kind for place in layers}
        known = [kind for kind in ZIMAGE.main_types() if kind in kinds]
        self._layers = layers
        self._kinds = [*known, *sorted(kinds.difference(known))]
        self._blocks = [
            (stack, block)
            for stack in _TITLES
            for block in sorted({place.block for place in layers if place.stack == stack})
        ]
        names = [f"{_TITLES[stack]}{block}" for stack, block in self._blocks]
        self.grid = Grid(names, self._kinds)

    def cells(self, value: Callable[[Layer], float | None]) -> Cells:
        """Return a number for every layer type and block; None where there is no such layer."""
        found = [
            [self._layers.get(RowRange(*at, kind)) for at in self._blocks] for kind in self._kinds
        ]
        return [[None if layer is None else value(layer) for layer in row] for row in found]

    def heat_maps(self, metrics: Sequence[Metric[Layer]]) -> list[Figure]:
        """Return a heat map of each figure that any layer has."""
        cells = [(metric, self.cells(metric.value)) for metric in metrics]
        return [
            Figure(metric.title, heat_map(self.grid, values, metric.unit, metric.digits))
            for metric, values in cells
            if any(value is not None for row in values for value in row)
        ]
