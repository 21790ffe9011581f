"""What is in an adapter file, told from its header and its alphas."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..checkpoint.adapters import adapted_model
from ..checkpoint.source import Checkpoint, SourceTensor, TensorReader
from ..zimage.layers import ZIMAGE, zimage_shapes
from ..zimage.rows import Shape
from .files import MAX_AXES, Settings, peft_settings, read_float32
from .keys import FLAGS, RANK_SCALED_FLAG, Role, is_text_encoder_key, split_key, unsupported_type
from .targets import Target, Targets

# Header entries of trainers that name the model.
_BASE_MODEL = (
    "modelspec.architecture",
    "ss_base_model_version",
    "base_model",
    "base_model_name_or_path",
    "ss_sd_model_name",
)
_LONGEST_NAME = 200  # characters


@dataclass
class AdapterSummary:
    """What is in an adapter file.

    Attributes:
        model: which model the names belong to; None if unknown.
        base_model: what the header says of the model that it was trained on; None if nothing.
        kinds: number of modules by kind: "LoRA", "LoHa", "LoKr", "DoRA", "difference", "OFT", ...
        spellings: number of modules by what stands before their names.
        dtypes: number of tensors by dtype.
        ranks: number of modules by rank.
        alphas: number of modules by alpha, of a tensor or else of the header; of those without one
            alpha is the rank.
        rank_scaled: alpha is over the rank's root (rsLoRA), not over the rank.
        targets: number of modules that fit Z-Image, by stack and layer.
        misfits: modules of Z-Image's names that do not fit it, each with the reason.
        resized: how many of them would fit a Z-Image of other widths.
        unmatched: names of tensors that belong to nothing in Z-Image.
        text_encoder: names of tensors for the text encoder.
    """

    model: str | None
    base_model: str | None
    kinds: dict[str, int] = field(default_factory=dict)
    spellings: dict[str, int] = field(default_factory=dict)
    dtypes: dict[str, int] = field(default_factory=dict)
    ranks: dict[int, int] = field(default_factory=dict)
    alphas: dict[float, int] = field(default_factory=dict)
    rank_scaled: bool = False
    targets: dict[str, int] = field(default_factory=dict)
    misfits: dict[str, str] = field(default_factory=dict)
    resized: int = 0
    unmatched: list[str] = field(default_factory=list)
    text_encoder: list[str] = field(default_factory=list)

    @property
    def is_for_other_widths(self) -> bool:
        """Whether it fits no released Z-Image, and perhaps one of other widths."""
        return bool(self.resized) and not self.targets

    @property
    def fitting(self) -> int:
        """The number of modules that fit Z-Image."""
        return sum(self.targets.values())

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity: an alpha is a text there."""
        return vars(self) | {
            "alphas": {f"{alpha:g}": count for alpha, count in self.alphas.items()},
            "fitting": self.fitting,
        }


def summarise(checkpoint: Checkpoint) -> AdapterSummary:
    """Describe an adapter; reads the header, and the alphas.

    Raises:
        CheckpointError: the file cannot be read.
    """
    tensors = checkpoint.tensors
    shapes = zimage_shapes()
    targets = Targets(ZIMAGE.count_blocks(shapes))
    header = peft_settings(checkpoint.metadata) or {}
    settings = Settings(header)
    summary = AdapterSummary(adapted_model(tensors), _base_model(checkpoint.metadata, header))
    summary.dtypes = dict(Counter(tensor.dtype for tensor in tensors.values()))
    modules: dict[tuple[str, str], dict[Role, SourceTensor]] = {}
    for name, tensor in tensors.items():
        if name in FLAGS:
            continue
        key = split_key(name)
        if is_text_encoder_key(name):
            summary.text_encoder.append(name)
        elif key is None:
            summary.unmatched.append(name)
        else:
            modules.setdefault((key.prefix, key.module), {})[key.role] = tensor
    counts: dict[str, Counter[Any]] = {
        name: Counter() for name in ("kinds", "spellings", "ranks", "alphas", "targets")
    }
    with TensorReader() as reader:
        flag = _number(tensors.get(RANK_SCALED_FLAG), reader)
        summary.rank_scaled = settings.rank_scaled or bool(flag)
        for (prefix, module), roles in modules.items():
            target = targets.find(module)
            if target is None or f"{target.layer}.weight" not in shapes:
                summary.unmatched += [tensor.name for tensor in roles.values()]
            elif problem := _problem(roles):
                summary.misfits[prefix + module] = problem
            elif problem := _other_size(roles, target, shapes[f"{target.layer}.weight"]):
                summary.misfits[prefix + module] = problem
                summary.resized += 1
            else:
                counts["targets"][_title(target)] += 1
            counts["kinds"][_kind(roles)] += 1
            counts["spellings"][prefix] += 1
            if rank := _rank(roles):
                counts["ranks"][rank] += 1
            alpha = _number(roles.get("alpha"), reader)
            if rank and "alpha" not in roles:
                alpha = settings.alpha(module)
            if alpha is not None:
                counts["alphas"][alpha] += 1
    for name, counter in counts.items():
        setattr(summary, name, dict(sorted(counter.items())))
    return summary


def _title(target: Target) -> str:
    """Return stack and layer, such as "layers attention.qkv (to_q)"."""
    at = ZIMAGE.split(target.layer)
    if at is None:
        return target.layer
    part = ""
    if target.parts > 1:
        names = next(layer.diffusers for layer in ZIMAGE.block if layer.name == at.part)
        part = f" ({names[target.part].rpartition('.')[2]})"
    return f"{at.stack} {at.part}{part}"


def _kind(roles: Mapping[Role, SourceTensor]) -> str:
    for role in ("unsupported", "mid"):
        if role in roles:
            return unsupported_type(roles[role].name) or "unknown"
    if "magnitude" in roles:
        return "DoRA"
    if "down" in roles or "up" in roles:
        return "LoRA"
    if any(role.startswith("hada") for role in roles):
        return "LoHa"
    if any(role.startswith("lokr") for role in roles):
        return "LoKr"
    if "diff" in roles or "diff_bias" in roles:
        return "difference"
    return "incomplete"


def _rank(roles: Mapping[Role, SourceTensor]) -> int | None:
    for role in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
        if role in roles and roles[role].shape:
            return roles[role].shape[0]
    return None


def _number(tensor: SourceTensor | None, reader: TensorReader) -> float | None:
    if tensor is None or len(tensor.shape) > MAX_AXES or math.prod(tensor.shape) != 1:
        return None
    values = read_float32(tensor, reader)
    return None if values is None else float(values.reshape(()))


def _problem(roles: Mapping[Role, SourceTensor]) -> str | None:
    """Return why a module fits no layer of any size, as a clause; None if it may fit one."""
    if "unsupported" in roles or "mid" in roles:
        return f"is {_kind(roles)}, which is not supported"
    if _shape(roles) is None and not roles.keys() <= {"diff_bias", "up_bias", "alpha"}:
        return "lacks a matrix, or has one of another number of axes"
    return None


def _other_size(roles: Mapping[Role, SourceTensor], target: Target, shape: Shape) -> str | None:
    """Return for which size of its layer a module is, as a clause; None if it fits `shape`."""
    found = _shape(roles)
    want = (shape[0] // target.parts, *shape[1:])
    if found is None or found == want:
        return None
    return f"is for a layer of {_times(found)}, not {_times(want)}"


def _times(shape: Shape) -> str:
    return " x ".join(map(str, shape))


def _shape(roles: Mapping[Role, SourceTensor]) -> Shape | None:
    """Return the shape of the weight that tensors change; None if they do not tell."""

    def shape(*names: Role) -> Shape | None:
        """Return rows of the first and columns of the last matrix."""
        found = [roles[name].shape for name in names if name in roles]
        if len(found) < len(names) or any(len(x) != 2 for x in found):
            return None
        return found[0][0], found[-1][1]

    if "down" in roles or "up" in roles:
        return shape("up", "down")
    if any(role.startswith("hada") for role in roles):
        return shape("hada_w1_a", "hada_w1_b")
    if "diff" in roles:
        return roles["diff"].shape
    left = shape("lokr_w1") or shape("lokr_w1_a", "lokr_w1_b")
    right = shape("lokr_w2") or shape("lokr_w2_a", "lokr_w2_b")
    return (left[0] * right[0], left[1] * right[1]) if left and right else None


def _base_model(metadata: Mapping[str, str], settings: Mapping[str, Any]) -> str | None:
    named = dict(metadata)
    for key, value in settings.items():
        if isinstance(value, str):
            named.setdefault(str(key).rpartition(".")[2], value)
    found = [named[key] for key in _BASE_MODEL if isinstance(named.get(key), str) and named[key]]
    return ", ".join(dict.fromkeys(found))[:_LONGEST_NAME] or None
