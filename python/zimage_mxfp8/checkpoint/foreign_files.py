"""Recognition of files that are not safetensors, and of folders without a checkpoint."""

from __future__ import annotations

import codecs
import errno
import json
import zipfile
from pathlib import Path

from ..errors import WrongKindError
from ..text import plural
from . import kinds
from .kinds import Kind

_HEAD = 4096  # bytes that are examined
_MAX_JSON = 64 << 20
_PICKLE_PROTOCOLS = (b"\x02", b"\x03", b"\x04", b"\x05")
_FOREIGN_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf")


def refuse(
    path: Path, kind: Kind, evidence: str = "", *, quantised: bool = False, shard: bool = False
) -> WrongKindError:
    """Return the error for a file that an operation does not take: one sentence with a remedy.

    Args:
        path: the file.
        kind: its kind, or the format that it is quantised with.
        evidence: the name that shows the kind.
        quantised: whether a file of this kind is quantised too.
        shard: whether it is one shard of several, which the kind does not say.
    """
    remedy = (quantised and kind.quantised_remedy) or kind.remedy
    problem, remedy = (text.replace("{0}", evidence) for text in (kind.problem, remedy))
    beginning = "is one shard of several and " if shard else ""
    return WrongKindError(f"{path} {beginning}{problem}", kind, remedy)


def check_file(path: Path) -> None:
    """Raise if a file is known not to be a safetensors file; others pass unread.

    Raises:
        WrongKindError: with the kind.
        OSError: the file cannot be read.
    """
    try:
        path.stat()
    except FileNotFoundError:
        if path.is_symlink():
            raise refuse(path, kinds.DANGLING_LINK, str(path.readlink())) from None
        raise
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise refuse(path, kinds.LINK_LOOP, str(path.readlink())) from None
        raise
    if not path.is_file():  # opening a pipe would wait for its writer
        return
    size = path.stat().st_size
    if size == 0:
        raise refuse(path, kinds.EMPTY_FILE)
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if kind := _kind_of(path, head, size):
        raise refuse(path, kind, str(path.parent))


def single_files(folder: Path) -> list[Path]:
    """Return the safetensors files in a folder, by name."""
    return sorted(folder.glob("*.safetensors"))


def no_weights(folder: Path) -> WrongKindError:
    """Return the error for a folder without a diffusers checkpoint; name its other files."""
    if singles := single_files(folder):
        remedy = f"name one of its {plural(len(singles), 'safetensors file')}"
        if len(singles) == 1:
            remedy = f"name its only safetensors file, {singles[0].name}"
    elif any(
        next(place.glob(pattern), None)
        for place in (folder, folder / "transformer")
        for pattern in _FOREIGN_WEIGHTS
    ):
        remedy = "its weights are in another format; download the safetensors files"
    else:
        remedy = "name the model's folder, or download its weights"
    return refuse(folder, kinds.NO_WEIGHTS, remedy)


def _kind_of(path: Path, head: bytes, size: int) -> Kind | None:
    if head.startswith(b"GGUF"):
        return kinds.GGUF
    if head.startswith(b"PK\x03\x04"):
        return kinds.PICKLE if _holds_pickle(path) else kinds.ZIP
    if head[0] == 0x80 and head[1:2] in _PICKLE_PROTOCOLS and not _is_safetensors(head):
        return kinds.PICKLE
    if head.startswith(b"version https://git-lfs"):
        return kinds.LFS_POINTER
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml")):
        return kinds.HTML
    if start.startswith(b"{") and head[:1] in b"\xef {\t\r\n" and not _is_safetensors(head):
        return _json_kind(path, size)
    if _is_text(head):
        return kinds.TEXT_FILE
    return None


def _holds_pickle(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("data.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return True  # an incomplete download: the zip archives among models are torch's files


def _is_safetensors(head: bytes) -> bool:
    """Return whether JSON follows the header's length, so that this is a safetensors file."""
    return head[8:9] == b"{"


def _json_kind(path: Path, size: int) -> Kind:
    if size <= _MAX_JSON:
        try:
            document = json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            return kinds.JSON_FILE
        if isinstance(document, dict) and "weight_map" in document:
            return kinds.SHARD_INDEX
    return kinds.JSON_FILE


def _is_text(head: bytes) -> bool:
    try:
        # The last character may be cut.
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return all(c.isprintable() or c in "\r\n\t" for c in text)
