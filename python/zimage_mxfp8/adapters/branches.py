"""What an adapter adds to one layer, as matrices, from the tensors that trainers store.

Formulas: LoRA (Hu et al., 2021, arXiv:2106.09685), LoHa (Hyeon-Woo et al., 2021, arXiv:2108.06098),
LoKr (Yeh et al., 2023, arXiv:2309.14859), DoRA (Liu et al., 2024, arXiv:2402.09353), with the
scales that LyCORIS, PEFT and ComfyUI agree on. Arithmetic is in float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .keys import Role

Matrix = npt.NDArray[np.float32]
Indices = npt.NDArray[np.intp]


OTHER_MODEL = "use it with the model that it was trained for"
_MAX_FACTOR = 1 << 24  # elements of a small factor that is a product itself
_FLOAT32_MAX = float(np.finfo(np.float32).max)


class BranchError(Exception):
    """Tensors that do not make an adapter; the message completes a sentence about the layer.

    Attributes:
        remedy: what to do instead.
    """

    def __init__(self, problem: str, remedy: str = "export it again") -> None:
        super().__init__(problem)
        self.remedy = remedy


@dataclass(frozen=True, eq=False)
class LowRank:
    """up @ down, of matrices [rows, rank] and [rank, columns]; the scale is in `up`."""

    down: Matrix
    up: Matrix

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns of the layer."""
        return self.up.shape[0], self.down.shape[1]

    @property
    def rank(self) -> int:
        """Inner size."""
        return len(self.down)

    @property
    def bound(self) -> float:
        """A number that no element of the product exceeds, nor any sum on the way to it."""
        return self.rank * _largest(self.down) * _largest(self.up)

    def low_rank(self) -> LowRank | None:
        """Return it as two narrow matrices, which it is."""
        return self

    def dense(self, rows: slice | Indices = slice(None)) -> Matrix:
        """Return rows of the whole matrix."""
        result: Matrix = self.up[rows] @ self.down
        return result

    def in_double(self) -> LowRank:
        """Return it in float64, so that the product is rounded only once, with the weight."""
        return LowRank(_double(self.down), _double(self.up))


@dataclass(frozen=True, eq=False)
class Dense:
    """A whole matrix [rows, columns], or a vector for a layer that has one."""

    delta: Matrix

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the layer's weight."""
        return self.delta.shape

    def low_rank(self) -> LowRank | None:
        """Return None: nothing is known of its rank."""
        return None

    def dense(self, rows: slice = slice(None)) -> Matrix:
        """Return rows of the whole matrix."""
        return self.delta[rows]

    def in_double(self) -> Dense:
        """Return it as it is: there is no product in it."""
        return self


@dataclass(frozen=True, eq=False)
class Hadamard:
    """The elementwise product of two low-rank matrices of the same shape (LoHa)."""

    first: LowRank
    second: LowRank

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns of the layer."""
        return self.first.shape

    @property
    def bound(self) -> float:
        """A number that no element exceeds, whether as one product or as two narrow matrices."""
        first, second = self.first, self.second
        down = _largest(first.down) * _largest(second.down)
        up = _largest(first.up) * _largest(second.up)
        return max(down, up, first.bound, second.bound, first.bound * second.bound)

    def dense(self, rows: slice = slice(None)) -> Matrix:
        """Return rows of the whole matrix."""
        return self.first.dense(rows) * self.second.dense(rows)

    def in_double(self) -> Hadamard:
        """Return it in float64, so that the product is rounded only once, with the weight."""
        return Hadamard(self.first.in_double(), self.second.in_double())

    def low_rank(self) -> LowRank | None:
        """Return the same of rank r1 r2, the products of all pairs of rows, if that is low."""
        rows, columns = self.shape
        rank = self.first.rank * self.second.rank
        if not _is_low(rank, rows, columns):
            return None
        down = self.first.down[:, None] * self.second.down[None]
        up = self.first.up[:, :, None] * self.second.up[:, None]
        return LowRank(down.reshape(rank, columns), up.reshape(rows, rank))


@dataclass(frozen=True, eq=False)
class Kronecker:
    """kron(left, right), where `right` may be a product of two narrow matrices (LoKr)."""

    left: Matrix
    right: Matrix | LowRank

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns of the layer."""
        (a, b), (c, d) = self.left.shape, self.right.shape
        return a * c, b * d

    @property
    def bound(self) -> float:
        """A number that no element exceeds, whether as one product or as two narrow matrices."""
        left, right = _largest(self.left), self.right
        if not isinstance(right, LowRank):
            return left * _largest(right)
        return max(right.bound, left * max(right.bound, _largest(right.up), _largest(right.down)))

    def dense(self, rows: slice = slice(None)) -> Matrix:
        """Return rows of the whole matrix."""
        block, inner = np.divmod(np.arange(self.shape[0])[rows], self.right.shape[0])
        right = self.right.dense(inner) if isinstance(self.right, LowRank) else self.right[inner]
        blocks = self.left[block, :, None] * right[:, None]
        result: Matrix = blocks.reshape(len(block), self.shape[1])
        return result

    def in_double(self) -> Kronecker:
        """Return it in float64, so that the product is rounded only once, with the weight."""
        right = self.right
        wide = right.in_double() if isinstance(right, LowRank) else _double(right)
        return Kronecker(_double(self.left), wide)

    def low_rank(self) -> LowRank | None:
        """Return the same as a product of two narrow matrices, if they are narrow.

        kron(w, u d) = kron(w, u) kron(1, d) = kron(1, u) kron(w, d).
        """
        if not isinstance(self.right, LowRank):
            return None
        (a, b), inner = self.left.shape, self.right
        if not _is_low(min(a, b) * inner.rank, *self.shape):
            return None
        one = np.eye(min(a, b), dtype=np.float32)
        if b <= a:
            return LowRank(np.kron(one, inner.down), np.kron(self.left, inner.up))
        return LowRank(np.kron(self.left, inner.down), np.kron(one, inner.up))


Delta = LowRank | Dense | Hadamard | Kronecker


@dataclass(frozen=True, eq=False)
class Branch:
    """What one adapter adds to one layer at weight 1.

    Attributes:
        kind: "LoRA", "LoHa", "LoKr", "DoRA" or "difference".
        matrix: added to the weight; None for a change of the bias alone.
        bias: added to the bias, [rows].
        magnitude: of DoRA: the norm of each row [rows, 1] or column [1, columns] of the result.
    """

    kind: str
    matrix: Delta | None
    bias: Matrix | None = None
    magnitude: Matrix | None = None


Tensors = Mapping[Role, Matrix]
# The tensors of each kind, without alpha and biases.
_ROLES: dict[str, frozenset[Role]] = {
    "LoRA": frozenset({"down", "up", "magnitude"}),
    "LoHa": frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}),
    "LoKr": frozenset({"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"}),
    "difference": frozenset({"diff"}),
}


def make_branch(tensors: Tensors, *, rank_scaled: bool = False) -> Branch:
    """Combine the tensors of one module.

    Args:
        tensors: by role, float32.
        rank_scaled: alpha is over the rank's root (rsLoRA), not over the rank.

    Raises:
        BranchError: incomplete, of shapes that do not fit, not finite, or of a kind that is not
            supported.
    """
    for role, tensor in tensors.items():
        if role != "alpha" and not np.isfinite(tensor).all():
            raise BranchError(f"has NaN or infinite numbers in {role}")
    bias = tensors.get("up_bias", tensors.get("diff_bias"))
    if bias is not None and bias.ndim != 1:
        raise BranchError(f"has a bias of shape {list(bias.shape)}, which is not a vector")
    roles = set(tensors) - {"alpha", "up_bias", "diff_bias"}
    kind = next((kind for kind, own in _ROLES.items() if roles & own - {"magnitude"}), None)
    if kind is None and bias is not None and not roles:
        return Branch("difference", None, bias)
    if kind is None:
        raise BranchError(f"has {' and '.join(sorted(tensors))} alone")
    if others := sorted(roles - _ROLES[kind]):
        raise BranchError(f"is {kind} with {' and '.join(others)}, which is not supported")
    if kind == "LoRA":
        return _lora(tensors, bias, rank_scaled)
    if kind == "LoHa":
        return Branch(kind, _loha(tensors), bias)
    if kind == "LoKr":
        return Branch(kind, _lokr(tensors), bias)
    if tensors["diff"].ndim == 0:
        raise BranchError("has diff of shape [], which is not a matrix")
    return Branch(kind, Dense(tensors["diff"]), bias)


def _lora(tensors: Tensors, bias: Matrix | None, rank_scaled: bool) -> Branch:
    down, up = _pair(tensors, "down", "up")
    scale = _scale(tensors, len(down), rank_scaled)
    branch = LowRank(down, _scaled(up, scale))
    _check_bound(branch.bound)
    if bias is not None and "up_bias" in tensors:
        bias = _scaled(bias, scale)
    magnitude = tensors.get("magnitude")
    if magnitude is None:
        return Branch("LoRA", branch, bias)
    rows, columns = branch.shape
    _check_bound(columns * branch.bound**2)  # norms of rows
    if magnitude.size == rows and magnitude.shape != (1, columns):
        return Branch("DoRA", branch, bias, magnitude.reshape(rows, 1))
    if magnitude.shape == (1, columns):
        return Branch("DoRA", branch, bias, magnitude)
    raise BranchError(
        f"has a magnitude of shape {list(magnitude.shape)} for {rows} rows and {columns} columns"
    )


def _loha(tensors: Tensors) -> Hadamard:
    b1, a1 = _pair(tensors, "hada_w1_b", "hada_w1_a")
    b2, a2 = _pair(tensors, "hada_w2_b", "hada_w2_a")
    first = LowRank(b1, _scaled(a1, _scale(tensors, len(b1), False)))
    second = LowRank(b2, a2)
    if first.shape != second.shape:
        raise BranchError("has two products of different shapes")
    product = Hadamard(first, second)
    _check_bound(product.bound)
    return product


def _lokr(tensors: Tensors) -> Kronecker:
    """Both factors may be whole or products; alpha counts only where one is a product."""
    left = _factor(tensors, "lokr_w1", "lokr_w1_a", "lokr_w1_b")
    right = _factor(tensors, "lokr_w2", "lokr_w2_a", "lokr_w2_b")
    of_rank = next((x.rank for x in (right, left) if isinstance(x, LowRank)), None)
    scale = 1.0 if of_rank is None else _scale(tensors, of_rank, False)
    if isinstance(left, LowRank):
        if math.prod(left.shape) > _MAX_FACTOR:
            raise BranchError(f"has a first factor of shape {list(left.shape)}", OTHER_MODEL)
        _check_bound(left.bound)
        left = left.dense()
    product = Kronecker(_scaled(left, scale), right)
    _check_bound(product.bound)
    return product


def _factor(tensors: Tensors, whole: Role, a: Role, b: Role) -> Matrix | LowRank:
    if whole not in tensors:
        return LowRank(*_pair(tensors, b, a))
    _check_matrix(tensors[whole], whole)
    return tensors[whole]


def _is_low(rank: int, rows: int, columns: int) -> bool:
    """Whether two narrow GEMMs do less than half the work of the dense one."""
    return 2 * rank * (rows + columns) <= rows * columns


def _largest(matrix: Matrix) -> float:
    return float(max(matrix.max(), -matrix.min()))


def _check_bound(bound: float) -> None:
    """Refuse what may overflow in float32: no weight switches infinity off (0 inf is NaN)."""
    if bound > _FLOAT32_MAX:
        raise BranchError("has numbers so large that their products may overflow")


def _double(matrix: Matrix) -> Any:
    return matrix.astype(np.float64)


def _pair(tensors: Tensors, down: Role, up: Role) -> tuple[Matrix, Matrix]:
    """Return two matrices [rank, columns] and [rows, rank]."""
    for role, other in ((down, up), (up, down)):
        if role not in tensors:
            raise BranchError(f"has {other} without {role}")
        _check_matrix(tensors[role], role)
    a, b = tensors[down], tensors[up]
    if len(a) != b.shape[1]:
        raise BranchError(f"has {down} of rank {len(a)} and {up} of rank {b.shape[1]}")
    if len(a) == 0:
        raise BranchError("has rank 0")
    return a, b


def _check_matrix(tensor: Matrix, role: str) -> None:
    if tensor.ndim != 2 or 0 in tensor.shape:
        raise BranchError(f"has {role} of shape {list(tensor.shape)}, which is not a matrix")


def _scaled(matrix: Matrix, scale: float) -> Matrix:
    with np.errstate(over="ignore"):
        result: Matrix = matrix * np.float32(scale)
    if not np.isfinite(result).all():
        raise BranchError("becomes infinite with its alpha")
    return result


def _scale(tensors: Tensors, rank: int, rank_scaled: bool) -> float:
    alpha = tensors.get("alpha")
    if alpha is None:
        return 1.0
    if alpha.size != 1:
        raise BranchError(f"has an alpha of shape {list(alpha.shape)}, which is not one number")
    value = float(alpha.reshape(()))
    if not math.isfinite(value):
        raise BranchError(f"has alpha {value}")
    return value / (math.sqrt(rank) if rank_scaled else rank)
