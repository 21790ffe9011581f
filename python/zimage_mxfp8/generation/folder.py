"""The diffusers folder with all parts except the transformer, and its required files."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.header import unreadable
from ..checks import path as path_argument
from ..errors import CheckpointError
from ..zimage.constants import LATENT_CHANNELS

# Files that each part must have: one of several names, and all of names joined by +.
_FILES: dict[str, tuple[tuple[str, ...], ...]] = {
    "tokenizer": (
        ("tokenizer_config.json",),
        # Without them transformers makes a tokenizer without letters, and drops every prompt.
        ("tokenizer.json", "vocab.json + merges.txt"),
    ),
    "text_encoder": (
        ("config.json",),
        ("model.safetensors", "model.safetensors.index.json"),
    ),
    "vae": (
        ("config.json",),
        (
            "diffusion_pytorch_model.safetensors",
            "diffusion_pytorch_model.safetensors.index.json",
        ),
    ),
    "scheduler": (("scheduler_config.json",),),
}
_SCHEDULER = "FlowMatchEulerDiscreteScheduler"
_VAE_STAGES = 4  # three of which halve: 8 pixels to a latent


@dataclass(frozen=True)
class ModelFolder:
    """A folder with a tokenizer, a text encoder, a VAE and a scheduler for Z-Image.

    Attributes:
        path: the folder.
        caption_features: width of the text encoder's states.
    """

    path: Path
    caption_features: int

    @property
    def transformer(self) -> Path:
        """Path of the folder's own transformer, if it has one."""
        return self.path / "transformer"

    def check_captions_fit(self, transformer: Path, features: int) -> None:
        """Check that a transformer takes the captions of this text encoder.

        Args:
            transformer: its file, for the sentence.
            features: number of caption features that it takes.

        Raises:
            CheckpointError: they belong to different models.
        """
        if features != self.caption_features:
            raise CheckpointError(
                f"the transformer {transformer} takes captions of {features} features, and "
                f"{self.path / 'text_encoder'} gives {self.caption_features}: they belong to "
                "different models; use parts of one"
            )


def open_model_folder(path: str | os.PathLike[str]) -> ModelFolder:
    """Check that a folder has every part, of the right kind, without loading any.

    Raises:
        CheckpointError: not a folder, not in diffusers' layout, of another model, or incomplete;
            the sentence names the part.
        UsageError: not a path.
    """
    folder = path_argument("model_dir", path)
    try:
        return _open(folder)
    except OSError as error:  # a folder without permission
        raise unreadable(Path(error.filename or folder), error) from None


def _open(folder: Path) -> ModelFolder:
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise CheckpointError(
            f"{folder} {what}",
            "name a model folder in the diffusers layout, or fetch one from the Hugging Face hub: "
            "Tongyi-MAI/Z-Image-Turbo with `download=True`",
        )
    index = _read(folder / "model_index.json", f"{folder} is not a diffusers folder")
    pipeline = str(index.get("_class_name"))
    if not pipeline.startswith("ZImage"):
        raise CheckpointError(
            f"{folder} is a model for {pipeline}, not for Z-Image; name a folder of Z-Image"
        )
    for part, needed in _FILES.items():
        if not (folder / part).is_dir():
            raise CheckpointError(
                f"{folder} has no {part}/; download the model again, with all of its folders"
            )
        for names in needed:
            if not any(_has(folder / part, name) for name in names):
                raise CheckpointError(
                    f"{folder / part} has no {' or '.join(names)}; download the model again"
                )
    scheduler = _read(folder / "scheduler" / "scheduler_config.json")
    if scheduler.get("_class_name") != _SCHEDULER:
        raise CheckpointError(
            f"{folder / 'scheduler'} is a {scheduler.get('_class_name')}; Z-Image needs the "
            f"{_SCHEDULER} that came with it"
        )
    _check_scheduler(folder / "scheduler" / "scheduler_config.json", scheduler)
    vae = _read(folder / "vae" / "config.json")
    stages = vae.get("block_out_channels")
    if (
        vae.get("latent_channels") != LATENT_CHANNELS
        or not isinstance(stages, list)
        or len(stages) != _VAE_STAGES
    ):
        raise CheckpointError(
            f"{folder / 'vae'} does not make {LATENT_CHANNELS} channels of 8 x 8 pixels each, so "
            "it is not Z-Image's; take the one that came with the model"
        )
    for name in ("scaling_factor", "shift_factor"):
        if not _is_number(vae.get(name)) or (name == "scaling_factor" and vae[name] <= 0):
            raise _wrong_setting(folder / "vae" / "config.json", vae, name)
    features = _read(folder / "text_encoder" / "config.json").get("hidden_size")
    if not isinstance(features, int):
        raise CheckpointError(
            f"{folder / 'text_encoder' / 'config.json'} has no hidden_size, so it is not Z-Image's "
            "text encoder; take the one that came with the model"
        )
    return ModelFolder(folder, features)


def _has(folder: Path, names: str) -> bool:
    return all((folder / name).is_file() for name in names.split(" + "))


def _check_scheduler(file: Path, settings: dict[str, Any]) -> None:
    """Check the numbers that the pipeline computes with; missing ones have defaults."""
    settings = {"shift": 1.0, "base_image_seq_len": 256, "max_image_seq_len": 4096} | settings
    numbers = ["shift", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"]
    if settings.get("shift_terminal") is not None:
        numbers.append("shift_terminal")
    for name in numbers:
        if name in settings and not _is_number(settings[name]):
            raise _wrong_setting(file, settings, name)
    times = settings.get("num_train_timesteps", 1000)
    if type(times) is not int or times < 1:
        raise _wrong_setting(file, settings, "num_train_timesteps")
    if settings["shift"] <= 0:
        raise _wrong_setting(file, settings, "shift")
    if settings.get("shift_terminal") is not None and not 0 <= settings["shift_terminal"] < 1:
        raise _wrong_setting(file, settings, "shift_terminal")
    if settings["base_image_seq_len"] == settings["max_image_seq_len"]:
        raise _wrong_setting(file, settings, "max_image_seq_len")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _wrong_setting(file: Path, settings: dict[str, Any], name: str) -> CheckpointError:
    found = json.dumps(settings[name])[:80] if name in settings else "missing"
    return CheckpointError(
        f"{file} cannot be used: {name} is {found}; take the file that came with the model"
    )


def _read(file: Path, problem: str = "") -> dict[str, Any]:
    """Return a JSON object; `problem` begins the error for a missing file."""
    if problem and not file.is_file():
        raise CheckpointError(f"{problem}: it has no {file.name}; name the folder that has it")
    try:
        document = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise unreadable(file, error) from None
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise CheckpointError(f"{file} is not a JSON object; download it again")
    return document
