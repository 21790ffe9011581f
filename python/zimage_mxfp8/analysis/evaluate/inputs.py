"""The arguments of `evaluate`: all checks that need no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ...checkpoint import hub
from ...checks import file_or_folder, text, whole_number
from ...errors import CheckpointError, UsageError
from ...generation.folder import open_model_folder
from ...generation.parts import open_parts
from ...generation.settings import GenerationSettings

MAX_PAIRS = 1000


def image_settings(
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    size: tuple[int, int],
    guidance: float,
) -> list[GenerationSettings]:
    """Return the settings of all images, by prompt and then by seed.

    Raises:
        UsageError: an argument of `evaluate` that cannot be.
    """
    if isinstance(prompts, str) or not isinstance(prompts, Sequence) or not prompts:
        raise UsageError("prompts", f"must be a list of texts, not {repr(prompts)[:80]}")
    if isinstance(seeds, str) or not isinstance(seeds, Sequence) or not seeds:
        raise UsageError("seeds", f"must be a list of whole numbers, not {repr(seeds)[:80]}")
    prompts = [text("prompts", prompt) for prompt in prompts]
    seeds = [whole_number("seeds", seed) for seed in seeds]
    _check_different("prompts", prompts)
    _check_different("seeds", seeds)
    if not isinstance(size, (list, tuple)) or len(size) != 2:
        raise UsageError("size", f"must be (height, width), not {repr(size)[:80]}")
    pairs = len(prompts) * len(seeds)
    if pairs > MAX_PAIRS:
        raise UsageError(
            "prompts",
            f"and seeds make {pairs:,} pairs of images, and {MAX_PAIRS:,} are allowed",
            "use fewer",
        )
    try:
        return [
            GenerationSettings(
                prompt, steps=steps, height=size[0], width=size[1], guidance=guidance, seed=seed
            )
            for prompt in prompts
            for seed in seeds
        ]
    except UsageError as error:
        name = {"height": "size", "width": "size", "seed": "seeds"}.get(error.argument)
        raise UsageError(name or error.argument, error.problem, error.hint) from None


def _check_different(argument: str, values: Sequence[object]) -> None:
    if len(set(values)) < len(values):
        repeated = next(value for i, value in enumerate(values) if value in values[:i])
        raise UsageError(
            argument, f"must be different, but {repr(repeated)[:80]} is there more than once"
        )


def find_files(
    model_dir: str | os.PathLike[str],
    transformer: str | os.PathLike[str],
    against: str | os.PathLike[str] | None,
    compute: str,
    against_compute: str,
    *,
    download: bool,
) -> tuple[Path, Path, Path]:
    """Return the folder, A and B on this machine, checked from their headers.

    Raises:
        CheckpointError, UsageError: as from `evaluate`, about these arguments.
    """
    own = () if against is not None else (hub.TRANSFORMER,)
    file_or_folder("model_dir", model_dir)
    folder = open_model_folder(hub.resolve(model_dir, (*hub.COMPONENTS, *own), download=download))
    file_or_folder("transformer", transformer)
    found = hub.resolve(transformer, (hub.TRANSFORMER,), download=download)
    if against is not None:
        file_or_folder("against", against)
        other = hub.resolve(against, (hub.TRANSFORMER,), download=download)
    elif folder.transformer.is_dir():
        other = folder.transformer
    else:
        raise CheckpointError(
            f"{model_dir} has no transformer/ to compare with", "name a file with `against`"
        )
    open_parts(folder.path, found, None, compute)
    with naming("compute", "against_compute"):
        open_parts(folder.path, other, None, against_compute)
    return folder.path, found, other


@contextmanager
def naming(argument: str, ours: str) -> Iterator[None]:
    """Let errors about an argument of the generator name that of `evaluate`."""
    try:
        yield
    except UsageError as error:
        if error.argument != argument:
            raise
        hint = error.hint.replace(f"`{argument}=", f"`{ours}=")
        raise UsageError(ours, error.problem, hint) from None
