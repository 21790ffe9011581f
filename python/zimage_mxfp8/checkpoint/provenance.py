"""What a converted file says of its own origin, in the header's metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

PROVENANCE_KEY = "zimage_mxfp8"


def read_provenance(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The version, recipe and options that `convert` wrote; None if there are none to read."""
    try:
        made = json.loads(metadata.get(PROVENANCE_KEY, "null"))
    except (ValueError, RecursionError):
        return None
    return made if isinstance(made, dict) else None
