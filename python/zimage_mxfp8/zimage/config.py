"""Sizes of a Z-Image transformer, from its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .constants import HEAD_DIM, LATENT_CHANNELS
from .layers import ZIMAGE


@dataclass(frozen=True)
class ZImageConfig:
    """Sizes of a Z-Image transformer. Names are those of diffusers' `ZImageTransformer2DModel`.

    Attributes:
        dim: width of the model.
        n_layers: number of main blocks.
        n_refiner_layers: number of blocks in each refiner.
        n_heads: attention heads of 128 elements.
        cap_feat_dim: features of a caption's token.
        hidden_dim: width of the feed-forward layers; 0 if there are no blocks.
        in_channels: channels of a latent image.
    """

    dim: int
    n_layers: int
    n_refiner_layers: int
    n_heads: int
    cap_feat_dim: int
    hidden_dim: int
    in_channels: int = LATENT_CHANNELS

    @classmethod
    def of_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> ZImageConfig:
        """Return the sizes of a whole transformer; `shapes` by name, in ComfyUI's layout."""
        sizes, counts = ZIMAGE.read_sizes(shapes), ZIMAGE.count_blocks(shapes)
        return cls(
            dim=sizes["dim"],
            **counts,
            n_heads=sizes["dim"] // HEAD_DIM,
            cap_feat_dim=sizes["caption_dim"],
            hidden_dim=sizes["hidden"] if any(counts.values()) else 0,
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all tensors by name, in ComfyUI's layout."""
        sizes = {"dim": self.dim, "caption_dim": self.cap_feat_dim, "hidden": self.hidden_dim}
        counts = {stack.count: getattr(self, stack.count) for stack in ZIMAGE.stacks}
        return ZIMAGE.shapes(sizes, counts)
