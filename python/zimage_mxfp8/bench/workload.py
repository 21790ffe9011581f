"""What is measured: the sizes of the transformer, of images and captions."""

from __future__ import annotations

from dataclasses import dataclass

from ..generation.limits import PIXELS_PER_TOKEN
from ..zimage.config import ZImageConfig
from ..zimage.layers import zimage_shapes


@dataclass(frozen=True)
class Workload:
    """Forwards of one image each.

    Attributes:
        config: sizes of the transformer.
        sides: sides of the square images in pixels, multiples of 16.
        caption_tokens: tokens of the caption, a multiple of 32.
    """

    config: ZImageConfig
    sides: tuple[int, ...]
    caption_tokens: int

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens of the main blocks, for each side."""
        return tuple((side // PIXELS_PER_TOKEN) ** 2 + self.caption_tokens for side in self.sides)


# The whole Z-Image, for GPUs.
WHOLE = Workload(ZImageConfig.of_shapes(zimage_shapes()), (512, 1024), 128)
# A tenth of its width and fewer blocks, so that the CPU needs seconds.
SMALL = Workload(
    ZImageConfig.of_shapes(zimage_shapes(dim=384, layers=4, refiner_layers=1, caption_dim=256)),
    (128,),
    32,
)
