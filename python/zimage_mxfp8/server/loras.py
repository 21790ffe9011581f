"""Adapters by name: the files of one folder. No path of a client is opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..text import did_you_mean, printable
from .request_errors import RequestError, invalid

_SUFFIX = ".safetensors"
_MAX_LORAS = 16  # of a request
MAX_WEIGHT = 100  # of an adapter, up and down


def check_count(count: int) -> None:
    """Check how many adapters a request names.

    Raises:
        RequestError: there are too many.
    """
    if count > _MAX_LORAS:
        raise invalid("lora", f"must be at most {_MAX_LORAS} LoRAs, not {count}")


class LoraFolder:
    """The adapters that clients may name.

    Args:
        folder: holds safetensors files, which may come and go; None: there are no adapters.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def names(self) -> list[str]:
        """Return the adapters' names: files of the folder itself, without the suffix."""
        return sorted(self._files())

    def find(self, named: Sequence[tuple[str, float]]) -> list[tuple[Path, float]]:
        """Return the files of adapters with their weights.

        Args:
            named: names, with or without the suffix, and weights.

        Raises:
            RequestError: there are too many, or there is none of a name.
        """
        check_count(len(named))
        files = self._files() if named else {}
        return [(self._one(name, files), weight) for name, weight in named]

    def _one(self, name: str, files: Mapping[str, Path]) -> Path:
        stem = name.removesuffix(_SUFFIX)
        if stem not in files:
            advice = did_you_mean([stem], list(files)) or (
                f"; there are {', '.join(sorted(files)[:10])}" if files else "; there are none here"
            )
            raise RequestError(
                400, "lora_not_found", f'there is no LoRA "{printable(stem[:80])}"{advice}', "lora"
            )
        return files[stem]

    def _files(self) -> dict[str, Path]:
        if self._folder is None:
            return {}
        try:
            found = list(self._folder.iterdir())
        except OSError:  # it was removed
            return {}
        return {
            path.stem: path
            for path in found
            if path.suffix == _SUFFIX and path.is_file() and _is_text(path.stem)
        }


def _is_text(name: str) -> bool:
    """Return whether a file's name is UTF-8: others have surrogates, which JSON cannot hold."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
