"""How ranks divide a batch, and attention across them, without processes."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zimage_mxfp8.transformer.attention import attend
from zimage_mxfp8.transformer.ranks.attention import SharedAttention, heads_to_gather_first
from zimage_mxfp8.transformer.ranks.division import divide
from zimage_mxfp8.transformer.ranks.shares import Shares, even, overlaps
from zimage_mxfp8.transformer.sequence import Shape, layout_of

SHAPES = st.lists(
    st.tuples(
        st.tuples(st.just(1), st.integers(1, 20).map(lambda n: 2 * n), st.just(8)),
        st.integers(1, 100),
    ),
    min_size=1,
    max_size=6,
)


@given(st.integers(0, 10**6), st.integers(1, 64))
def test_even_parts(total: int, parts: int) -> None:
    found = even(total, parts)
    assert sum(found) == total and len(found) == parts
    assert max(found) - min(found) <= 1 and list(found) == sorted(found, reverse=True)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=5), st.data())
def test_overlaps_are_those_that_counting_finds(
    pairs: list[tuple[int, int]], data: st.DataObject
) -> None:
    counts, fillers = [a for a, _ in pairs], [b for _, b in pairs]
    lengths = [a + b for a, b in pairs]
    begin = data.draw(st.integers(0, sum(lengths)))
    end = data.draw(st.integers(begin, sum(lengths)))
    marks = [
        (item, place < count)
        for item, (count, filler) in enumerate(zip(counts, fillers, strict=True))
        for place in range(count + filler)
    ][begin:end]
    for item, part in enumerate(overlaps(lengths, counts, begin, end)):
        wanted = [i for i, mark in enumerate(marks) if mark == (item, True)]
        assert list(range(part.start, part.stop)) == wanted


class Ranks:
    """Stands for the ranks of a model where nothing is exchanged."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def team(self, count: int) -> Any:
        members = self.size // count
        return Ranks(self.rank % members, members) if members > 1 else None


@given(SHAPES, st.integers(1, 6))
def test_every_token_of_an_image_has_one_rank(shapes: list[Shape], size: int) -> None:
    seen: list[tuple[int, int]] = []
    for rank in range(size):
        division = divide(shapes, Ranks(rank, size))  # type: ignore[arg-type]
        own = shapes[division.items]
        layout = layout_of(tuple(own), torch.device("cpu")).shared(division.team)
        counts = [h * w // 4 for (_, h, w), _ in own]
        rows = layout.joint.first_tokens(counts)
        assert sum(part.stop - part.start for part in rows) == division.image_rows[rank]
        first = layout.joint.shares.here.start if layout.joint.shares else 0
        starts = [sum(layout.joint.lengths[:i]) for i in range(len(own))]
        begin = division.items.start
        for i, (part, start) in enumerate(zip(rows, starts, strict=True)):
            seen += [(begin + i, first + n - start) for n in range(part.start, part.stop)]
        assert len(layout.joint.rotations) == (
            sum(layout.joint.lengths)
            if layout.joint.shares is None
            else layout.joint.shares.counts[division.team.rank]  # type: ignore[union-attr]
        )
    wanted = [(i, n) for i, ((_, h, w), _) in enumerate(shapes) for n in range(h * w // 4)]
    assert seen == wanted  # in the order in which rank 0 collects them


def test_items_of_equal_length_are_not_exchanged() -> None:
    guidance: list[Shape] = [((1, 32, 32), 30), ((1, 32, 32), 1)]
    assert divide(guidance, Ranks(1, 2)).items == slice(1, 2)  # type: ignore[arg-type]
    assert divide(guidance, Ranks(1, 2)).team is None  # type: ignore[arg-type]
    assert divide(guidance, Ranks(1, 4)).team.size == 2  # type: ignore[arg-type, union-attr]
    uneven: list[Shape] = [((1, 64, 64), 30), ((1, 16, 16), 30)]
    assert divide(uneven, Ranks(1, 2)).team.size == 2  # type: ignore[arg-type, union-attr]


class Thread:
    """A rank that is a thread: it hands tensors over through a list."""

    multiprocessors = 5

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, table: list[Any]) -> None:
        self.rank, self.size = rank, size
        self._barrier, self._table = barrier, table

    own = None

    def gathering(self, counts, shape, dtype, groups) -> Any:
        assert (shape[0], shape[2], dtype) == (2, 128, torch.float32)
        self._counts, self._groups, self._sent = list(counts), groups, []
        return self

    def send(self, columns: torch.Tensor) -> None:
        self._sent.append(columns)

    def groups(self) -> Iterator[torch.Tensor]:
        rows = torch.cat(self._sent, dim=1)
        for group in self._groups:
            self._table[self.rank] = rows[:, :, group]
            self._barrier.wait()
            whole = torch.cat(self._table)
            self._barrier.wait()
            assert [len(each) for each in self._table] == self._counts
            yield whole


def test_heads_go_in_two_groups() -> None:
    # On an H200 cuDNN took 112 us for each half of 2112 x 4224 tokens, and for 14 and 16 of 30
    # heads of 8256 x 16512 tokens 3137 us, where halves took 3474.
    assert heads_to_gather_first(30, 2112, 132) == 15
    assert heads_to_gather_first(30, 8256, 132) == 14


@given(st.integers(2, 64), st.integers(1, 40000), st.integers(1, 200))
def test_no_half_takes_fewer_waves_than_the_groups(heads: int, tokens: int, count: int) -> None:
    def waves(part: int) -> int:
        return math.ceil(part * math.ceil(tokens / 128) / count)

    first, half = heads_to_gather_first(heads, tokens, count), heads // 2
    assert heads // 4 <= first <= half
    assert waves(first) + waves(heads - first) <= waves(half) + waves(heads - half)


@pytest.mark.parametrize("lengths", [[96, 64, 160], [64, 64], [37], [2, 1]], ids=str)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("heads", [6, 1])
def test_attention_across_ranks_is_attention(heads: int, size: int, lengths: list[int]) -> None:
    qkv = torch.randn(sum(lengths), 3 * heads * 128, generator=torch.Generator().manual_seed(size))
    tokens = even(len(qkv), size)
    barrier, table = threading.Barrier(size, timeout=60), [None] * size

    def attend_here(rank: int) -> torch.Tensor:
        group: Any = Thread(rank, size, barrier, table)
        shares = Shares(group, tokens)
        q, kv = qkv[shares.here].split((heads * 128, 2 * heads * 128), dim=1)
        attention = SharedAttention(heads, lengths, shares, kv.dtype)
        for columns in [kv] if size % 2 else kv.chunk(2, dim=1):
            attention.send(columns.contiguous())
        return torch.cat(attention.attend(q.contiguous()), dim=1)

    with ThreadPoolExecutor(size) as pool:
        found = torch.cat(list(pool.map(attend_here, range(size))))
    torch.testing.assert_close(found, attend(qkv, heads, lengths), rtol=1e-5, atol=1e-6)


def test_a_segment_without_ranks_is_whole() -> None:
    layout = layout_of((((1, 8, 8), 5),), torch.device("cpu"))
    x = torch.zeros(32, 3)
    assert layout.shared(None).images is layout.images
    assert layout.images.mine(x) is x and layout.images.whole(x) is x
