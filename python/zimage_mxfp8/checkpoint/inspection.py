"""Contents of a checkpoint, summed up by groups of tensors."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Any

from ..adapters.files import open_adapter
from ..adapters.summary import AdapterSummary, summarise
from ..checks import file_or_folder
from ..errors import CheckpointError, WrongKindError
from ..zimage.layers import zimage_shapes
from . import kinds
from . import quantization as markers
from .controlnets import control_config
from .find_layers import find_layers
from .identify import Identified, identify
from .provenance import PROVENANCE_KEY, read_provenance
from .scopes import group_of

_MERGING = "convert, merge-lora, validate"
_LIVE = ("generate (with `loras`)", "serve (in `lora_dir`)", "ZImageTransformer.load_lora")


@dataclass
class Group:
    """Tensors that are shown in one row.

    Attributes:
        name: the group.
        formats: number of tensors in each format ("MXFP8", "BF16", ...). A quantised layer
            counts once, its scales and marker included.
        parameters: elements, without padding and without scales.
        nbytes: bytes in the file.
    """

    name: str
    formats: dict[str, int] = field(default_factory=dict)
    parameters: int = 0
    nbytes: int = 0


@dataclass(repr=False)
class Inspection:
    """Results of `inspect`.

    Attributes:
        path: the file or folder.
        kind: its kind.
        quantization: format that the model is quantised with, or None.
        files: number of safetensors files.
        metadata: metadata of the header, without the description of quantised layers.
        groups: sums by group, the largest first.
        breaches: broken rules of its quantised layers.
        accepted_by: the commands that take it. Arguments are between backticks, as in the hints of
            `Error`.
        refusal: why no command takes it, and what to do instead; "" if one does.
        provenance: what `convert` or `merge_loras` wrote about it; None without that.
        adapter: changes that an adapter makes; None for other files.
    """

    path: str
    kind: str
    quantization: str | None
    files: int
    metadata: dict[str, str]
    groups: list[Group]
    breaches: list[str]
    accepted_by: list[str]
    refusal: str
    provenance: dict[str, Any] | None = None
    adapter: AdapterSummary | None = None

    def __repr__(self) -> str:
        return f"Inspection({self.path!r}, {self.kind}, {self.parameters:,} parameters)"

    def __str__(self) -> str:
        from ..printing.inspection import print_inspection
        from ..printing.screen import as_text

        return as_text(lambda screen: print_inspection(self, screen))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(group.nbytes for group in self.groups)

    @property
    def parameters(self) -> int:
        """Elements of all tensors."""
        return sum(group.parameters for group in self.groups)

    def to_dict(self) -> dict[str, Any]:
        """Return the values for JSON."""
        return vars(self) | {
            "groups": [vars(group) for group in self.groups],
            "adapter": self.adapter.to_dict() if self.adapter else None,
            "parameters": self.parameters,
            "nbytes": self.nbytes,
        }


def inspect(path: str | os.PathLike[str]) -> Inspection:
    """Sum up a safetensors file or a diffusers folder; reads no weights.

    Of a ControlNet it reads one bias, which tells the generation. Of adapters it also returns their
    changes, and which of them fit Z-Image.

    Other kinds of files, such as pickles and web pages, are described by their kind, and damaged
    safetensors files by the damage.

    Raises:
        CheckpointError: there is no such file, it cannot be read, or it is neither a file nor a
            folder.
    """
    path = file_or_folder("path", path)
    try:
        found = identify(path)
    except WrongKindError as error:
        return _unusable(path, error.kind.title, error)
    except CheckpointError as error:
        if not (os.access(path, os.R_OK) and path.is_file()):
            raise
        return _unusable(path, "a damaged or unknown file", error)
    checkpoint, scope = found.checkpoint, found.scope
    readable = found.format in (kinds.MXFP8, kinds.INT8_CONVROT)
    quantized = find_layers(found) if readable else None
    layers = quantized.layers if quantized else []
    weights = {layer.weight.name: layer for layer in layers}
    parts = {layer.scale.name for layer in layers}
    parts |= {layer.name + markers.MARKER_SUFFIX for layer in layers}
    groups: dict[str, Group] = {}
    for name, tensor in sorted(checkpoint.tensors.items()):
        title = group_of(name, scope)
        group = groups.setdefault(title, Group(title))
        group.nbytes += tensor.nbytes
        if name in parts or (found.format and markers.is_scale(checkpoint, name)):
            continue
        format_name = found.format.title if found.format and name in weights else tensor.dtype
        group.formats[format_name] = group.formats.get(format_name, 0) + 1
        shape = weights[name].shape if name in weights else tensor.shape
        group.parameters += math.prod(shape)
    hidden = (markers.HEADER_KEY, PROVENANCE_KEY)
    adapter = None
    if found.kind is kinds.ADAPTER:
        adapter = summarise(checkpoint)
        accepted_by, refusal = _uses_of(path, adapter)
    else:
        accepted_by = _commands_for(found)
        refusal = "" if accepted_by else _refusal(found)
    return Inspection(
        path=str(path),
        kind=_describe(found),
        quantization=found.format.title if found.format else None,
        files=len(checkpoint.files),
        metadata={k: v for k, v in checkpoint.metadata.items() if k not in hidden},
        groups=sorted(groups.values(), key=lambda group: -group.nbytes),
        breaches=[str(breach) for breach in quantized.breaches] if quantized else [],
        accepted_by=accepted_by,
        refusal=refusal,
        provenance=read_provenance(checkpoint.metadata),
        adapter=adapter,
    )


def _unusable(path: str | os.PathLike[str], kind: str, error: CheckpointError) -> Inspection:
    return Inspection(str(path), kind, None, 0, {}, [], [], [], _sentence(path, error))


def _sentence(path: str | os.PathLike[str], error: CheckpointError) -> str:
    """Return an error's sentence, with "it" where it begins with the file."""
    sentence = str(error)
    if sentence.startswith(f"{path} "):
        return "it" + sentence[len(str(path)) :]
    return sentence.removeprefix(f"{path}: ")


def _describe(found: Identified) -> str:
    """Return kind and layout, such as "Z-Image, ComfyUI layout"."""
    if found.kind is kinds.ADAPTER:
        return found.evidence
    if found.kind not in (kinds.ZIMAGE, kinds.ZIMAGE_CONTROLNET):
        return found.kind.title + (", one shard of several" if found.is_shard_of_another else "")
    title = found.kind.title
    if found.kind is kinds.ZIMAGE_CONTROLNET:
        title += f", Fun-Controlnet-Union {control_config(found).generation}"
    layout = "diffusers" if found.diffusers else "ComfyUI"
    prefix = f', prefix "{found.scope.prefix}"' if found.scope.prefix else ""
    return f"{title}, {layout} layout{prefix}"


def _uses_of(path: str | os.PathLike[str], summary: AdapterSummary) -> tuple[list[str], str]:
    """Read an adapter; return the commands and calls that take it, and why none does."""
    magnitudes: list[tuple[int, ...]] = []
    try:
        adapter = open_adapter(path, zimage_shapes())
        for module in adapter.modules:
            magnitude = adapter.branch(module).magnitude
            if magnitude is not None:
                magnitudes.append(magnitude.shape)
    except CheckpointError as error:
        if summary.is_for_other_widths:
            error = CheckpointError(error.problem, "use it with a Z-Image of its widths")
        return [], _sentence(path, error)
    if any(columns != 1 for _, columns in magnitudes):
        return [_MERGING], ""
    return [f"{_MERGING}, {_LIVE[0]}", *_LIVE[1:]], ""


def _commands_for(found: Identified) -> list[str]:
    """Return the commands that take a file."""
    commands = []
    for use, named in kinds.USES.items():
        if _accepts(found, use, any_model=use == "original"):  # as `validate` opens it
            commands.append(named)
        elif use in kinds.USES_AS_OTHER_MODEL and _accepts(found, use, any_model=True):
            commands.append(kinds.USES_AS_OTHER_MODEL[use])
    return commands


def _accepts(found: Identified, use: kinds.Use, *, any_model: bool) -> bool:
    try:
        found.check_use(use, any_model=any_model)
    except WrongKindError:
        return False
    return True


def _refusal(found: Identified) -> str:
    """Return why no command takes a file."""
    try:
        found.check_use("run")
    except WrongKindError as error:
        return _sentence(found.checkpoint.path, error)
    return ""
