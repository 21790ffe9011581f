"""What decides the bytes of a converted file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from .. import _core
from ..errors import UsageError
from ..zimage.sampling import sampler_timesteps
from .bias_correction import MODES, Mode
from .recipes import DEFAULT, Recipe, builtin_names, load_recipe

NonFinite = Literal["error", "keep"]
ModulationMatmul = Literal["quantised", "full"]


@dataclass(frozen=True)
class ConversionOptions:
    """The options of a conversion; `convert` describes them. They are checked when made."""

    recipe: str | os.PathLike[str] | Recipe = DEFAULT
    exclude_layers: Sequence[str] = ()
    any_model: bool = False
    nonfinite: NonFinite = "error"
    bias_correction: Mode = "timesteps"
    timesteps: str | int = "turbo"
    calibration_samples: int = 3072
    seed: int = 42
    modulation_matmul: ModulationMatmul = "quantised"
    hash_source: bool = False
    rules: Recipe = field(init=False, repr=False)  # the recipe with the patterns to exclude

    def __post_init__(self) -> None:
        if self.nonfinite not in ("error", "keep"):
            raise UsageError(f'nonfinite must be "error" or "keep", not "{self.nonfinite}"')
        if self.bias_correction not in MODES:
            raise UsageError(f"bias_correction must be one of {', '.join(MODES)}")
        if self.bias_correction == "timesteps":
            sampler_timesteps(self.timesteps)  # refuse nonsense even where no layer needs it
        if self.modulation_matmul not in ("quantised", "full"):
            raise UsageError(
                f'modulation_matmul must be "quantised" or "full", not "{self.modulation_matmul}"'
            )
        recipe = self.recipe
        rules = recipe if isinstance(recipe, Recipe) else load_recipe(os.fspath(recipe))
        object.__setattr__(self, "exclude_layers", tuple(self.exclude_layers))
        object.__setattr__(self, "rules", rules.excluding(self.exclude_layers))
        if self.rules.reproduces_convert_to_quant:
            for option, given in (
                ("--modulation-matmul full", self.modulation_matmul == "full"),
                ("--hash-source", self.hash_source),
            ):
                if given:
                    raise UsageError(
                        f"{option} changes the file, and recipe {rules.name} reproduces "
                        "convert_to_quant's byte for byte; choose another recipe, or drop it"
                    )

    def provenance(self, source_hashes: Sequence[str]) -> dict[str, Any] | None:
        """What the file says of its origin; None if it is to equal another program's.

        Neither names nor times: the same input and options give the same bytes.

        Args:
            source_hashes: SHA-256 of each file of the source, with `hash_source`.
        """
        if self.rules.reproduces_convert_to_quant:
            return None
        made: dict[str, Any] = {
            "version": _core.__version__,
            "recipe": self.rules.name if self.rules.name in builtin_names() else "custom",
        }
        if self.exclude_layers:
            made["exclude_layers"] = list(self.exclude_layers)
        made["bias_correction"] = self.bias_correction
        if self.bias_correction == "timesteps":
            named = self.timesteps in ("turbo", "base")
            made["timesteps"] = self.timesteps if named else int(self.timesteps)
        if self.modulation_matmul == "full":
            made["modulation_matmul"] = "full"
        if self.hash_source:
            made["source_sha256"] = list(source_hashes)
        return made
