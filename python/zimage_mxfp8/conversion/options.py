"""The options that decide the bytes of a converted file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypedDict

from .. import _core, checks
from ..checkpoint import kinds
from ..checkpoint.kinds import Kind
from ..errors import UsageError
from ..streaming.formats import FORMAT_NAMES, FORMATS, FormatName
from ..streaming.formats.weight_format import WeightFormat
from ..zimage.sampling import sampler_timesteps
from .bias_correction import MODES, Mode
from .recipes import CONTROLNET, DEFAULT, Recipe, builtin_names, load_recipe

NonFinite = Literal["error", "keep"]
ModulationMatmul = Literal["quantised", "full"]
MAX_SAMPLES = 1_000_000  # of random input, drawn at once
AnyPath = str | os.PathLike[str]


class ConversionKeywords(TypedDict, total=False):
    """The fields of `ConversionOptions` as keyword arguments."""

    format: FormatName
    recipe: str | os.PathLike[str] | Recipe
    exclude_layers: Iterable[str]
    any_model: bool
    nonfinite: NonFinite
    bias_correction: Mode
    timesteps: str | int
    calibration_samples: int
    seed: int
    modulation_matmul: ModulationMatmul
    hash_source: bool
    loras: Iterable[AnyPath | tuple[AnyPath, float]]


@dataclass(frozen=True)
class ConversionOptions:
    r"""The options that decide the bytes of a converted file, checked on creation.

        options = ConversionOptions(recipe="zimage", exclude_layers=[r"layers\.29\."])

    Attributes:
        format: "mxfp8", or "int8-convrot": INT8 with one scale per row, after a rotation of blocks
            of columns, as convert_to_quant 1.3.4 encodes it without learning.
        recipe: name of a built-in recipe, path of a TOML file, or a `Recipe`. For a ControlNet
            "uniform" means the recipe "controlnet".
        exclude_layers: regular expressions, searched in the tensors' full names; matching tensors
            are kept in addition to the recipe's. Stored as a tuple.
        any_model: accept a checkpoint that is not Z-Image, and quantise every 2-D weight that no
            pattern excludes.
        nonfinite: what to do with a tensor of the transformer that has NaN or Inf: "error", or
            "keep" it unchanged (the weights are then read twice).
        bias_correction: "timesteps" preserves a modulation's mean output over the sampler's
            timesteps; "synthetic" reproduces convert_to_quant 1.3.4 for MXFP8 (needs torch);
            "none" leaves biases alone.
        timesteps: for "timesteps": "turbo" (8 steps), "base" (50 steps) or a number of steps.
        calibration_samples: for "synthetic": rows of random input, up to 1,000,000.
        seed: for "synthetic": seed of the random numbers, below 2^63.
        modulation_matmul: "full" asks ComfyUI not to quantise the input of quantised modulations
            on GPUs that multiply the format; it is one row per block.
        hash_source: write the SHA-256 of the source's files into the header, which reads them once
            more. Version, recipe and correction are always written, unless the recipe reproduces
            convert_to_quant's files.
        loras: adapters to merge into the weights before they are quantised: files, or pairs of a
            file and a weight (1 by default, may be negative). `W + sum(weight * dW)` is rounded
            once. A tuple of pairs, whatever was given.
        rules: the recipe, loaded, with the patterns to exclude.

    Raises:
        UsageError: if a value is invalid, or contradicts the recipe.
        RecipeError: the file is not a valid recipe.
    """

    format: FormatName = "mxfp8"
    recipe: str | os.PathLike[str] | Recipe = DEFAULT
    exclude_layers: Iterable[str] = ()
    any_model: bool = False
    nonfinite: NonFinite = "error"
    bias_correction: Mode = "timesteps"
    timesteps: str | int = "turbo"
    calibration_samples: int = 3072
    seed: int = 42
    modulation_matmul: ModulationMatmul = "quantised"
    hash_source: bool = False
    loras: Iterable[AnyPath | tuple[AnyPath, float]] = ()
    rules: Recipe = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.format not in FORMAT_NAMES:
            names = " or ".join(FORMAT_NAMES)
            raise UsageError("format", f"must be {names}, not {repr(self.format)[:80]}")
        if self.nonfinite not in ("error", "keep"):
            raise UsageError("nonfinite", f'must be "error" or "keep", not "{self.nonfinite}"')
        if self.bias_correction not in MODES:
            raise UsageError("bias_correction", f"must be one of {', '.join(MODES)}")
        if self.bias_correction == "timesteps":
            sampler_timesteps(self.timesteps)  # refuse invalid values even if no layer needs them
        samples = checks.whole_number("calibration_samples", self.calibration_samples)
        if not 1 <= samples <= MAX_SAMPLES:
            raise UsageError("calibration_samples", f"must be 1 to {MAX_SAMPLES:,}, not {samples}")
        if not 0 <= checks.whole_number("seed", self.seed) < 2**63:
            raise UsageError("seed", "must be 0 or more, and below 2^63")
        if self.modulation_matmul not in ("quantised", "full"):
            raise UsageError(
                "modulation_matmul",
                f'must be "quantised" or "full", not "{self.modulation_matmul}"',
            )
        recipe = self.recipe
        rules = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
        if isinstance(self.exclude_layers, str):  # an iterable too, of letters
            raise UsageError("exclude_layers", "must be a list of patterns, not a single text")
        object.__setattr__(self, "loras", weighted_files(self.loras))
        patterns = tuple(self.exclude_layers)
        object.__setattr__(self, "exclude_layers", patterns)
        object.__setattr__(self, "rules", rules.excluding(patterns))
        if not self.weight_format.can_reproduce_convert_to_quant:
            self._check_no_reproduction()
        if self.rules.reproduces_convert_to_quant:
            for argument, given in (
                ("modulation_matmul", self.modulation_matmul == "full"),
                ("hash_source", self.hash_source),
                ("loras", bool(self.loras)),
            ):
                if given:
                    raise UsageError(
                        argument,
                        f"changes the file, and recipe {rules.name} reproduces convert_to_quant's "
                        "byte for byte",
                        "choose another `recipe`, or drop it",
                    )

    @property
    def weight_format(self) -> WeightFormat:
        """The format that weights are encoded in."""
        return FORMATS[self.format]

    def _check_no_reproduction(self) -> None:
        """Refuse options that reproduce convert_to_quant's MXFP8 files."""
        if self.rules.reproduces_convert_to_quant:
            raise UsageError(
                "recipe",
                f"{self.rules.name} reproduces convert_to_quant's MXFP8 files, and the format is "
                f"{self.format}",
                "choose another `recipe`",
            )
        if self.bias_correction == "synthetic":
            raise UsageError(
                "bias_correction",
                f"synthetic reproduces convert_to_quant's MXFP8 files, and the format is "
                f"{self.format}",
                'choose `bias_correction="timesteps"`, or none',
            )

    @property
    def weighted_loras(self) -> tuple[tuple[Path, float], ...]:
        """The pairs that `loras` is after the checks."""
        return weighted_files(self.loras)

    def for_kind(self, kind: Kind) -> ConversionOptions:
        """Return these options, with the default recipe of a kind of file in place of the default.

        Args:
            kind: of the source.
        """
        if kind is kinds.ZIMAGE_CONTROLNET and self.rules.name == DEFAULT:
            return replace(self, recipe=CONTROLNET)
        return self

    def provenance(
        self, source_hashes: Sequence[str], loras: Sequence[Mapping[str, Any]] = ()
    ) -> dict[str, Any] | None:
        """Return the metadata about the file's origin; None if it must equal convert_to_quant's.

        There are neither names nor times in it: the same input and options give the same bytes.

        Args:
            source_hashes: SHA-256 of each file of the source, with `hash_source`.
            loras: SHA-256 and weight of each adapter, with those merged before.
        """
        if self.rules.reproduces_convert_to_quant:
            return None
        made: dict[str, Any] = {
            "version": _core.__version__,
            "recipe": self.rules.name if self.rules.name in builtin_names() else "custom",
        }
        if self.format != "mxfp8":  # which files of earlier versions do not name
            made["format"] = self.format
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
        if loras:
            made["loras"] = list(loras)
        return made


def weighted_files(loras: Any) -> tuple[tuple[Path, float], ...]:
    """Return adapters as pairs of a file and a weight.

    Args:
        loras: files, or pairs of a file and a weight.

    Raises:
        UsageError: it is something else, or a weight is not finite.
    """
    if isinstance(loras, (str, bytes, os.PathLike)) or not isinstance(loras, Iterable):
        raise UsageError(
            "loras", f"must be a list of files, or of (file, weight), not {repr(loras)[:80]}"
        )
    pairs = []
    for lora in loras:
        is_pair = isinstance(lora, (tuple, list)) and len(lora) == 2
        path, weight = lora if is_pair else (lora, 1.0)
        file = checks.path("loras", path)
        try:
            pairs.append((file, checks.finite_number("loras", weight)))
        except UsageError as error:
            raise UsageError("loras", f"has a weight for {file} that {error.problem}") from None
    return tuple(pairs)
