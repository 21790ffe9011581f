"""The table of layers: names, shapes, groups and layer types derived from its rows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from ..layout import MXFP8_BLOCK, round_up
from .rows import Layer, Shape, Size, Sizes, Stack


class BlockTensor(NamedTuple):
    """The parts of the name of a block's tensor or layer: `<stack>.<block>.<part>`."""

    stack: str
    block: int
    part: str


@dataclass(frozen=True)
class LayerTable:
    """The layers of a model.

    Attributes:
        sizes: the model's widths.
        stacks: the stacks of blocks, in the order of the forward pass for those that run on the
            same tokens; joint tokens come last.
        block: the layers of a block; those of kind "modulation" are in modulated stacks only.
        outside: the layers outside the stacks.
        diffusers_modules: the beginnings of names outside the stacks, in diffusers' layout (with
            the patch size) and in ComfyUI's.
        anchor: a matrix [dim, features] that is in every model of the family and has the
            same name in ComfyUI's and diffusers' layouts.
        signature: tensors that ComfyUI recognises the model by.
        time_embedder: the beginning of the names of the layers that embed the timestep;
            empty for a model that is given the embedded timestep.
        title: the name of the model.
    """

    sizes: tuple[Size, ...] = field(repr=False)
    stacks: tuple[Stack, ...]
    block: tuple[Layer, ...] = field(repr=False)
    outside: tuple[Layer, ...] = field(repr=False)
    diffusers_modules: tuple[tuple[str, str], ...]
    anchor: str
    signature: tuple[str, ...]
    time_embedder: str
    title: str

    # ---- Rows

    @cached_property
    def main(self) -> Stack:
        """The stack of the main blocks."""
        return next(stack for stack in self.stacks if stack.main)

    @cached_property
    def tokens(self) -> tuple[str, ...]:
        """Names of the tensors that are tokens."""
        return tuple(layer.name for layer in self.outside if layer.kind == "token")

    @cached_property
    def modules(self) -> frozenset[str]:
        """First parts of the names of all tensors."""
        outside = (layer.name.partition(".")[0] for layer in self.outside)
        return frozenset((*outside, *(stack.name for stack in self.stacks)))

    def layers_of(self, stack: Stack, block: int = 1) -> list[Layer]:
        """Return the layers of a stack's block; the first one may have more than the others."""
        layers = [layer for layer in self.block if stack.modulated or layer.kind != "modulation"]
        return [*layers, *stack.extra, *(stack.first if block == 0 else ())]

    def linears(self) -> dict[str, list[Layer]]:
        """Return the linear layers of all blocks by slot, in the order of the forward pass."""
        slots: dict[str, list[Layer]] = {}
        for layer in self.block:
            if layer.kind == "linear":
                slots.setdefault(layer.slot, []).append(layer)
        return slots

    def norms(self) -> list[Layer]:
        """Return the norms of a block."""
        return [layer for layer in self.block if layer.kind == "norm"]

    def modulations(self) -> list[Layer]:
        """Return the layers of a modulated block that compute its modulation."""
        return [layer for layer in self.block if layer.kind == "modulation"]

    def time_embedding(self) -> list[Layer]:
        """Return the layers that embed the timestep, in their order."""
        return [x for x in self.outside if x.name.startswith(f"{self.time_embedder}.")]

    def main_types(self) -> tuple[str, ...]:
        """Return the names of the matrices of a main block."""
        return tuple(layer.name for layer in self.layers_of(self.main) if layer.is_matrix)

    def refiner_types(self) -> tuple[str, ...]:
        """Return names of other blocks' matrices without modulations, with the stack; by stack."""
        refiners = sorted(stack.name for stack in self.stacks if not stack.main)
        kinds = [layer.name for layer in self.block if layer.kind == "linear"]
        return tuple(f"{stack}.{kind}" for stack in refiners for kind in kinds)

    def layer_types(self) -> tuple[str, ...]:
        """Return the types of layers to compare with each other: main ones, then refiners'."""
        return self.main_types() + self.refiner_types()

    def layer_type(self, tensor: BlockTensor) -> str:
        """Return the type of a layer: its name in the block, for refiners with the stack's name."""
        main = tensor.stack == self.main.name
        return tensor.part if main else f"{tensor.stack}.{tensor.part}"

    # ---- Names

    @cached_property
    def _block_name(self) -> re.Pattern[str]:
        # Numbers as the model writes them: 07 or digits of other scripts would name another block.
        stacks = "|".join(re.escape(stack.name) for stack in self.stacks)
        return re.compile(rf"({stacks})\.(0|[1-9][0-9]{{0,8}})\.(.+)")

    def split(self, name: str) -> BlockTensor | None:
        """Return the parts of a name; None if it does not belong to a block."""
        match = self._block_name.fullmatch(name)
        return BlockTensor(match[1], int(match[2]), match[3]) if match else None

    def is_modulation(self, layer: str) -> bool:
        """Return whether a layer is the modulation of a block."""
        at = self.split(layer)
        modulated = {stack.name for stack in self.stacks if stack.modulated}
        return (
            at is not None
            and at.stack in modulated
            and any(at.part == layer.name for layer in self.modulations())
        )

    def group_of(self, name: str) -> str:
        """Return the group that a tensor is shown under in tables."""
        if at := self.split(name):
            norms = {layer.weight for layer in self.norms()}
            if at.part in norms or "norm" in at.part:  # the latter in other models' blocks
                return f"{at.stack} norms"
            part = at.part
            for ending in (".weight", ".bias", ".weight_scale", ".comfy_quant"):
                part = part.removesuffix(ending)
            return f"{at.stack} {part.removesuffix('.0')}"
        module = name.partition(".")[0]
        groups = {x.name.partition(".")[0]: x.group for x in self.outside}
        return groups.get(module, "other") or module

    # ---- Shapes

    def shapes(self, sizes: Sizes, counts: Mapping[str, int]) -> dict[str, Shape]:
        """Name -> shape of all tensors.

        Args:
            sizes: sizes by name; those without a value get their usual one.
            counts: number of blocks by the stacks' `count`.
        """
        sizes = self._completed(sizes)
        shapes: dict[str, Shape] = {}
        for layer in self.outside:
            shapes |= layer.shapes(sizes)
        for stack in self.stacks:
            for i in range(counts[stack.count]):
                for layer in self.layers_of(stack, i):
                    for name, shape in layer.shapes(sizes).items():
                        shapes[f"{stack.name}.{i}.{name}"] = shape
        return shapes

    def _completed(self, sizes: Sizes) -> dict[str, int]:
        complete: dict[str, int] = {}
        for size in self.sizes:
            complete[size.name] = sizes.get(size.name) or size.usual(complete)
        return complete

    def expected_shapes(
        self, found: Mapping[str, Shape], padded: Collection[str] = ()
    ) -> dict[str, Shape]:
        """Name -> shape that a model with these tensors should have.

        Sizes and numbers of blocks are taken from the tensors themselves.

        Args:
            found: name without prefix -> shape, in ComfyUI's layout.
            padded: names of tensors that are rounded up to multiples of 32.
        """
        return self.shapes(self.read_sizes(found, padded), self.count_blocks(found))

    def count_blocks(self, names: Iterable[str]) -> dict[str, int]:
        """Return the number of blocks by the stacks' `count`.

        It is the number of different block numbers: a stray "layers.999999." is one, not a million.
        """
        blocks: dict[str, set[str]] = {stack.name: set() for stack in self.stacks}
        for name in names:
            stack, _, rest = name.partition(".")
            number, dot, _ = rest.partition(".")
            if stack in blocks and dot and number.isdecimal():
                blocks[stack].add(number)
        counts: dict[str, int] = {}
        for row in self.stacks:
            counts[row.count] = max(counts.get(row.count, 0), len(blocks[row.name]))
        return counts

    def read_sizes(
        self, found: Mapping[str, Shape], padded: Collection[str] = ()
    ) -> dict[str, int]:
        """Return the model's sizes by name, taken from its tensors (see `expected_shapes`).

        For layers of blocks the majority decides: a single wrong one is then reported as such.
        """
        by_part: dict[str, list[str]] = {}
        for name in sorted(found):
            at = self.split(name)
            by_part.setdefault(at.part if at else name, []).append(name)
        sizes: dict[str, int] = {}
        for size in self.sizes:
            votes: dict[bool, Counter[int]] = {False: Counter(), True: Counter()}
            for part, axis in size.shown_by:
                for name in by_part.get(part, ()):
                    if len(found[name]) == self._ranks[part] and 0 not in found[name]:
                        votes[name in padded][found[name][axis]] += 1
                if votes[False]:
                    break
            usual = size.usual(sizes)
            if votes[False]:
                sizes[size.name] = votes[False].most_common(1)[0][0]
            elif votes[True]:
                width = votes[True].most_common(1)[0][0]
                sizes[size.name] = usual if round_up(usual, MXFP8_BLOCK) == width else width
            else:
                sizes[size.name] = usual
        return sizes

    @cached_property
    def _ranks(self) -> dict[str, int]:
        sizes = self._completed({})
        return {
            name: len(shape)
            for layer in (*self.block, *self.outside)
            for name, shape in layer.shapes(sizes).items()
        }

    # ---- Diffusers' names

    def from_diffusers(self, name: str) -> tuple[str, tuple[str, ...]]:
        """Return a tensor's name in ComfyUI's layout, and diffusers' names of all tensors in it.

        Names that are the same in both layouts, or belong to no layer, are returned unchanged.
        """
        for theirs, ours in self.diffusers_modules:
            if name.startswith(f"{theirs}."):
                return ours + name[len(theirs) :], (name,)
        if at := self.split(name):
            block = f"{at.stack}.{at.block}."
            for layer in self.block:
                for theirs in layer.diffusers:
                    if at.part.startswith(f"{theirs}."):
                        ending = at.part[len(theirs) :]
                        stacked = tuple(f"{block}{part}{ending}" for part in layer.diffusers)
                        return f"{block}{layer.name}{ending}", stacked
        return name, (name,)

    def to_diffusers(self, name: str) -> tuple[str, ...]:
        """Return diffusers' names of a tensor in ComfyUI's layout: several, if it is split by rows.

        Names that belong to no layer are returned unchanged.
        """
        for theirs, ours in self.diffusers_modules:
            if name.startswith(f"{ours}."):
                return (theirs + name[len(ours) :],)
        if at := self.split(name):
            for layer in self.block:
                if layer.diffusers and at.part.startswith(f"{layer.name}."):
                    ending = at.part[len(layer.name) :]
                    block = f"{at.stack}.{at.block}."
                    return tuple(f"{block}{theirs}{ending}" for theirs in layer.diffusers)
        return (name,)

    def is_diffusers_layout(self, names: Iterable[str]) -> bool:
        """Return whether names have the modules of diffusers' layout."""
        modules = tuple(f"{module}." for module, _ in self._patch_sizes)
        if not modules:  # what is outside the stacks has the same name in both layouts
            return any(self.from_diffusers(name)[0] != name for name in names)
        return any(name.startswith(modules) for name in names)

    def other_patch_size(self, names: Iterable[str]) -> str | None:
        """Return the first name for another patch size, for which ComfyUI's layout has no place."""
        sizes = dict(self._patch_sizes)
        for name in names:
            module, _, rest = name.partition(".")
            size, dot, _ = rest.partition(".")
            if module in sizes and dot and size != sizes[module]:
                return name
        return None

    @cached_property
    def _patch_sizes(self) -> list[tuple[str, str]]:
        """Modules of diffusers' layout that are numbered by patch size, with the model's size."""
        modules = (theirs.partition(".") for theirs, _ in self.diffusers_modules)
        return [(module, size) for module, dot, size in modules if dot]
