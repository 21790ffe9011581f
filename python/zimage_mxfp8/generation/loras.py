"""The adapters of a generation, on a transformer that keeps those of earlier ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..transformer.model import ZImageTransformer

_MAX_KEPT = 4  # adapters that are loaded and not in use


class LoraCache:
    """Lets adapters count on a transformer, and keeps those of earlier calls loaded.

    Up to four stay loaded that are not in use, the most recently used ones, so that switching
    between them reads nothing. A file that changed since is read again.
    """

    def __init__(self) -> None:
        self._recent: dict[str, None] = {}  # names, the latest last

    def use(self, transformer: ZImageTransformer, loras: Sequence[tuple[Path, float]]) -> list[str]:
        """Let these adapters count, and no others.

        A file that comes twice counts with the sum of its weights.

        Args:
            transformer: the one of earlier calls, or a new one without adapters.
            loras: files with their weights.

        Returns:
            What of the files is not used, see `Lora.notes`.

        Raises:
            CheckpointError: a file cannot be read, or does not fit; the same adapters count as
                before.
            CudaError: too little memory.
        """
        weights: dict[str, float] = {}
        files: dict[str, Path] = {}
        for file, weight in loras:
            name = _name_of(file)
            files[name] = file
            weights[name] = weights.get(name, 0.0) + weight
        self._recent = {name: None for name in self._recent if name in transformer.loras}
        unused = [name for name in self._recent if name not in weights]
        for name in unused[: max(0, len(unused) - _MAX_KEPT)]:
            transformer.unload_lora(name)
        before = {name: transformer.loras[name].weight for name in transformer.active_adapters()}
        try:
            for name, file in files.items():
                if name not in transformer.loras:
                    transformer.load_lora(file, name)
                self._recent.pop(name, None)
                self._recent[name] = None
        except BaseException:
            transformer.set_lora(before)
            raise
        transformer.set_lora(weights)
        return [note for name in weights for note in transformer.loras[name].notes]


def _name_of(file: Path) -> str:
    """Return a name for the content of a file, by its path, size and time."""
    try:
        state = file.stat()
    except OSError:  # reading it will tell
        return str(file)
    path = str(file.resolve()).encode("utf-8", "backslashreplace").decode()
    return f"{path} ({state.st_size} bytes, {state.st_mtime_ns})"
