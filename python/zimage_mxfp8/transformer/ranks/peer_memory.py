"""Memory on each CUDA device of a group that the other ranks write to.

It is torch's symmetric memory, whose copies between devices take no multiprocessor. Its multicast
stays off: what it would save is little, and where it fails it takes the whole machine's NVLink with
it.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed

from .environment import environment

_NO_MULTICAST = {"TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
_ALIGNMENT = 512  # bytes
_WIDE = torch.complex128  # of 16 bytes, which torch copies faster than the same in small elements
_SECONDS_BETWEEN_LOOKS = 0.001
_SECONDS_OF_REST = 0.5  # longer than the device works between two exchanges


class PeerMemory:
    """Gathers tensors of all ranks of a group, each while the one before is used."""

    def __init__(self, name: str, rank: int, size: int, device: torch.device) -> None:
        """Take part in a group that `connect` has made."""
        self._name = name
        self._rank = rank
        self._size = size
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._sets: list[_Set] = []
        self._turn = 0
        # Kept for as long as this: graphs may write to them.
        self._smaller_sets: list[_Set] = []

    @classmethod
    def connect(cls, store: Any, rank: int, size: int, device: torch.device) -> PeerMemory | None:
        """Connect with the other ranks, which must call this too.

        Args:
            store: a store of torch.distributed that only these ranks use.
            rank: number of this process.
            size: number of ranks.
            device: of this process, a CUDA device.

        Returns:
            None, on every rank, if a device cannot write to the memory of another one.
        """
        indices = [int(each) for each in _told_by_all(store, "device", rank, size, device.index)]
        reached = all(
            torch.cuda.can_device_access_peer(device, index)
            for index in indices
            if index != device.index
        )
        if not _agreed(store, "reached", rank, size, reached):
            return None
        name = _told_by_all(store, "name", rank, size, uuid.uuid4())[0]
        memory: PeerMemory | None = None
        try:
            _symmetric_memory().set_group_info(name, rank, size, store)
            memory = cls(name, rank, size, device)
            memory._reserve(_ALIGNMENT)
            # Also because CUDA may wait for the device when it loads the kernels of this call.
            memory._write_signals(own=0, of_others=0)
            torch.cuda.synchronize(device)
        except (AttributeError, RuntimeError):  # torch is too old, or the system forbids it
            memory = None
        if not _agreed(store, "connected", rank, size, memory is not None) or memory is None:
            return None
        memory._sets[0].handle.barrier()
        torch.cuda.synchronize(device)
        return memory

    def gather_each(
        self, parts: Sequence[torch.Tensor], counts: Sequence[int]
    ) -> Iterator[torch.Tensor]:
        """Gather the rows of all ranks, of one tensor after another.

        Args:
            parts: [counts[rank], ...] of this rank, with columns of a multiple of 16 bytes.
            counts: number of rows of each rank.

        Yields:
            [sum(counts), ...] of each part, on the current stream. They are valid until the call
            after the next.
        """
        rows, begin = sum(counts), sum(counts[: self._rank])
        shapes = [(rows, *part.shape[1:]) for part in parts]
        nbytes = [
            math.prod(shape) * part.itemsize for shape, part in zip(shapes, parts, strict=True)
        ]
        offsets = [0]
        for each in nbytes:
            offsets.append(offsets[-1] + -(-each // _ALIGNMENT) * _ALIGNMENT)
        self._reserve(offsets[-1])
        # With two sets in turns, none is written to that is still read: a rank that has gathered
        # once more than another one waits for it there.
        self._turn = 1 - self._turn
        memory = self._sets[self._turn]
        current = torch.cuda.current_stream(self._device)
        arrivals = []
        for part, shape, offset in zip(parts, shapes, offsets[:-1], strict=True):
            views = [
                memory.view(rank, shape, part.dtype, offset)[begin : begin + counts[self._rank]]
                for rank in range(self._size)
            ]
            own = views[self._rank]
            if part.numel():
                own.view(_WIDE).copy_(part.view(_WIDE))
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                for step in range(1, self._size):
                    views[(self._rank + step) % self._size].copy_(own)
                memory.handle.barrier()
                arrivals.append(self._stream.record_event())
        for part, shape, offset, arrival in zip(parts, shapes, offsets[:-1], arrivals, strict=True):
            current.wait_event(arrival)
            yield memory.view(self._rank, shape, part.dtype, offset)

    def release(self) -> None:
        """Let work of this device go on that waits for a rank which has died."""
        stream = torch.cuda.Stream(self._device)
        with torch.cuda.device(self._device), torch.cuda.stream(stream):
            latest = time.monotonic() + _SECONDS_OF_REST
            while time.monotonic() < latest:
                if self._write_signals(own=1, of_others=0):
                    latest = time.monotonic() + _SECONDS_OF_REST
                time.sleep(_SECONDS_BETWEEN_LOOKS)

    def _write_signals(self, *, own: int, of_others: int) -> bool:
        """Write the signals for which barriers wait; return whether they had other values.

        A barrier sets this rank's signal at each other rank, as soon as it is 0, and then waits for
        the other rank's signal here, and resets it.
        """
        changed = False
        for memory in (*self._sets, *self._smaller_sets):
            for rank in range(self._size):
                if rank == self._rank:
                    continue
                for place, index, value in (
                    (self._rank, rank, own),
                    (rank, self._rank, of_others),
                ):
                    signal = memory.handle.get_signal_pad(place, (self._size,), torch.int32)[index]
                    changed |= int(signal) != value
                    signal.fill_(value)
        return changed

    def _reserve(self, nbytes: int) -> None:
        """Have two sets of so many bytes, on all ranks."""
        if self._sets and self._sets[0].nbytes >= nbytes:
            return
        self._smaller_sets += self._sets
        self._sets = [_Set(self._name, nbytes, self._device) for _ in range(2)]


class _Set:
    """A buffer on each rank.

    Attributes:
        nbytes: of each buffer.
        handle: torch's, with the buffers of all ranks.
    """

    def __init__(self, name: str, nbytes: int, device: torch.device) -> None:
        symmetric_memory = _symmetric_memory()
        self.nbytes = nbytes
        with environment(_NO_MULTICAST):
            self._own = symmetric_memory.empty_strided_p2p(
                (nbytes,), (1,), torch.uint8, device, name
            )
            self.handle = symmetric_memory.rendezvous(self._own, name)

    def view(
        self, rank: int, shape: tuple[int, ...], dtype: torch.dtype, offset: int
    ) -> torch.Tensor:
        """Return a tensor at so many bytes from the begin of a rank's buffer."""
        view: torch.Tensor = self.handle.get_buffer(rank, shape, dtype, offset // dtype.itemsize)
        return view


def _symmetric_memory() -> Any:
    return torch._C._distributed_c10d._SymmetricMemory


def _told_by_all(store: Any, what: str, rank: int, size: int, told: object) -> list[str]:
    store.set(f"{what} of {rank}", str(told))
    return [store.get(f"{what} of {i}").decode() for i in range(size)]


def _agreed(store: Any, what: str, rank: int, size: int, agrees: bool) -> bool:
    return set(_told_by_all(store, what, rank, size, agrees)) == {"True"}
