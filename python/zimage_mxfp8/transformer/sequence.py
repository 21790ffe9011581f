"""Conversion of latents and captions to one sequence of tokens, and back.

Tokens of all images of a batch follow one another, with no padding between them except the model's
own: images and captions are filled up to multiples of 32 tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F

from ..zimage.constants import (
    LATENT_CHANNELS,
    PATCH_SIZE,
    ROPE_AXES,
    ROPE_LENGTHS,
    ROPE_THETA,
    SEQUENCE_MULTIPLE,
)
from .ranks.group import RankGroup
from .ranks.shares import Shares, even, overlaps

Size = tuple[int, int, int]  # frames, height and width of a latent image
Shape = tuple[Size, int]  # of a batch's item: its image, the tokens of its caption

MAX_LATENTS = PATCH_SIZE * min(ROPE_LENGTHS[1:])  # of an image's height and width


def padded(tokens: int) -> int:
    """Return the number of tokens with fillers."""
    return -(-tokens // SEQUENCE_MULTIPLE) * SEQUENCE_MULTIPLE


def image_tokens(size: Size) -> int:
    """Return the number of patches of a latent image."""
    frames, height, width = size
    return frames * (height // PATCH_SIZE) * (width // PATCH_SIZE)


def joint_length(shape: Shape) -> int:
    """Return the number of tokens of an item in the main blocks, with fillers."""
    size, caption = shape
    return padded(image_tokens(size)) + padded(caption)


def max_caption_tokens(frames: int) -> int:
    """Return the number of caption tokens for which positions remain after those of the frames."""
    # Position 0 is the fillers'; the caption's come from 1 on, and then those of the frames.
    room = max(ROPE_LENGTHS[0] - 1 - frames, 0)
    return room // SEQUENCE_MULTIPLE * SEQUENCE_MULTIPLE


@dataclass(frozen=True)
class Segment:
    """Layout of one kind of sequence of a batch: its tokens, item after item.

    Attributes:
        lengths: tokens of each item.
        items: the item of each token, int32 [tokens]; None if there is only one item.
        rotations: cosine and sine of each token's rotary angles, float32 [tokens, 64, 2].
        shares: the division of the tokens among ranks, of whose tokens `items` and `rotations` are
            then; None if this process has all tokens.
    """

    lengths: tuple[int, ...]
    items: torch.Tensor | None
    rotations: torch.Tensor
    shares: Shares | None = None

    def shared(self, group: RankGroup | None) -> Segment:
        """Divide the tokens evenly among ranks."""
        if group is None:
            return self
        shares = Shares(group, even(sum(self.lengths), group.size))
        items = None if self.items is None else self.items[shares.here]
        return Segment(self.lengths, items, self.rotations[shares.here], shares)

    def mine(self, x: torch.Tensor) -> torch.Tensor:
        """Return this rank's tokens of all tokens [n, C], in memory of their own."""
        return x if self.shares is None else x[self.shares.here].clone()

    def whole(self, x: torch.Tensor) -> torch.Tensor:
        """Return all tokens [n, C] from those of each rank."""
        return x if self.shares is None else self.shares.whole(x)

    def first_tokens(self, counts: Sequence[int]) -> tuple[slice, ...]:
        """Return which of this rank's tokens are among the first `counts` of each item."""
        here = slice(0, sum(self.lengths)) if self.shares is None else self.shares.here
        return overlaps(self.lengths, counts, here.start, here.stop)


@dataclass(frozen=True)
class Layout:
    """Layout of the tokens of a batch.

    Attributes:
        images: sequences of the noise refiner.
        captions: sequences of the context refiner.
        joint: sequences of the main blocks; an item's image comes before its caption.
    """

    images: Segment
    captions: Segment
    joint: Segment

    def shared(self, group: RankGroup | None) -> Layout:
        """Divide tokens among ranks; captions are few, and every rank has all of them."""
        return Layout(self.images.shared(group), self.captions, self.joint.shared(group))


@lru_cache(maxsize=16)
def layout_of(shapes: tuple[Shape, ...], device: torch.device) -> Layout:
    """Return the layout of a batch; the last few are cached."""
    images, captions = [], []
    for size, caption in shapes:
        captions.append(_grid((1, 0, 0), (padded(caption), 1, 1)))
        grid = _image_grid(size, caption)
        images.append(F.pad(grid, (0, 0, 0, padded(len(grid)) - len(grid))))
    joint = [torch.cat(pair) for pair in zip(images, captions, strict=True)]
    return Layout(_part(images, device), _part(captions, device), _part(joint, device))


@lru_cache(maxsize=16)
def image_part(shapes: tuple[Shape, ...], device: torch.device) -> Segment:
    """Return the layout of the images of a batch without fillers; the last few are cached."""
    grids = [_image_grid(size, caption) for size, caption in shapes]
    return _part(grids, device)


def _image_grid(size: Size, caption: int) -> torch.Tensor:
    """Return the positions of an image's tokens, which come after those of its caption."""
    frames, height, width = size
    start = (padded(caption) + 1, 0, 0)
    return _grid(start, (frames, height // PATCH_SIZE, width // PATCH_SIZE))


def _grid(start: Size, size: Size) -> torch.Tensor:
    """Return the positions [tokens, 3], the last axis fastest."""
    axes = [torch.arange(begin, begin + n) for begin, n in zip(start, size, strict=True)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)


def _part(positions: list[torch.Tensor], device: torch.device) -> Segment:
    lengths = tuple(len(p) for p in positions)
    items = None
    if len(lengths) > 1:
        items = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(
            torch.tensor(lengths)
        )
        items = items.to(device)
    return Segment(lengths, items, _rotations(torch.cat(positions)).to(device))


def _rotations(positions: torch.Tensor) -> torch.Tensor:
    # Angles in float64, then float32, as in the model's training.
    angles = []
    for axis, dim in enumerate(ROPE_AXES):
        frequencies = ROPE_THETA ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles.append(positions[:, axis, None].double() * frequencies)
    angle = torch.cat(angles, dim=1).float()
    return torch.stack((angle.cos(), angle.sin()), dim=-1)


def patchify(image: torch.Tensor) -> torch.Tensor:
    """Split [C, F, H, W] into [tokens, 4 C], the (row, column, channel) of each patch."""
    channels, frames, height, width = image.shape
    patches = image.reshape(
        channels, frames, height // PATCH_SIZE, PATCH_SIZE, width // PATCH_SIZE, PATCH_SIZE
    )
    return patches.permute(1, 2, 4, 3, 5, 0).reshape(-1, PATCH_SIZE * PATCH_SIZE * channels)


def unpatchify(tokens: torch.Tensor, size: Size) -> torch.Tensor:
    """Join [tokens, 64] to [16, F, H, W]."""
    frames, height, width = size
    patches = tokens.reshape(
        frames,
        height // PATCH_SIZE,
        width // PATCH_SIZE,
        PATCH_SIZE,
        PATCH_SIZE,
        LATENT_CHANNELS,
    )
    return patches.permute(5, 0, 1, 3, 2, 4).reshape(LATENT_CHANNELS, frames, height, width)


def fill_up(
    tokens: torch.Tensor, counts: Sequence[int], lengths: Sequence[int], filler: torch.Tensor
) -> torch.Tensor:
    """Append fillers to each item's tokens.

    Args:
        tokens: [sum of counts, C].
        counts: tokens of each item.
        lengths: the same with fillers.
        filler: [1, C].
    """
    if list(counts) == list(lengths):
        return tokens
    parts: list[torch.Tensor] = []
    for item, length in zip(tokens.split(list(counts)), lengths, strict=True):
        parts += [item, filler.expand(length - len(item), -1)]
    return torch.cat(parts)


def joined(images: torch.Tensor, captions: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Put each item's caption tokens behind its image tokens.

    Args:
        images: [tokens of all images, C].
        captions: [tokens of all captions, C].
        layout: of the batch.
    """
    parts = zip(
        images.split(list(layout.images.lengths)),
        captions.split(list(layout.captions.lengths)),
        strict=True,
    )
    return torch.cat([tokens for pair in parts for tokens in pair])
