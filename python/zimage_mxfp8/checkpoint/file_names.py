"""Names that follow from a path, which may be "." or ".."."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import UsageError

_SUFFIXES = (".safetensors", ".sft")


def base_name(path: str | os.PathLike[str]) -> str:
    """Return the name of a file or folder; for "." the folder's own name, for the root ""."""
    return _absolute(Path(path)).name


def checkpoint_beside(source: Path, ending: str) -> Path:
    """Return the path of a safetensors file next to a checkpoint, for an output made from it.

    Args:
        source: a file or a folder; the result is relative if `source` is.
        ending: added to the source's name without suffix, for example `-mxfp8`.

    Raises:
        UsageError: the source has no name, because it is the root.
    """
    place = _absolute(source) if source.name in ("", "..") else source
    if not place.name:
        raise UsageError("output", f"must be given: there is no name to make one from in {place}")
    stem = place.stem if place.suffix in _SUFFIXES and not _is_folder(place) else place.name
    return place.with_name(f"{stem}{ending}.safetensors")


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))  # noqa: PTH100 - keeps links, unlike resolve()


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a folder without permission, which reading the file tells
        return False
