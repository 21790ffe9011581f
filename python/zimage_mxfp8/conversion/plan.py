"""Deciding what happens to each tensor, and where its bytes will be, before any data is read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from ..checkpoint import quantization as marks
from ..checkpoint.header import TensorInfo, file_size, layout_header
from ..checkpoint.source import Checkpoint, SourceTensor
from ..checkpoint.zimage import group_of, is_zimage, missing_signature, model_prefix
from ..codec import padded_shape, scale_shape
from ..dtypes import FLOAT_NAMES
from ..errors import CheckpointError
from ..recipes import Recipe

# A tile of 32 to 128 rows is encoded at once; this bounds its memory. Real layers have thousands.
MOST_COLUMNS = 1 << 20

Action = Literal["quantize", "keep", "cast"]


@dataclass(frozen=True)
class PlannedTensor:
    """What happens to one tensor of the source.

    Attributes:
        source: where its bytes are.
        action: "quantize" to MXFP8, "keep" its bytes, or "cast" to BF16 (convert_to_quant does
            that to F16 and F32 matrices which it keeps).
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
        return self.source.name.removesuffix(marks.WEIGHT_SUFFIX)


@dataclass(frozen=True)
class Plan:
    """A whole conversion, decided.

    Attributes:
        checkpoint: the source, in the ComfyUI layout.
        recipe: the rules that were applied.
        prefix: what stands before the transformer's tensor names.
        tensors: every tensor of the source, by name.
        header: first bytes of the output file.
        places: where each tensor of the output goes.
        size: bytes of the output file.
        warnings: sentences that the user should see.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    prefix: str
    tensors: dict[str, PlannedTensor]
    header: bytes
    places: dict[str, TensorInfo]
    size: int
    warnings: tuple[str, ...]

    @property
    def quantized(self) -> list[PlannedTensor]:
        """The layers that are quantised, by name."""
        return [planned for planned in self.tensors.values() if planned.action == "quantize"]

    def output_nbytes(self, name: str) -> int:
        """Bytes in the output of what becomes of one source tensor, without the header."""
        planned = self.tensors[name]
        names = [name]
        if planned.action == "quantize":
            names += [planned.layer + marks.SCALE_SUFFIX, planned.layer + marks.MARKER_SUFFIX]
        return sum(self.places[part].nbytes for part in names)


def make_plan(
    checkpoint: Checkpoint,
    recipe: Recipe,
    *,
    any_model: bool = False,
    keep_names: Collection[str] = (),
) -> Plan:
    """Plan the conversion of a checkpoint in the ComfyUI layout.

    Args:
        checkpoint: the source.
        recipe: which layers stay as they are.
        any_model: accept what is not Z-Image; every tensor of it counts as part of the model.
        keep_names: tensors to keep although the recipe would quantise them (NaN or Inf inside).

    Raises:
        CheckpointError: not Z-Image, quantised already, nothing to quantise, or a weight of a type
            that cannot be quantised.
    """
    names = checkpoint.tensors.keys()
    zimage = is_zimage(names)
    prefix = transformer_prefix(checkpoint, any_model=any_model)
    tensors = {
        name: _plan_tensor(checkpoint, checkpoint.tensors[name], recipe, prefix, keep_names)
        for name in sorted(names)
    }
    if not any(planned.action == "quantize" for planned in tensors.values()):
        raise CheckpointError(
            f"{checkpoint.path} has nothing to quantise: the recipe and --exclude-layers keep "
            "every 2-D weight"
        )
    outputs = _output_tensors(checkpoint, tensors)
    # An all-in-one file may describe a quantised text encoder there; that stays.
    markers = marks.header_layers(checkpoint.metadata.get(marks.HEADER_KEY, "")) or {}
    markers |= {
        planned.layer: marks.layer_marker(_matrix_shape(planned.source))
        for planned in tensors.values()
        if planned.action == "quantize"
    }
    metadata = checkpoint.metadata | {marks.HEADER_KEY: marks.header_value(markers)}
    header, places = layout_header(outputs, metadata)
    size = file_size(header, places)
    warnings = _warnings(tensors, recipe, prefix, zimage)
    return Plan(checkpoint, recipe, prefix, tensors, header, places, size, warnings)


def transformer_prefix(checkpoint: Checkpoint, *, any_model: bool) -> str:
    """What stands before the names of the tensors that may be quantised.

    Args:
        checkpoint: the source, in the ComfyUI layout.
        any_model: accept what is not Z-Image; every tensor of it counts as part of the model.

    Raises:
        CheckpointError: not Z-Image, or quantised already.
    """
    names = checkpoint.tensors.keys()
    zimage = is_zimage(names)
    prefix = model_prefix(names) if zimage else ""
    if not any_model and not zimage:
        if missing := missing_signature(names):
            raise CheckpointError(
                f'{checkpoint.path} lacks tensor "{missing[0]}", without which ComfyUI does not '
                "recognise Z-Image; complete it, or give --any-model"
            )
        raise CheckpointError(
            f"{checkpoint.path} is not a Z-Image checkpoint; give --any-model to take every 2-D "
            "weight that no pattern excludes"
        )
    if found := marks.quantized_format(checkpoint, prefix):
        raise CheckpointError(
            f'{checkpoint.path} is quantised already ({found[0]}, see "{found[1]}"); start from '
            "the BF16, F16 or F32 checkpoint"
        )
    return prefix


def _plan_tensor(
    checkpoint: Checkpoint,
    tensor: SourceTensor,
    recipe: Recipe,
    prefix: str,
    keep_names: Collection[str],
) -> PlannedTensor:
    group = group_of(tensor.name, prefix)

    def kept(reason: str, action: Action = "keep") -> PlannedTensor:
        return PlannedTensor(tensor, action, reason, group)

    if not tensor.name.startswith(prefix):
        return kept("not part of the transformer")
    if len(tensor.shape) != 2 or not tensor.name.endswith(marks.WEIGHT_SUFFIX):
        return kept("not a weight matrix")
    for rule in recipe.keep:
        if rule.matches(tensor.name, prefix):
            cast = recipe.source_rounding and tensor.dtype in ("F16", "F32")
            return kept(rule.reason, "cast" if cast else "keep")
    if tensor.name in keep_names:
        return kept("has NaN or Inf (--nonfinite keep)")
    if tensor.nbytes == 0:
        return kept("is empty")
    if tensor.dtype not in FLOAT_NAMES:
        if not tensor.dtype.startswith(("F", "C")):
            return kept(f"is {tensor.dtype}, no floating-point type")
        raise CheckpointError(
            f'{checkpoint.path}: tensor "{tensor.name}" is {tensor.dtype}; only BF16, F16 and F32 '
            "weights can be quantised: convert it, or exclude it with --exclude-layers"
        )
    if tensor.shape[1] > MOST_COLUMNS:
        raise CheckpointError(
            f'{checkpoint.path}: tensor "{tensor.name}" has {tensor.shape[1]:,} columns; more than '
            f"{MOST_COLUMNS:,} cannot be quantised: exclude it with --exclude-layers"
        )
    bias = checkpoint.tensors.get(tensor.name.removesuffix(marks.WEIGHT_SUFFIX) + ".bias")
    has_bias = bias is not None and bias.shape == tensor.shape[:1] and bias.dtype in FLOAT_NAMES
    return PlannedTensor(tensor, "quantize", "", group, bias.name if bias and has_bias else None)


def _matrix_shape(tensor: SourceTensor) -> tuple[int, int]:
    rows, cols = tensor.shape
    return rows, cols


def _output_tensors(
    checkpoint: Checkpoint, tensors: Mapping[str, PlannedTensor]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype, shape) of everything in the output."""
    outputs: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, planned in tensors.items():
        source = planned.source
        if planned.action != "quantize":
            outputs[name] = ("BF16" if planned.action == "cast" else source.dtype), source.shape
            continue
        shape = _matrix_shape(source)
        marker = marks.marker_bytes(marks.layer_marker(shape))
        outputs[name] = "F8_E4M3", padded_shape(shape)
        for suffix, added in (
            (marks.SCALE_SUFFIX, ("U8", scale_shape(shape))),
            (marks.MARKER_SUFFIX, ("U8", (len(marker),))),
        ):
            if planned.layer + suffix in tensors:
                raise CheckpointError(
                    f'{checkpoint.path} already has a tensor "{planned.layer + suffix}", which '
                    f'quantising "{name}" would add'
                )
            outputs[planned.layer + suffix] = added
    return outputs


def _warnings(
    tensors: Mapping[str, PlannedTensor], recipe: Recipe, prefix: str, zimage: bool
) -> tuple[str, ...]:
    idle = [
        rule
        for rule in recipe.keep
        if not any(n.startswith(prefix) and rule.matches(n, prefix) for n in tensors)
    ]
    warnings = []
    if idle and not zimage:
        ours = [rule for rule in idle if not rule.full_name]
        idle = [rule for rule in idle if rule.full_name]
        if ours:
            warnings.append(
                f"{len(ours)} patterns of recipe {recipe.name} match nothing in this model"
            )
    warnings += [f'pattern "{rule.pattern.pattern}" matches no tensor' for rule in idle]
    return tuple(warnings)
