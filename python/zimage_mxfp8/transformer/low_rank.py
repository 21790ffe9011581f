"""The branch of a linear layer that all adapters share: narrow GEMMs, dense ones, row factors."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .adapter import Adapter
from .arithmetic import tiles
from .floating_dtype import sums_dtype
from .ops import PLAIN, Activation


@dataclass(frozen=True, eq=False)
class Addend:
    """What one adapter adds to some rows of a layer at weight 1.

    Attributes:
        adapter: its name.
        layer: names of the layer in both layouts, for weights by layer.
        rows: of the layer as it is loaded, which may stack several.
        down: [rank, K], or None if `up` is dense.
        up: [rows, rank], or a dense [rows, K]; None for a change of the bias alone.
        bias: [rows], or None.
        norms: of DoRA, float32 [4, rows] from `dora_norms`; None otherwise.
    """

    adapter: str
    layer: str
    rows: slice
    down: torch.Tensor | None
    up: torch.Tensor | None
    bias: torch.Tensor | None = None
    norms: torch.Tensor | None = None


class SharedAdapter(Adapter):
    """Base class of the branches that all loaded adapters share, with their weights.

    Weights are in buffers, so CUDA graphs see new ones. `WeightTable` sets them.

    Attributes:
        names: of each addend, those of its adapter and layer.
        weights: of each addend, float32: 0.7 is not a bfloat16.
        active: 1 for addends that are on, else 0.
        scales: of each column of the stacked `down`: its addend's weight times its power.
        members: int64, the addend of each column.
        powers: constant factors of the columns.
    """

    weights: torch.Tensor
    active: torch.Tensor
    scales: torch.Tensor
    members: torch.Tensor
    powers: torch.Tensor

    def __init__(self, addends: Sequence[Addend]) -> None:
        super().__init__()
        self.names = tuple((x.adapter, x.layer) for x in addends)

    def _register_weights(self, members: Sequence[int], powers: torch.Tensor) -> None:
        """Make the buffers from the addends and the powers of the columns."""
        device, count = powers.device, len(self.names)
        self.register_buffer("weights", torch.zeros(count, device=device))
        self.register_buffer("active", torch.zeros(count, device=device))
        self.register_buffer("scales", torch.zeros(len(members), device=device))
        self.register_buffer("members", torch.tensor(members, dtype=torch.int64, device=device))
        self.register_buffer("powers", powers)


class WeightTable:
    """The weights of several branches in one tensor, so that setting all of them is one copy."""

    def __init__(self, adapters: Sequence[SharedAdapter]) -> None:
        """Give the branches, which are on one device, parts of new tensors."""
        self._names = [name for adapter in adapters for name in adapter.names]
        ends = list(itertools.accumulate(len(adapter.names) for adapter in adapters))
        firsts = [0, *ends[:-1]]
        parts = zip(firsts, adapters, strict=True)
        self._members = torch.cat([adapter.members + first for first, adapter in parts])
        self._powers = torch.cat([adapter.powers for adapter in adapters])
        self._values = torch.zeros(2, len(self._names), device=self._powers.device)
        self._scales = torch.zeros_like(self._powers)
        counts = [len(adapter.scales) for adapter in adapters]
        columns = self._scales.split(counts)
        for first, end, of_columns, adapter in zip(firsts, ends, columns, adapters, strict=True):
            adapter.weights, adapter.active = self._values[:, first:end]
            adapter.scales = of_columns

    def set(self, weight_of: Callable[[str, str], float | None]) -> None:
        """Set the weight of each addend from the names of its adapter and layer; None for off.

        A magnitude with weight 0 still rescales rows, and one that is off does not.
        """
        given = [weight_of(*each) for each in self._names]
        values = torch.tensor([[w or 0.0 for w in given], [w is not None for w in given]])
        self._values.copy_(values, non_blocking=True)
        torch.mul(self._values[0][self._members], self._powers, out=self._scales)


class LowRankAdapter(SharedAdapter):
    """Adds the addends of all loaded adapters to a linear layer's result.

    An addend with weight w adds w (x down^T) up^T. The `down` of all addends are stacked into one
    GEMM, and the `up` of the same rows into another. With a magnitude m per row, W x becomes
    f (W + w dW) x where f = m / |W + w dW|, as PEFT computes DoRA. Several such changes of the same
    rows add up, in any order; PEFT rescales what earlier adapters added too.
    """

    down: torch.Tensor
    base_bias: torch.Tensor | None

    def __init__(
        self, addends: Sequence[Addend], base_bias: torch.Tensor | None, like: torch.Tensor
    ) -> None:
        """Take the addends of a layer.

        Args:
            addends: of all adapters.
            base_bias: the layer's bias [N], if it has one.
            like: has the model's device, and the dtype of the factors.
        """
        super().__init__(addends)
        self._itemsize = like.itemsize
        self._groups: list[_Group] = []
        self._dense: list[tuple[str, slice, int]] = []
        self._biases: list[tuple[str, slice, int]] = []
        downs: list[torch.Tensor] = []
        members: list[int] = []
        for group in _same_rows(addends):
            begin = len(members)
            for i in group:
                down = addends[i].down
                assert down is not None
                downs.append(down.to(like))
                members += [i] * len(down)
            columns, first = slice(begin, len(members)), addends[group[0]]
            number = len(self._groups)
            self._groups.append(
                _Group(number, first.rows, columns, group[0], first.norms is not None)
            )
            ups = [up for i in group if (up := addends[i].up) is not None]
            self.register_buffer(f"up{number}", torch.cat(ups, 1).to(like))
            if first.norms is not None:
                self.register_buffer(f"norms{number}", first.norms.to(like.device))
        if downs:
            self.register_buffer("down", torch.cat(downs))
        for i, x in enumerate(addends):
            if x.down is None and x.up is not None:
                self.register_buffer(f"dense{i}", x.up.to(like))
                self._dense.append((f"dense{i}", x.rows, i))
            if x.bias is not None:
                self.register_buffer(f"bias{i}", x.bias.to(like))
                self._biases.append((f"bias{i}", x.rows, i))
        dora = any(group.is_dora for group in self._groups)
        self.register_buffer("base_bias", base_bias if dora else None)
        self._register_weights(members, torch.ones(len(members), device=like.device))

    def forward(self, activation: Activation, result: torch.Tensor) -> torch.Tensor:
        """Add the addends (see the class)."""
        x = activation[PLAIN]
        x = x.to(sums_dtype(x.dtype))
        factors = {group.number: self._factor(group) for group in self._groups if group.is_dora}
        if factors:
            self._rescale(result, factors)
        if self._groups:
            narrow = F.linear(x, self.down).mul_(self.scales)
        for group in self._groups:
            up = getattr(self, f"up{group.number}")
            part, target = narrow[..., group.columns], result[..., group.rows]
            if group.is_dora:
                target += F.linear(part, up) * factors[group.number].to(x.dtype)
            else:
                _add_gemm(target, part, up)
        for name, rows, i in self._dense:
            _add_gemm(result[..., rows], x * self.weights[i].to(x.dtype), getattr(self, name))
        for name, rows, i in self._biases:
            result[..., rows] += self.weights[i].to(x.dtype) * getattr(self, name)
        return result

    def _factor(self, group: _Group) -> torch.Tensor:
        """Return m / |W + w dW| per row; 1 if the addend is off."""
        square, cross, change, magnitude = getattr(self, f"norms{group.number}")
        w, active = self.weights[group.addend], self.active[group.addend]
        factor = magnitude * torch.rsqrt(square + w * (cross + w * change))
        result: torch.Tensor = 1 + active * (factor - 1)
        return result

    def _rescale(self, result: torch.Tensor, factors: Mapping[int, torch.Tensor]) -> None:
        gain = torch.ones(result.shape[-1], device=result.device)
        for group in self._groups:
            if group.is_dora:
                gain[group.rows] += factors[group.number] - 1
        if self.base_bias is not None:
            result -= self.base_bias
        result *= gain
        if self.base_bias is not None:
            result += self.base_bias

    def workspace_nbytes(self, tokens: int) -> int:
        """Bytes that `forward` takes on a CUDA device in addition to its arguments."""
        item = self._itemsize
        nbytes = tokens * len(self.scales) * item
        widths = [0, *(len(getattr(self, f"up{x.number}")) for x in self._groups if x.is_dora)]
        widths += [getattr(self, name).shape[1] for name, _, _ in self._dense]
        return nbytes + 2 * tokens * max(widths) * item


@dataclass(frozen=True)
class _Group:
    """Addends of the same rows, of which `addend` is the first; alone if with a magnitude."""

    number: int
    rows: slice
    columns: slice
    addend: int
    is_dora: bool


def _same_rows(addends: Sequence[Addend]) -> list[list[int]]:
    groups: dict[Hashable, list[int]] = {}
    for i, x in enumerate(addends):
        if x.down is not None:
            key = x.rows.start, x.rows.stop, None if x.norms is None else i
            groups.setdefault(key, []).append(i)
    return list(groups.values())


def dora_norms(
    weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor, magnitude: torch.Tensor
) -> torch.Tensor:
    """Return what gives m / |W + w dW| for any w.

    Args:
        weight: W, float32 [rows, K].
        down: [rank, K].
        up: [rows, rank]; dW is up @ down.
        magnitude: m, [rows].

    Returns:
        Per row |W|^2, 2 W.dW, |dW|^2 and m, float32 [4, rows].
    """
    delta = up.float() @ down.float()
    sums = [weight.square().sum(1), 2 * (weight * delta).sum(1), delta.square().sum(1)]
    return torch.stack([*sums, magnitude.to(weight)])


def _add_gemm(target: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """Add x weight^T to `target`, in one rounding if there are rows and the dtype is the same."""
    if target.dim() == 1:
        target += F.linear(x, weight)
    elif target.dtype == x.dtype:
        target.addmm_(x, weight.T)
    else:  # float16 and float32
        for rows in tiles.row_tiles(len(target), target.shape[1], tiles.TILE):
            target[rows] += F.linear(x[rows], weight)
