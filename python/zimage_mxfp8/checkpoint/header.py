"""The header of a safetensors file: strict parsing, and writing in the library's own order.

Format: 8 bytes little-endian header length, that many bytes of JSON (padded with spaces), then the
data. The JSON maps each name to dtype, shape and [begin, end) offsets into the data; the ranges
must cover the data exactly. `__metadata__` maps strings to strings.
(https://github.com/huggingface/safetensors, "Format")
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ..dtypes import SAFETENSORS_BITS
from ..errors import CheckpointError, remedy

MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
_DTYPE_RANK = {dtype: rank for rank, dtype in enumerate(SAFETENSORS_BITS)}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: `begin` and `end` are absolute positions in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return self.end - self.begin


@dataclass(frozen=True)
class Header:
    """The parsed header of a safetensors file."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def tensor_nbytes(dtype: str, shape: Iterable[int]) -> int:
    """Return the bytes of a tensor; `dtype` is a key of `SAFETENSORS_BITS`."""
    return math.prod(shape) * SAFETENSORS_BITS[dtype] // 8


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file.

    Raises:
        CheckpointError: the file cannot be read, is not a safetensors file, or breaks a rule of the
            format. The sentence names the file and, if one is concerned, the tensor.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for its writer
            _fail(path, "is not a regular file", "name a file or a folder")
        with path.open("rb") as file:
            file_size = path.stat().st_size
            prefix = file.read(8)
            if len(prefix) < 8:
                _fail(path, f"is not a safetensors file: it has only {file_size} bytes")
            length = int.from_bytes(prefix, "little")
            if length > max(file_size - 8, MAX_HEADER_BYTES):
                _fail(path, "is not a safetensors file: it does not begin with a header's size")
            if length > file_size - 8:
                _fail(
                    path,
                    f"is truncated or not a safetensors file: its header should have {length:,} "
                    f"bytes, the file has {file_size:,}",
                )
            if length > MAX_HEADER_BYTES:
                _fail(path, f"has a header of {length:,} bytes, over the format's limit of 100 MB")
            text = file.read(length)
    except OSError as error:
        raise unreadable(path, error) from None
    entries = _parse_json(path, text)
    metadata = entries.pop("__metadata__", None)
    if metadata is None:  # the library reads null as no metadata
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        _fail(path, "has a __metadata__ that does not map strings to strings")
    data_begin = 8 + length
    tensors = {name: _parse_entry(path, name, entry, data_begin) for name, entry in entries.items()}
    _check_coverage(path, tensors, data_begin, file_size)
    return Header(tensors, metadata)


def layout_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, TensorInfo]]:
    """Lay out a file: its first bytes, and the position of each tensor's data.

    Args:
        tensors: name -> (safetensors dtype, shape).
        metadata: content of `__metadata__`, in this order; left out if empty.

    Returns:
        The header with its length prefix, and each tensor's place in the file, in file order.
        Both are as the safetensors library would choose them: widest types first, then by name.

    Raises:
        CheckpointError: the header would be larger than the format allows.
    """
    order = sorted(tensors, key=lambda name: (_DTYPE_RANK[tensors[name][0]], name))
    document: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    places: dict[str, tuple[int, int]] = {}
    end = 0
    for name in order:
        dtype, shape = tensors[name]
        begin, end = end, end + tensor_nbytes(dtype, shape)
        places[name] = begin, end
        document[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"the output's header would have {len(text):,} bytes, and the format allows 100 MB; "
            "take metadata out of the input"
        )
    start = 8 + len(text)
    infos = {
        name: TensorInfo(*tensors[name], start + begin, start + end)
        for name, (begin, end) in places.items()
    }
    return len(text).to_bytes(8, "little") + text, infos


def file_size(header: bytes, places: Mapping[str, TensorInfo]) -> int:
    """Return the bytes of the file that `layout_header` laid out."""
    return max((info.end for info in places.values()), default=len(header))


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """Return the error for a file that the operating system cannot read."""
    if isinstance(error, FileNotFoundError):
        return CheckpointError(f"{path} does not exist; check the path")
    if isinstance(error, PermissionError):
        return CheckpointError(f"{path} cannot be read: no permission; allow this user to read it")
    return CheckpointError(f"{path} cannot be read: {error.strerror or error}; {remedy(error)}")


def _fail(path: Path, what: str, remedy: str = "download or export it again") -> NoReturn:
    raise CheckpointError(f"{path} {what}; {remedy}")


def _parse_json(path: Path, text: bytes) -> dict[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            seen: set[str] = set()
            name = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            _fail(path, f'has the name "{name}" twice in its header')
        return result

    def no_constants(text: str) -> NoReturn:
        raise ValueError(text)

    try:
        document = json.loads(
            text.decode("utf-8"), object_pairs_hook=no_duplicates, parse_constant=no_constants
        )
    except (ValueError, RecursionError) as error:
        detail = _what_is_wrong(error)
        _fail(path, f"has a header that is not JSON ({detail})")
    if not isinstance(document, dict):
        _fail(path, "has a header that is not a JSON object")
    try:
        json.dumps(document, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        _fail(path, "has a header with half a surrogate pair, which is not Unicode text")
    return document


def _what_is_wrong(error: ValueError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is not UTF-8"
    if isinstance(error, json.JSONDecodeError):
        return f"line {error.lineno}, column {error.colno}: {error.msg}"
    return "a number out of range"


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _parse_entry(path: Path, name: str, entry: object, data_begin: int) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        _fail(path, f'has a header entry "{name}" without exactly dtype, shape and data_offsets')
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in SAFETENSORS_BITS:
        _fail(path, f'gives tensor "{name}" the unknown dtype {json.dumps(dtype)}')
    if not isinstance(shape, list) or not all(_is_size(size) for size in shape):
        _fail(path, f'gives tensor "{name}" a shape that is not a list of sizes')
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(_is_size(offset) for offset in offsets)
        or offsets[0] > offsets[1]
    ):
        _fail(path, f'gives tensor "{name}" data_offsets that are not [begin, end]')
    bits = math.prod(shape) * SAFETENSORS_BITS[dtype]
    begin, end = offsets
    if bits != (end - begin) * 8:
        needed = "more than a file can hold" if bits >= 2**66 else f"{bits / 8:,.10g}"
        _fail(
            path,
            f'gives tensor "{name}" {end - begin:,} bytes, but {dtype} {shape} needs {needed}',
        )
    return TensorInfo(dtype, tuple(shape), data_begin + begin, data_begin + end)


def _check_coverage(
    path: Path, tensors: Mapping[str, TensorInfo], data_begin: int, file_size: int
) -> None:
    position, previous = data_begin, ""
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin < position:
            _fail(path, f'has tensors that overlap: "{previous}" and "{name}"')
        if info.begin > position:
            _fail(path, f'has {info.begin - position:,} unused bytes before tensor "{name}"')
        if info.end > file_size:
            _fail(
                path,
                f'is truncated: tensor "{name}" ends at byte {info.end:,}, the file has '
                f"{file_size:,}",
            )
        position, previous = info.end, name
    if position != file_size:
        _fail(
            path,
            f"has {file_size - position:,} bytes after its last tensor, so its header and its data "
            "do not belong together",
        )
