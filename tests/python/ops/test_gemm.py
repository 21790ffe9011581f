"""Products, folding and row scales on the CPU, against NumPy and ml_dtypes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import zimage_mxfp8 as zm
from helpers import reference
from zimage_mxfp8 import _core
from zimage_mxfp8.ops.gemm import fold_async, fold_stats

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {"bfloat16": BFLOAT16, "float16": np.dtype(np.float16), "float32": np.dtype(np.float32)}
FORMATS: dict[str, Callable[[np.ndarray], Any]] = {
    "mxfp8": zm.quantize,
    "row-scaled": zm.quantize_rows,
    "bfloat16": lambda matrix: matrix.astype(BFLOAT16),
}


def spread(rows: int, cols: int, seed: int) -> np.ndarray:
    """Values whose sizes differ from block to block."""
    random = np.random.default_rng(seed)
    matrix = random.standard_normal((rows, cols))
    return (matrix * np.exp2(random.integers(-4, 4, (rows, cols)))).astype(np.float32)


def values(operand: Any) -> tuple[np.ndarray, np.ndarray]:
    """What an operand stands for: float32 elements and, apart, one factor a row."""
    if isinstance(operand, zm.MXFP8Array):
        rows, cols = operand.shape
        codes = operand.codes.view(ml_dtypes.float8_e4m3fn)[:rows, :cols].astype(np.float32)
        scales = zm.from_blocked(operand.scales, rows, cols // 32).astype(np.float64) - 127
        return codes * np.repeat(np.exp2(scales), 32, axis=1).astype(np.float32), np.ones(rows)
    if isinstance(operand, zm.RowScaledArray):
        codes = operand.codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        return codes, operand.scales
    return operand.astype(np.float32), np.ones(operand.shape[0])


def product_in_order(a: Any, b: Any, bias: np.ndarray | None) -> np.ndarray:
    """The definition of the kernel `reference`: float32 sums in ascending order of k."""
    (left, row_scales), (right, column_scales) = values(a), values(b)
    total = np.zeros((left.shape[0], right.shape[0]), np.float32)
    for k in range(left.shape[1]):
        total += left[:, k, None] * right[None, :, k]
    total = total * row_scales[:, None].astype(np.float32) * column_scales.astype(np.float32)
    return total if bias is None else total + bias.astype(np.float32)


@settings(deadline=None, max_examples=40)
@given(
    m=st.integers(1, 140),
    n=st.integers(1, 9).map(lambda i: 8 * i),
    k=st.integers(1, 6).map(lambda i: 32 * i),
    formats=st.tuples(st.sampled_from(list(FORMATS)), st.sampled_from(list(FORMATS))),
    dtype=st.sampled_from(list(DTYPES)),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_emulated_product_is_the_definition(
    m: int, n: int, k: int, formats: tuple[str, str], dtype: str, bias: bool, seed: int
) -> None:
    a = FORMATS[formats[0]](spread(m, k, seed))
    b = FORMATS[formats[1]](spread(n, k, seed + 1))
    vector = spread(1, n, seed + 2)[0].astype(BFLOAT16) if bias else None
    with np.errstate(over="ignore"):
        want = product_in_order(a, b, vector).astype(DTYPES[dtype])
    for threads in (1, 3):
        result = zm.gemm(a, b, vector, dtype=dtype, threads=threads)
        assert result.dtype == DTYPES[dtype]
        bits = f"u{result.itemsize}"
        np.testing.assert_array_equal(result.view(bits), want.view(bits))


@settings(deadline=None, max_examples=40)
@given(
    m=st.integers(1, 20),
    n=st.integers(1, 9).map(lambda i: 8 * i),
    k=st.sampled_from([32, 96, 2080]),
    dtype=st.sampled_from(list(DTYPES)),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_sums_of_int8_are_exact(m: int, n: int, k: int, dtype: str, bias: bool, seed: int) -> None:
    random = np.random.default_rng(seed)
    a, b = (
        zm.Int8Array(
            random.integers(-127, 128, (rows, k), dtype=np.int8),
            random.random(rows, dtype=np.float32) * np.float32(0.01),
        )
        for rows in (m, n)
    )
    a.codes[0], b.codes[0] = 127, 127  # beyond what float32 adds up exactly
    sums = a.codes.astype(np.int64) @ b.codes.astype(np.int64).T
    want = sums.astype(np.float32) * a.scales[:, None] * b.scales
    added = random.standard_normal(n).astype(BFLOAT16) if bias else None
    if added is not None:
        want += added.astype(np.float32)
    found = zm.gemm(a, b, added, dtype=dtype, kernel="reference")
    assert np.array_equal(found, want.astype(DTYPES[dtype]))


def test_sums_of_int8_fit_an_integer() -> None:
    deepest = 131040
    a, b = (zm.Int8Array(np.full((8, deepest + 32), -127, np.int8), np.ones(8, np.float32)),) * 2
    with pytest.raises(zm.InvalidArgumentError, match="K of INT8 must be at most 131040"):
        zm.gemm(a, b, dtype=np.float32, kernel="reference")
    parts = (zm.Int8Array(x.codes[:, :deepest], x.scales) for x in (a, b))
    found = zm.gemm(*parts, dtype=np.float32, kernel="reference")
    assert (found == np.float32(127 * 127 * deepest)).all()


def test_int8_is_multiplied_with_int8() -> None:
    int8 = zm.Int8Array(np.zeros((8, 32), np.int8), np.ones(8, np.float32))
    with pytest.raises(zm.UnsupportedError, match=r"^no kernel multiplies INT8 x MXFP8; encode"):
        zm.gemm(int8, zm.quantize(np.ones((8, 32), np.float32)))
    with pytest.raises(zm.InvalidArgumentError, match="codes of a must be uint8 or int8"):
        zm.gemm(zm.Int8Array(np.zeros((8, 32), np.int16), int8.scales), int8)


def test_every_cpu_target_gives_the_same_bits(cpu_target: str) -> None:
    a, b = zm.quantize(spread(37, 256, 1)), zm.quantize_rows(spread(40, 256, 2))
    want = product_in_order(a, b, None)
    np.testing.assert_array_equal(zm.gemm(a, b, dtype="float32"), want)


def test_torch_operands() -> None:
    a, b = torch.from_numpy(spread(5, 64, 3)), torch.from_numpy(spread(16, 64, 4))
    bias = torch.arange(16).bfloat16()
    result = zm.gemm(zm.quantize(a), zm.quantize(b), bias)
    assert result.dtype == torch.bfloat16
    exact = zm.dequantize(zm.quantize(a)) @ zm.dequantize(zm.quantize(b)).T + bias.float()
    torch.testing.assert_close(result.float(), exact, rtol=1e-2, atol=1e-2)
    mixed = zm.gemm(a.bfloat16(), zm.quantize(b), dtype=torch.float32)
    torch.testing.assert_close(
        mixed, a.bfloat16().float() @ zm.dequantize(zm.quantize(b)).T, rtol=1e-5, atol=1e-4
    )


def test_empty_products() -> None:
    b = zm.quantize(spread(16, 64, 5))
    assert zm.gemm(zm.quantize(np.zeros((0, 64), np.float32)), b).shape == (0, 16)
    bias = np.arange(16).astype(BFLOAT16)
    empty = zm.quantize(np.zeros((3, 0), np.float32))
    result = zm.gemm(empty, zm.quantize(np.zeros((16, 0), np.float32)), bias, dtype="float32")
    np.testing.assert_array_equal(result, np.tile(np.arange(16, dtype=np.float32), (3, 1)))


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_quantize_rows_equals_ml_dtypes(cpu_target: str, dtype: str) -> None:
    matrix = spread(70, 333, 6).astype(DTYPES[dtype])
    matrix[3] = 0
    matrix[4] = matrix[4] * 0 + DTYPES[dtype].type(2.0**-14)
    if dtype == "float32":
        matrix[5] *= np.float32(2.0**-110)
    numbers = matrix.astype(np.float32)
    amax = np.abs(numbers).max(axis=1)
    tiny = amax < 2.0**-100
    assert tiny.sum() == (2 if dtype == "float32" else 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = numbers * (np.float32(448) / amax)[:, None]
        want = np.clip(scaled, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    want[tiny] = 0
    result = zm.quantize_rows(matrix)
    np.testing.assert_array_equal(result.codes, want)
    np.testing.assert_array_equal(result.scales, np.where(tiny, 0, amax / np.float32(448)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rows_with_nonfinite_values_are_nan(cpu_target: str, value: float) -> None:
    matrix = spread(8, 64, 7)
    matrix[2, 40] = value
    rows = zm.quantize_rows(matrix)
    assert np.isnan(rows.scales).nonzero()[0].tolist() == [2]
    product = zm.gemm(rows, zm.quantize_rows(spread(16, 64, 8)), dtype="float32")
    assert np.isnan(product[2]).all() and np.isfinite(np.delete(product, 2, axis=0)).all()


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 70), cols=st.integers(1, 200), seed=st.integers(0, 99))
def test_fold_is_the_nearest_row_scaled_matrix(rows: int, cols: int, seed: int) -> None:
    encoded = zm.quantize(spread(rows, cols, seed))
    folded, stats = zm.fold(encoded, bound=1.0)
    before = zm.dequantize(encoded).astype(np.float64)
    codes = folded.codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    after = codes * folded.scales[:, None].astype(np.float64)
    # One power of two a row, and as small as it can be: the next would overflow.
    exponents = np.log2(folded.scales)
    np.testing.assert_array_equal(exponents, np.round(exponents))
    assert (np.abs(codes).max(axis=1) > 224).all()
    scaled = before / folded.scales[:, None]
    np.testing.assert_array_equal(codes, scaled.astype(ml_dtypes.float8_e4m3fn).astype(np.float64))
    assert stats.changed == np.count_nonzero(before != after)
    error = np.linalg.norm(before - after) / np.linalg.norm(before)
    assert stats.relative_error == pytest.approx(error, rel=1e-9, abs=1e-300)


def test_fold_of_every_code_and_shift() -> None:
    codes = np.zeros((256, 64), np.uint8)
    codes[:, :32] = np.arange(256)[:, None]
    codes[:, :32] -= (codes[:, :32] & 0x7F) == 0x7F  # no NaN
    codes[:, 32] = 0x7E  # 448 in the second block sets the row's scale
    for shift in range(0, 25):
        scales = np.tile(np.array([100 - shift, 100], np.uint8), (256, 1))
        array = zm.MXFP8Array(codes, zm.to_blocked(scales), (256, 64))
        folded, _ = zm.fold(array, bound=1.0)
        assert (folded.scales == np.float32(2.0**-27)).all()
        for row in range(256):
            value = reference.decode(int(codes[row, 0]), 127 - shift)
            want = reference.encode_magnitude(abs(value)) | (int(codes[row, 0]) & 0x80)
            assert folded.codes[row, 0] == want


def test_fold_refuses_what_it_would_spoil() -> None:
    matrix = np.ones((4, 64), np.float32)
    matrix[:, :32] *= np.float32(2.0**-15) * np.linspace(1, 2, 32, dtype=np.float32)
    folded, stats = zm.fold(zm.quantize(matrix))  # small against the row: allowed
    assert stats.changed > 0 and stats.relative_error < 1e-3
    with pytest.raises(zm.PrecisionLossError, match="more than the bound") as caught:
        zm.fold(zm.quantize(matrix), bound=1e-9)
    assert caught.value.relative_error == pytest.approx(stats.relative_error)
    assert folded.shape == (4, 64)


def test_fold_stats_add_rows() -> None:
    statistics = np.array([[3.0, 4.0, 60.0], [2.0, 12.0, 40.0]])
    stats = fold_stats(torch.from_numpy(statistics), bound=1)
    assert stats == zm.FoldStats(5, 0.4) == fold_stats(statistics, bound=0.4)
    with pytest.raises(zm.PrecisionLossError) as caught:
        fold_stats(statistics, bound=0.3)
    assert caught.value.relative_error == 0.4


@pytest.mark.skipif(bool(_core.build_info().cuda), reason="this build has CUDA")
def test_folding_asynchronously_needs_cuda() -> None:
    with pytest.raises(zm.UnsupportedError, match="this build has no CUDA kernels"):
        fold_async(zm.quantize(torch.ones(2, 32)))


def test_fold_on_every_thread_count() -> None:
    encoded = zm.quantize(spread(300, 320, 9))
    results = {
        (folded.codes.tobytes(), folded.scales.tobytes(), stats)
        for folded, stats in (zm.fold(encoded, bound=1, threads=threads) for threads in (1, 2, 7))
    }
    assert len(results) == 1


ENCODED = zm.quantize(np.ones((16, 64), np.float32))
ROWS = zm.quantize_rows(np.ones((16, 64), np.float32))
NAN = zm.MXFP8Array(np.full((32, 64), 0x7F, np.uint8), np.zeros((128, 4), np.uint8), (32, 64))
LATE_NAN = zm.quantize(np.ones((3, 40), np.float32))
LATE_NAN.codes[1:3, 33] = 0xFF
META = zm.MXFP8Array(torch.ones(32, 64, dtype=torch.uint8, device="meta"), ENCODED.scales, (16, 64))


def rows_with(scales: object) -> zm.RowScaledArray:
    return zm.RowScaledArray(ROWS.codes, scales)


def shaped(shape: Any) -> zm.MXFP8Array:
    return zm.MXFP8Array(ENCODED.codes, ENCODED.scales, shape)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: zm.gemm(ENCODED, zm.quantize(np.ones((16, 96), np.float32))), "widths differ"),
        (lambda: zm.gemm_kernel(ENCODED, zm.quantize(np.ones((16, 96), np.float32))), "widths"),
        (lambda: zm.gemm(ENCODED, zm.quantize(np.ones((12, 64), np.float32))), "N must be a mult"),
        (
            lambda: zm.gemm(*[zm.quantize(np.ones((16, 40), np.float32))] * 2),
            "K must be a multiple of 32, not 40",
        ),
        (lambda: zm.gemm(ENCODED, np.ones((16, 64), np.float32)), "not of float32"),
        (
            lambda: zm.gemm(None, ENCODED),
            "a must be an MXFP8Array, a RowScaledArray, an Int8Array or",
        ),
        (lambda: zm.gemm(ENCODED, ENCODED, np.ones(15, BFLOAT16)), r"bias must be \[16\]"),
        (lambda: zm.gemm(ENCODED, ENCODED, np.ones(16, np.float32)), "bias must be bfloat16"),
        (lambda: zm.gemm(ENCODED, ENCODED, [1.0] * 16), "bias must be a NumPy array"),
        (lambda: zm.gemm(ENCODED, ENCODED, dtype="float64"), "not float64"),
        (lambda: zm.gemm(ENCODED, ENCODED, kernel="fast"), "kernel must be one of mxfp8_sm100"),  # type: ignore[arg-type]
        (lambda: zm.gemm(ENCODED, ENCODED, kernel=""), "kernel must be one of mxfp8_sm100"),  # type: ignore[arg-type]
        (lambda: zm.gemm(ENCODED, ENCODED, kernel=3), "kernel must be one of mxfp8_sm100"),  # type: ignore[arg-type]
        (lambda: zm.gemm(ENCODED, ENCODED, threads=-1), "threads"),
        (lambda: zm.gemm(ENCODED, ENCODED, threads=1.5), "threads"),  # type: ignore[arg-type]
        (lambda: zm.quantize(np.ones((2, 32), np.float32), threads=None), "threads"),  # type: ignore[arg-type]
        (lambda: zm.gemm(ENCODED, torch.ones(16, dtype=torch.bfloat16)), "2 dimensions"),
        (lambda: zm.gemm(ENCODED, META), "codes of b is on meta"),
        (
            lambda: zm.gemm(ENCODED, rows_with(ROWS.scales.astype("f8"))),
            "scales of b must be float32",
        ),
        (lambda: zm.gemm(ENCODED, rows_with(ROWS.scales.view("i4"))), "must be float32, not int32"),
        (lambda: zm.gemm(ENCODED, rows_with(ROWS.scales[:8])), r"scales of b must be \[16\]"),
        (lambda: zm.gemm(ENCODED, rows_with(ROWS.scales[:, None])), r"scales of b must be \[16\]"),
        (lambda: zm.gemm(ENCODED, rows_with(None)), "scales of b must be a NumPy array"),
        (
            lambda: zm.gemm(ENCODED, zm.RowScaledArray(ROWS.codes.reshape(-1), ROWS.scales)),
            "codes of b must have 2 dimensions",
        ),
        (
            lambda: zm.gemm(ENCODED, zm.MXFP8Array(ENCODED.codes.T, ENCODED.scales, (16, 64))),
            "codes of a 16x64 matrix must be",
        ),
        (lambda: zm.gemm(ENCODED, shaped((16, 64, 1))), "the shape of b must be two sizes"),
        (lambda: zm.fold(shaped(None)), "the shape of array must be two sizes"),
        (lambda: zm.fold(shaped((-16, 64))), "the shape of array must be two sizes"),
        (lambda: zm.dequantize(shaped((16.0, 64))), "the shape of array must be two sizes"),
        (
            lambda: zm.dequantize(
                zm.MXFP8Array(
                    torch.ones(32, 64).to(torch.float8_e5m2), torch.ones(128, 4).byte(), (32, 64)
                )
            ),
            "must be uint8 or float8_e4m3fn, not float8_e5m2",
        ),
        (lambda: zm.dequantize(None), "array must be an MXFP8Array, not NoneType"),  # type: ignore[arg-type]
        (lambda: zm.fold(ROWS), "array must be an MXFP8Array, not RowScaledArray"),  # type: ignore[arg-type]
        (lambda: zm.fold(NAN), "NaN in row 0, columns 0 to 31"),
        (lambda: zm.fold(LATE_NAN), "NaN in row 1, columns 32 to 39"),
        (lambda: fold_stats(np.zeros((2, 2))), r"must be float64 \[N, 3\], not float64 \[2, 2\]"),
        (lambda: fold_stats(np.zeros((2, 3), np.float32)), "not float32"),
        (lambda: fold_stats(np.zeros((2, 3)), bound=-1), "bound must be 0 or more"),
        (lambda: fold_stats(np.array([[32.0, 63.0, np.nan]])), "NaN in row 0, columns 32 to 63"),
        (lambda: zm.fold(ENCODED, bound=float("nan")), "bound must be 0 or more"),
        (lambda: zm.fold(ENCODED, bound=-1), "bound must be 0 or more"),
        (lambda: zm.fold(ENCODED, bound=None), "bound must be a number"),  # type: ignore[arg-type]
        (lambda: zm.quantize_rows(np.ones(4, np.float32)), "2 dimensions"),
        (lambda: zm.quantize_rows(np.ones((4, 4), np.int8)), "not int8"),
        (lambda: zm.quantize(torch.eye(4).to_sparse()), "must be a dense tensor"),
        (lambda: zm.quantize(np.ma.masked_array(np.ones((2, 2)), False)), "not MaskedArray"),
        (lambda: zm.quantize(np.ones((2, 32), np.float32), nonfinite=np.zeros(3)), "nonfinite"),  # type: ignore[arg-type]
        (lambda: zm.from_blocked(np.zeros((128, 4), np.uint8), "a", 2), "must be two sizes"),  # type: ignore[arg-type]
        (lambda: zm.from_blocked(np.zeros((128, 4), np.uint8), 10**6, 10**6), "bytes, not 512"),
    ],
)
def test_misuse_is_a_typed_error(call: Callable[[], object], sentence: str) -> None:
    with pytest.raises(zm.InvalidArgumentError, match=sentence):
        call()


def test_lazy_negation_and_other_byte_orders_count() -> None:
    negative = torch.complex(torch.zeros(64, 1), torch.ones(64, 1)).conj().imag
    assert negative.is_neg()
    assert (zm.dequantize(zm.quantize(negative)) == -1).all()
    swapped = zm.RowScaledArray(ROWS.codes, ROWS.scales.astype(">f4"))
    np.testing.assert_array_equal(
        zm.gemm(swapped, ENCODED, dtype="float32"), zm.gemm(ROWS, ENCODED, dtype="float32")
    )
    parameter = torch.nn.Parameter(torch.from_numpy(ROWS.scales.copy()))
    tensors = zm.RowScaledArray(torch.from_numpy(ROWS.codes), parameter)
    assert torch.equal(
        zm.gemm(tensors, tensors, dtype="float32"),
        torch.from_numpy(zm.gemm(ROWS, ROWS, dtype="float32")),
    )


def test_arrays_compare_by_identity() -> None:
    assert ENCODED == ENCODED and shaped((16, 64)) != ENCODED and ROWS in {ROWS}


@pytest.mark.parametrize("shape", [(8, 0), (0, 0), (0, 32)])
def test_empty_tensors(shape: tuple[int, int]) -> None:
    encoded = zm.quantize(torch.zeros(shape))
    assert tuple(zm.dequantize(encoded).shape) == shape
    assert tuple(zm.quantize_rows(torch.zeros(shape)).codes.shape) == shape


def test_kernels_that_need_a_device() -> None:
    for kernel in _core.gemm_kernels():
        if kernel.name != "reference":
            sentence = (
                f"{kernel.name} needs a CUDA device; 4x16x64 BF16 x MXFP8 -> BF16 is computed by "
                '"reference" on the CPU'
            )
            with pytest.raises(zm.UnsupportedError, match=f"^{re.escape(sentence)}$"):
                zm.gemm(np.ones((4, 64), BFLOAT16), ENCODED, kernel=kernel.name)
    assert zm.gemm_kernel(ENCODED, ENCODED) == "reference"
    first, *others = zm.explain_gemm(ENCODED, ENCODED)
    assert (first.kernel, first.reason) == ("reference", "")
    assert [one.reason for one in others] == [f"{one.kernel} needs a CUDA device" for one in others]


def run_with(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    code = """
import numpy as np, zimage_mxfp8 as zm
a = zm.quantize(np.ones((8, 32), np.float32))
for _ in range(2):
    print(zm.gemm(a, a, dtype="float32").sum())
"""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_the_environment_logs_and_forces_choices() -> None:
    result = run_with({"ZIMAGE_MXFP8_GEMM_LOG": "1", "ZIMAGE_MXFP8_GEMM_KERNEL": "mixed_sm90"})
    assert result.stdout.split() == ["2048.0"] * 2
    (line,) = result.stderr.splitlines()
    start = "zimage-mxfp8 gemm: 8x8x32 MXFP8 x MXFP8 -> F32 on the CPU: reference (cost 1.00); "
    assert line.startswith(start)
    assert "fp8_rowwise needs a CUDA device" in line
    assert run_with({"ZIMAGE_MXFP8_GEMM_LOG": "0"}).stderr == ""
    result = run_with({"ZIMAGE_MXFP8_GEMM_KERNEL": "fastest"})
    assert 'InvalidArgumentError: unknown GEMM kernel "fastest": use one of mxfp8_sm100' in (
        result.stderr
    )
    assert "or unset ZIMAGE_MXFP8_GEMM_KERNEL in the environment" in result.stderr


def test_overlapping_memory_is_refused() -> None:
    memory = np.zeros(64 * 64 * 4, np.uint8)
    matrix = memory.view(np.float32).reshape(64, 64)
    scales = np.zeros(64, np.float32)
    with pytest.raises(zm.InvalidArgumentError, match="codes overlaps with the source"):
        _core.quantize_rows(matrix, "float32", memory[: 64 * 64].reshape(64, 64), scales)
    encoded = zm.quantize(matrix)
    with pytest.raises(zm.InvalidArgumentError, match="codes overlaps with the source"):
        _core.quantize(matrix, "float32", memory[:4096], np.zeros(512, np.uint8))
    with pytest.raises(zm.InvalidArgumentError, match="the target overlaps with codes"):
        out = encoded.codes.reshape(-1).view(np.float32).reshape(16, 64)
        _core.dequantize(encoded.codes[:32, :], np.zeros(512, np.uint8), out[:16], "float32")
    operand = ("mxfp8", encoded.codes, encoded.scales, 64, 64)
    out = encoded.codes.reshape(-1).view(np.uint16).reshape(32, 64)
    with pytest.raises(zm.InvalidArgumentError, match="D overlaps with"):
        first = ("mxfp8", zm.quantize(matrix[:32]).codes, encoded.scales, 32, 64)
        _core.gemm("reference", first, operand, None, out, "bfloat16", None)
