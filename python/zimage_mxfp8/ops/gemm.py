"""GEMM with 8-bit operands, D = A B^T + bias, for NumPy arrays and torch tensors.

Operands are MXFP8 (`codec.MXFP8Array`), E4M3 with one scale per row (`RowScaledArray`), INT8 with
one scale per row (`Int8Array`, times the same) or plain bfloat16. The core has a table of kernels
and takes the one of least cost:

    reference    decoded operands, sums in order of K; the CPU and every CUDA device, slow
    dequantize   operands decoded to bfloat16 in a workspace, then cuBLASLt
    fp8_rowwise  cuBLASLt's FP8 GEMM of two row-scaled operands; Hopper
    fp8_sm90     the same with a fused epilogue or a low-rank addend (`gemm_epilogues`); Hopper
    int8_sm90    INT8 operands, with or without a fused epilogue or a low-rank addend; Hopper
    int8_sm80    INT8 operands; compute capability 8.0 and newer, run on Hopper alone
    mixed_sm90   bfloat16 times MXFP8, decoded in the GEMM kernel; Hopper
    mxfp8_sm100  block-scaled tensor cores of compute capability 10.0 and 10.3; never run on one
    mxfp8_sm120  the same for 12.0 and 12.1; never run on one

In the environment, ZIMAGE_MXFP8_GEMM_LOG=1 prints each choice once to stderr, with the reasons
against the other kernels, and ZIMAGE_MXFP8_GEMM_KERNEL names a kernel to take wherever it supports
the problem.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from .. import _core
from ..dtypes import DTypeName
from ..errors import InvalidArgumentError
from .arrays import (
    CODES,
    aligned,
    as_bytes,
    as_float8,
    as_result,
    bfloat16_type,
    call_core,
    dtype_name,
    empty,
    kind_of,
    on_cuda,
    plain,
    require_2d,
    thread_count,
    vector,
)
from .codec import MXFP8Array, mxfp8_parts

__all__ = [
    "FoldStats",
    "GemmCandidate",
    "Int8Array",
    "RowScaledArray",
    "explain_gemm",
    "fold",
    "fold_async",
    "fold_stats",
    "gemm",
    "gemm_kernel",
    "quantize_rows",
]


class WithRowScales:
    """A matrix of codes [N, K] with one float32 scale per row [N]."""

    codes: Any
    scales: Any

    def __repr__(self) -> str:
        size = "x".join(map(str, getattr(self.codes, "shape", "?")))
        return f"{type(self).__name__}({size}, {kind_of(self.codes)})"

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        rows, cols = self.codes.shape
        return int(rows), int(cols)


@dataclass(frozen=True, eq=False, repr=False)  # arrays have no single truth value
class RowScaledArray(WithRowScales):
    """A matrix in E4M3 with one scale per row: element = e4m3(code) * scale of its row.

    Attributes:
        codes: E4M3 bit patterns, [N, K], row-major: NumPy uint8, or torch float8_e4m3fn.
        scales: float32, [N].
    """

    codes: Any
    scales: Any


@dataclass(frozen=True, eq=False, repr=False)
class Int8Array(WithRowScales):
    """A matrix in INT8 with one scale per row: element = code * scale of its row.

    Sums of products are exact, so all kernels give the same result, bit for bit: float32(sum) *
    scale of A's row * scale of B's row, rounded at each step.

    Attributes:
        codes: int8 from -127 to 127, [N, K], row-major. K is at most 131040.
        scales: float32, [N].
    """

    codes: Any
    scales: Any


@dataclass(frozen=True)
class FoldStats:
    """The change of a matrix by folding its scales.

    Attributes:
        changed: number of elements with another value than before.
        relative_error: Frobenius norm of the change, relative to that of the matrix.
    """

    changed: int
    relative_error: float


def quantize_rows(array: Any, *, threads: int = 0) -> RowScaledArray:
    """Encode a matrix in E4M3 with one scale per row, like activations.

    `scale = amax / 448` in float32, codes `x * (448 / amax)` to nearest even. A row with a maximum
    below 2^-100 becomes zeros; one with NaN or infinity gets the scale NaN. The bytes depend
    neither on the processor nor on the device.

    Args:
        array: [N, K] of bfloat16, float16 or float32; NumPy, or torch on the CPU or on CUDA.
        threads: threads to use on the CPU; 0 means one per core.

    Raises:
        InvalidArgumentError: not a matrix, or another dtype or device.
    """
    source, name = plain(array, "array")
    dtype = dtype_name(name, "array")
    shape = require_2d(source, "array")
    codes = empty(shape, "uint8", like=source)
    scales = empty(shape[:1], "float32", like=source)
    call_core(_core.quantize_rows, source, dtype, codes, scales, thread_count(threads), like=source)
    return RowScaledArray(as_float8(codes), scales)


def fold(
    array: MXFP8Array, *, bound: float = 1e-3, threads: int = 0
) -> tuple[RowScaledArray, FoldStats]:
    """Fold the block scales of an MXFP8 matrix into one power of two per row.

    The scales of the blocks are powers of two, so differences within a row move into the codes'
    exponents; only codes that fall below E4M3's normal range lose bits. Hopper's FP8 tensor cores
    take the result.

    Args:
        array: on the CPU or on CUDA, where the call waits for the device.
        bound: the largest relative error that may be added.
        threads: threads to use on the CPU; 0 means one per core.

    Returns:
        The row-scaled matrix, and its change. The bytes do not depend on the device.

    Raises:
        PrecisionLossError: the error would pass `bound`.
        InvalidArgumentError: NaN in the matrix.
    """
    codes, scales, rows, cols = mxfp8_parts(array, "array")
    limit = _bound(bound)
    threads = thread_count(threads)
    if on_cuda(codes) or on_cuda(scales):
        result, statistics = fold_async(array)
        return result, fold_stats(statistics, bound=limit)
    out_codes = empty((rows, cols), "uint8", like=codes)
    out_scales = empty((rows,), "float32", like=codes)
    changed, error = _core.fold(codes, scales, rows, cols, out_codes, out_scales, limit, threads)
    return RowScaledArray(as_float8(out_codes), out_scales), FoldStats(changed, error)


def fold_async(array: MXFP8Array) -> tuple[RowScaledArray, Any]:
    """Fold a matrix on CUDA, on torch's current stream, without waiting for the device.

    Args:
        array: on a CUDA device.

    Returns:
        The row-scaled matrix and the change of each row, a tensor of float64 [N, 3] on the device
        for `fold_stats`. Until that has checked it, the matrix may be unusable: it may have NaN or
        too large a change.

    Raises:
        InvalidArgumentError: not an `MXFP8Array` on one CUDA device.
    """
    codes, scales, rows, cols = mxfp8_parts(array, "array")
    out_codes = empty((rows, cols), "uint8", like=codes)
    out_scales = empty((rows,), "float32", like=codes)
    statistics = empty((rows, 3), "float64", like=codes)
    call_core(
        _core.fold_async, codes, scales, rows, cols, out_codes, out_scales, statistics, like=codes
    )
    return RowScaledArray(as_float8(out_codes), out_scales), statistics


def fold_stats(statistics: Any, *, bound: float = 1e-3) -> FoldStats:
    """Return the change by folding, from the statistics of `fold_async`; wait for the device.

    Args:
        statistics: statistics of one matrix, [N, 3] of float64.
        bound: the largest relative error that may have been added.

    Raises:
        PrecisionLossError: the error passes `bound`.
        InvalidArgumentError: NaN in the matrix, or not such statistics.
    """
    limit = _bound(bound)
    rows, dtype = plain(statistics, "statistics")
    if dtype != "float64" or len(rows.shape) != 2 or rows.shape[1] != 3:
        raise InvalidArgumentError(
            f"statistics must be float64 [N, 3], not {dtype} {list(rows.shape)}"
        )
    return FoldStats(*_core.fold_stats(rows.cpu() if on_cuda(rows) else rows, limit))


def _bound(bound: Any) -> float:
    try:
        return float(bound)
    except (TypeError, ValueError, OverflowError):
        raise InvalidArgumentError("bound must be a number") from None


def row_scaled_parts(array: RowScaledArray | Int8Array, name: str) -> tuple[Any, Any, int, int]:
    """Return codes, scales, rows and columns of a matrix with a scale per row, for the core.

    Raises:
        InvalidArgumentError: if its parts do not fit together.
    """
    of_codes = "int8" if isinstance(array, Int8Array) else CODES
    codes = as_bytes(array.codes, of_codes, f"codes of {name}")
    rows, cols = require_2d(codes, f"codes of {name}")
    return codes, vector(array.scales, "float32", rows, f"scales of {name}"), rows, cols


@dataclass(frozen=True)
class GemmCandidate:
    """A kernel of the table, as the core considers it for a problem.

    Attributes:
        kernel: its name.
        fuses_epilogue: whether it computes the epilogue too; True for problems without one.
        cost: estimated duration relative to the others; infinity if it does not compute the
            problem, or only if it is chosen by name.
        reason: why it is not chosen; "" for the one that is.
    """

    kernel: str
    fuses_epilogue: bool
    cost: float
    reason: str


Operand = tuple[str, Any, Any, int, int]


def operand(array: Any, name: str) -> Operand:
    """Return an operand as the core takes it: format, elements or codes, scales, rows, columns.

    Raises:
        InvalidArgumentError: not an operand.
    """
    if isinstance(array, MXFP8Array):
        return "mxfp8", *mxfp8_parts(array, name)
    if isinstance(array, RowScaledArray):
        return "row-scaled", *row_scaled_parts(array, name)
    if isinstance(array, Int8Array):
        return "int8", *row_scaled_parts(array, name)
    kinds = "an MXFP8Array, a RowScaledArray, an Int8Array or an array of bfloat16"
    matrix, dtype = plain(array, name, kinds)
    if dtype != "bfloat16":
        raise InvalidArgumentError(f"{name} must be {kinds}, not of {dtype}")
    return "bfloat16", matrix, None, *require_2d(matrix, name)


def operands(a: Any, b: Any) -> tuple[Operand, Operand]:
    """Return both operands.

    Raises:
        InvalidArgumentError: not operands, or their widths differ.
    """
    first, second = operand(a, "a"), operand(b, "b")
    if first[4] != second[4]:
        raise InvalidArgumentError(
            f"a is {list(first[3:])} and b is {list(second[3:])}: their widths differ"
        )
    return first, second


def cuda_operands(a: Any, b: Any, names: tuple[str, str] = ("a", "b")) -> tuple[Operand, Operand]:
    """Return both operands, whose elements or codes are on a CUDA device and aligned.

    Raises:
        InvalidArgumentError: not operands, their widths differ, or one is not on such a device.
    """
    pair = operands(a, b)
    for operand, name in zip(pair, names, strict=True):
        if not on_cuda(operand[1]):
            raise InvalidArgumentError(f"{name} must be on a CUDA device")
    first, second = pair
    return (first[0], aligned(first[1]), *first[2:]), (second[0], aligned(second[1]), *second[2:])


def device_of(operand: Operand) -> int:
    """Return the index of the CUDA device that holds an operand; -1 for the CPU."""
    return int(operand[1].device.index) if on_cuda(operand[1]) else -1


# The arguments of _core.GemmProblem.
Problem = tuple[int | str | bool, ...]


@lru_cache(maxsize=1024)
def choice(problem: Problem, device: int, kernel: str | None = None) -> tuple[str, int]:
    """Return the kernel for a problem, the one of least cost by default, and its workspace's bytes.

    Results are kept, because the core estimates costs anew in each call.
    """
    of_core = _core.GemmProblem(*problem)  # type: ignore[arg-type]
    if kernel is None:
        kernel = _core.choose_gemm(of_core, device)
    return kernel, _core.gemm_workspace_size(kernel, of_core, device)


def choose(problem: Problem, like: Operand, kernel: str | None = None) -> tuple[str, Any]:
    """Choose a kernel for a problem, and allocate its workspace.

    Args:
        problem: the GEMM to compute.
        like: an operand, for the device.
        kernel: name of the kernel; None to choose it.

    Returns:
        The name of the kernel, and its workspace: bytes on the device, or None.

    Raises:
        InvalidArgumentError: no kernel has that name.
        UnsupportedError: the device has no fast kernel, or not that one; the sentence says why.
    """
    if kernel is not None:
        kernel = str(kernel)
        if kernel not in (names := [known.name for known in _core.gemm_kernels()]):
            raise InvalidArgumentError(f"kernel must be one of {', '.join(names)}")
    kernel, nbytes = choice(problem, device_of(like), kernel)
    return kernel, empty((nbytes,), "uint8", like=like[1]) if nbytes else None


def _plain_problem(
    a: Any, b: Any, bias: Any, dtype: Any
) -> tuple[Problem, Operand, Operand, DTypeName]:
    first, second = operands(a, b)
    name = dtype_name(dtype, "dtype")
    problem = (first[3], second[3], first[4], first[0], second[0], name, bias is not None)
    return problem, first, second, name


def gemm_kernel(a: Any, b: Any, bias: Any = None, *, dtype: Any = "bfloat16") -> str:
    """Return the name of the kernel that `gemm` chooses for these arguments.

    Raises:
        UnsupportedError: the device has only "reference"; the sentence says why.
        InvalidArgumentError: operands that `gemm` does not take.
    """
    problem, first, _, _ = _plain_problem(a, b, bias, dtype)
    return choice(problem, device_of(first))[0]


def explain_gemm(
    a: Any, b: Any, bias: Any = None, *, dtype: Any = "bfloat16"
) -> list[GemmCandidate]:
    """Return all kernels of the table for these arguments of `gemm`, the chosen one first.

    If every kernel has a reason, none is chosen, and `gemm` raises `UnsupportedError`.

    Raises:
        InvalidArgumentError: operands that `gemm` does not take.
    """
    problem, first, _, _ = _plain_problem(a, b, bias, dtype)
    of_core = _core.GemmProblem(*problem)  # type: ignore[arg-type]
    return [GemmCandidate(*one) for one in _core.explain_gemm(of_core, device_of(first))]


def gemm(
    a: Any,
    b: Any,
    bias: Any = None,
    *,
    dtype: Any = "bfloat16",
    kernel: str | None = None,
    threads: int = 0,
) -> Any:
    """Compute A B^T + bias with 8-bit operands and float32 sums, int32 of INT8.

    On CUDA it runs on torch's current stream; workspace comes from torch's allocator.

    Args:
        a: [M, K], an `MXFP8Array`, a `RowScaledArray`, an `Int8Array` or bfloat16.
        b: [N, K], likewise, and on the same device. N is a multiple of 8, K of 32.
        bias: [N] of bfloat16, or None.
        dtype: dtype of the result: bfloat16, float16 or float32.
        kernel: name of the kernel (see the module); by default the one of least cost.
        threads: threads to use on the CPU; 0 means one per core.

    Returns:
        [M, N] of `dtype`, NumPy or torch like `a`.

    Raises:
        InvalidArgumentError: shapes, dtypes or devices that do not fit together.
        UnsupportedError: the device does not have the kernel; the sentence says why, and which
            kernels it has.
    """
    threads = thread_count(threads)
    problem, first, second, name = _plain_problem(a, b, bias, dtype)
    if name == "bfloat16" and isinstance(first[1], np.ndarray):
        bfloat16_type()  # for the result; missing it must raise now, not after the work
    bias_vector = None if bias is None else vector(bias, "bfloat16", second[3], "bias")
    chosen, workspace = choose(problem, first, kernel)
    result = empty((first[3], second[3]), name, like=first[1])
    call_core(
        _core.gemm,
        chosen,
        first,
        second,
        bias_vector,
        result,
        name,
        workspace,
        threads,
        like=first[1],
    )
    return as_result(result, name)
