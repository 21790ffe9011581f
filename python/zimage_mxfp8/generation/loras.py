"""The adapters of a generation, on a transformer that keeps those of earlier ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..transformer.model import ZImageTransformer

_MAX_KEPT = 4  # adapters that are loaded and not in use


def use_loras(transformer: ZImageTransformer, loras: Sequence[tuple[Path, float]]) -> list[str]:
    """Let these adapters count, and no others.

    A file that comes twice counts with the sum of its weights. Adapters of earlier calls stay
    loaded, up to four, so that switching between them reads nothing.

    Returns:
        What of the files is not used, see `Lora.notes`.

    Raises:
        CheckpointError: a file cannot be read, or does not fit; no adapter changed.
        CudaError: too little memory.
    """
    weights: dict[str, float] = {}
    for file, weight in loras:
        name = str(file.resolve())
        weights[name] = weights.get(name, 0.0) + weight
    unused = [name for name in transformer.loras if name not in weights]
    for name in unused[: max(0, len(unused) - _MAX_KEPT)]:
        transformer.unload_lora(name)
    for name in weights:
        if name not in transformer.loras:
            transformer.load_lora(name, name)
    transformer.set_lora(weights)
    return [note for name in weights for note in transformer.loras[name].notes]
