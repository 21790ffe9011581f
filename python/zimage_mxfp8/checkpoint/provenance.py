"""The origin of a converted file, from the metadata in its header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

PROVENANCE_KEY = "zimage_mxfp8"


def read_provenance(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """Return the version, recipe and options that `convert` wrote; None without them.

    Values of another type than `convert` writes are left out: the entry may be any program's.
    """
    try:
        made = json.loads(metadata.get(PROVENANCE_KEY, "null"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(made, dict):
        return None
    return {key: value for key, value in made.items() if _is_ours(key, value)}


def _is_ours(key: str, value: Any) -> bool:
    if key in ("version", "recipe", "format"):
        return isinstance(value, str)
    if key == "exclude_layers":
        return isinstance(value, list) and all(isinstance(each, str) for each in value)
    if key == "loras":
        return isinstance(value, list) and all(map(_is_lora, value))
    return True


def _is_lora(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("sha256"), str)
        and isinstance(value.get("weight"), int | float)
    )
