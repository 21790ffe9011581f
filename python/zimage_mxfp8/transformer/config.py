"""What a Z-Image transformer's tensors say of its size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count

HEAD_DIM = 128
PATCH_SIZE = 2
LATENT_CHANNELS = 16
PATCH_FEATURES = PATCH_SIZE * PATCH_SIZE * LATENT_CHANNELS
SEQUENCE_MULTIPLE = 32  # images and captions are padded to multiples of so many tokens
NORM_EPS = 1e-5
FINAL_NORM_EPS = 1e-6
ROPE_THETA = 256.0
ROPE_AXES = (32, 48, 48)  # of a head's elements: caption position or frame, row, column
ROPE_LENGTHS = (1536, 512, 512)  # positions that the published models have on each of these axes
TIME_FEATURES = 256
TIME_SCALE = 1000.0


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
        """The sizes of a whole transformer; `shapes` by name, in the ComfyUI layout."""
        dim, cap_feat_dim = shapes["cap_embedder.1.weight"]

        def blocks(stack: str) -> int:
            return next(i for i in count() if f"{stack}.{i}.attention_norm1.weight" not in shapes)

        hidden = (s[0] for name, s in shapes.items() if name.endswith(".feed_forward.w1.weight"))
        return cls(
            dim=dim,
            n_layers=blocks("layers"),
            n_refiner_layers=blocks("noise_refiner"),
            n_heads=dim // HEAD_DIM,
            cap_feat_dim=cap_feat_dim,
            hidden_dim=next(hidden, 0),
        )
