"""Settings as one text, in the format of AUTOMATIC1111's web UI, which other programs read.

The prompt, a line "Negative prompt: ..." if there is one, and a line of "Name: value" pairs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

KEY = "parameters"  # of the text in PNG files
_NEGATIVE = "Negative prompt:"
# The length of names is bounded: a long last line would take quadratic time.
_PAIR = re.compile(r'(\w[\w \-/]{1,40}):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_MIN_PAIRS = 3  # of a last line that is not part of the prompt
_PROGRAM = "zimage-mxfp8"
_CONTROL = {
    "control_strength": "Weight",
    "control_start": "Guidance Start",
    "control_end": "Guidance End",
}
_LORA = re.compile(r"<lora:([^:<>]{1,255}(?::[^:<>]{0,100}){0,2})>")  # in prompts of other programs


@dataclass(frozen=True)
class Infotext:
    """What such a text says.

    Attributes:
        values: arguments of `GenerationSettings`.
        loras: names of the adapters, most with their weights.
        images: arguments of `GenerationSettings` for the images that it was made from.
        is_ours: whether this package wrote it.
    """

    values: Mapping[str, Any]
    loras: tuple[str, ...]
    images: tuple[str, ...]
    is_ours: bool


def write_infotext(metadata: Mapping[str, Any]) -> str:
    """Return the settings of an image, see `Generation.metadata`.

    The CFG scale is `guidance` + 1: the text's readers compute negative + scale * (positive -
    negative), and diffusers' Z-Image pipelines positive + guidance * (positive - negative).
    """
    pairs = {
        "Steps": metadata["steps"],
        "Sampler": "Euler",
        "CFG scale": _plain(Decimal(repr(metadata["guidance"])) + 1),
        "Seed": metadata["seed"],
        "Size": f"{metadata['width']}x{metadata['height']}",
        "Model": _model_name(metadata),
    }
    if metadata["strength"] is not None:
        pairs["Denoising strength"] = metadata["strength"]
    if metadata.get("mask_image") is not None:
        pairs["Mask"] = "yes"
    if metadata["loras"]:
        loras = (f"{Path(x['name']).stem}:{x['weight']}" for x in metadata["loras"])
        pairs["Loras"] = ", ".join(loras)
    if metadata.get("controlnet") is not None:
        pairs["ControlNet 0"] = f"Model: {Path(metadata['controlnet']).stem}, " + ", ".join(
            f"{key}: {metadata[name]}" for name, key in _CONTROL.items()
        )
    pairs["Version"] = f"{_PROGRAM} {metadata['version']}"
    lines = [metadata["prompt"]]
    if metadata["negative_prompt"]:
        lines.append(f"{_NEGATIVE} {metadata['negative_prompt']}")
    lines.append(", ".join(f"{name}: {_quoted(str(value))}" for name, value in pairs.items()))
    return "\n".join(lines)


def read_infotext(text: str) -> Infotext:
    """Parse such a text. Adapters in the prompt of another program are taken out of it.

    Raises:
        ValueError: the text has another format, or a value that cannot be used; the message ends a
            sentence that names the text.
    """
    *lines, last = text.strip().split("\n")
    pairs = {name: _unquoted(value) for name, value in _PAIR.findall(last)}
    if len(pairs) < _MIN_PAIRS or "Steps" not in pairs:
        raise ValueError("does not end with a line of settings (Steps: ..., Seed: ..., ...)")
    prompts: tuple[list[str], list[str]] = ([], [])
    for line in map(str.strip, lines):
        if line.startswith(_NEGATIVE):
            prompts[1].append(line.removeprefix(_NEGATIVE).strip())
        else:
            prompts[1 if prompts[1] else 0].append(line)
    is_ours = pairs.get("Version", "").startswith(_PROGRAM)
    prompt = "\n".join(prompts[0])
    loras = [each for each in pairs.get("Loras", "").split(", ") if each]
    if not is_ours and (found := _LORA.findall(prompt)):
        loras, prompt = found, _LORA.sub("", prompt).strip()
    values: dict[str, Any] = {"prompt": prompt}
    if negative := "\n".join(prompts[1]):
        values["negative_prompt"] = negative
    try:
        values["steps"] = int(pairs["Steps"])
        if "Seed" in pairs:
            values["seed"] = int(pairs["Seed"])
        if "Size" in pairs:
            values["width"], values["height"] = map(int, pairs["Size"].split("x"))
        if "CFG scale" in pairs:
            values["guidance"] = float(Decimal(pairs["CFG scale"]) - 1)
        images = []
        if is_ours and "Denoising strength" in pairs:
            values["strength"] = float(pairs["Denoising strength"])
            images = ["init_image", "mask_image"] if "Mask" in pairs else ["init_image"]
        if is_ours and "ControlNet 0" in pairs:
            control = dict(_PAIR.findall(pairs["ControlNet 0"]))
            for name, key in _CONTROL.items():
                values[name] = float(control[key])
            images.append("control_image")
    except (KeyError, ValueError, ArithmeticError):
        raise ValueError(f'has a number that cannot be read in "{last.strip()[:200]}"') from None
    return Infotext(values, tuple(loras), tuple(images), is_ours)


def _model_name(metadata: Mapping[str, Any]) -> str:
    """Return the transformer's file; the model's folder if it has no file of its own."""
    file = Path(metadata["transformer"])
    return file.stem if file.suffix == ".safetensors" else str(metadata["model"])


def _plain(number: Decimal) -> str:
    """Format a number without trailing zeros and without an exponent."""
    return f"{number.normalize():f}"


def _quoted(value: str) -> str:
    if any(mark in value for mark in ",:\n"):
        return json.dumps(value, ensure_ascii=False)
    return value


def _unquoted(value: str) -> str:
    if len(value) > 1 and value[0] == value[-1] == '"':
        try:
            return str(json.loads(value))
        except ValueError:
            return value
    return value
