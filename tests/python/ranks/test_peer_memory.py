"""How ranks agree on memory of peers, and stop waiting for one that has died; without devices."""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed

import zimage_mxfp8 as zm
from zimage_mxfp8.transformer.ranks import group, peer_memory
from zimage_mxfp8.transformer.ranks.group import RankGroup
from zimage_mxfp8.transformer.ranks.peer_memory import PeerMemory

SIZE = 3
DEVICE = torch.device("cuda", 0)


class Memory:
    """Stands for the core's memory on a device."""

    def __init__(self, rank: int, nbytes: int, open_problem: str) -> None:
        self.opened: dict[int, bytes] = {}
        self.is_released = False
        self._name = f"{nbytes} bytes of rank {rank}".encode()
        self._open_problem = open_problem

    def handle(self) -> bytes:
        return self._name

    def open(self, rank: int, handle: bytes) -> None:
        if self._open_problem:
            raise zm.CudaError(self._open_problem)
        self.opened[rank] = handle

    def release(self) -> None:
        self.is_released = True


@pytest.fixture
def problems(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, int], str]:
    """Return a table of what fails: ("allocate" or "open", rank)."""
    table: dict[tuple[str, int], str] = {}

    class Buffer:
        def __init__(self, device: torch.device, rank: int, size: int, nbytes: int) -> None:
            assert (device, size) == (DEVICE, SIZE)
            if ("allocate", rank) in table:
                raise zm.CudaError(table["allocate", rank])
            self.memory, self.nbytes = Memory(rank, nbytes, table.get(("open", rank), "")), nbytes

    monkeypatch.setattr(peer_memory, "_Buffer", Buffer)
    return table


def on_all(function: Callable[[int], Any]) -> list[Any]:
    with ThreadPoolExecutor(SIZE) as pool:
        return list(pool.map(function, range(SIZE)))


def connect_all() -> list[PeerMemory | None]:
    store = torch.distributed.HashStore()
    return on_all(lambda rank: PeerMemory.connect(store, rank, SIZE, DEVICE, threading.Event()))


def test_every_rank_opens_every_other_one(problems) -> None:
    connected = connect_all()
    for rank, memory in enumerate(connected):
        assert memory is not None
        (buffer,) = memory._buffers
        others = set(range(SIZE)) - {rank}
        assert buffer.memory.opened == {
            other: f"{buffer.nbytes} bytes of rank {other}".encode() for other in others
        }


@pytest.mark.parametrize("step", ["allocate", "open"])
@pytest.mark.parametrize("rank", range(SIZE))
def test_if_one_rank_cannot_none_does(step: str, rank: int, problems) -> None:
    problems[step, rank] = "no"
    assert connect_all() == [None] * SIZE


def test_larger_tensors_get_larger_memory_and_earlier_memory_stays(problems) -> None:
    connected = connect_all()
    sizes = (5000, 5001, 8000, 100)
    for size in sizes:
        assert on_all(lambda rank, size=size: connected[rank]._reserve(size)) == [True] * SIZE
    for memory in connected:
        assert memory is not None
        found = [buffer.nbytes for buffer in memory._buffers]
        assert found[1] == 5000 and found[2] >= 7500 and len(found) < 5
        assert found[-1] >= max(sizes)
        memory.release()
        assert all(buffer.memory.is_released for buffer in memory._buffers)


def test_memory_that_was_reserved_is_enough(problems) -> None:
    connected = connect_all()

    def reserve(rank: int, rows: int) -> None:
        connected[rank].reserve(rows, (2, 3, 128), torch.bfloat16)

    for rows in (2000, 1900, 2000):
        on_all(lambda rank, rows=rows: reserve(rank, rows))
    for memory in connected:
        assert memory is not None
        assert [buffer.nbytes for buffer in memory._buffers][1:] == [2 * 2000 * 2 * 3 * 128 * 2]


def test_too_little_memory_later_names_the_cause_where_it_is(problems) -> None:
    connected = connect_all()
    problems["allocate", 1] = "out of memory"

    def gather(rank: int) -> str:
        with pytest.raises(zm.CudaError) as caught:
            connected[rank].gathering([4] * SIZE, (2, 1, 128), torch.float32, [])
        return str(caught.value)

    sentences = on_all(gather)
    causes = ["another device failed", "out of memory", "another device failed"]
    for sentence, cause in zip(sentences, causes, strict=True):
        assert sentence.startswith(f"no memory for the keys and values of all ranks: {cause}; draw")


def within_seconds(function: Callable[[], Any], then: Callable[[], None]) -> Any:
    """Return what a function returns or raises after something else has been done."""
    result: list[Any] = []

    def run() -> None:
        try:
            result.append(function())
        except RuntimeError as error:
            result.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()  # it waits
    then()
    thread.join(20)
    assert not thread.is_alive()
    return result[0]


def test_nothing_waits_for_a_rank_that_died_before_it_connected(problems) -> None:
    store, aborted = torch.distributed.HashStore(), threading.Event()
    error = within_seconds(lambda: PeerMemory.connect(store, 0, SIZE, DEVICE, aborted), aborted.set)
    assert str(error) == "another rank has ended"


def test_memory_that_comes_after_the_release_is_released(problems, monkeypatch) -> None:
    connected = connect_all()
    events = [memory._aborted for memory in connected if memory is not None]
    opened = threading.Barrier(SIZE)

    def open_and_abort(self: Memory, rank: int, handle: bytes) -> None:
        if not self.opened:
            opened.wait(20)
            for event in events:
                event.set()
        self.opened[rank] = handle

    told = PeerMemory._told_by_all

    def told_by_all(self: PeerMemory, what: str, value: bytes) -> list[bytes]:
        # As if all had told before the event was set.
        event, self._aborted = self._aborted, threading.Event()
        try:
            return told(self, what, value)
        finally:
            self._aborted = event

    monkeypatch.setattr(Memory, "open", open_and_abort)
    monkeypatch.setattr(PeerMemory, "_told_by_all", told_by_all)
    assert on_all(lambda rank: connected[rank]._reserve(10**6)) == [True] * SIZE
    assert all(memory._buffers[-1].memory.is_released for memory in connected)


class Stream:
    """Stands for a CUDA stream: all work is done at once."""

    cuda_stream = 1

    def wait_stream(self, _: Stream) -> None:
        pass

    def wait_event(self, _: object) -> None:
        pass

    def record_event(self) -> object:
        return object()


class SharedMemory:
    """Stands for the core's memory: bytes of every rank, which are written to by address."""

    def __init__(self, rank: int, of_all: list[torch.Tensor], signals: list[threading.Semaphore]):
        self._rank, self._of_all, self._signals = rank, of_all, signals

    def send(self, source, source_pitch, width, rows, offset, pitch, stream) -> None:
        for other, memory in enumerate(self._of_all):
            for row in range(rows if other != self._rank else 0):
                assert offset + row * pitch + width <= memory.nbytes
                target = memory.data_ptr() + offset + row * pitch
                ctypes.memmove(target, source + row * source_pitch, width)

    def signal(self, channel: int, stream: int) -> None:
        for _ in range(SIZE - 1):
            self._signals[channel].release()

    def wait(self, channel: int, stream: int) -> None:
        # Of both groups all have been sent before any rank takes one.
        for _ in range(SIZE - 1):
            assert self._signals[channel].acquire(timeout=20)


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("counts", [(3, 2, 4), (1, 0, 2)])
def test_every_rank_gets_the_rows_of_all(counts, in_place, at_once, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream())
    shape, total, first = (2, 5, 128), sum(counts), 64
    nbytes = first + 4 * total * math.prod(shape) + 64
    of_all = [torch.zeros(nbytes, dtype=torch.uint8) for _ in range(SIZE)]
    signals = [threading.Semaphore(0) for _ in range(2)]
    rows = torch.randn(total, *shape)
    sent = threading.Barrier(SIZE)

    def gather(rank: int) -> list[torch.Tensor]:
        begin = sum(counts[:rank])
        here = slice(begin, begin + counts[rank])
        whole = of_all[rank][first : first + rows.nbytes].view(torch.float32).view(rows.shape)
        memory: Any = SharedMemory(rank, of_all, signals)
        groups = [slice(0, 2), slice(2, 5)]
        stream: Any = Stream()
        gathering = peer_memory._Gathering(memory, whole, here, first, groups, stream)
        own = torch.randn(counts[rank], 3, *shape[1:])[:, 1:]  # a part of a wider matrix
        if in_place:
            assert gathering.own is not None
            own = gathering.own
        own.copy_(rows[here])
        for columns in [own] if at_once else own.split(1, dim=1):
            gathering.send(columns)
        sent.wait(20)
        return [part.clone() for part in gathering.groups()]

    for first_heads, others in on_all(gather):
        assert torch.equal(first_heads, rows[:, :, :2])
        assert torch.equal(others, rows[:, :, 2:])


@pytest.mark.parametrize("when", ["before", "while"])
def test_a_team_that_cannot_connect_can_be_aborted(when: str, monkeypatch) -> None:
    class Backend:
        def abort(self) -> None:
            pass

    class Buffer:
        nbytes = 1024
        memory = Memory(0, 1024, "")

        def __init__(self, *_: Any) -> None:
            pass

    monkeypatch.setattr(group, "_backend", lambda *_: Backend())
    monkeypatch.setattr(peer_memory, "_Buffer", Buffer)
    store, aborted = torch.distributed.HashStore(), threading.Event()

    def connect(rank: int) -> RankGroup:
        return RankGroup(store, rank, 4, DEVICE, aborted)

    with ThreadPoolExecutor(4) as pool:
        ranks = list(pool.map(connect, range(4)))
    if when == "before":
        ranks[0].abort()
        with pytest.raises(RuntimeError, match="another rank has ended"):
            ranks[0]._add_teams(2)
    else:
        error = within_seconds(lambda: ranks[0]._add_teams(2), ranks[0].abort)
        assert str(error) == "another rank has ended"
