"""Adapter files: which tensors belong to which layer, read one layer at a time."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import checks
from ..checkpoint.adapters import DIFFUSERS_OF_VIDEOX, describe_adapter, is_adapter
from ..checkpoint.source import SourceTensor, TensorReader, open_checkpoint
from ..errors import CheckpointError
from ..zimage.layers import ZIMAGE
from ..zimage.rows import Shape
from .branches import OTHER_MODEL, Branch, BranchError, Matrix, make_branch
from .keys import (
    FLAGS,
    RANK_SCALED_FLAG,
    Key,
    Role,
    is_text_encoder_key,
    split_key,
    unsupported_type,
)
from .targets import Target, Targets

_FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16}
# Of alphas and flags, which are one number.
_INTEGERS = {
    **{
        f"{kind}{bits}": f"{name}{bits}"
        for kind, name in (("I", "int"), ("U", "uint"))
        for bits in (8, 16, 32, 64)
    },
    "BOOL": "bool",
}
_ARRAY_DTYPES = ("float64", "float32", "float16", "bfloat16")
MAX_AXES, _MAX_SIDE = 8, 1 << 31  # far beyond the tensors of any adapter
# VideoX-Fun's trainer writes alpha 0 for "the rank".
_ZERO_ALPHA_IS_RANK = "lora_unet__"

Load = Callable[[], Matrix]


@dataclass(frozen=True)
class Module:
    """One layer's adapter in a file.

    Attributes:
        target: what it changes.
        name: prefix and module, as the file spells them.
        roles: how to read each tensor.
        rank_scaled: see `make_branch`.
        alpha: of the header, if there is no tensor of it.
    """

    target: Target
    name: str
    roles: Mapping[Role, Load]
    rank_scaled: bool = False
    alpha: float | None = None


@dataclass(frozen=True)
class AdapterFile:
    """An adapter whose modules are known, and whose tensors are not yet read.

    Attributes:
        label: the file, for sentences.
        modules: those that the model has.
        unmatched: names of tensors that belong to nothing in the model.
        text_encoder: names of tensors for the text encoder.
        redundant: modules that are in the file once more under another name.
    """

    label: str
    modules: tuple[Module, ...]
    unmatched: tuple[str, ...]
    text_encoder: tuple[str, ...]
    redundant: tuple[str, ...]
    _shapes: Mapping[str, Shape]

    def branch(self, module: Module) -> Branch:
        """Read one module.

        Raises:
            CheckpointError: it cannot be read, or its tensors do not make an adapter of the layer;
                the sentence names file and module.
        """
        try:
            tensors = {role: load() for role, load in module.roles.items()}
            if module.alpha is not None:
                with np.errstate(over="ignore"):
                    tensors.setdefault("alpha", np.array([module.alpha]).astype(np.float32))
            if module.name.startswith(DIFFUSERS_OF_VIDEOX):
                _check_not_zero(tensors)
            branch = make_branch(tensors, rank_scaled=module.rank_scaled)
            self._check_shape(module.target, branch)
        except BranchError as error:
            raise CheckpointError(
                f'{self.label}: the adapter of "{module.name}" {error}', error.remedy
            ) from None
        return branch

    def branches(self) -> Iterator[tuple[Module, Branch]]:
        """Read all modules, one after another (see `branch`)."""
        return ((module, self.branch(module)) for module in self.modules)

    def _check_shape(self, target: Target, branch: Branch) -> None:
        shape = self._shapes[f"{target.layer}.weight"]
        want = (shape[0] // target.parts, *shape[1:])
        if branch.matrix is not None and branch.matrix.shape != want:
            found = " x ".join(map(str, branch.matrix.shape))
            raise BranchError(
                f"is for a layer of {found}, not {' x '.join(map(str, want))}", OTHER_MODEL
            )
        if branch.bias is not None and len(shape) == 1:
            raise BranchError("has a bias, and the layer is a norm, which has none")
        if branch.bias is not None and len(branch.bias) != want[0]:
            raise BranchError(
                f"has a bias of {len(branch.bias)} elements, not {want[0]}", OTHER_MODEL
            )


def open_adapter(
    source: str | os.PathLike[str] | Mapping[str, Any],
    shapes: Mapping[str, Shape],
    metadata: Mapping[str, Any] | None = None,
) -> AdapterFile:
    """Find out what an adapter changes.

    Args:
        source: a safetensors file, or arrays by name (NumPy's or torch's).
        shapes: of the model's tensors by name in ComfyUI's layout, without prefix.
        metadata: PEFT's settings, as diffusers passes them; by default those of the file.

    Raises:
        CheckpointError: unreadable, for another model, of a type that is not supported, or with
            two tensors for one place; the sentence names the file and the tensor.
    """
    if isinstance(source, Mapping):
        label = "the adapter"
        loads = {str(name): _of_array(label, str(name), x) for name, x in source.items()}
        found = {str(name): tuple(x.shape) for name, x in source.items()}
    else:
        path = checks.path("source", source)
        if path.is_dir():
            raise CheckpointError(
                f"{path} is a folder, and an adapter is a file", "name the safetensors file"
            )
        checkpoint = open_checkpoint(path)
        label = str(checkpoint.path)
        metadata = metadata or peft_settings(checkpoint.metadata)
        if metadata is None:
            raise CheckpointError(
                f"{label} has lora_adapter_metadata in its header that is not a JSON object",
                "export the adapter again",
            )
        loads = {name: _of_file(label, tensor) for name, tensor in checkpoint.tensors.items()}
        found = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    targets = Targets(ZIMAGE.count_blocks(shapes))

    def find(module: str) -> Target | None:
        target = targets.find(module)
        return target if target and f"{target.layer}.weight" in shapes else None

    settings = Settings(metadata or {})
    flag = loads.get(RANK_SCALED_FLAG)
    rank_scaled = settings.rank_scaled or (flag is not None and _is_set(label, flag()))
    names: dict[tuple[str, str], dict[Role, str]] = {}
    unmatched, text_encoder = [], []
    for name in loads:
        if name in FLAGS:
            continue
        key = split_key(name)
        if is_text_encoder_key(name):
            text_encoder.append(name)
        elif key is None or find(key.module) is None:
            unmatched.append(name)
        else:
            _add(names.setdefault((key.prefix, key.module), {}), key, label)
    if not names:
        raise _nothing_fits(label, found, text_encoder)
    modules = [
        Module(
            target,
            prefix + name,
            {
                role: loads[tensor]
                for role, tensor in roles.items()
                if not (
                    role == "alpha" and prefix == _ZERO_ALPHA_IS_RANK and _is_zero(loads[tensor]())
                )
            },
            rank_scaled,
            settings.alpha(name),
        )
        for (prefix, name), roles in names.items()
        if (target := find(name)) is not None
    ]
    kept, redundant = _once(modules)
    return AdapterFile(label, kept, tuple(unmatched), tuple(text_encoder), redundant, dict(shapes))


def _add(roles: dict[Role, str], key: Key, label: str) -> None:
    if key.role in ("unsupported", "mid"):
        title = unsupported_type(key.name) or "of an unknown type"
        raise CheckpointError(
            f'{label} is {title} (tensor "{key.name}"), which is not supported',
            "merge it into the original weights with the program that trained it",
        )
    if key.role in roles:
        raise CheckpointError(
            f'{label} has two tensors for one place, "{roles[key.role]}" and "{key.name}"',
            "export the adapter again",
        )
    roles[key.role] = key.name


def _once(modules: Sequence[Module]) -> tuple[tuple[Module, ...], tuple[str, ...]]:
    """Leave out modules that are in the file under another name too, whole or in parts."""
    by_target: dict[Target, Module] = {}
    redundant = [
        module.name
        for module in modules
        if by_target.setdefault(module.target, module) is not module
    ]
    parts = Counter(target.layer for target in by_target if target.parts > 1)
    for target in [target for target in by_target if target.parts > 1]:
        whole = by_target.get(Target(target.layer))
        if whole is not None:
            drop = Target(target.layer) if parts[target.layer] == target.parts else target
            redundant.append(by_target.pop(drop).name)
    return tuple(by_target.values()), tuple(redundant)


# Regular expressions without repetition, which a file cannot make run for long.
_HARMLESS = re.compile(r"[\w.\\\[\]()|^$-]{1,200}")


class Settings:
    """PEFT's settings in a header: alpha and how it scales."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self._values = {
            str(key).removeprefix("transformer."): value for key, value in metadata.items()
        }
        self.rank_scaled = self._values.get("use_rslora") is True

    def alpha(self, module: str) -> float | None:
        """Return the alpha of a module that has no tensor of that name."""
        patterns = self._values.get("alpha_pattern")
        for pattern, value in patterns.items() if isinstance(patterns, Mapping) else ():
            if _fits(str(pattern), module):
                return _number(value)
        return _number(self._values.get("lora_alpha"))


def _fits(pattern: str, module: str) -> bool:
    """Match as PEFT does: the pattern is a regular expression for the end of the name."""
    if not _HARMLESS.fullmatch(pattern):
        return False
    try:
        return re.match(rf"(.*\.)?({pattern})$", module) is not None
    except re.error:
        return False


def _number(value: Any) -> float | None:
    try:
        return float(value) if isinstance(value, (int, float)) else None
    except OverflowError:  # JSON has integers of any size
        return math.inf


def _is_set(label: str, flag: Matrix) -> bool:
    if flag.size != 1:
        raise CheckpointError(
            f'{label}: "{RANK_SCALED_FLAG}" has {flag.size:,} numbers, and is one in every adapter',
            "export the adapter again",
        )
    if np.isnan(flag).any():
        raise CheckpointError(f'{label}: "{RANK_SCALED_FLAG}" is NaN', "export the adapter again")
    return bool(flag.any())


def _is_zero(alpha: Matrix) -> bool:
    return alpha.size == 1 and not alpha.any()


def _check_not_zero(tensors: Mapping[Role, Matrix]) -> None:
    """Refuse factors that diffusers multiplied by VideoX-Fun's alpha 0, which means the rank."""
    if not any(tensor.any() for tensor in tensors.values()):
        raise BranchError(
            "has only zeros, which diffusers makes of an adapter with alpha 0",
            "load the file with pipe.transformer.load_lora(file)",
        )


def peft_settings(metadata: Mapping[str, str]) -> Mapping[str, Any] | None:
    """Return PEFT's settings in a header, if there are any; None if they are no JSON object."""
    text = metadata.get("lora_adapter_metadata")
    if text is None:
        return {}
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return settings if isinstance(settings, dict) else None


def _nothing_fits(
    label: str, shapes: Mapping[str, Shape], text_encoder: Sequence[str]
) -> CheckpointError:
    if not is_adapter(shapes):
        first = f'it has no LoRA tensors (its first is "{min(shapes, default="")}")'
        problem = first if shapes else "it is empty"
        return CheckpointError(
            f"{label} is not an adapter: {problem}",
            "give the file that a trainer of adapters wrote",
        )
    if len(text_encoder) == len(shapes):
        return CheckpointError(
            f'{label} changes the text encoder alone (tensor "{min(shapes)}"), and adapters are '
            "applied to the transformer",
            "use one that was trained on it",
        )
    first = min(set(shapes).difference(text_encoder))
    return CheckpointError(
        f"{label} does not fit this model: it is {describe_adapter(shapes)}; the model has no "
        f'layer for "{first}"',
        "use it with the model that it was trained for",
    )


def _of_array(label: str, name: str, array: Any) -> Load:
    def load() -> Matrix:
        dtype = str(array.dtype).removeprefix("torch.")
        number = dtype in _INTEGERS.values() and math.prod(array.shape) == 1
        if dtype not in _ARRAY_DTYPES and not number:
            raise _wrong_dtype(label, name, dtype, tuple(array.shape))
        if getattr(array, "is_meta", False) or getattr(array, "is_sparse", False):
            raise CheckpointError(
                f'{label}: tensor "{name}" has no dense data; give it as a dense tensor'
            )
        plain = array.detach().cpu().float().numpy() if hasattr(array, "detach") else array
        with np.errstate(over="ignore", invalid="ignore"):  # infinity and NaN are refused later
            result: Matrix = np.array(plain, np.float32, order="C")
        return result

    if not (hasattr(array, "shape") and hasattr(array, "dtype")):
        raise CheckpointError(
            f'{label} has "{name}", which is no tensor; give arrays of NumPy or torch'
        )
    return load


def _of_file(label: str, tensor: SourceTensor) -> Load:
    def load() -> Matrix:
        if len(tensor.shape) > MAX_AXES or max(tensor.shape, default=0) > _MAX_SIDE:
            raise CheckpointError(
                f'{label}: tensor "{tensor.name}" has {len(tensor.shape)} axes, the longest of '
                f"{max(tensor.shape):,}, and no adapter has such a shape",
                "export it again",
            )
        with TensorReader() as reader:
            values = read_float32(tensor, reader)
        if values is None:
            raise _wrong_dtype(label, tensor.name, tensor.dtype, tensor.shape)
        return values

    return load


def _wrong_dtype(label: str, name: str, dtype: str, shape: Shape) -> CheckpointError:
    if dtype in (*_INTEGERS, *_INTEGERS.values()):
        return CheckpointError(
            f'{label}: tensor "{name}" is {dtype} {list(shape)}, and only single numbers are '
            "integers in adapters",
            "export it in F32 or BF16",
        )
    return CheckpointError(
        f'{label}: tensor "{name}" has dtype {dtype}, and adapters are read in F64, F32, BF16 and '
        "F16",
        "export it in one of these",
    )


def read_float32(tensor: SourceTensor, reader: TensorReader) -> Matrix | None:
    """Read a tensor; None if it is of a dtype that adapters are not read in.

    Raises:
        CheckpointError: the file cannot be read.
    """
    if tensor.dtype == "BF16":
        wide = reader.read(tensor).view(np.uint16).astype(np.uint32) << 16
        return wide.view(np.float32).reshape(tensor.shape)
    if tensor.dtype in _INTEGERS and math.prod(tensor.shape) == 1:
        data = reader.read(tensor).view(_INTEGERS[tensor.dtype])
        return data.astype(np.float32).reshape(tensor.shape)
    if tensor.dtype not in _FLOATS:
        return None
    with np.errstate(over="ignore", invalid="ignore"):  # F64 out of range, signalling NaN
        result: Matrix = reader.read(tensor).view(_FLOATS[tensor.dtype]).astype(np.float32)
    return result.reshape(tensor.shape)
