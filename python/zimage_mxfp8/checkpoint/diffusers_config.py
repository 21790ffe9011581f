"""The `config.json` of a transformer in diffusers' layout."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..zimage import constants
from ..zimage.config import ZImageConfig

QUANT_METHOD = "zimage_mxfp8"  # of our quantizer, in config.json
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


def model_config(config: ZImageConfig) -> dict[str, Any]:
    """Return what diffusers makes a `ZImageTransformer2DModel` of these sizes from."""
    return {
        "_class_name": "ZImageTransformer2DModel",
        "all_f_patch_size": [1],
        "all_patch_size": [constants.PATCH_SIZE],
        "axes_dims": list(constants.ROPE_AXES),
        "axes_lens": list(constants.ROPE_LENGTHS),
        "cap_feat_dim": config.cap_feat_dim,
        "dim": config.dim,
        "in_channels": config.in_channels,
        "n_heads": config.n_heads,
        "n_kv_heads": config.n_heads,
        "n_layers": config.n_layers,
        "n_refiner_layers": config.n_refiner_layers,
        "norm_eps": constants.NORM_EPS,
        "qk_norm": True,
        "rope_theta": constants.ROPE_THETA,
        "t_scale": constants.TIME_SCALE,
    }
