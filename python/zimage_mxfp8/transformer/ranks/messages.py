"""What rank 0 tells the processes of the other ranks, and their answers."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from ..compute import Compute
from ..inputs import ForwardInputs


@dataclass(frozen=True)
class Load:
    """Load the transformer.

    Attributes:
        path: the checkpoint.
        state: which files it is, see `ModelFile.state`.
        device: where to.
        rank: number of the process.
        size: number of ranks.
        compute: the compute mode.
        dtype: of everything that is not 8 bits wide.
        cuda_graphs: whether to run shapes through CUDA graphs.
        store: the file in which ranks find each other.
        threads: of torch on the CPU.
        multiprocessors: of `RankGroup`.
    """

    path: Path
    state: tuple[tuple[int, ...], ...]
    device: torch.device
    rank: int
    size: int
    compute: Compute
    dtype: torch.dtype
    cuda_graphs: bool
    store: Path
    threads: int
    multiprocessors: int


@dataclass(frozen=True)
class Join:
    """Connect with the other ranks, all of which have loaded the transformer."""


@dataclass(frozen=True)
class LoadControlNet:
    """Load a ControlNet.

    Attributes:
        number: by which forwards name it.
        path: its file.
        compute: its compute mode.
    """

    number: int
    path: Path
    compute: Compute


@dataclass(frozen=True)
class ChangeAdapters:
    """Call a method of the transformer's `LoraSet`."""

    method: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Forward:
    """Compute this rank's share of a forward, whose inputs rank 0 broadcasts. No answer follows.

    Attributes:
        inputs: tensors without data, of the shapes and dtypes of those that follow.
        nets: numbers of the ControlNets.
        kept_nets: numbers of all ControlNets that are in use; others are dropped.
        scale: of the adapters' weights.
    """

    inputs: ForwardInputs
    nets: tuple[int, ...]
    kept_nets: frozenset[int]
    scale: float


@dataclass(frozen=True)
class Done:
    """The order was carried out."""


@dataclass(frozen=True)
class Failed:
    """The process ends because of an error.

    Attributes:
        error: one of this package's, or None.
        problem: a sentence.
    """

    error: Exception | None
    problem: str


def pickled(message: Any) -> bytes:
    """Return a message for `Connection.send_bytes`.

    `Connection.send` would share the memory of tensors in a way that torch registers for it.
    """
    return pickle.dumps(message)


def receive(connection: Connection) -> Any:
    """Return the next message; EOFError if the other process has ended."""
    return pickle.loads(connection.recv_bytes())


def unpack(buffer: torch.Tensor, like: ForwardInputs) -> ForwardInputs:
    """Return inputs whose memory is in a buffer of `packed_nbytes`, uint8."""
    begin = 0

    def take(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal begin
        part = buffer[begin : begin + tensor.nbytes]
        begin += _aligned(tensor.nbytes)
        return part.view(tensor.dtype).view(tensor.shape)

    return like.map(take)


def packed_nbytes(inputs: ForwardInputs) -> int:
    """Return the size of the buffer of `unpack`."""
    return sum(_aligned(tensor.nbytes) for tensor in inputs.tensors)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // 256) * 256  # as torch's allocator aligns tensors
