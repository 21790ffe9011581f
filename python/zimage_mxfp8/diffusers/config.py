"""The configuration that diffusers passes to the quantizer and writes to `config.json`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from enum import Enum
from typing import Any

from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from ..checkpoint.diffusers_config import CUSTOM_RECIPE, QUANT_METHOD, quantization_config
from ..conversion.options import ConversionOptions
from ..conversion.recipes import DEFAULT, Recipe, builtin_names
from ..transformer.compute import Compute
from .linear import check_compute


class Method(str, Enum):
    """The quantizer's name, as diffusers reads it."""

    ZIMAGE_MXFP8 = QUANT_METHOD


class ZImageMXFP8Config(QuantizationConfigMixin):  # type: ignore[misc]
    """What `from_pretrained` does to the linear layers of a `ZImageTransformer2DModel`.

        ZImageMXFP8Config(recipe="zimage", compute="fp8")

    For a folder that is quantised already, diffusers takes the configuration in its `config.json`
    instead; `set_compute` then changes the compute mode.

    Args:
        recipe: a built-in recipe, the path of a TOML file or a `Recipe`: the layers to keep.
        exclude_layers: regular expressions of more layers to keep, searched in ComfyUI's names.
        compute: how quantised layers are multiplied: "weight-only", "fp8", "mxfp8" or
            "mxfp8-emulated". In mode "fp8" the weights are folded when they have been loaded.

    Raises:
        UsageError: no such recipe or mode, or a pattern that is not a regular expression.
        RecipeError: the file is not a valid recipe.
    """

    def __init__(
        self,
        recipe: str | os.PathLike[str] | Recipe = DEFAULT,
        exclude_layers: Iterable[str] = (),
        compute: Compute = "weight-only",
    ) -> None:
        options = ConversionOptions(recipe=recipe, exclude_layers=exclude_layers)
        self.quant_method = Method.ZIMAGE_MXFP8
        self.rules = options.rules
        self.recipe = options.rules.name if options.rules.name in builtin_names() else CUSTOM_RECIPE
        self.exclude_layers = list(options.exclude_layers)
        self.compute = check_compute(compute)

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Return the configuration of a quantised folder.

        Its recipe has no rules: the file shows which layers are quantised.
        """
        config = cls.__new__(cls)
        config.quant_method = Method.ZIMAGE_MXFP8
        config.recipe = str(config_dict.get("recipe", CUSTOM_RECIPE))
        config.rules = Recipe(config.recipe, title="", description="", keep=())
        config.exclude_layers = list(config_dict.get("exclude_layers", ()))
        config.compute = check_compute(config_dict.get("compute", "weight-only"))
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """Return the entry of `config.json`."""
        return quantization_config(self.recipe, self.exclude_layers, self.compute)

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the same, for the base class's `repr`."""
        return self.to_dict()
