"""The plan of a conversion: each tensor's action and place, decided before data is read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..checkpoint import quantization as markers
from ..checkpoint.header import TensorInfo, file_size, layout_header
from ..checkpoint.identify import Identified
from ..checkpoint.provenance import PROVENANCE_KEY, merged_loras
from ..checkpoint.scopes import COMFYUI_PREFIXES, NOT_TRANSFORMER, Scope, group_of
from ..checkpoint.source import Checkpoint, SourceTensor
from ..checkpoint.structure import (
    MAX_NAMED,
    double_precision,
    missing_or_misshapen,
    structure_error,
    unknown_parameters,
    unknown_weights,
)
from ..dtypes import FLOAT_NAMES
from ..errors import CheckpointError
from ..streaming.formats.weight_format import WeightFormat
from ..text import plural
from .merging import MergedAdapter
from .options import ConversionOptions
from .recipes import Recipe

# A tile of 32 to 128 rows is encoded at once; this bounds its memory. Real layers have thousands.
MAX_COLUMNS = 1 << 20

OUTSIDE = "not part of the transformer"

Action = Literal["quantize", "keep", "cast"]


@dataclass(frozen=True)
class PlannedTensor:
    """The action for one tensor of the source.

    Attributes:
        source: the position of its bytes.
        action: "quantize", "keep" its bytes, or "cast" to BF16 (convert_to_quant does that
            to F16 and F32 matrices that it keeps).
        reason: why it is not quantised; empty if it is.
        group: the row of summary tables that it counts in.
        bias: name of the layer's bias, for quantised layers that have one.
    """

    source: SourceTensor
    action: Action
    reason: str
    group: str
    bias: str | None = None

    @property
    def layer(self) -> str:
        """The layer's name, for a weight."""
        return self.source.name.removesuffix(markers.WEIGHT_SUFFIX)


@dataclass(frozen=True, repr=False)
class Plan:
    """A complete plan of a conversion.

    Attributes:
        source: the checkpoint and its kind.
        options: the options of the conversion.
        tensors: every tensor of the source, by name.
        layers: the marker of each layer that is quantised, by layer name.
        header: first bytes of the output file.
        places: position of each tensor in the output.
        size: bytes of the output file.
        nonfinite: names of weights that are kept because they have NaN or Inf.
        warnings: sentences that the user should see.
        notes: facts about the input and its parts.
        adapters: those merged into the weights of `source`.
    """

    source: Identified
    options: ConversionOptions
    tensors: dict[str, PlannedTensor]
    layers: dict[str, dict[str, Any]]
    header: bytes
    places: dict[str, TensorInfo]
    size: int
    nonfinite: frozenset[str]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    adapters: tuple[MergedAdapter, ...] = ()

    def __repr__(self) -> str:
        return (
            f"Plan({str(self.checkpoint.path)!r}, recipe {self.recipe.name!r}: "
            f"{plural(len(self.quantized), 'layer')} of {plural(len(self.tensors), 'tensor')} in "
            f"{self.options.weight_format.title}, {self.size:,} bytes)"
        )

    @property
    def checkpoint(self) -> Checkpoint:
        """The source, in the ComfyUI layout."""
        return self.source.checkpoint

    @property
    def recipe(self) -> Recipe:
        """The rules that were applied."""
        return self.options.rules

    @property
    def scope(self) -> Scope:
        """The tensors that may be quantised."""
        return self.source.scope

    def with_source_hashes(self, hashes: Sequence[str]) -> Plan:
        """Return the same plan with the SHA-256 of each file of the source in the header."""
        planned = make_plan(
            self.source,
            self.options,
            keep_names=self.nonfinite,
            source_hashes=hashes,
            adapters=self.adapters,
        )
        return replace(planned, warnings=self.warnings, notes=self.notes)

    @property
    def quantized(self) -> list[PlannedTensor]:
        """The layers that are quantised, by name."""
        return [planned for planned in self.tensors.values() if planned.action == "quantize"]

    def output_nbytes(self, name: str) -> int:
        """Return the bytes that one source tensor takes in the output, without the header."""
        planned = self.tensors[name]
        names = [name]
        if planned.action == "quantize":
            names += [planned.layer + markers.SCALE_SUFFIX, planned.layer + markers.MARKER_SUFFIX]
        return sum(self.places[part].nbytes for part in names)


def make_plan(
    source: Identified,
    options: ConversionOptions,
    *,
    keep_names: Collection[str] = (),
    source_hashes: Sequence[str] | None = None,
    adapters: Sequence[MergedAdapter] = (),
) -> Plan:
    """Plan the conversion of a checkpoint.

    Args:
        source: a plain checkpoint, as `open_for(..., "convert")` gives it.
        options: the options of the conversion.
        keep_names: tensors to keep although the recipe would quantise them (they have NaN or Inf).
        adapters: those that are merged into `source`.
        source_hashes: SHA-256 of each file of the source, for `hash_source`. By default text of the
            same length takes their place, and the layout is the same.

    Raises:
        CheckpointError: not a whole Z-Image, nothing to quantise, or a weight of a type that
            cannot be quantised.
    """
    checkpoint, scope, recipe = source.checkpoint, source.scope, options.rules
    form = options.weight_format
    full_precision_modulations = options.modulation_matmul == "full"
    if scope.zimage and not options.any_model:
        check_structure(source)
    tensors = {
        name: _plan_tensor(checkpoint, checkpoint.tensors[name], recipe, scope, keep_names)
        for name in sorted(checkpoint.tensors)
    }
    if not any(planned.action == "quantize" for planned in tensors.values()):
        raise CheckpointError(
            f"{checkpoint.path} has nothing to quantise: every 2-D weight is kept",
            "choose another `recipe`, or exclude less with `exclude_layers`",
        )
    layers = {
        planned.layer: form.marker(
            _matrix_shape(planned.source),
            full_precision=full_precision_modulations
            and scope.table.is_modulation(scope.inner(planned.layer)),
        )
        for planned in tensors.values()
        if planned.action == "quantize"
    }
    outputs = _output_tensors(checkpoint, tensors, layers, form)
    metadata = dict(checkpoint.metadata)
    # An all-in-one file may describe a quantised text encoder there; that stays.
    described = markers.header_layers(metadata.pop(markers.HEADER_KEY, "")) or {}
    # With a prefix, ComfyUI adds the header's layers under both names, and warns about those that
    # the model does not have; markers are enough for it.
    if not scope.prefix or recipe.reproduces_convert_to_quant:
        described |= {name: markers.header_entry(marker) for name, marker in layers.items()}
    if described:
        metadata[markers.HEADER_KEY] = markers.header_value(described)
    if source_hashes is None:
        source_hashes = ["0" * 64 for _ in checkpoint.files]
    loras = [*merged_loras(metadata), *(adapter.identity for adapter in adapters)]
    provenance = options.provenance(source_hashes, loras)
    if provenance is not None:
        metadata[PROVENANCE_KEY] = json.dumps(provenance)
    header, places = layout_header(outputs, metadata)
    return Plan(
        source,
        options,
        tensors,
        layers,
        header,
        places,
        file_size(header, places),
        frozenset(keep_names),
        (*_warnings(tensors, recipe, scope), *_refused_later(source), *_other_shards(source)),
        _notes(source, tensors),
        tuple(adapters),
    )


def check_structure(source: Identified) -> None:
    """Check that a Z-Image is whole and has no unknown weights.

    Raises:
        CheckpointError: if it is not; the sentence names up to five tensors.
    """
    checkpoint, scope = source.checkpoint, source.scope
    problems = missing_or_misshapen(checkpoint, scope) or unknown_weights(checkpoint, scope)
    if problems:
        raise structure_error(checkpoint, scope, problems)


def _plan_tensor(
    checkpoint: Checkpoint,
    tensor: SourceTensor,
    recipe: Recipe,
    scope: Scope,
    keep_names: Collection[str],
) -> PlannedTensor:
    group = group_of(tensor.name, scope)

    def kept(reason: str, action: Action = "keep") -> PlannedTensor:
        return PlannedTensor(tensor, action, reason, group)

    if tensor.name not in scope:
        return kept(OUTSIDE)
    if len(tensor.shape) != 2 or not tensor.name.endswith(markers.WEIGHT_SUFFIX):
        return kept("not a weight matrix")
    for rule in recipe.keep:
        if rule.matches(tensor.name, scope.prefix):
            cast = recipe.source_rounding and tensor.dtype in ("F16", "F32")
            return kept(rule.reason, "cast" if cast else "keep")
    if tensor.name in keep_names:
        return kept("has NaN or Inf")
    if tensor.nbytes == 0:
        return kept("is empty")
    if tensor.dtype not in FLOAT_NAMES:
        if not tensor.dtype.startswith(("F", "C")):
            return kept(f"is {tensor.dtype}, not a floating-point type")
        raise CheckpointError(
            f'{checkpoint.path}: tensor "{tensor.name}" is {tensor.dtype}; only BF16, F16 and F32 '
            "weights can be quantised",
            "convert it, or exclude it with `exclude_layers`",
        )
    if tensor.shape[1] > MAX_COLUMNS:
        raise CheckpointError(
            f'{checkpoint.path}: tensor "{tensor.name}" has {tensor.shape[1]:,} columns; more than '
            f"{MAX_COLUMNS:,} cannot be quantised",
            "exclude it with `exclude_layers`",
        )
    bias = checkpoint.tensors.get(tensor.name.removesuffix(markers.WEIGHT_SUFFIX) + ".bias")
    has_bias = bias is not None and bias.shape == tensor.shape[:1] and bias.dtype in FLOAT_NAMES
    return PlannedTensor(tensor, "quantize", "", group, bias.name if bias and has_bias else None)


def _matrix_shape(tensor: SourceTensor) -> tuple[int, int]:
    rows, cols = tensor.shape
    return rows, cols


def _output_tensors(
    checkpoint: Checkpoint,
    tensors: Mapping[str, PlannedTensor],
    layers: Mapping[str, Mapping[str, object]],
    form: WeightFormat,
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return name -> (dtype, shape) of everything in the output."""
    outputs: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, planned in tensors.items():
        source = planned.source
        if planned.action != "quantize":
            outputs[name] = ("BF16" if planned.action == "cast" else source.dtype), source.shape
            continue
        shape = _matrix_shape(source)
        marker = markers.marker_bytes(layers[planned.layer])
        outputs[name] = form.codes(shape)
        for suffix, added in (
            (markers.SCALE_SUFFIX, form.scales(shape)),
            (markers.MARKER_SUFFIX, ("U8", (len(marker),))),
        ):
            if planned.layer + suffix in tensors:
                raise CheckpointError(
                    f'{checkpoint.path} already has a tensor "{planned.layer + suffix}", which '
                    f'quantising "{name}" would add',
                    "take it out of the file",
                )
            outputs[planned.layer + suffix] = added
    return outputs


def _warnings(
    tensors: Mapping[str, PlannedTensor], recipe: Recipe, scope: Scope
) -> tuple[str, ...]:
    idle = [
        rule
        for rule in recipe.keep
        if not any(name in scope and rule.matches(name, scope.prefix) for name in tensors)
    ]
    warnings = []
    if idle and not scope.zimage:
        ours = [rule for rule in idle if not rule.full_name]
        idle = [rule for rule in idle if rule.full_name]
        if ours:
            warnings.append(
                f"{len(ours)} patterns of recipe {recipe.name} match nothing in this model"
            )
    warnings += [f'pattern "{rule.pattern.pattern}" matches no tensor' for rule in idle]
    if scope.zimage and scope.prefix not in COMFYUI_PREFIXES:
        warnings.append(
            f'tensor names keep their prefix "{scope.prefix}", which ComfyUI does not support: it '
            "will not load the file"
        )
    return tuple(warnings)


def _refused_later(source: Identified) -> list[str]:
    """Return warnings about tensors that ComfyUI takes or ignores, and that `generate` refuses."""
    if not source.scope.zimage:
        return []
    problems = unknown_parameters(source.checkpoint, source.scope)
    problems += double_precision(source.checkpoint, source.scope)
    return [
        f'"{name}" {problem}: it is copied, and generate refuses the converted file'
        for name, problem in problems[:MAX_NAMED]
    ] + ([f"{len(problems) - MAX_NAMED} more of such tensors"] if problems[MAX_NAMED:] else [])


def _other_shards(source: Identified) -> list[str]:
    if not source.is_shard_of_another:
        return []
    return [f"{source.checkpoint.path} is one shard of several: the others are not converted"]


def _notes(source: Identified, tensors: Mapping[str, PlannedTensor]) -> tuple[str, ...]:
    scope, notes = source.scope, []
    if scope.zimage and scope.prefix and scope.prefix in COMFYUI_PREFIXES:
        notes.append(f'the transformer is under the prefix "{scope.prefix}"')
    outside = Counter(
        planned.group.removesuffix(NOT_TRANSFORMER)
        for planned in tensors.values()
        if planned.reason == OUTSIDE
    )
    if outside:
        parts = ", ".join(f"{name} ({count:,})" for name, count in sorted(outside.items())[:5])
        rest = f" and {len(outside) - 5} more" if len(outside) > 5 else ""
        notes.append(
            f"{plural(outside.total(), 'tensor')} outside the transformer copied unchanged: "
            f"{parts}{rest}"
        )
    notes += [
        f'the copy of the transformer under "{other.prefix}" is not quantised'
        for other in source.others
    ]
    return tuple(notes)
