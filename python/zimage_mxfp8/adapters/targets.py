"""The modules that an adapter can name, in every spelling, from the table of layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ..zimage.layers import ZIMAGE
from ..zimage.table import LayerTable


@dataclass(frozen=True)
class Target:
    """What an adapter changes.

    Attributes:
        layer: the layer's name in ComfyUI's layout, without ".weight".
        part: for a layer that diffusers splits along the rows, such as "qkv": which part.
        parts: into how many it splits.
        diffusers: diffusers' name of it; of each part, for a layer that is split and meant whole.
    """

    layer: str
    part: int = 0
    parts: int = 1
    diffusers: tuple[str, ...] = field(default=(), compare=False)

    def rows(self, total: int) -> slice:
        """Return the rows of a layer of `total` rows that this is."""
        size = total // self.parts
        return slice(self.part * size, (self.part + 1) * size)


class Targets:
    """Modules by their names, in both layouts. Dots and underscores count as the same.

    A name without the ".0" of a layer that is the first of a sequence is taken too, as trainers
    write it.
    """

    def __init__(self, counts: Mapping[str, int], table: LayerTable = ZIMAGE) -> None:
        """Take the number of blocks by the stacks' `count` (see `LayerTable.count_blocks`)."""
        self._underscored: dict[str, Target] = {}
        for name, target in _modules(counts, table):
            self._underscored.setdefault(_underscored(name), target)
            if name.endswith(".0"):
                self._underscored.setdefault(_underscored(name.removesuffix(".0")), target)

    def find(self, module: str) -> Target | None:
        """Return what a module's name means; None for one that the model does not have."""
        return self._underscored.get(_underscored(module))


def _underscored(name: str) -> str:
    return name.replace(".", "_")


def _modules(counts: Mapping[str, int], table: LayerTable) -> Iterator[tuple[str, Target]]:
    for stack in table.stacks:
        for i in range(counts[stack.count]):
            for layer in table.layers_of(stack):
                name = f"{stack.name}.{i}.{layer.name}"
                names = tuple(f"{stack.name}.{i}.{theirs}" for theirs in layer.diffusers)
                yield name, Target(name, diffusers=names)
                for part, theirs in enumerate(names):
                    yield theirs, Target(name, part, len(names), (theirs,))
    for layer in table.outside:
        if layer.kind == "token":
            continue
        names = tuple(
            theirs + layer.name[len(ours) :]
            for theirs, ours in table.diffusers_modules
            if layer.name == ours or layer.name.startswith(f"{ours}.")
        )
        for name in (layer.name, *names):
            yield name, Target(layer.name, diffusers=names)
