"""Adapters by name: the files of one folder. No path of a client is opened."""

from __future__ import annotations

from pathlib import Path

from ..text import did_you_mean, printable
from .request_errors import RequestError

_SUFFIX = ".safetensors"


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

    def find(self, name: str) -> Path:
        """Return the file of an adapter, named with or without the suffix.

        Raises:
            RequestError: there is none of this name.
        """
        files = self._files()
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
        return {path.stem: path for path in found if path.suffix == _SUFFIX and path.is_file()}
