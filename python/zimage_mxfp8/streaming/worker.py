"""Workers: the open files and reusable memory of one thread of a streaming operation."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..checkpoint.output import BLOCK, AtomicFile, Writer
from ..checkpoint.source import SourceTensor, TensorReader

Bytes = npt.NDArray[np.uint8]


class Scratch:
    """Reusable memory, one piece per use."""

    def __init__(self) -> None:
        self._memory: dict[str, Bytes] = {}

    def take(self, use: str, nbytes: int, position: int = 0) -> Bytes:
        """Return memory of a size; its content lasts until the next call for the same `use`.

        Args:
            use: name of the use.
            nbytes: its size.
            position: where in the output it will be written: the memory is then aligned so that it
                can go to the disk directly.
        """
        if use not in self._memory or self._memory[use].size < nbytes + 2 * BLOCK:
            self._memory[use] = np.empty(nbytes + 2 * BLOCK, np.uint8)
        memory = self._memory[use]
        begin = (position - memory.ctypes.data) % BLOCK
        return memory[begin : begin + nbytes]


class Worker:
    """A thread's scratch memory, reader and writer.

    Attributes:
        scratch: memory for data between reading and writing.

    Args:
        output: the file to write; None where nothing is written.
    """

    def __init__(self, output: AtomicFile | None) -> None:
        self.scratch = Scratch()
        self._reader = TensorReader()
        self._output = output
        self._writer: Writer | None = None

    def read(
        self, tensor: SourceTensor, begin: int, nbytes: int, use: str = "source", position: int = 0
    ) -> Bytes:
        """Read the bytes [begin, begin + nbytes) of a tensor to scratch memory."""
        data = self.scratch.take(use, nbytes, position)
        self._reader.read_into(tensor, begin, data)
        return data

    def write(self, position: int, data: npt.NDArray[Any]) -> None:
        """Write an array's bytes at a position of the output."""
        assert self._output is not None
        if self._writer is None:
            self._writer = self._output.open()
        try:
            self._writer.write(position, data.reshape(-1).view(np.uint8))
        except OSError as error:
            raise self._output.failure(error) from None

    def flush(self) -> None:
        """Flush all written data to the output file."""
        if self._writer is not None:
            assert self._output is not None
            try:
                self._writer.flush()
            except OSError as error:
                raise self._output.failure(error) from None

    def close(self) -> None:
        """Close the files."""
        self._reader.close()
        if self._writer is not None:
            self._writer.close()
