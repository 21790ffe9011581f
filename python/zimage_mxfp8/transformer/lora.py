"""Adapters of a transformer: loading them onto its layers, setting their weights, taking them off.

The quantised weights stay as they are. Each layer computes the adapters' narrow GEMMs in addition
to its own, so nothing is quantised twice.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from .. import checks
from ..adapters.branches import OTHER_MODEL, Branch, Dense, Matrix
from ..adapters.files import AdapterFile, Module, open_adapter
from ..errors import CheckpointError, CudaError, UsageError
from ..printing.screen import size_text
from ..text import plural
from ..zimage.rows import Shape
from .floating_dtype import sums_dtype
from .fused_low_rank import fused_adapter
from .linear import Linear
from .low_rank import Addend, LowRankAdapter, SharedAdapter, WeightTable, dora_norms
from .places import LinearPlace
from .turns import Turns

Weight = float | Mapping[str, float]


@dataclass(frozen=True)
class Lora:
    """An adapter that is loaded.

    Attributes:
        name: what `set_lora` and `unload_lora` call it.
        label: the file that it came from.
        weight: how much of it counts. A mapping has weights by part of the layers' names, in
            ComfyUI's or diffusers' spelling, and layers that no part fits have 1.
        layers: the number of layers that it changes.
        kinds: how many of each kind: "LoRA", "LoHa", "LoKr", "DoRA", "difference".
        dense: names of modules that are added as whole matrices, because their rank is high.
        unmatched: names of tensors that belong to nothing in this model.
        text_encoder: names of tensors for the text encoder, which are not applied.
        redundant: modules that the file has under another name too, which count once.
        nbytes: bytes of its tensors on the device.
    """

    name: str
    label: str
    weight: Weight
    layers: int
    kinds: Mapping[str, int]
    dense: tuple[str, ...] = ()
    unmatched: tuple[str, ...] = ()
    text_encoder: tuple[str, ...] = ()
    redundant: tuple[str, ...] = ()
    nbytes: int = 0
    _addends: tuple[tuple[Linear, Addend], ...] = field(default=(), repr=False)
    _norms: tuple[tuple[str, torch.Tensor], ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        """Return what it is, and what of the file is not used, in some sentences."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.kinds.items())
        what = f"{self.name}: {self.label}, {plural(self.layers, 'layer')} ({kinds})"
        return "\n".join([f"{what}, {size_text(self.nbytes)}, weight {self.weight}", *self.notes])

    @property
    def notes(self) -> list[str]:
        """What of the file is not used, or costs more than usual: sentences."""
        notes = []
        for names, problem in (
            (self.unmatched, "without a counterpart in this model"),
            (self.text_encoder, "for the text encoder, to which adapters are not applied"),
        ):
            if names:
                tensors = plural(len(names), "tensor")
                notes.append(f"{self.label}: {tensors} {problem}, such as {names[0]}")
        if self.dense:
            notes.append(
                f"{self.label}: a dense branch, which costs as much as the layer, for "
                f"{plural(len(self.dense), 'layer')} of high rank, such as {self.dense[0]}"
            )
        return notes

    def weight_of(self, layer: str) -> float:
        """Return the weight for a layer, given as its names with spaces between them."""
        if not isinstance(self.weight, Mapping):
            return self.weight
        return next((value for part, value in self.weight.items() if part in layer), 1.0)

    def check_parts(self, weight: Weight) -> None:
        """Check that each part of a mapping fits a layer.

        Raises:
            UsageError: one does not.
        """
        names = [addend.layer for _, addend in self._addends] + [name for name, _ in self._norms]
        for part in weight if isinstance(weight, Mapping) else ():
            if not any(part in name for name in names):
                raise UsageError(
                    "weight", f'has the part "{part}", which is in no layer\'s name', "correct it"
                )


class LoraSet:
    """The adapters of one transformer, and which of them count."""

    def __init__(
        self,
        shapes: Mapping[str, Shape],
        linears: Callable[[], Mapping[str, LinearPlace]],
        norms: Callable[[], Mapping[str, torch.Tensor]],
        changed: Callable[[], None],
    ) -> None:
        """Take what adapters can change.

        Args:
            shapes: of the model's tensors by name in ComfyUI's layout.
            linears: returns the places of layers with a matrix, by name.
            norms: returns the vectors of norms, by the layer's name.
            changed: called before layers get or lose a branch.
        """
        self._shapes, self._linears, self._norms = shapes, linears, norms
        self._changed = changed
        self._loaded: dict[str, Lora] = {}
        self._tables: list[WeightTable] = []
        self._off: set[str] = set()
        self._fused: dict[str, float] = {}  # with the scale
        self._kept: set[str] = set()  # fused ones that stay when all are unloaded
        self._parked: set[str] = set()  # on another device than the model
        self._originals: dict[str, torch.Tensor] = {}  # norms that adapters change
        self._enabled = True
        self._scales = Turns()

    def __len__(self) -> int:
        return len(self._loaded)

    def __iter__(self) -> Iterator[Lora]:
        return iter(self._loaded.values())

    def __contains__(self, name: object) -> bool:
        return name in self._loaded

    @property
    def active(self) -> list[str]:
        """Names of the adapters that count, without fused ones that were unloaded since."""
        return [name for name in self._loaded if name not in self._off | self._kept]

    @property
    def listed(self) -> dict[str, Lora]:
        """The adapters by name, without fused ones that were unloaded since.

        Those that are switched off have the weight that they had before.
        """
        return {name: x for name, x in self._loaded.items() if name not in self._kept}

    @property
    def in_effect(self) -> dict[str, Lora]:
        """The adapters of `listed`, those that are switched off with the weight 0."""
        return {
            name: replace(x, weight=0.0) if name in self._off else x
            for name, x in self.listed.items()
        }

    @property
    def fused(self) -> list[str]:
        """Names of the adapters that `fuse` fixed."""
        return list(self._fused)

    def load(
        self,
        source: str | os.PathLike[str] | Mapping[str, Any],
        name: str | None = None,
        weight: Weight = 1.0,
        metadata: Mapping[str, Any] | None = None,
    ) -> Lora:
        """Load an adapter; nothing changes if it fails (see `ZImageTransformer.load_lora`)."""
        name = self._new_name(name)
        weight = check_weight("weight", weight)
        file = open_adapter(source, self._shapes, metadata)
        with _short_of_memory(file):
            lora = self._read(file, name, weight)
            lora.check_parts(weight)
            self._loaded[name] = lora
            try:
                self._attach(lora)
            except BaseException:
                self._attach(self._forget(name))
                raise
        return lora

    def replace(
        self,
        source: str | os.PathLike[str] | Mapping[str, Any],
        name: str | None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Lora:
        """Load an adapter in place of one, whose weight it takes over."""
        if name is None:
            raise UsageError("adapter_name", "is missing", "name the adapter to replace")
        old = self._loaded[self._known(name)]
        file = open_adapter(source, self._shapes, metadata)
        with _short_of_memory(file):
            new = self._read(file, name, old.weight)
            self._loaded[name] = new
            try:
                self._attach(old, new)
            except BaseException:
                self._loaded[name] = old
                self._attach(old, new)
                raise
        return new

    def set(self, weights: Mapping[str, Weight]) -> None:
        """Set weights; adapters that are not named are switched off, but for fused ones."""
        if not isinstance(weights, Mapping):
            raise UsageError(
                "weights", f'must be a dict such as {{"style": 0.8}}, not {repr(weights)[:80]}'
            )
        checked = {
            self._known(name): check_weight(f'weights["{name}"]', weight)
            for name, weight in weights.items()
        }
        for name, weight in checked.items():
            self._loaded[name].check_parts(weight)
        self._off = set(self._loaded) - set(checked) - set(self._fused)
        for name, weight in checked.items():
            self._loaded[name] = replace(self._loaded[name], weight=weight)
        self._write_weights()

    def unload(self, name: str) -> None:
        """Take an adapter off."""
        self._attach(self._forget(self._known(name)))

    def unload_all(self) -> None:
        """Take all adapters off, but let fused ones count on, under a name that is not listed."""
        before = list(self)
        for name in self.listed:
            if name not in self._fused:
                self._forget(name)
                continue
            kept = next(x for i in itertools.count() if (x := f"{name} (fused {i})") not in self)
            self._loaded[kept] = self._rename(self._loaded.pop(name), kept)
            self._fused[kept] = self._fused.pop(name)
            self._kept.add(kept)
        self._enabled = True
        if before:
            self._attach(*before)

    def _forget(self, name: str) -> Lora:
        for names in (self._off, self._kept, self._parked):
            names.discard(name)
        self._fused.pop(name, None)
        return self._loaded.pop(name)

    @staticmethod
    def _rename(lora: Lora, name: str) -> Lora:
        addends = tuple((linear, replace(x, adapter=name)) for linear, x in lora._addends)
        return replace(lora, name=name, _addends=addends)

    def enable(self, enabled: bool) -> None:
        """Let adapters count, or none of them."""
        self._enabled = enabled
        self._write_weights()

    def fuse(self, scale: float, names: Sequence[str] | None = None) -> None:
        """Fix adapters, by default the active ones, at their weights times `scale`."""
        scale = checks.finite_number("lora_scale", scale)
        chosen = [self._known(name) for name in (self.active if names is None else names)]
        self._fused |= dict.fromkeys(chosen, scale)
        self._off -= set(chosen)
        self._write_weights()

    def unfuse(self) -> None:
        """End what `fuse` did, but for adapters that were unloaded since."""
        self._fused = {name: x for name, x in self._fused.items() if name in self._kept}
        self._write_weights()

    def place(self, name: str, device: torch.device) -> None:
        """Keep an adapter with the model, or in host memory alone, where it does not count."""
        lora = self._loaded[self._known(name)]
        if all(_device(linear).type == device.type for linear, _ in lora._addends):
            self._parked.discard(name)
        else:
            self._parked.add(name)
        self._attach(lora)

    @contextmanager
    def scaled(self, scale: float) -> Iterator[None]:
        """Multiply all weights by a number for a while; threads with other numbers wait."""
        if not self._loaded:
            yield
            return
        with self._scales.turn(checks.finite_number("scale", scale), self._write_weights):
            yield

    def rebuild(self) -> None:
        """Make the branches anew, after the model changed its device or dtype."""
        if self._loaded:
            self._attach(*self)

    def _new_name(self, name: str | None) -> str:
        if name is None:
            return next(x for i in itertools.count() if (x := f"lora{i}") not in self._loaded)
        checks.text("name", name)
        if name in self._loaded:
            raise UsageError(
                "name", f'"{name}" is taken by another adapter', "choose another, or unload it"
            )
        return name

    def _known(self, name: str) -> str:
        if checks.text("name", name) not in self._loaded:
            there = ", ".join(f'"{x}"' for x in self._loaded) or "none"
            raise UsageError("name", f'"{name}" is no adapter that is loaded ({there})')
        return name

    def _read(self, file: AdapterFile, name: str, weight: Weight) -> Lora:
        places = self._linears()
        norms = self._norms()
        addends: list[tuple[Linear, Addend]] = []
        vectors: list[tuple[str, torch.Tensor]] = []
        kinds: Counter[str] = Counter()
        dense = []
        for module, branch in file.branches():
            kinds[branch.kind] += 1
            layer = module.target.layer
            if layer in norms:
                assert isinstance(branch.matrix, Dense)
                vectors.append((layer, torch.from_numpy(branch.matrix.delta.copy())))
                continue
            place = places[layer]
            addend = _addend(file, name, module, branch, place)
            addends.append((place.linear, addend))
            if addend.down is None and addend.up is not None:
                dense.append(module.name)
        nbytes = sum(x.nbytes for _, a in addends for x in (a.down, a.up, a.bias) if x is not None)
        return Lora(
            name=name,
            label=file.label,
            weight=weight,
            layers=len(file.modules),
            kinds=dict(kinds),
            dense=tuple(dense),
            unmatched=file.unmatched,
            text_encoder=file.text_encoder,
            redundant=file.redundant,
            nbytes=nbytes,
            _addends=tuple(addends),
            _norms=tuple(vectors),
        )

    def _attach(self, *changed: Lora) -> None:
        """Give the layers of adapters their branch anew, from the adapters that are loaded."""
        self._changed()
        of_linear: dict[int, list[Addend]] = defaultdict(list)
        for lora in self:
            if lora.name not in self._parked:
                for linear, addend in lora._addends:
                    of_linear[id(linear)].append(addend)
        for linear in _linears_of(changed):
            addends = of_linear[id(linear)]
            linear.adapter = _branch(linear, addends) if addends else None
        of_device: dict[torch.device, list[SharedAdapter]] = defaultdict(list)
        for linear in _linears_of(self):
            if isinstance(linear.adapter, SharedAdapter):
                of_device[_device(linear)].append(linear.adapter)
        with torch.inference_mode(False):
            self._tables = [WeightTable(adapters) for adapters in of_device.values()]
        self._write_weights()

    def _write_weights(self) -> None:
        for table in self._tables:
            table.set(self._weight)
        self._write_norms()

    def _weight(self, name: str, layer: str) -> float | None:
        if name in self._fused:
            return self._fused[name] * self._loaded[name].weight_of(layer)
        if not self._enabled or name in self._off or name in self._parked:
            return None
        return self._scales.value * self._loaded[name].weight_of(layer)

    def _write_norms(self) -> None:
        changes: dict[str, list[tuple[str, torch.Tensor]]] = defaultdict(list)
        for lora in self:
            for layer, delta in lora._norms:
                changes[layer].append((lora.name, delta))
        norms = self._norms()
        for layer in {*changes, *self._originals}:
            original = self._originals.setdefault(layer, norms[layer].clone().cpu())
            total = original.float()
            for name, delta in changes[layer]:
                total = total + (self._weight(name, layer) or 0.0) * delta
            norms[layer].copy_(total)
            if not changes[layer]:
                del self._originals[layer]


def _linears_of(loras: Iterable[Lora]) -> Iterable[Linear]:
    return {id(linear): linear for lora in loras for linear, _ in lora._addends}.values()


def _device(linear: Linear) -> torch.device:
    return next(itertools.chain(linear.parameters(False), linear.buffers(False))).device


@contextmanager
def _short_of_memory(file: AdapterFile) -> Iterator[None]:
    """Name the adapter where loading it takes more memory than the device has."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise CudaError(
            f"{file.label} does not fit into the device's memory; it was not loaded"
        ) from None


def check_weight(argument: str, weight: Any) -> Weight:
    """Return a weight, or weights by part of a layer's name.

    Raises:
        UsageError: not a number within 1e6 of 0, or a mapping of other things.
    """
    if isinstance(weight, Mapping):
        for part, value in weight.items():
            checks.text(argument, part)
            check_weight(f'{argument}["{part}"]', value)
        return dict(weight)
    return checks.lora_weight(argument, weight)


def _addend(
    file: AdapterFile, name: str, module: Module, branch: Branch, place: LinearPlace
) -> Addend:
    """Return a module's branch as tensors in host memory, in the dtype of sums of the model."""
    layer = " ".join(dict.fromkeys([module.target.layer, *module.target.diffusers]))
    matrix, dtype = branch.matrix, sums_dtype(place.linear.dtype)
    rows = place.slice(module.target.rows(place.rows))

    def tensor(array: Matrix) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(dtype, copy=True)

    bias = None if branch.bias is None else tensor(branch.bias)
    if matrix is None:
        return Addend(name, layer, rows, None, None, bias)
    low = matrix.low_rank()
    if low is None:
        return Addend(name, layer, rows, None, tensor(matrix.dense()), bias)
    down, up = tensor(low.down), tensor(low.up)
    if branch.magnitude is None:
        return Addend(name, layer, rows, down, up, bias)
    if branch.magnitude.shape[1] != 1:
        raise CheckpointError(
            f'{file.label}: the adapter of "{module.name}" is DoRA with a magnitude per column, '
            "which works merged into the weights alone",
            "merge it into the checkpoint",
        )
    weight = place.linear.decode()[rows, : low.shape[1]]
    magnitude = torch.from_numpy(branch.magnitude[:, 0].copy())
    norms = dora_norms(weight, down.to(weight), up.to(weight), magnitude).cpu()
    if zeros := (norms[0] == 0).nonzero().flatten().tolist():
        raise CheckpointError(
            f'{file.label}: the adapter of "{module.name}" is DoRA, which divides by the norms of '
            f"the layer's rows, and that of row {zeros[0]} is 0",
            OTHER_MODEL,
        )
    return Addend(name, layer, rows, down, up, bias, norms)


def _branch(linear: Linear, addends: list[Addend]) -> SharedAdapter:
    with torch.inference_mode(False):  # tensors of that mode cannot be written to outside it
        fused = fused_adapter(linear, addends)
        if fused is not None:
            return fused
        like = torch.empty(0, dtype=sums_dtype(linear.dtype), device=_device(linear))
        return LowRankAdapter(addends, getattr(linear, "bias", None), like)
