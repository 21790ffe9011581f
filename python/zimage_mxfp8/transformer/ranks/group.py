"""The exchange of tensors between ranks, through torch.distributed and memory of peers."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from .gathering import Gathering
from .peer_memory import PeerMemory

_c10d: Any = torch.distributed  # its classes are public, its type stubs incomplete
_TIMEOUT = timedelta(minutes=10)  # of one exchange on the CPU: ranks wait for the slowest
_SECONDS_BETWEEN_LOOKS = 0.0002  # at an exchange on the CPU
_SECONDS_TO_ABORT = 0.5  # longer than NCCL takes to begin
# Of torch's NCCL groups, read when one is made. Threads that watch a group then neither end the
# whole program after an error, nor look for each other's errors in the store: a file store waits
# five minutes for its file, and this package removes the file before the group is gone.
_NCCL_ENVIRONMENT = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
}


class RankGroup:
    """Some of a model's ranks, which exchange tensors among themselves.

    Every rank must make the same calls in the same order. The group is none of torch's default
    world, which belongs to the program that uses this package.

    Attributes:
        rank: number of this process in the group.
        size: number of ranks.
        multiprocessors: of the smallest device; 1 on CPUs.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        size: int,
        device: torch.device,
        aborted: threading.Event,
        multiprocessors: int = 1,
        name: str = "all",
    ) -> None:
        """Connect with the other ranks.

        Args:
            store: a store of torch.distributed that all ranks reach.
            rank: number of this process.
            size: number of ranks.
            device: of the tensors; NCCL and memory of peers are used for CUDA devices, gloo for the
                CPU.
            aborted: set to end the group, also while it connects.
            multiprocessors: of the smallest device of all ranks.
            name: of the group in the store.

        Raises:
            RuntimeError: it was aborted while it waited for the others.
        """
        self.rank = rank
        self.size = size
        self.multiprocessors = multiprocessors
        self._store = store
        self._device = device
        own_store = _c10d.PrefixStore(name, store)
        self._backend = _backend(own_store, rank, size, device)
        self._teams: dict[int, RankGroup] = {}
        self._aborted = aborted
        self._lock = threading.RLock()  # `abort` may come from a finalizer at any time
        self._aborter = _Aborter(self._backend) if device.type == "cuda" else None
        self._peers: PeerMemory | None = None
        if device.type == "cuda":
            memory_store = _c10d.PrefixStore("memory", own_store)
            try:
                self._peers = PeerMemory.connect(memory_store, rank, size, device, aborted)
            except BaseException:
                self.abort()
                raise

    @classmethod
    def connect(
        cls,
        store: Path,
        rank: int,
        size: int,
        device: torch.device,
        aborted: threading.Event,
        multiprocessors: int = 1,
    ) -> RankGroup:
        """Return the group of all ranks, as soon as all have called this with the same file."""
        found = _c10d.FileStore(str(store), size)
        group = cls(found, rank, size, device, aborted, multiprocessors)
        try:
            # NCCL connects with the first exchange.
            group.broadcast_(torch.zeros(1, device=device))
            # Now, not when a forward needs them: whoever calls this can stop waiting.
            for count in range(2, size):
                if size % count == 0:
                    group._add_teams(count)
        except BaseException:
            group.abort()
            raise
        return group

    def team(self, count: int) -> RankGroup | None:
        """Return this rank's team of `count` teams of as many consecutive ranks each.

        Args:
            count: a divisor of the number of ranks.

        Returns:
            None if the team has only one rank, which has nobody to exchange with.
        """
        if count == 1:
            return self
        return None if count == self.size else self._teams[count]

    def _add_teams(self, count: int) -> None:
        members = self.size // count
        team, rank = divmod(self.rank, members)
        name = f"team {team} of {count}"
        made = RankGroup(
            self._store, rank, members, self._device, self._aborted, self.multiprocessors, name
        )
        with self._lock:
            self._teams[count] = made
        if self._aborted.is_set():
            made.abort()

    @property
    def reaches_peers(self) -> bool:
        """Whether devices write to each other's memory."""
        return self._peers is not None

    def exchange(
        self, x: torch.Tensor, sent: Sequence[int], received: Sequence[int]
    ) -> torch.Tensor:
        """Send a part of x to each rank, and return what each rank sent, in order.

        Args:
            x: [elements], contiguous.
            sent: elements for each rank.
            received: elements from each rank.
        """
        out = x.new_empty(sum(received))
        size = x.itemsize  # as bytes, because gloo does not know every dtype
        work = self._backend.alltoall_base(
            out.view(torch.uint8),
            x.view(torch.uint8),
            [count * size for count in received],
            [count * size for count in sent],
        )
        self._finish(work)
        return out

    def reserve(self, rows: int, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        """Have memory for `gathering` of so many rows of all ranks, if it takes any."""
        if self._peers is not None:
            self._peers.reserve(rows, shape, dtype)

    def gathering(
        self,
        counts: Sequence[int],
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        groups: Sequence[slice],
    ) -> Gathering:
        """Prepare to gather rows, through the memory of peers if devices can write to it.

        Args:
            counts: number of rows of each rank.
            shape: of a row, [n, heads, width].
            dtype: of the elements.
            groups: of heads, in the order in which they are gathered.

        Returns:
            What sends and gathers them, to be used before the next one.
        """
        if self._peers is not None:
            return self._peers.gathering(counts, shape, dtype, groups)
        return _Exchanged(self, counts, groups)

    def whole(self, rows: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """Return the rows of all ranks, on every rank.

        Args:
            rows: [counts[rank], C] of this rank.
            counts: number of rows of each rank.
        """
        columns = rows.shape[1]
        copies = rows.expand(self.size, -1, -1).flatten()
        received = [count * columns for count in counts]
        return self.exchange(copies, [rows.numel()] * self.size, received).view(-1, columns)

    def collect(self, rows: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """Return the rows of all ranks on rank 0, and none on the others.

        Args:
            rows: [counts[rank], C] of this rank.
            counts: number of rows of each rank.
        """
        columns = rows.shape[1]
        sent = [rows.numel()] + [0] * (self.size - 1)
        received = [count * columns * (self.rank == 0) for count in counts]
        return self.exchange(rows.flatten(), sent, received).view(-1, columns)

    def broadcast_(self, x: torch.Tensor) -> None:
        """Replace x on every rank by rank 0's."""
        self._finish(self._backend.broadcast([x]))

    def _finish(self, work: Any) -> None:
        # On CUDA devices it is the stream that waits. On the CPU `wait` would keep Ctrl-C from
        # Python, for minutes if another rank has stopped.
        while self._device.type != "cuda" and not work.is_completed():
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        work.wait()

    def abort(self, seconds: float = _SECONDS_TO_ABORT) -> None:
        """End exchanges that wait for a rank that has died, on this rank.

        Exchanges have begun to end when this returns. Those of NCCL end completely when no graph
        holds them. Gloo notices by itself, and nothing is done for it.

        Args:
            seconds: to wait at most until they have ended completely.
        """
        if self._aborter is None:
            return
        self._aborted.set()
        with self._lock:
            groups = [self, *self._teams.values()]
        for group in groups:
            if group._peers is not None:
                group._peers.release()
        aborters = {group._aborter for group in groups if group._aborter is not None}
        for aborter in aborters:
            aborter.asked.put(None)
        latest = time.monotonic() + seconds
        for aborter in aborters:
            if aborter.thread is not threading.current_thread():
                aborter.thread.join(max(0.0, latest - time.monotonic()))


class _Exchanged:
    """A `Gathering` by the backend, each group when its turn comes."""

    def __init__(self, group: RankGroup, counts: Sequence[int], groups: Sequence[slice]) -> None:
        self.own = None
        self._group = group
        self._counts = counts
        self._groups = groups
        self._columns: list[torch.Tensor] = []

    def send(self, columns: torch.Tensor) -> None:
        self._columns.append(columns)

    def groups(self) -> Iterator[torch.Tensor]:
        for group in self._groups:
            part = torch.cat([columns[:, :, group] for columns in self._columns], dim=1)
            whole = self._group.whole(part.flatten(1), self._counts)
            yield whole.unflatten(1, part.shape[1:])


class _Aborter:
    """Aborts a NCCL group when asked, in a thread of its own.

    Aborting may wait until no graph holds an exchange of the group. The thread is there from the
    beginning, because at the end of a program none can be started.
    """

    def __init__(self, backend: Any) -> None:
        # Unlike an event, it may be used by a finalizer that interrupts its own use.
        self.asked: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, args=[self.asked, backend], daemon=True)
        self.thread.start()

    @staticmethod
    def _run(asked: queue.SimpleQueue[None], backend: Any) -> None:
        asked.get()
        backend.abort()


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _backend(store: Any, rank: int, size: int, device: torch.device) -> Any:
    if device.type == "cuda":
        with _environment(_NCCL_ENVIRONMENT):
            return _c10d.ProcessGroupNCCL(store, rank, size, _c10d.ProcessGroupNCCL.Options())
    gloo = _c10d.ProcessGroupGloo._Options()
    # By default gloo looks up the machine's name, which needs not be an address of this machine.
    gloo._devices = [_c10d.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    gloo._timeout = _TIMEOUT
    return _c10d.ProcessGroupGloo(store, rank, size, gloo)
