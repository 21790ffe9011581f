"""The layers that a recipe may quantise, in a model with plain weights."""

from __future__ import annotations

from dataclasses import dataclass

from ...layout import padded_shape, scale_shape
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
