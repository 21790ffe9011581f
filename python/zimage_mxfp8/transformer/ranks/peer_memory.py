"""Memory on each CUDA device of a group that the other ranks write to."""

from __future__ import annotations

import functools
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ... import _core
from ...errors import CudaError, Error

_ALIGNMENT = 512  # bytes
_SECONDS_BETWEEN_LOOKS = 0.001
_WIDE = torch.complex128  # of 16 bytes, which torch copies faster than the same in small elements


class PeerMemory:
    """Gathers tensors of all ranks of a group, each while the one before is used."""

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

    def gather_each(
        self, parts: Sequence[torch.Tensor], counts: Sequence[int]
    ) -> Iterator[torch.Tensor]:
        """Begin to gather the rows of all ranks, of one tensor after another.

        Args:
            parts: [counts[rank], n, ...] of this rank, such as keys and values, all of a dtype.
                From the third dimension on they are contiguous, in whole 16 bytes.
            counts: number of rows of each rank.

        Returns:
            [sum(counts), n, ...] of each part, for work that the current stream is given before the
            next call.

        Raises:
            CudaError: a device has no memory for them.
            RuntimeError: a rank has died.
        """
        rows, begin = sum(counts), sum(counts[: self._rank])
        shapes = [(rows, *part.shape[1:]) for part in parts]
        sizes = [_aligned(math.prod(shape) * parts[0].itemsize) for shape in shapes]
        if not self._reserve(2 * sum(sizes)):
            cause = "another device failed" if self._problem is None else str(self._problem)
            raise CudaError(
                f"no memory for the keys and values of all ranks: {cause}",
                "draw a smaller image, or use one device",
            ) from self._problem
        buffer = self._buffers[-1]
        # With the halves of the memory in turns, none is written to that is still read: a rank that
        # has gathered once more than another one waits for it there. Between two forwards, whose
        # last and first call may take the same half, all ranks wait for each other anyway.
        self._turn = 1 - self._turn
        offset = self._turn * (buffer.nbytes // 2)
        # The parts are in use until the last event, which the caller's stream waits for. After an
        # error the ranks end, so that it does not matter what is sent then.
        self._copying.wait_stream(torch.cuda.current_stream(self._device))
        arrivals: list[_Arrival] = []
        for part, shape, nbytes in zip(parts, shapes, sizes, strict=True):
            whole = buffer.view(offset, shape, part.dtype)
            copy_own = partial(_copy, part, whole[begin : begin + counts[self._rank]])
            row_nbytes = math.prod(shape[1:]) * part.itemsize
            self._send(buffer, part, offset + begin * row_nbytes)
            if arrivals:
                with torch.cuda.stream(self._copying):
                    copy_own()
            arrivals.append(_Arrival(whole, copy_own, self._copying.record_event()))
            offset += nbytes
        return self._in_turn(arrivals)

    def _send(self, buffer: _Buffer, part: torch.Tensor, offset: int) -> None:
        """Send a part to all other ranks, then wait for theirs, on the stream for it."""
        stream = self._copying.cuda_stream
        columns, width = part.shape[1], math.prod(part.shape[2:]) * part.itemsize
        for i, column in enumerate(part.unbind(1)):
            buffer.memory.send(
                column.data_ptr(),
                part.stride(0) * part.itemsize,
                width,
                len(part),
                offset + i * width,
                columns * width,
                stream,
            )
        buffer.memory.barrier(stream)

    def _in_turn(self, arrivals: Sequence[_Arrival]) -> Iterator[torch.Tensor]:
        # This rank's rows of the first part are copied as late as here, where there is time while
        # the others' are on their way; those of the other parts have been.
        arrivals[0].copy_own()
        for arrival in arrivals:
            torch.cuda.current_stream(self._device).wait_event(arrival.event)
            yield arrival.whole

    def release(self) -> None:
        """Let work of this device go on that waits for a rank which has died.

        `aborted` is set before.
        """
        for buffer in self._buffers:
            buffer.memory.release()

    @functools.cached_property
    def _copying(self) -> torch.cuda.Stream:
        # One, as two gained nothing on an H200. Of high priority, so that signals do not wait for
        # the end of a long kernel's blocks.
        return torch.cuda.Stream(self._device, priority=-1)

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


@dataclass(frozen=True)
class _Arrival:
    """A part that is gathered.

    Attributes:
        whole: the rows of all ranks.
        copy_own: copies this rank's rows there.
        event: when those of the other ranks have arrived.
    """

    whole: torch.Tensor
    copy_own: Callable[[], None]
    event: torch.cuda.Event


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


def _copy(source: torch.Tensor, target: torch.Tensor) -> None:
    if source.numel():
        target.view(_WIDE).copy_(source.view(_WIDE))


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
