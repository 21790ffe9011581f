"""Settings stored in an image file, and their replacement by options."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, UsageError
from . import infotext
from .images import METADATA_KEY
from .png_text import read_texts
from .settings import GenerationSettings

_CONTROL = ("control_strength", "control_start", "control_end")
_SETTINGS = (
    "prompt",
    "negative_prompt",
    "steps",
    "height",
    "width",
    "guidance",
    "seed",
    "strength",
    *_CONTROL,
)
_CIRCUMSTANCES = ("model", "transformer", "controlnet", "compute", "dtype")
_IMAGES = ("init_image", "mask_image", "control_image")


@dataclass(frozen=True)
class StoredSettings:
    """The settings of an image file, unchecked.

    Attributes:
        path: the file.
        values: arguments of `GenerationSettings`; omitted ones and None are missing.
        images: names of the images that it was made from, by the argument of `GenerationSettings`;
            "" if the file does not name them.
        loras: names of the adapters, each with its weight.
        circumstances: other values that the image depends on, by name in `Generation.metadata`.
        is_ours: whether this package made the image.
    """

    path: Path
    values: Mapping[str, Any]
    images: Mapping[str, str]
    loras: tuple[str, ...]
    circumstances: Mapping[str, Any]
    is_ours: bool = True

    def with_options(self, given: Mapping[str, Any]) -> GenerationSettings:
        """Return these settings, with the given arguments of `GenerationSettings` replaced.

        A negative prompt of the file is left out without guidance.

        Raises:
            CheckpointError: a value of the file cannot be used.
            UsageError: a given value cannot be used, or an image or an adapter is missing.
        """
        for argument, image in self.images.items():
            if argument not in given:
                named = f"the image {image[:80]!r}" if image else "an image, which it does not name"
                raise UsageError(
                    argument,
                    f"must be given: {self.path} was made from {named}",
                    "name that image",
                )
        if self.is_ours and self.loras and "loras" not in given:
            raise UsageError(
                "loras",
                f"must be given: {self.path} was made with {', '.join(self.loras)[:200]}",
                "name those files",
            )
        values = {**self.values, **given}
        if "prompt" not in values:
            raise CheckpointError(f"the settings of {self.path} have no prompt", "give `prompt`")
        if not values.get("guidance") and "negative_prompt" not in given:
            values.pop("negative_prompt", None)
        try:
            return GenerationSettings(**values)
        except UsageError as error:
            GenerationSettings(**{"prompt": "", **given})  # raises if it is not the file's fault
            raise CheckpointError(
                f"the settings of {self.path} cannot be used: {error.argument} {error.problem}",
                f"replace it with `{error.argument}`",
            ) from None

    def warnings(self, metadata: Mapping[str, Any]) -> Iterator[str]:
        """Yield differences from the file that change the image although the settings are the same.

        Args:
            metadata: metadata of the new image, see `Generation.metadata`.
        """
        if not self.is_ours:
            yield f"{self.path} is from another program: the same settings give another image"
            if self.loras and not metadata.get("loras"):
                named = ", ".join(self.loras)[:200]
                yield f"{self.path} was made with adapters, which are left out: {named}"
        elif not self.circumstances:
            yield f"{self.path} does not tell the compute mode and dtype: the image may differ"
        changes = [
            f"{name} {str(self.circumstances[name])[:80]} (now {metadata.get(name)})"
            for name in _CIRCUMSTANCES
            if name in self.circumstances and self.circumstances[name] != metadata.get(name)
        ]
        if changes:
            yield f"{self.path} was made with {', '.join(changes)}: the image differs"


def read_settings(path: Path) -> StoredSettings:
    """Read the settings of an image that `generate` or another program made.

    Raises:
        CheckpointError: if it is not a PNG file, has no settings, or damaged ones.
    """
    texts = read_texts(path, (METADATA_KEY, infotext.KEY))
    if METADATA_KEY in texts:
        return _of_generate(path, texts[METADATA_KEY])
    if infotext.KEY not in texts:
        raise CheckpointError(
            f"{path} has no settings: neither those of generate nor a text "
            f'"{infotext.KEY}"; programs that edit or convert images often remove them'
        )
    try:
        read = infotext.read_infotext(texts[infotext.KEY])
    except ValueError as error:
        raise CheckpointError(
            f'the text "{infotext.KEY}" of {path} {error}; use another image'
        ) from None
    if read.values.get("guidance", 0) < 0:
        raise CheckpointError(
            f"{path} has a CFG scale below 1, which has no counterpart here",
            "`guidance` is the CFG scale minus 1, and at least 0",
        )
    images = dict.fromkeys(read.images, "")
    return StoredSettings(path, read.values, images, read.loras, {}, read.is_ours)


def _of_generate(path: Path, text: str) -> StoredSettings:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise CheckpointError(
            f'the text "{METADATA_KEY}" of {path} is not a JSON object; use another image'
        )
    values = {name: document[name] for name in _SETTINGS if document.get(name) is not None}
    images = {name: str(document[name]) for name in _IMAGES if document.get(name) is not None}
    for image, names in (("init_image", ("strength",)), ("control_image", _CONTROL)):
        if image not in images:
            for name in names:
                values.pop(name, None)
    return StoredSettings(
        path,
        values,
        images,
        tuple(_lora_texts(document.get("loras"))),
        {name: document[name] for name in _CIRCUMSTANCES if name in document},
    )


def _lora_texts(loras: Any) -> Iterator[str]:
    for each in loras if isinstance(loras, list) else [loras] if loras else []:
        if isinstance(each, dict):
            yield f"{str(each.get('name'))[:80]}:{each.get('weight')}"
        else:
            yield str(each)[:80]
