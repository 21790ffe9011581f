"""The division of a batch among ranks: items among teams, and tokens within a team."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..sequence import Shape, image_tokens, joint_length
from .group import RankGroup
from .shares import even, overlaps

# How many more tokens than the mean a team may have, or else all ranks share all items.
_MAX_IMBALANCE = 1.1


@dataclass(frozen=True)
class Division:
    """What this rank computes of a batch.

    Attributes:
        ranks: all ranks; None in a model on one device.
        team: the ranks that share the tokens of the same items; None if this rank has them alone.
        items: the items of the team.
        image_rows: tokens of images that each rank has at the end; empty on one device.
    """

    ranks: RankGroup | None
    team: RankGroup | None
    items: slice
    image_rows: tuple[int, ...]

    def collect(self, rows: Sequence[torch.Tensor], counts: Sequence[int]) -> list[torch.Tensor]:
        """Return the rows of each item of the batch on rank 0, and nothing on other ranks.

        Args:
            rows: [n, C] of each of the team's items, those of this rank.
            counts: rows of each item of the batch.
        """
        if self.ranks is None:
            return list(rows)
        collected = self.ranks.collect(torch.cat(list(rows)), self.image_rows)
        return list(collected.split(list(counts))) if self.ranks.rank == 0 else []


def divide(shapes: Sequence[Shape], ranks: RankGroup | None) -> Division:
    """Divide a batch.

    Each of several teams gets as many items, if their numbers of tokens are about the same.

    Args:
        shapes: of the items.
        ranks: all ranks of the model; None for one device.
    """
    if ranks is None:
        return Division(None, None, slice(None), ())
    teams = _teams(shapes, ranks.size)
    members, items = ranks.size // teams, len(shapes) // teams
    batches = [shapes[i * items : (i + 1) * items] for i in range(teams)]
    rows = [count for batch in batches for count in _image_rows(batch, members)]
    team = ranks.rank // members
    return Division(ranks, ranks.team(teams), slice(team * items, (team + 1) * items), tuple(rows))


def _teams(shapes: Sequence[Shape], ranks: int) -> int:
    """Return the largest number of teams that divides items and ranks, with balanced tokens."""
    lengths = [joint_length(shape) for shape in shapes]
    most = math.gcd(len(shapes), ranks)
    for teams in range(most, 1, -1):
        if most % teams:
            continue
        items = len(lengths) // teams
        tokens = [sum(lengths[i * items : (i + 1) * items]) for i in range(teams)]
        if max(tokens) * teams <= _MAX_IMBALANCE * sum(lengths):
            return teams
    return 1


def _image_rows(shapes: Sequence[Shape], members: int) -> list[int]:
    """Return the tokens of images that each member of a team has."""
    lengths = [joint_length(shape) for shape in shapes]
    counts = [image_tokens(size) for size, _ in shapes]
    rows, begin = [], 0
    for count in even(sum(lengths), members):
        own = overlaps(lengths, counts, begin, begin + count)
        rows.append(sum(part.stop - part.start for part in own))
        begin += count
    return rows
