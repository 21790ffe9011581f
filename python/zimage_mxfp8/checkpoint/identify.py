"""Recognition of checkpoints, and opening them for a use."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from ..checks import file_or_folder
from ..errors import CheckpointError, WrongKindError
from ..text import plural
from ..zimage.control import control_table
from ..zimage.layers import ZIMAGE
from ..zimage.table import LayerTable
from . import kinds
from .adapters import describe_adapter, find_adapter_tensor, is_adapter
from .diffusers_layout import (
    has_scales_to_stack,
    is_diffusers_layout,
    other_patch_size,
    to_comfyui_layout,
)
from .foreign_files import refuse, single_files
from .kinds import Kind, Use
from .quantization import find_format
from .scopes import WHOLE_FILE, Scope, find_scopes
from .source import Checkpoint, open_checkpoint

_SHARD_NAME = re.compile(r"-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors$")


def _part_pattern(table: LayerTable) -> re.Pattern[str]:
    """Return a pattern that finds names of a part of a model that other models do not have."""
    layers = [layer.name for layer in table.block if layer.is_matrix]
    anchor = table.anchor.partition(".")[0]
    parts = [re.escape(stack.name) + r"\.\d+" for stack in table.stacks if not stack.main]
    parts += [
        rf"{re.escape(table.main.name)}\.\d+\.{re.escape(name.removesuffix('.0'))}"
        for name in layers
        if not name.startswith("attention.")  # which many models have
    ]
    parts += [re.escape(x.name) for x in table.outside if x.name.startswith(f"{anchor}.")]
    parts += [re.escape(theirs.partition(".")[0]) for theirs, _ in table.diffusers_modules]
    return re.compile(rf"(?:^|\.)(?:{'|'.join(parts)})\.")


_ZIMAGE_PART = _part_pattern(ZIMAGE)
_TEXT_EMBEDDING = re.compile(
    r"(?:^|\.)(?:embed_tokens|tok_embeddings|word_embeddings|shared|wte)\.weight$"
)
_LUMINA2_ONLY = re.compile(
    r"(?:^|\.)layers\.\d+\.adaLN_modulation\.1\.weight$|(?:^|\.)time_caption_embed\."
)

# By names, the first that fits: parts of a pipeline come last, since a file of a whole pipeline
# has them too.
_FAMILIES: tuple[tuple[Kind, re.Pattern[str]], ...] = (
    (
        kinds.ZIMAGE_CONTROLNET,
        re.compile(r"(?:^|\.)(?:control_layers|control_noise_refiner|control_all_x_embedder)\."),
    ),
    (
        kinds.CONTROLNET,
        re.compile(
            r"(?:^|\.)(?:controlnet_\w+|control_model|zero_convs|input_hint_block|"
            r"controlnet_cond_embedding)\."
        ),
    ),
    (
        kinds.FLUX,
        re.compile(r"(?:^|\.)(?:double_blocks\.\d+\.img_attn|single_transformer_blocks\.\d+)\."),
    ),
    (kinds.QWEN_IMAGE, re.compile(r"(?:^|\.)transformer_blocks\.\d+\.img_mod\.")),
    (
        kinds.WAN,
        re.compile(
            r"(?:^|\.)(?:blocks\.\d+\.(?:self_attn|cross_attn)\.[qkvo]|condition_embedder)\."
        ),
    ),
    (
        kinds.SDXL,
        re.compile(r"(?:^|\.)(?:label_emb\.\d|add_embedding\.linear_\d|conditioner\.embedders\.)"),
    ),
    (
        kinds.STABLE_DIFFUSION,
        re.compile(
            r"(?:^|\.)(?:input_blocks\.\d+\.\d+|down_blocks\.\d+\.attentions|joint_blocks\.\d+)\."
        ),
    ),
    (
        kinds.VAE,
        re.compile(
            r"(?:^|\.)(?:(?:en|de)coder\.(?:conv_in|down_blocks|up_blocks|mid|down|up|middle|conv1)"
            r"|first_stage_model|(?:post_)?quant_conv)\."
        ),
    ),
    (
        kinds.VISION_ENCODER,
        re.compile(r"(?:^|\.)(?:vision_model|visual|vision_tower)\."),
    ),
    (
        kinds.TEXT_ENCODER,
        re.compile(r"\.self_attn\.(?:[qkv]|out)_proj\.|\.layer\.\d+\.SelfAttention\."),
    ),
)


@dataclass(frozen=True)
class Identified:
    """A checkpoint and its kind.

    Attributes:
        checkpoint: in ComfyUI's layout, if it is a whole Z-Image.
        kind: the model, or the obstacle to using it.
        evidence: the name that shows the kind.
        format: the format that the model is quantised with; None if it is not quantised.
        format_evidence: the tensor or header key that shows the format.
        scope: which tensors are the model's: all, for another model.
        others: further sets of Z-Image names in the file, such as averaged weights.
        diffusers: whether the file has diffusers' names.
    """

    checkpoint: Checkpoint
    kind: Kind
    evidence: str
    format: Kind | None
    format_evidence: str
    scope: Scope
    others: tuple[Scope, ...] = ()
    diffusers: bool = False

    @property
    def is_shard_of_another(self) -> bool:
        """Whether this is one shard of a model other than Z-Image, by its name."""
        return bool(self.kind.uses_as_other_model) and _is_shard(self.checkpoint)

    def check_use(self, use: Use, *, any_model: bool = False) -> None:
        """Raise if the checkpoint cannot be used this way.

        Raises:
            WrongKindError: one sentence with the file's kind and a remedy.
        """
        if use == "control" and self.kind is not kinds.ZIMAGE_CONTROLNET:
            what = "another model" if self.kind is kinds.UNKNOWN else self.kind.title
            raise refuse(self.checkpoint.path, kinds.NOT_A_CONTROLNET, what)
        by_kind = self.kind.accepts(use, any_model=any_model)
        decoding = use in ("validate", "dequantize")
        if self.format is None and self.kind is kinds.ZIMAGE_CONTROLNET and decoding:
            refused: Kind | None = kinds.PLAIN_CONTROLNET
        elif self.format is None:
            refused = None if by_kind else self.kind
        elif self.kind is kinds.ZIMAGE or by_kind:
            refused = None if self.format.accepts(use) else self.format
        else:  # another model in MXFP8, or part of one, can be validated and decoded
            decodable = decoding and self.kind.holds_layers
            refused = None if decodable and self.format.accepts(use) else self.kind
        if refused is not None:
            if refused is not self.kind:
                raise refuse(self.checkpoint.path, refused, self.format_evidence)
            raise refuse(
                self.checkpoint.path,
                refused,
                self.evidence,
                quantised=self.format is not None,
                shard=self.is_shard_of_another,
            )


def identify(path: str | os.PathLike[str]) -> Identified:
    """Recognise a safetensors file or a diffusers folder by names, dtypes and markers.

    Raises:
        WrongKindError: it is not a safetensors file, and its kind is known.
        CheckpointError: unreadable or malformed, or tensors that do not fit together.
    """
    checkpoint = open_checkpoint(file_or_folder("a checkpoint", path))
    names = checkpoint.tensors.keys()
    scopes = find_scopes(names)
    if not scopes:
        kind, evidence = _kind_without_zimage(checkpoint)
        if kind is kinds.ZIMAGE_CONTROLNET:
            return _controlnet(checkpoint, evidence)
        quantization, shown_by = find_format(checkpoint, WHOLE_FILE) or (None, "")
        return Identified(checkpoint, kind, evidence, quantization, shown_by, WHOLE_FILE)
    scope, *others = scopes
    diffusers = is_diffusers_layout(names, scope)
    quantization, shown_by = find_format(checkpoint, scope) or (None, "")
    kind, evidence = kinds.ZIMAGE, scope.prefix + ZIMAGE.anchor
    if obstacle := _obstacle(checkpoint, scope):
        kind, evidence = obstacle
    elif diffusers and quantization and not has_scales_to_stack(checkpoint, quantization):
        kind, evidence = kinds.DIFFUSERS_QUANTISED, shown_by
    else:
        checkpoint = to_comfyui_layout(checkpoint, scope)
    return Identified(
        checkpoint, kind, evidence, quantization, shown_by, scope, tuple(others), diffusers
    )


def open_for(path: str | os.PathLike[str], use: Use, *, any_model: bool = False) -> Identified:
    """Open a checkpoint for a use.

    Args:
        path: safetensors file or diffusers folder.
        use: the purpose.
        any_model: for "convert", "original" and "analyse": accept other models than Z-Image too.

    Raises:
        WrongKindError: its kind cannot be used this way.
        CheckpointError: unreadable or malformed, or tensors that do not fit together.
    """
    try:
        found = identify(path)
    except WrongKindError as error:
        if error.kind is not kinds.NO_WEIGHTS or not single_files(Path(path)):
            raise
        raise _name_a_file(Path(path), use, any_model=any_model) from None
    found.check_use(use, any_model=any_model)
    return found


def _name_a_file(folder: Path, use: Use, *, any_model: bool) -> WrongKindError:
    """Return the error for a folder of single files, with one of them that can be used."""
    files = single_files(folder)
    for file in files:
        try:
            identify(file).check_use(use, any_model=any_model)
        except CheckpointError:
            continue
        return refuse(folder, kinds.NO_WEIGHTS, f"name one of its files, such as {file.name}")
    remedy = f"name another file: its {plural(len(files), 'safetensors file')} cannot be used here"
    return refuse(folder, kinds.NO_WEIGHTS, remedy)


def _controlnet(checkpoint: Checkpoint, evidence: str) -> Identified:
    names = checkpoint.tensors.keys()
    table = control_table(names)
    scope = next(iter(find_scopes(names, table)), Scope("", zimage=True, table=table))
    diffusers = is_diffusers_layout(names, scope)
    form, shown_by = find_format(checkpoint, scope) or (None, "")
    kind = kinds.ZIMAGE_CONTROLNET
    if diffusers and form:
        kind, evidence = kinds.DIFFUSERS_QUANTISED, shown_by
    else:
        checkpoint = to_comfyui_layout(checkpoint, scope)
    return Identified(checkpoint, kind, evidence, form, shown_by, scope, (), diffusers)


def _obstacle(checkpoint: Checkpoint, scope: Scope) -> tuple[Kind, str] | None:
    """Return the kind of a file with a set of Z-Image names that cannot be used, and evidence."""
    names = [name for name in checkpoint.tensors if name.startswith(scope.prefix)]
    inside = [name for name in names if name in scope]
    if wrapped := min((name for name in inside if ".base_layer." in name), default=None):
        return kinds.PEFT_WRAPPED, wrapped
    if adapter := find_adapter_tensor(inside):
        return kinds.ADAPTED, adapter
    if other := other_patch_size(names, scope):
        return kinds.TWO_PATCH_SIZES, other
    if _is_shard(checkpoint):  # even if its blocks are complete: others are in other shards
        return kinds.SHARD, str(checkpoint.path.parent)
    return None


def _is_shard(checkpoint: Checkpoint) -> bool:
    match = _SHARD_NAME.search(checkpoint.path.name)
    return match is not None and int(match["count"]) > 1


def _kind_without_zimage(checkpoint: Checkpoint) -> tuple[Kind, str]:
    """Return the kind of a file without a whole set of Z-Image names, and the evidence."""
    names = sorted(checkpoint.tensors)
    if is_adapter(names):
        shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
        return kinds.ADAPTER, describe_adapter(shapes)
    for kind, pattern in _FAMILIES:
        if kind in (kinds.ZIMAGE_CONTROLNET, kinds.CONTROLNET) and (
            found := _first(names, pattern)
        ):
            return kind, found
    if embedding := _first(names, _TEXT_EMBEDDING):
        return kinds.TEXT_ENCODER, embedding
    if _first(names, _ZIMAGE_PART):
        if _is_shard(checkpoint):
            return kinds.SHARD, str(checkpoint.path.parent)
        if lumina := _first(names, _LUMINA2_ONLY):
            return kinds.LUMINA2, lumina
        found = next((name for name in names if name.endswith(ZIMAGE.anchor)), None)
        if found is None:
            return kinds.INCOMPLETE, ZIMAGE.anchor
        token = next(name for name in ZIMAGE.signature if name in ZIMAGE.tokens)
        return kinds.INCOMPLETE, found.removesuffix(ZIMAGE.anchor) + token
    for kind, pattern in _FAMILIES:
        if found := _first(names, pattern):
            return kind, found
    return kinds.UNKNOWN, names[0]


def _first(names: Collection[str], pattern: re.Pattern[str]) -> str | None:
    return next((name for name in names if pattern.search(name)), None)
