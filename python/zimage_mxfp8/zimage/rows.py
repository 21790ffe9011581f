"""The kinds of rows in a table of layers: sizes, stacks of blocks, layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

Sizes = Mapping[str, int]  # by name, such as "dim"
Shape = tuple[int, ...]
LayerKind = Literal["linear", "modulation", "projection", "norm", "token"]
TokenKind = Literal["image", "caption", "joint"]


@dataclass(frozen=True)
class Size:
    """A width of the model.

    Attributes:
        name: its name in shapes.
        usual: its value if no tensor shows it, from the sizes in the rows above.
        shown_by: tensors that show it, each with the axis; the first one found decides. A tensor of
            a block is named without stack and number.
    """

    name: str
    usual: Callable[[Sizes], int]
    shown_by: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Layer:
    """A layer of a block, or one outside the stacks.

    Attributes:
        name: its name in ComfyUI's layout; for a layer of a block, within the block.
        kind: "linear": a matrix; "modulation": one that only modulated blocks have; "norm": a
            vector; "token": a tensor named like the layer, which has no bias; "projection": a
            matrix that is no part of `Block`.
        shape: shape of the weight, from the sizes.
        bias: whether it has a bias, of as many elements as the weight has rows.
        diffusers: diffusers' names in a block, if they are others; several are stacked along the
            rows.
        slot: attribute of the transformer's `Block` that it is loaded into. Linear layers with the
            same slot are stacked along the rows if their formats allow it.
        group: its group in tables, if it is outside the stacks; by default the name's first part.
    """

    name: str
    kind: LayerKind
    shape: Callable[[Sizes], Shape]
    bias: bool = False
    diffusers: tuple[str, ...] = ()
    slot: str = ""
    group: str = ""

    @property
    def is_matrix(self) -> bool:
        """Whether the weight is a matrix that a recipe can quantise."""
        return self.kind in ("linear", "modulation", "projection")

    @property
    def weight(self) -> str:
        """Name of the weight."""
        return self.name if self.kind == "token" else f"{self.name}.weight"

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the weight and of the bias, if there is one."""
        return (self.weight, f"{self.name}.bias") if self.bias else (self.weight,)

    def shapes(self, sizes: Sizes) -> dict[str, Shape]:
        """Name -> shape of the weight and the bias."""
        shape = self.shape(sizes)
        return dict(zip(self.tensors, (shape, shape[:1]), strict=False))


@dataclass(frozen=True)
class Stack:
    """Blocks that run one after another.

    Attributes:
        name: what its tensors' names begin with.
        count: field of `ZImageConfig` with the number of its blocks. Stacks with the same field
            have the same number; a new field is to be added there.
        tokens: what its blocks run on: the "image" or the "caption" tokens, each after its
            embedder, or "joint" ones, each item's image before its caption.
        modulated: whether the timestep modulates its blocks.
        main: whether it holds the main blocks. One stack of a table does.
        title: what stands before a block's number in figures.
        extra: layers of its blocks in addition to those of `LayerTable.block`.
        first: layers of its first block in addition.
    """

    name: str
    count: str
    tokens: TokenKind
    modulated: bool
    main: bool = False
    title: str = ""
    extra: tuple[Layer, ...] = ()
    first: tuple[Layer, ...] = ()
