"""The time of the GEMMs of a block, by each kernel of the library's table and by torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F

from .. import _core
from ..ops.fused import ActivationFormat
from ..ops.gemm import gemm
from ..ops.gemm_epilogues import EPILOGUES
from ..system.devices import core_index, has_kernels, why_no_kernels
from ..transformer import ops
from ..transformer.arithmetic import int8, scaled_mm
from ..transformer.floating_dtype import default_dtype, name_of
from ..zimage.config import ZImageConfig
from ..zimage.constants import HEAD_DIM, NORM_EPS
from ..zimage.layers import ZIMAGE
from .attempts import Attempts
from .models import random_weights
from .report import GemmTime
from .timing import Captured, capture, microseconds_in_turn
from .workload import Workload

_REPEATS = 10
_CACHE = 128 << 20  # bytes, as large as those of the largest GPUs
_FOR_CHECKS = "reference"  # the kernel that is not measured: it is slow
_NO_EPILOGUE = "none"
# What the transformer computes behind the layers of a slot.
_EPILOGUES = {"qkv": "rotate_heads", "ffn_in": "silu_multiply"}


def _encode(matrix: torch.Tensor, operand: str) -> Any:
    """Encode a matrix as an operand of a kernel: the formats of activations have the same names."""
    to = cast(ActivationFormat, operand)
    return ops.encode(matrix, {to})[to]


def _as_it_is(matrix: torch.Tensor, _operand: str) -> torch.Tensor:
    return matrix


def _integers(matrix: torch.Tensor, _operand: str) -> torch.Tensor:
    """Round a matrix to INT8 without its scales, which torch's sums of integers do not take."""
    codes: torch.Tensor = int8.quantize(matrix.float()).codes
    return codes


@dataclass(frozen=True)
class BlockGemm:
    """The GEMM of a linear layer of a block, or of several that are stacked.

    Attributes:
        layer: its name, such as "qkv" or "w1+w3".
        rows: N.
        columns: K.
        epilogue: what the transformer computes behind it, in the core's table; "none" for nothing.
    """

    layer: str
    rows: int
    columns: int
    epilogue: str


def block_gemms(config: ZImageConfig) -> list[BlockGemm]:
    """Return the GEMMs of a main block."""
    shapes = config.shapes()
    gemms = []
    for slot, layers in ZIMAGE.linears().items():
        name = "+".join(layer.name.rpartition(".")[2] for layer in layers)
        stacked = [shapes[f"{ZIMAGE.main.name}.0.{layer.name}.weight"] for layer in layers]
        rows, columns = sum(shape[0] for shape in stacked), stacked[0][1]
        gemms.append(BlockGemm(name, rows, columns, _EPILOGUES.get(slot, _NO_EPILOGUE)))
    return gemms


@dataclass(frozen=True)
class _Way:
    """A way to multiply: a kernel of the table or a function of torch, and its operands."""

    kernel: str
    a: str
    b: str
    epilogue: str
    multiply: Callable[..., object] = field(compare=False)  # takes A, B, the epilogue's arguments
    encode: Callable[[torch.Tensor, str], Any] = field(default=_encode, compare=False)

    def __str__(self) -> str:
        return f"{self.kernel} of {self.a} x {self.b}"


class Gemms:
    """Measurements of GEMMs on the current CUDA device.

    Args:
        workload: sizes of the model and its inputs.
        device: the device.
        attempts: takes what fails, and reports progress.

    Attributes:
        times: what was measured.
    """

    def __init__(self, workload: Workload, device: torch.device, attempts: Attempts) -> None:
        self.times: list[GemmTime] = []
        self._workload, self._device, self._attempts = workload, device, attempts
        self._dtype = default_dtype(device)

    def measure(self) -> None:
        """Measure all GEMMs in all ways that the device has."""
        ways = [*self._ways_of_torch(), *self._ways_of_kernels()]
        for tokens in self._workload.tokens:
            for problem in block_gemms(self._workload.config):
                what = f"{problem.layer} at {tokens:,} tokens"
                self._attempts.begin(f"GEMM {what}")
                with self._attempts.at("gemm", what):
                    self._measure(problem, tokens, ways)

    def _ways_of_torch(self) -> Iterator[_Way]:
        """Yield those that the device has, and leave out the others."""
        index = core_index(self._device)
        plain = name_of(self._dtype)
        yield _Way("torch linear", plain, plain, _NO_EPILOGUE, F.linear, _as_it_is)
        if why := scaled_mm.unsupported(index):
            self._attempts.leave_out("gemm", "torch._scaled_mm", why)
        else:
            multiply = partial(scaled_mm.multiply, dtype=self._dtype)
            yield _Way("torch._scaled_mm", "row-scaled", "row-scaled", _NO_EPILOGUE, multiply)
        if why := int8.unsupported(index):
            self._attempts.leave_out("gemm", "torch._int_mm", why)
        else:
            yield _Way("torch._int_mm", "int8", "int8", _NO_EPILOGUE, int8.integer_sums, _integers)

    def _ways_of_kernels(self) -> Iterator[_Way]:
        """Yield those of the library's table that the device has, and leave out the others."""
        index = core_index(self._device)
        if not has_kernels(index):
            self._attempts.leave_out("gemm", "kernels of this package", why_no_kernels())
            return
        for kernel in _core.gemm_kernels():
            if kernel.name == _FOR_CHECKS:
                continue
            size = self._workload.config.dim
            sizes = size, 3 * size, size
            problem = _core.GemmProblem(
                *sizes, *kernel.operands[0], "bfloat16", False, kernel.epilogues[0]
            )
            if why := _core.gemm_unsupported(kernel.name, problem, index):
                self._attempts.leave_out("gemm", kernel.name, why)
                continue
            for a, b in kernel.operands:
                if b == "bfloat16":  # weights that are not quantised
                    continue
                for epilogue in kernel.epilogues:
                    multiply = _multiplication(kernel.name, epilogue)
                    yield _Way(kernel.name, a, b, epilogue, multiply)

    def _measure(self, problem: BlockGemm, tokens: int, ways: list[_Way]) -> None:
        x = torch.randn(tokens, problem.columns, dtype=self._dtype, device=self._device)
        # Calls take turns with these weights, so that the cache does not keep them. Touched are
        # weights of 8 bits and D.
        touched = problem.rows * (problem.columns + tokens * self._dtype.itemsize)
        copies = 1 + _CACHE // touched
        captured: dict[_Way, Captured] = {}
        for way in ways:
            if way.epilogue not in (_NO_EPILOGUE, problem.epilogue):
                continue
            with self._attempts.at("gemm", f"{way}, {problem.layer} at {tokens:,} tokens"):
                captured[way] = self._capture(way, problem, x, copies)
        for way, us in microseconds_in_turn(captured, _REPEATS).items():
            sizes = tokens, problem.rows, problem.columns
            names = way.kernel, way.a, way.b, way.epilogue, problem.layer
            self.times.append(GemmTime(*names, *sizes, us))

    def _capture(self, way: _Way, problem: BlockGemm, x: torch.Tensor, copies: int) -> Captured:
        a, arguments = way.encode(x, way.a), self._arguments(way.epilogue, len(x))

        def call() -> Callable[[], object]:
            weights = random_weights((problem.rows, problem.columns), self._device, self._dtype)
            b = way.encode(weights, way.b)
            return lambda: way.multiply(a, b, *arguments)

        return capture([call() for _ in range(copies)])

    def _arguments(self, epilogue: str, tokens: int) -> tuple[Any, ...]:
        """Return the arguments of an epilogue after the operands."""
        if epilogue == "silu_multiply":
            return ("bfloat16",)
        if epilogue == "rotate_heads":
            norm = torch.ones(HEAD_DIM, dtype=self._dtype, device=self._device)
            rotations = torch.ones(tokens, HEAD_DIM // 2, 2, device=self._device)
            heads = self._workload.config.n_heads
            return norm, norm, rotations, heads, heads, NORM_EPS
        return ()


def _multiplication(kernel: str, epilogue: str) -> Callable[..., object]:
    """Return the function that multiplies by a kernel, with the epilogue's arguments."""
    function = gemm if epilogue == _NO_EPILOGUE else EPILOGUES[epilogue].gemm
    return lambda a, b, *arguments: function(a, b, *arguments, kernel=kernel)
