"""Memory on each CUDA device of a group that the other ranks write to."""

from __future__ import annotations

import functools
import math
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ... import _core
from ...errors import CudaError, Error
from .gathering import Gathering

_ALIGNMENT = 512  # bytes
_SECONDS_BETWEEN_LOOKS = 0.001
_WIDE = torch.complex128  # of 16 bytes, which torch copies faster than the same in small elements


class PeerMemory:
    """Gathers rows of all ranks of a group, a part of them while the one before is used."""

    def __init__(
        self, store: Any, rank: int, size: int, device: torch.device, aborted: threading.Event
    ) -> None:
        """Take part in a group; see `connect`."""
        self._store = store
        self._rank = rank
        self._size = size
        self._device = device
        self._aborted = aborted
        self._buffers: list[_Buffer] = []  # graphs write to earlier ones too
        self._turn = 0
        self._problem: Error | None = None

    @classmethod
    def connect(
        cls, store: Any, rank: int, size: int, device: torch.device, aborted: threading.Event
    ) -> PeerMemory | None:
        """Connect with the other ranks, which must call this too.

        Args:
            store: a store of torch.distributed that these ranks use for nothing else.
            rank: number of this process.
            size: number of ranks.
            device: of this process, a CUDA device.
            aborted: set when a rank has died, so that nothing waits for it.

        Returns:
            None, on every rank, if a device cannot write to the memory of another one.

        Raises:
            RuntimeError: a rank has died.
        """
        memory = cls(store, rank, size, device, aborted)
        return memory if memory._reserve(2 * _ALIGNMENT) else None

    def reserve(self, rows: int, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        """Have memory for `gathering` of so many rows of all ranks.

        Raises:
            CudaError: a device has no memory for them.
            RuntimeError: a rank has died.
        """
        # Twice: `gathering` takes the halves in turns.
        if self._reserve(2 * _aligned(rows * math.prod(shape) * dtype.itemsize)):
            return
        cause = "another device failed" if self._problem is None else str(self._problem)
        raise CudaError(
            f"no memory for the keys and values of all ranks: {cause}",
            "draw a smaller image, or use one device",
        ) from self._problem

    def gathering(
        self,
        counts: Sequence[int],
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        groups: Sequence[slice],
    ) -> Gathering:
        """Prepare to gather rows.

        Args:
            counts: number of rows of each rank.
            shape: of a row, [n, heads, width], such as keys and values; a head has whole 16 bytes.
            dtype: of the elements.
            groups: of heads, in the order in which they are gathered.

        Returns:
            What sends and gathers them, to be used before the next one.

        Raises:
            CudaError, RuntimeError: see `reserve`.
        """
        rows, begin = sum(counts), sum(counts[: self._rank])
        self.reserve(rows, shape, dtype)
        buffer = self._buffers[-1]
        # With the halves of the memory in turns, none is written to that is still read: a rank that
        # has gathered once more than another one waits for it there. Between two forwards, whose
        # last and first call may take the same half, all ranks wait for each other anyway.
        self._turn = 1 - self._turn
        offset = self._turn * (buffer.nbytes // 2)
        whole = buffer.view(offset, (rows, *shape), dtype)
        here = slice(begin, begin + counts[self._rank])
        return _Gathering(buffer.memory, whole, here, offset, groups, self._copying)

    def release(self) -> None:
        """Let work of this device go on that waits for a rank which has died.

        `aborted` is set before.
        """
        for buffer in self._buffers:
            buffer.memory.release()

    @functools.cached_property
    def _copying(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self._device)  # one, as two gained nothing on an H200

    def _reserve(self, nbytes: int) -> bool:
        """Have a buffer of so many bytes on every rank; return whether all have it."""
        if self._buffers:
            largest = self._buffers[-1].nbytes
            if largest >= nbytes:
                return True
            nbytes = max(nbytes, _aligned(largest + largest // 2))  # each size once is too often
        buffer: _Buffer | None = None
        handle = b""
        try:
            buffer = self._allocate(nbytes)
            handle = buffer.memory.handle()
        except Error as error:  # no memory, or no interprocess communication
            self._problem = error
        handles = self._told_by_all("handle", handle)
        is_open = buffer is not None and all(handles)
        try:
            if buffer is not None and is_open:
                for other, each in enumerate(handles):
                    if other != self._rank:
                        buffer.memory.open(other, each)
        except Error as error:  # not a peer
            self._problem, is_open = error, False
        # Until all have told this, none frees its memory.
        all_have_it = all(self._told_by_all("open", b"1" if is_open else b""))
        if buffer is None or not all_have_it:
            return False
        self._buffers.append(buffer)
        if self._aborted.is_set():  # `release` may have come before
            buffer.memory.release()
        return True

    def _allocate(self, nbytes: int) -> _Buffer:
        try:
            return _Buffer(self._device, self._rank, self._size, nbytes)
        except Error:
            torch.cuda.empty_cache()
            return _Buffer(self._device, self._rank, self._size, nbytes)

    def _told_by_all(self, what: str, told: bytes) -> list[bytes]:
        """Tell all ranks something, and return what each tells."""
        keys = [f"{what} {len(self._buffers)} of {rank}" for rank in range(self._size)]
        self._store.set(keys[self._rank], "=" + told.hex())  # stores take no empty values
        # Not by `wait`, which would wait for minutes for a rank that has died.
        while not self._store.check(keys):
            if self._aborted.is_set():
                raise RuntimeError("another rank has ended")
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        return [bytes.fromhex(self._store.get(key).decode()[1:]) for key in keys]


class _Gathering:
    """A `Gathering` in memory that other ranks write to."""

    def __init__(
        self,
        memory: _core.PeerMemory,
        whole: torch.Tensor,
        here: slice,
        offset: int,
        groups: Sequence[slice],
        copying: torch.cuda.Stream,
    ) -> None:
        """Take memory.

        Args:
            memory: the core's.
            whole: rows of all ranks in it.
            here: those of this rank.
            offset: of the first row in the memory, in bytes.
            groups: of heads.
            copying: the stream to send on.
        """
        self._memory = memory
        self._whole = whole
        self._own = whole[here]
        self._offset = offset + here.start * whole.stride(0) * whole.itemsize
        self._heads = groups
        self._copying = copying
        self._given: list[tuple[slice, torch.Tensor]] = []  # which columns, and the columns
        self._sent: list[torch.cuda.Event] = []  # of each group

    @property
    def own(self) -> torch.Tensor | None:
        return self._own

    def send(self, columns: torch.Tensor) -> None:
        # Columns are in use until the last event, which the caller's stream waits for. After an
        # error the ranks end, so that it does not matter what is sent then.
        self._copying.wait_stream(torch.cuda.current_stream(columns.device))
        begin = self._given[-1][0].stop if self._given else 0
        which = slice(begin, begin + columns.shape[1])
        self._given.append((which, columns))
        first, *others = self._heads
        self._send(which, columns, first)
        if which.stop < self._whole.shape[1]:
            return
        self._signal()
        for heads in others:
            for given in self._given:
                self._send(*given, heads)
            self._signal()

    def _send(self, which: slice, columns: torch.Tensor, heads: slice) -> None:
        part, target = columns[:, :, heads], self._whole[:, which, heads]
        size = columns.itemsize
        for i, column in enumerate(part.unbind(1), which.start):
            self._memory.send(
                column.data_ptr(),
                columns.stride(0) * size,
                math.prod(column.shape[1:]) * size,
                len(columns),
                self._offset + (i * target.stride(1) + heads.start * target.stride(2)) * size,
                target.stride(0) * size,
                self._copying.cuda_stream,
            )

    def _signal(self) -> None:
        self._memory.signal(len(self._sent), self._copying.cuda_stream)
        self._sent.append(self._copying.record_event())

    def groups(self) -> Iterator[torch.Tensor]:
        # Here there is time, while rows of the others are on their way.
        for which, columns in self._given:
            own = self._own[:, which]
            if columns.numel() and columns.data_ptr() != own.data_ptr():
                own.view(_WIDE).copy_(columns.view(_WIDE))
        for channel, (heads, event) in enumerate(zip(self._heads, self._sent, strict=True)):
            # The kernel that waits is not on the other stream, where it would find no
            # multiprocessor until those of the queries are free.
            stream = torch.cuda.current_stream(self._whole.device)
            stream.wait_event(event)
            self._memory.wait(channel, stream.cuda_stream)
            yield self._whole[:, :, heads]


class _Buffer:
    """Memory of the core, of this rank and opened of the others.

    Attributes:
        memory: the core's.
        nbytes: of each rank.
    """

    def __init__(self, device: torch.device, rank: int, size: int, nbytes: int) -> None:
        assert device.index is not None
        self.memory = _core.PeerMemory(device.index, rank, size, nbytes)
        self.nbytes = nbytes
        with torch.inference_mode(False):  # tensors of that mode cannot be written to outside it
            self._bytes = torch.as_tensor(_CudaArray(self.memory, nbytes), device=device)

    def view(self, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor at so many bytes from the beginning of this rank's memory."""
        nbytes = math.prod(shape) * dtype.itemsize
        return self._bytes[offset : offset + nbytes].view(dtype).view(*shape)


class _CudaArray:
    """Device memory as other libraries take it (CUDA array interface, version 3)."""

    def __init__(self, memory: _core.PeerMemory, nbytes: int) -> None:
        self._memory = memory  # which lives as long as a tensor of it
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (memory.address(), False),
            "version": 3,
        }


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
