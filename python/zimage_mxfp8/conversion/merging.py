"""A checkpoint with adapters merged into its weights, computed while they are read."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import _core
from ..adapters.branches import Branch
from ..adapters.files import AdapterFile, Module, open_adapter
from ..adapters.merging import Change, Double, bias_change, weight_change
from ..checkpoint.identify import Identified
from ..checkpoint.source import (
    Checkpoint,
    ComputedTensor,
    SourceTensor,
    TensorReader,
    sha256,
)
from ..dtypes import FLOAT_NAMES
from ..errors import CheckpointError, UsageError
from ..text import plural
from .bias_correction import to_float64
from .nonfinite import first_nonfinite

BLOCK = 32  # rows of a matrix that are merged at once; bounds the memory
_MAX_NAMED = 3
# Layers whose branches are in memory. Jobs follow each other by layer, so that few are in use.
_CACHED_LAYERS = 2


@dataclass(frozen=True)
class MergedAdapter:
    """An adapter that was merged.

    Attributes:
        path: the file.
        weight: how much of it counts.
        sha256: of the file.
        layers: the number of layers that it changes.
        kinds: how many of each kind: "LoRA", "LoHa", "LoKr", "DoRA", "difference".
        unmatched: names of tensors that belong to nothing in the model.
    """

    path: str
    weight: float
    sha256: str
    layers: int
    kinds: dict[str, int]
    unmatched: tuple[str, ...]

    @property
    def identity(self) -> dict[str, Any]:
        """What headers say of it: neither its name nor its path."""
        return {"sha256": self.sha256, "weight": self.weight}

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return vars(self) | {"unmatched": list(self.unmatched)}


@dataclass(frozen=True)
class _Part:
    """A module of an adapter that changes a tensor."""

    file: AdapterFile
    weight: float
    module: Module
    is_bias: bool

    def change(self, tensor: SourceTensor) -> Change:
        """Read it."""
        branch = self.file.branch(self.module)
        rows = self.module.target.rows(tensor.shape[0])
        make = bias_change if self.is_bias else weight_change
        change = make(branch, self.weight, rows)
        assert change is not None
        return change


@dataclass
class _Loaded:
    """The changes of one tensor, read by the first worker that needs them."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    changes: list[Change] | None = None


class Merge:
    """Adapters to be merged into a checkpoint.

    Attributes:
        adapters: what they are.
        warnings: sentences about what fits nothing.
        notes: sentences about what counts once.
    """

    def __init__(self, found: Identified, loras: Sequence[tuple[Path, float]]) -> None:
        """Open the adapters and read each of their modules once, to check it.

        Args:
            found: a whole Z-Image.
            loras: files and weights.

        Raises:
            UsageError: the checkpoint is another model.
            CheckpointError: an adapter is unreadable, fits nothing, or does not fit the model.
        """
        if not found.scope.zimage:
            raise UsageError(
                "loras",
                f"can be merged into a Z-Image only, and {found.checkpoint.path} is another model",
                "leave them out",
            )
        self._checkpoint, self._scope = found.checkpoint, found.scope
        names = found.scope.inner_names(found.checkpoint.tensors)
        shapes = {inner: found.checkpoint.tensors[name].shape for inner, name in names.items()}
        self._parts: dict[str, list[_Part]] = {}
        self._cache: OrderedDict[str, _Loaded] = OrderedDict()
        self._lock = threading.Lock()
        self.adapters: list[MergedAdapter] = []
        self.warnings: list[str] = []
        self.notes: list[str] = []
        for path, weight in loras:
            self._add(path, weight, open_adapter(path, shapes))
        self.warnings += [
            f"{path} changes nothing: its weights add up to 0"
            for path, weight in _added_up((a.path, a.weight) for a in self.adapters).items()
            if weight == 0
        ]

    @property
    def changed(self) -> int:
        """The number of tensors that the adapters change."""
        return sum(
            any(_added_up((part.file.label, part.weight) for part in parts).values())
            for parts in self._parts.values()
        )

    def _add(self, path: Path, weight: float, file: AdapterFile) -> None:
        kinds: Counter[str] = Counter()
        for module, branch in file.branches():
            kinds[branch.kind] += 1
            for name, is_bias in self._tensors_of(file, module, branch):
                self._parts.setdefault(name, []).append(_Part(file, weight, module, is_bias))
        self.adapters.append(
            MergedAdapter(
                str(path), weight, sha256(path), len(file.modules), dict(kinds), file.unmatched
            )
        )
        if file.unmatched:
            self.warnings.append(
                f"{path}: {plural(len(file.unmatched), 'tensor fits', 'tensors fit')} nothing in "
                f"this model and {'is' if len(file.unmatched) == 1 else 'are'} not merged "
                f"({_first(file.unmatched)})"
            )
        if file.text_encoder:
            self.warnings.append(
                f"{path}: {plural(len(file.text_encoder), 'tensor')} for the text encoder not "
                f"merged ({_first(file.text_encoder)})"
            )
        if file.redundant:
            self.notes.append(
                f"{path} has {plural(len(file.redundant), 'module')} under another name too, which "
                f"count once ({_first(file.redundant)})"
            )

    def _tensors_of(
        self, file: AdapterFile, module: Module, branch: Branch
    ) -> Iterator[tuple[str, bool]]:
        """Names of the tensors that a module changes, and whether each is a bias."""
        layer = self._scope.prefix + module.target.layer
        wanted = [(f"{layer}.weight", False)] if branch.matrix is not None else []
        wanted += [(f"{layer}.bias", True)] if branch.bias is not None else []
        for name, is_bias in wanted:
            tensor = self._checkpoint.tensors.get(name)
            if tensor is None:
                raise CheckpointError(
                    f'{file.label}: the adapter of "{module.name}" changes a bias, which the layer '
                    "does not have; load the adapter when you generate instead of merging it"
                )
            if tensor.dtype not in FLOAT_NAMES:
                raise CheckpointError(
                    f'{self._checkpoint.path}: tensor "{name}" is {tensor.dtype}; adapters are '
                    "merged into BF16, F16 and F32"
                )
            yield name, is_bias

    def apply(self, as_float32: Collection[str], untouched: Collection[str] = ()) -> Checkpoint:
        """Return the checkpoint with the adapters in it.

        Args:
            as_float32: names of weights that are about to be quantised: they are F32 if an
                adapter changes them, so that they are rounded once only. Others keep their dtype.
            untouched: names of tensors that stay as they are.
        """
        merged: dict[str, SourceTensor] = {}
        for name in self._parts.keys() - set(untouched):
            tensor = self._checkpoint.tensors[name]
            merged[name] = ComputedTensor(
                name,
                "F32" if name in as_float32 else tensor.dtype,
                tensor.shape,
                tensor.segments,
                origin=tensor,
                block=BLOCK if len(tensor.shape) > 1 else tensor.shape[0],
                compute=_Computation(
                    self, tensor, "F32" if name in as_float32 else tensor.dtype
                ).rows,
            )
        return replace(self._checkpoint, tensors=self._checkpoint.tensors | merged)

    def changes(self, tensor: SourceTensor, reader: TensorReader) -> list[Change]:
        """Return the changes of a tensor; a few tensors' stay in memory."""
        with self._lock:
            loaded = self._cache.setdefault(tensor.name, _Loaded())
            self._cache.move_to_end(tensor.name)
            while len(self._cache) > _CACHED_LAYERS:
                self._cache.popitem(last=False)
        with loaded.lock:
            if loaded.changes is None:
                changes = [part.change(tensor) for part in self._parts[tensor.name]]
                loaded.changes = [_with_norms(change, tensor, reader) for change in changes]
        return loaded.changes


@dataclass(frozen=True)
class _Computation:
    merge: Merge
    tensor: SourceTensor
    dtype: str

    def rows(self, reader: TensorReader, begin: int, end: int) -> npt.NDArray[np.uint8]:
        """Return the bytes of rows [begin, end) after merging."""
        weight = _read_rows(reader, self.tensor, begin, end)
        total = weight.copy()
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # checked below
            for change in self.merge.changes(self.tensor, reader):
                change.add(total, weight, begin)
            single = total.astype(np.float32)
        data = _rounded(single, self.dtype)
        bad = first_nonfinite(self.dtype, data)
        if bad is not None and np.isfinite(weight.reshape(-1)[bad]):
            row, column = divmod(bad, weight.size // len(weight))
            raise CheckpointError(
                f'{self.tensor.segments[0].path}: tensor "{self.tensor.name}" becomes NaN or '
                f"infinite at row {begin + row}, column {column} when the adapters are merged",
                "use smaller weights in `loras`",
            )
        return data


def _rounded(single: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[np.uint8]:
    flat = single.reshape(1, -1)
    if dtype == "F32":
        return flat.reshape(-1).view(np.uint8)
    rounded = np.empty(flat.shape, np.uint16)
    _core.cast(flat, "float32", rounded, FLOAT_NAMES[dtype], 1)
    return rounded.reshape(-1).view(np.uint8)


def _read_rows(reader: TensorReader, tensor: SourceTensor, begin: int, end: int) -> Double:
    row_bytes = tensor.nbytes // tensor.shape[0]
    data = np.empty((end - begin) * row_bytes, np.uint8)
    reader.read_into(tensor, begin * row_bytes, data)
    return to_float64(tensor, data).reshape(end - begin, *tensor.shape[1:])


def _with_norms(change: Change, tensor: SourceTensor, reader: TensorReader) -> Change:
    """Read the weight once for the norms of its columns, where DoRA needs them."""
    if change.magnitude is None or change.magnitude.shape[1] == 1:
        return change
    begin, end = change.rows.start, change.rows.stop
    return change.with_column_norms(
        (row, _read_rows(reader, tensor, row, min(row + BLOCK, end)))
        for row in range(begin, end, BLOCK)
    )


def _added_up(weights: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Return the sum of the weights of each file, which may come several times."""
    sums: dict[str, float] = {}
    for file, weight in weights:
        sums[file] = sums.get(file, 0.0) + weight
    return sums


def _first(names: Sequence[str]) -> str:
    """Return the first few names, for a sentence."""
    named = ", ".join(f'"{name}"' for name in names[:_MAX_NAMED])
    return f"{named}, ..." if len(names) > _MAX_NAMED else named
