"""Checkpoints to read: a safetensors file, or a diffusers folder with shards."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..dtypes import SAFETENSORS_BITS
from ..errors import CheckpointError, remedy
from .foreign_files import check_file, no_weights
from .header import read_header, unreadable

_DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
_HASH_CHUNK = 8 << 20
_DIFFUSERS_INDEX = _DIFFUSERS_WEIGHTS + ".index.json"


@dataclass(frozen=True)
class Segment:
    """Consecutive bytes of a file."""

    path: Path
    begin: int
    nbytes: int


@dataclass(frozen=True)
class SourceTensor:
    """A tensor to read. Its bytes are those of `segments`, one after another."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    segments: tuple[Segment, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return sum(segment.nbytes for segment in self.segments)

    @property
    def stored(self) -> SourceTensor:
        """The tensor as the file has it."""
        return self

    def rows(self, name: str, begin: int, end: int) -> SourceTensor:
        """Return rows [begin, end) as a tensor of another name, at the same place in the file."""
        row_bytes = self.nbytes // self.shape[0]
        pieces = _pieces(self, begin * row_bytes, (end - begin) * row_bytes)
        shape = (end - begin, *self.shape[1:])
        return SourceTensor(name, self.dtype, shape, tuple(Segment(*piece) for piece in pieces))


@dataclass(frozen=True)
class ComputedTensor(SourceTensor):
    """A tensor that is computed from one in a file, whenever rows of it are read.

    `segments` are those of the tensor in the file.

    Attributes:
        origin: the tensor in the file, of the same shape.
        block: the number of rows that are computed at once, from multiples of it on, so that the
            result does not depend on which rows are read together.
        compute: returns the bytes of rows [begin, end).
    """

    origin: SourceTensor
    block: int
    compute: Callable[[TensorReader, int, int], npt.NDArray[np.uint8]]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data in its own dtype."""
        return math.prod(self.shape) * SAFETENSORS_BITS[self.dtype] // 8

    @property
    def stored(self) -> SourceTensor:
        """The tensor as the file has it."""
        return self.origin

    def read_into(self, reader: TensorReader, begin: int, target: npt.NDArray[np.uint8]) -> None:
        """Compute the bytes [begin, begin + target.size)."""
        rows, end = self.shape[0], begin + target.size
        row_bytes = self.nbytes // rows
        first = begin // row_bytes // self.block * self.block
        for row in range(first, -(-end // row_bytes), self.block):
            data = self.compute(reader, row, min(row + self.block, rows))
            at = row * row_bytes
            low, high = max(begin, at), min(end, at + data.size)
            target[low - begin : high - begin] = data[low - at : high - at]


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name, and the metadata of the file (or of all shards).

    Attributes:
        path: the file or the folder that was named.
        files: the safetensors files that it consists of.
        index: the index.json that names them, for a folder with shards.
    """

    path: Path
    tensors: dict[str, SourceTensor]
    metadata: dict[str, str]
    files: tuple[Path, ...]
    index: Path | None = None

    @property
    def inputs(self) -> tuple[Path, ...]:
        """All files that were or will be read; no output may replace them."""
        return (self.path, *self.files, *([self.index] if self.index else []))

    @property
    def is_folder(self) -> bool:
        """Whether a folder was named, which ComfyUI does not load."""
        return self.path not in self.files

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in the files."""
        return sum(tensor.stored.nbytes for tensor in self.tensors.values())


def open_checkpoint(path: Path) -> Checkpoint:
    """Read the header(s) of a safetensors file or of a diffusers folder.

    A folder is a transformer folder (shards with `diffusion_pytorch_model.safetensors.index.json`,
    or a single `diffusion_pytorch_model.safetensors`) or has one called `transformer`.

    Raises:
        CheckpointError: unreadable, malformed, incomplete, or without any tensor; a
            `WrongKindError` for a known kind of file that is not safetensors.
    """
    try:
        shards, index = _folder_shards(path) if path.is_dir() else ({path: None}, None)
    except OSError as error:  # a folder without permission
        raise unreadable(path, error) from None
    tensors: dict[str, SourceTensor] = {}
    metadata: dict[str, str] = {}
    for file, expected in shards.items():
        try:
            check_file(file)
        except OSError as error:
            raise unreadable(file, error) from None
        header = read_header(file)
        for name in sorted(expected or ()):
            if name not in header.tensors:
                raise CheckpointError(
                    f'{file} lacks tensor "{name}", which the index of {path} puts there; '
                    "download both again"
                )
        for name, info in header.tensors.items():
            if name in tensors:
                raise CheckpointError(
                    f'{file} has tensor "{name}", which is also in '
                    f"{tensors[name].segments[0].path}; download the folder again"
                )
            segment = Segment(file, info.begin, info.nbytes)
            tensors[name] = SourceTensor(name, info.dtype, info.shape, (segment,))
        for key, value in header.metadata.items():
            metadata.setdefault(key, value)
    if not tensors:
        raise CheckpointError(f"{path} has no tensors; download or export it again")
    return Checkpoint(path, tensors, metadata, tuple(shards), index)


def _folder_shards(folder: Path) -> tuple[Mapping[Path, set[str] | None], Path | None]:
    """Return a diffusers folder's safetensors files, with the tensors of each, and its index."""
    for candidate in (folder, folder / "transformer"):
        index = candidate / _DIFFUSERS_INDEX
        if index.is_file():
            return _read_index(index), index
        if (candidate / _DIFFUSERS_WEIGHTS).is_file():
            return {candidate / _DIFFUSERS_WEIGHTS: None}, None
    raise no_weights(folder)


def _read_index(index: Path) -> dict[Path, set[str] | None]:
    try:
        document = json.loads(index.read_text("utf-8"))
    except OSError as error:
        raise unreadable(index, error) from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{index} is not JSON; download it again") from None
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index} has no weight_map that names the shard of each tensor; download it again"
        )
    shards: dict[Path, set[str] | None] = {}
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not shard or shard in (".", "..", "./"):
            raise CheckpointError(
                f'{index} gives tensor "{tensor}" no shard name; download it again'
            )
        shard = shard.removeprefix("./")
        if any(mark in shard for mark in ("/", "\\", ":", "\0")):
            raise CheckpointError(
                f'{index} puts tensor "{tensor}" into "{shard}", which is outside its folder; '
                "move the shard there, and correct the name"
            )
        file = index.parent / shard
        if not file.is_file():
            raise CheckpointError(
                f'{index} names shard "{shard}", which is missing; download it again'
            )
        names = shards.setdefault(file, set())
        assert names is not None
        names.add(tensor)
    return shards


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal.

    Raises:
        CheckpointError: it cannot be read.
    """
    digest, buffer = hashlib.sha256(), bytearray(_HASH_CHUNK)
    view = memoryview(buffer)
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(view[:count])
    except OSError as error:
        raise unreadable(path, error) from None
    return digest.hexdigest()


class TensorReader:
    """A reader of tensors with files that stay open; not for use by two threads at once."""

    def __init__(self) -> None:
        self._files: dict[Path, FileIO] = {}

    def read_into(self, tensor: SourceTensor, begin: int, target: npt.NDArray[np.uint8]) -> None:
        """Fill `target` with the bytes [begin, begin + target.size) of a tensor.

        Raises:
            CheckpointError: the file cannot be read, or has become shorter.
        """
        if isinstance(tensor, ComputedTensor):
            tensor.read_into(self, begin, target)
            return
        view = target.data
        for path, position, count in _pieces(tensor, begin, target.size):
            try:
                complete = self._read_piece(path, position, view[:count])
            except OSError as error:
                complete, cause = False, f"{error.strerror or error}; {remedy(error)}"
            else:
                cause = "the file became shorter; download it again"
            if not complete:
                raise CheckpointError(f'{path} cannot be read at tensor "{tensor.name}": {cause}')
            view = view[count:]

    def _read_piece(self, path: Path, position: int, view: memoryview) -> bool:
        if path not in self._files:
            self._files[path] = path.open("rb", buffering=0)
        file = self._files[path]
        file.seek(position)
        while view:
            got = file.readinto(view)
            if not got:
                return False
            view = view[got:]
        return True

    def read(self, tensor: SourceTensor) -> npt.NDArray[np.uint8]:
        """Return all bytes of a tensor."""
        data = np.empty(tensor.nbytes, np.uint8)
        self.read_into(tensor, 0, data)
        return data

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _pieces(tensor: SourceTensor, begin: int, count: int) -> Iterator[tuple[Path, int, int]]:
    """Yield (file, position, bytes) for the range [begin, begin + count) of a tensor's bytes."""
    for segment in tensor.segments:
        take = min(segment.nbytes - begin, count)
        if take > 0:
            yield segment.path, segment.begin + begin, take
            count -= take
        begin = max(begin - segment.nbytes, 0)
