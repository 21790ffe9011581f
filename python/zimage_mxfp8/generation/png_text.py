"""Texts in PNG files, read without decoding the image."""

from __future__ import annotations

import zlib
from collections.abc import Collection
from pathlib import Path
from typing import BinaryIO

from ..checkpoint.header import unreadable
from ..errors import CheckpointError

MAX_TEXT = 1 << 20  # bytes; settings take a few hundred
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_REMEDY = "copy or download it again"
_MAX_KEY = 79  # bytes, by the PNG specification


def read_texts(path: Path, keys: Collection[str]) -> dict[str, str]:
    """Read a PNG file's texts with given keys, the first of each key.

    Args:
        path: the file.
        keys: keys of the texts; others are skipped, whatever their size.

    Raises:
        CheckpointError: if the file cannot be read or is not a PNG file, or a text is damaged or
            longer than `MAX_TEXT`.
    """
    try:
        if path.exists() and not path.is_file():  # opening a pipe waits for its other end
            raise CheckpointError(f"{path} is not a regular file; name a PNG file")
        with path.open("rb") as file:
            if file.read(len(_SIGNATURE)) != _SIGNATURE:
                raise CheckpointError(f"{path} is not a PNG file; settings are in PNG files only")
            return _read_chunks(path, file, keys)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; name a PNG file made by generate") from None
    except OSError as error:
        raise unreadable(path, error) from None


def _read_chunks(path: Path, file: BinaryIO, keys: Collection[str]) -> dict[str, str]:
    texts: dict[str, str] = {}
    while (head := file.read(8))[4:] != b"IEND":
        if len(head) < 8 or not head[4:].isalpha():
            if texts:
                break
            raise CheckpointError(f"{path} is a damaged or incomplete PNG file", _REMEDY)
        size, kind = int.from_bytes(head[:4], "big"), head[4:]
        begin = file.tell()
        if kind in (b"tEXt", b"zTXt", b"iTXt"):
            key = file.read(min(size, _MAX_KEY + 1)).partition(b"\0")[0].decode("latin-1")
            if key in keys and key not in texts:
                file.seek(begin)
                texts[key] = _read_text(path, file, key, kind, size)
        file.seek(begin + size + 4)
    return texts


def _read_text(path: Path, file: BinaryIO, key: str, kind: bytes, size: int) -> str:
    if size > MAX_TEXT:
        raise CheckpointError(
            f'the text "{key}" of {path} has {size:,} bytes; more than {MAX_TEXT:,} are not read'
        )
    data, checksum = file.read(size), file.read(4)
    if zlib.crc32(kind + data) != int.from_bytes(checksum, "big") or len(checksum) < 4:
        raise CheckpointError(f'the text "{key}" of {path} is damaged', _REMEDY)
    try:
        return _decode(kind, data.partition(b"\0")[2])
    except (zlib.error, ValueError, IndexError):
        raise CheckpointError(
            f'the text "{key}" of {path} is damaged, or too long', _REMEDY
        ) from None


def _decode(kind: bytes, data: bytes) -> str:
    """Return the text of a chunk, without its key.

    Raises:
        zlib.error, ValueError, IndexError: if it is damaged or too long.
    """
    if kind == b"tEXt":
        return data.decode("latin-1")
    if kind == b"zTXt":
        return _inflate(data[1:]).decode("latin-1")
    is_compressed = data[0]
    text = data[2:].split(b"\0", 2)[2]  # after the language and the translated key
    return (_inflate(text) if is_compressed else text).decode("utf-8")


def _inflate(data: bytes) -> bytes:
    inflater = zlib.decompressobj()
    text = inflater.decompress(data, MAX_TEXT)
    if not inflater.eof:
        raise ValueError
    return text
