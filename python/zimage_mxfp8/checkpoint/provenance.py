"""The origin of a converted file, from the metadata in its header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

PROVENANCE_KEY = "zimage_mxfp8"


def read_provenance(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """Return the version, recipe and options that `convert` wrote; None without them."""
    try:
        made = json.loads(metadata.get(PROVENANCE_KEY, "null"))
    except (ValueError, RecursionError):
        return None
    return made if isinstance(made, dict) else None
