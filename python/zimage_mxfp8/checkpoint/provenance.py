"""The origin of a converted or merged file, from the metadata in its header."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .. import _core

PROVENANCE_KEY = "zimage_mxfp8"


def read_provenance(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """Return what `convert` or `merge_loras` wrote: version, recipe, adapters; None without it.

    Values of another type than they write are left out: the entry may be any program's.
    """
    try:
        made = json.loads(metadata.get(PROVENANCE_KEY, "null"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(made, dict):
        return None
    return {key: value for key, value in made.items() if _is_ours(key, value)}


def merged_loras(metadata: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the SHA-256 and the weight of each adapter that was merged into a file's weights."""
    return (read_provenance(metadata) or {}).get("loras") or []


def provenance_of_merged(loras: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the metadata of a plain file with these adapters merged in; empty without any."""
    if not loras:
        return {}
    return {PROVENANCE_KEY: json.dumps({"version": _core.__version__, "loras": list(loras)})}


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
