"""The tables of layers of Z-Image's ControlNets, and what their tensors say of them.

The files are those of alibaba-pai's Z-Image-Fun-Controlnet-Union and its kin. Their blocks are
Z-Image's, with projections before the first block and after every block. Names are those of the
files, but for the layers of a block, which have ComfyUI's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from ..text import plural
from .config import ZImageConfig
from .constants import HEAD_DIM, LATENT_CHANNELS, PATCH_SIZE
from .layers import ZIMAGE
from .rows import Layer, Size, Stack
from .table import LayerTable

EMBEDDER = "control_all_x_embedder.2-1"  # for patches of 2 x 2 in one frame
REFINER = "control_noise_refiner"
LAYERS = "control_layers"
INPAINT_CHANNELS = 2 * LATENT_CHANNELS + 1  # control latent, mask, latent of the kept part

# What the tokens of the control image run through before those of the caption join them: blocks
# without hints ("plain"), blocks with hints for the noise refiner ("hints"), or the main blocks of
# the ControlNet itself, which then run twice ("main").
Refiner = Literal["plain", "hints", "main"]

_PATCH = PATCH_SIZE * PATCH_SIZE
_BEFORE = Layer("before_proj", "projection", lambda s: (s["dim"], s["dim"]), bias=True)
_AFTER = Layer("after_proj", "projection", lambda s: (s["dim"], s["dim"]), bias=True)
_MAIN = Stack(
    LAYERS, "n_layers", "joint", modulated=True, main=True, extra=(_AFTER,), first=(_BEFORE,)
)
_PLAIN_REFINER = Stack(REFINER, "n_refiner_layers", "image", modulated=True, title="noise ")
_HINT_REFINER = replace(_PLAIN_REFINER, extra=(_AFTER,), first=(_BEFORE,))

CONTROLNET = LayerTable(
    sizes=(
        Size("dim", lambda _: 3840, ((f"{EMBEDDER}.weight", 0),)),
        Size("patch", lambda _: _PATCH * INPAINT_CHANNELS, ((f"{EMBEDDER}.weight", 1),)),
        *(size for size in ZIMAGE.sizes if size.name in ("hidden", "modulation")),
    ),
    stacks=(_HINT_REFINER, _MAIN),
    block=ZIMAGE.block,
    outside=(
        Layer(EMBEDDER, "linear", lambda s: (s["dim"], s["patch"]), bias=True, group="embedders"),
    ),
    diffusers_modules=(),
    anchor=f"{EMBEDDER}.weight",
    signature=(),
    time_embedder="",
    title="ControlNet for Z-Image",
)
CONTROLNET_1 = replace(CONTROLNET, stacks=(_PLAIN_REFINER, _MAIN))  # generation 1.0


def control_table(names: Collection[str]) -> LayerTable:
    """Return the table of the ControlNet with these tensors, under whatever prefix."""
    refiner = [name for name in names if f"{REFINER}." in name]
    has_hints = any(f".{_AFTER.name}." in name for name in refiner)
    return CONTROLNET if has_hints or not refiner else CONTROLNET_1


@dataclass(frozen=True)
class ControlConfig:
    """Sizes of a ControlNet for Z-Image.

    Attributes:
        dim: width, which is that of the transformer.
        n_layers: number of main blocks, each of which gives a hint.
        n_refiner_layers: number of refiner blocks of its own that are used.
        n_heads: attention heads of 128 elements.
        hidden_dim: width of the feed-forward layers.
        control_in_dim: channels of its input: 16, or 33 with mask and inpaint latent.
        refiner: what runs before the caption's tokens join.
    """

    dim: int
    n_layers: int
    n_refiner_layers: int
    n_heads: int
    hidden_dim: int
    control_in_dim: int
    refiner: Refiner

    @classmethod
    def of_shapes(
        cls, shapes: Mapping[str, tuple[int, ...]], table: LayerTable, *, trained_refiner: bool
    ) -> ControlConfig:
        """Return the sizes of a ControlNet.

        Args:
            shapes: of its tensors by name, in ComfyUI's layout.
            table: as from `control_table`.
            trained_refiner: whether the hints of its own refiner are more than zeros. Those of
                generation 2.0 are zeros, because it was trained without this refiner.
        """
        sizes, counts = table.read_sizes(shapes), table.count_blocks(shapes)
        refiner: Refiner = "plain"
        if table is CONTROLNET:
            refiner = "hints" if trained_refiner and counts["n_refiner_layers"] else "main"
        return cls(
            dim=sizes["dim"],
            n_layers=counts["n_layers"],
            n_refiner_layers=0 if refiner == "main" else counts["n_refiner_layers"],
            n_heads=sizes["dim"] // HEAD_DIM,
            hidden_dim=sizes["hidden"],
            control_in_dim=sizes["patch"] // _PATCH,
            refiner=refiner,
        )

    @property
    def generation(self) -> str:
        """The generation of Fun-Controlnet-Union, as far as tensors tell it.

        Tile files have the tensors of 2.1 or 2.1-lite, and those for Turbo the base model's.
        """
        known: dict[tuple[Refiner, int], str] = {
            ("plain", 6): "1.0",
            ("main", 15): "2.0",
            ("hints", 15): "2.1 or Tile 2.1",
            ("hints", 3): "2.1-lite or Tile 2.1-lite",
        }
        blocks = plural(self.n_layers, "block")
        return known.get((self.refiner, self.n_layers), f"unknown, with {blocks}")

    @property
    def table(self) -> LayerTable:
        """The table of its layers."""
        return CONTROLNET_1 if self.refiner == "plain" else CONTROLNET

    def places(self, model: ZImageConfig) -> tuple[int, ...]:
        """Return the main blocks of a transformer that the hints are added after."""
        return tuple(range(0, model.n_layers, model.n_layers // self.n_layers))

    def refiner_places(self, model: ZImageConfig) -> tuple[int, ...]:
        """Return the blocks of a transformer's noise refiner that hints are added after."""
        counts = {"plain": 0, "hints": self.n_refiner_layers, "main": model.n_refiner_layers}
        return tuple(range(counts[self.refiner]))

    def misfit(self, model: ZImageConfig) -> str:
        """Return why it cannot be used with a transformer, as a clause; empty if it can."""
        if self.dim != model.dim:
            return f"it is for a model of width {self.dim}, and this one's width is {model.dim}"
        if self.control_in_dim not in (LATENT_CHANNELS, INPAINT_CHANNELS):
            return (
                f"its input has {plural(self.control_in_dim, 'channel')}, neither "
                f"{LATENT_CHANNELS} nor {INPAINT_CHANNELS}"
            )
        if self.n_layers == 0 or model.n_layers % self.n_layers:
            return (
                f"its {plural(self.n_layers, 'block')} cannot be spread evenly over the "
                f"{model.n_layers} of the model"
            )
        if self.refiner == "hints" and self.n_refiner_layers != model.n_refiner_layers:
            return (
                f"its refiner has {plural(self.n_refiner_layers, 'block')}, and the model's noise "
                f"refiner {model.n_refiner_layers}"
            )
        if self.refiner == "main" and self.n_layers < model.n_refiner_layers:
            return (
                f"it has {plural(self.n_layers, 'block')}, fewer than the "
                f"{model.n_refiner_layers} of the model's noise refiner"
            )
        return ""
