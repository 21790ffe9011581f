"""The `config.json` of a transformer in diffusers' layout."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

QUANT_METHOD = "zimage_mxfp8"  # the quantizer's name among those of diffusers
CUSTOM_RECIPE = "custom"  # stands for the recipe of a file, which may be gone


def quantization_config(
    recipe: str = CUSTOM_RECIPE,
    exclude_layers: Iterable[str] = (),
    compute: str = "weight-only",
) -> dict[str, Any]:
    """Return the entry by which diffusers finds the quantizer of `zimage_mxfp8.diffusers`.

    Args:
        recipe: a built-in recipe; only for readers, the file shows which layers are quantised.
        exclude_layers: patterns of more layers that are kept.
        compute: the compute mode to load the transformer in.
    """
    entry: dict[str, Any] = {"quant_method": QUANT_METHOD, "recipe": recipe}
    if patterns := list(exclude_layers):
        entry["exclude_layers"] = patterns
    return entry | {"compute": compute}
