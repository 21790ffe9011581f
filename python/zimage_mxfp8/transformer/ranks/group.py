"""The exchange of tensors between ranks, through torch.distributed."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed

_c10d: Any = torch.distributed  # its classes are public, its type stubs incomplete
_TIMEOUT = timedelta(minutes=10)  # of one exchange on the CPU: ranks wait for the slowest
_NCCL_ERRORS = "TORCH_NCCL_ASYNC_ERROR_HANDLING"


class RankGroup:
    """Some of a model's ranks, which exchange tensors among themselves.

    Every rank must make the same calls in the same order. The group is none of torch's default
    world, which belongs to the program that uses this package.

    Attributes:
        rank: number of this process in the group.
        size: number of ranks.
    """

    def __init__(
        self, store: Any, rank: int, size: int, device: torch.device, name: str = "all"
    ) -> None:
        """Connect with the other ranks.

        Args:
            store: a store of torch.distributed that all ranks reach.
            rank: number of this process.
            size: number of ranks.
            device: of the tensors; NCCL is used for CUDA devices, gloo for the CPU.
            name: of the group in the store.
        """
        self.rank = rank
        self.size = size
        self._store = store
        self._device = device
        self._backend = _backend(_c10d.PrefixStore(name, store), rank, size, device)
        self._teams: dict[int, RankGroup | None] = {}

    @classmethod
    def connect(cls, store: Path, rank: int, size: int, device: torch.device) -> RankGroup:
        """Return the group of all ranks, as soon as all have called this with the same file."""
        group = cls(_c10d.FileStore(str(store), size), rank, size, device)
        group.broadcast_(torch.zeros(1, device=device))  # NCCL connects with the first exchange
        return group

    def team(self, count: int) -> RankGroup | None:
        """Return this rank's team of `count` teams of as many consecutive ranks each.

        Returns:
            None if the team has only one rank, which has nobody to exchange with.
        """
        if count not in self._teams:
            members = self.size // count
            team, rank = divmod(self.rank, members)
            name = f"team {team} of {count}"
            self._teams[count] = (
                self
                if count == 1
                else RankGroup(self._store, rank, members, self._device, name)
                if members > 1
                else None
            )
        return self._teams[count]

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
        work.wait()
        return out

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
        self._backend.broadcast([x]).wait()

    def abort(self) -> None:
        """End exchanges that wait for a rank that has died, on this rank.

        This returns before they have ended. Gloo notices by itself, and nothing is done for it.
        """
        if self._device.type != "cuda":
            return
        teams = [team for team in list(self._teams.values()) if team is not None]
        for backend in {id(each): each for each in (self, *teams)}.values():
            # Each may wait until no graph holds its exchanges.
            threading.Thread(target=backend._backend.abort, daemon=True).start()


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _backend(store: Any, rank: int, size: int, device: torch.device) -> Any:
    if device.type == "cuda":
        with _environment(_NCCL_ERRORS, "0"):  # else an error ends the whole program
            return _c10d.ProcessGroupNCCL(store, rank, size, _c10d.ProcessGroupNCCL.Options())
    gloo = _c10d.ProcessGroupGloo._Options()
    # By default gloo looks up the machine's name, which needs not be an address of this machine.
    gloo._devices = [_c10d.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    gloo._timeout = _TIMEOUT
    return _c10d.ProcessGroupGloo(store, rank, size, gloo)
