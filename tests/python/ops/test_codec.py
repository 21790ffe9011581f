"""The codec against a scalar reference, ml_dtypes, torch and comfy-kitchen."""

from __future__ import annotations

import math
import os
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import comfy_kitchen
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import zimage_mxfp8 as zm
from helpers import reference
from zimage_mxfp8 import _core

DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}
TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
TINY = math.ldexp(448.0, -127)


def all_16bit(dtype: str) -> np.ndarray:
    """Every finite value of a 16-bit type."""
    values = np.arange(65536, dtype=np.uint16).view(DTYPES[dtype])
    return values[np.isfinite(values.astype(np.float32))]


def expected(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes and row-major scales of a matrix whose columns are a multiple of 32."""
    rows, cols = matrix.shape
    codes = np.zeros((rows, cols), np.uint8)
    scales = np.zeros((rows, cols // 32), np.uint8)
    numbers = matrix.astype(np.float64)
    for row in range(rows):
        for block in range(cols // 32):
            span = slice(block * 32, block * 32 + 32)
            scales[row, block], codes[row, span] = reference.encode_block(
                numbers[row, span].tolist()
            )
    return codes, scales


def encode(matrix: np.ndarray, threads: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Codes and row-major scales by the package, without padding."""
    rows, cols = matrix.shape
    encoded = zm.quantize(matrix, threads=threads)
    blocks = -(-cols // 32)
    return encoded.codes[:rows], zm.from_blocked(encoded.scales, rows, blocks)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_value_as_block_maximum(cpu_target: str, dtype: str) -> None:
    values = all_16bit(dtype)
    matrix = np.zeros((values.size, 32), DTYPES[dtype])
    matrix[:, 5] = values
    codes, scales = encode(matrix)
    for value, code, byte in zip(
        values.astype(np.float64).tolist(), codes[:, 5].tolist(), scales[:, 0].tolist(), strict=True
    ):
        want_byte, want_codes = reference.encode_block([value])
        assert (byte, code) == (want_byte, want_codes[0]), value
    others = np.delete(codes, 5, axis=1)
    assert not others.any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("maximum", [448.0, 449.0, 2.0**-14, 1.0, 65504.0, 3.3895e38])
def test_every_value_under_a_maximum(cpu_target: str, dtype: str, maximum: float) -> None:
    values = all_16bit(dtype)
    maximum = min(maximum, float(np.abs(values.astype(np.float64)).max()))
    values = values[np.abs(values.astype(np.float64)) <= maximum]
    top = DTYPES[dtype].type(maximum)
    matrix = np.zeros((-(-values.size // 31), 32), DTYPES[dtype])
    padded = np.zeros(matrix.shape[0] * 31, DTYPES[dtype])
    padded[: values.size] = values
    matrix[:, :31] = padded.reshape(-1, 31)
    matrix[:, 31] = top
    codes, scales = encode(matrix)
    want_codes, want_scales = expected(matrix)
    np.testing.assert_array_equal(scales, want_scales)
    np.testing.assert_array_equal(codes, want_codes)


def test_scales_near_the_ends_of_float32(cpu_target: str) -> None:
    rows = []
    for exponent in [*range(-149, -100), 100, 126, 127]:
        for mantissa in (1.0, 1.25, 1.75, 1.7500001, 1.9999999):
            with np.errstate(over="ignore"):
                top = np.float32(math.ldexp(mantissa, exponent))
            if np.isfinite(top):
                small = [top / np.float32(2**k) for k in range(1, 24)]
                rows.append([top, *small, *[-s for s in small[:8]]])
    matrix = np.array(rows, np.float32)
    codes, scales = encode(matrix)
    want_codes, want_scales = expected(matrix)
    np.testing.assert_array_equal(scales, want_scales)
    np.testing.assert_array_equal(codes, want_codes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_blocks(cpu_target: str, dtype: str) -> None:
    matrix = np.zeros((4, 32), DTYPES[dtype])
    matrix[1] = -0.0
    matrix[2, 3] = 1.0
    matrix[2, 4] = -0.0
    matrix[3] = matrix[3] * 0
    codes, scales = encode(matrix)
    assert scales[:, 0].tolist() == [0, 0, 127 - 8, 0]
    assert not codes[[0, 1, 3]].any()
    assert codes[2, 4] == 0x80, "negative zero keeps its sign in a block with a value"


def test_tiny_blocks_are_zero(cpu_target: str) -> None:
    matrix = np.zeros((3, 32), np.float32)
    matrix[:, 0] = [TINY * (1 - 2**-23), TINY, TINY * (1 + 2**-23)]
    codes, scales = encode(matrix)
    assert codes[:, 0].tolist() == [0, 0x7E, 0x76]
    assert scales[:, 0].tolist() == [0, 0, 1]


def finite_floats(dtype: str) -> st.SearchStrategy[float]:
    width = 16 if dtype == "float16" else 32
    return st.floats(allow_nan=False, allow_infinity=False, width=width)


@pytest.mark.usefixtures("restored_target")
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
@pytest.mark.parametrize("dtype", DTYPES)
def test_random_blocks(dtype: str, data: st.DataObject) -> None:
    values = data.draw(st.lists(finite_floats(dtype), min_size=32, max_size=32))
    with np.errstate(over="ignore"):
        matrix = np.array([values], np.float32).astype(DTYPES[dtype])
    matrix[~np.isfinite(matrix.astype(np.float32))] = 0
    want_codes, want_scales = expected(matrix)
    for target in _core.available_cpu_targets():
        _core.force_cpu_target(target)
        codes, scales = encode(matrix)
        np.testing.assert_array_equal(scales, want_scales)
        np.testing.assert_array_equal(codes, want_codes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_ranges_within_a_block(cpu_target: str, dtype: str) -> None:
    random = np.random.default_rng(1)
    exponents = random.uniform(-14, 14, (64, 512))
    matrix = (random.standard_normal((64, 512)) * np.exp2(exponents)).astype(DTYPES[dtype])
    codes, scales = encode(matrix)
    want_codes, want_scales = expected(matrix)
    np.testing.assert_array_equal(scales, want_scales)
    np.testing.assert_array_equal(codes, want_codes)


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (33, 50), (31, 32), (128, 96), (129, 641)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ragged_shapes_are_padded_with_zeros(
    cpu_target: str, dtype: str, rows: int, cols: int
) -> None:
    random = np.random.default_rng(rows)
    matrix = random.standard_normal((rows, cols)).astype(DTYPES[dtype])
    encoded = zm.quantize(matrix)
    code_rows, code_cols = -(-rows // 32) * 32, -(-cols // 32) * 32
    padded = np.zeros((code_rows, code_cols), DTYPES[dtype])
    padded[:rows, :cols] = matrix
    want_codes, want_scales = expected(padded)
    np.testing.assert_array_equal(encoded.codes, want_codes)
    assert encoded.shape == (rows, cols)
    scale_rows, blocks = -(-code_rows // 128) * 128, code_cols // 32
    want = np.zeros((scale_rows, -(-blocks // 4) * 4), np.uint8)
    for row in range(code_rows):
        for block in range(blocks):
            want.reshape(-1)[reference.scale_position(row, block, blocks)] = want_scales[row, block]
    np.testing.assert_array_equal(encoded.scales, want)


@pytest.mark.peer
@pytest.mark.parametrize("shape", [(40, 50), (160, 96), (300, 700), (1, 31)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_equals_comfy_kitchen(cpu_target: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(shape[0])
    spread = torch.exp(torch.randn(shape, generator=generator) * 1.5)
    matrix = (torch.randn(shape, generator=generator) * spread).to(dtype)
    padding = shape[0] % 32 != 0 or shape[1] % 32 != 0
    with comfy_kitchen.use_backend("eager"):
        codes, scales = comfy_kitchen.quantize_mxfp8(matrix, pad_32x=padding)
        decoded = comfy_kitchen.dequantize_mxfp8(codes, scales, dtype)
    encoded = zm.quantize(matrix)
    assert encoded.codes.dtype == torch.float8_e4m3fn
    assert torch.equal(encoded.codes.view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(encoded.scales, scales.view(torch.uint8))
    back = zm.dequantize(encoded, dtype)
    assert torch.equal(back, decoded[: shape[0], : shape[1]])


@pytest.mark.peer
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_equals_comfy_kitchen_on_every_maximum(dtype: str) -> None:
    values = all_16bit(dtype)
    # Below this comfy-kitchen divides by a scale that it reads as 0 (file contract).
    values = values[np.abs(values.astype(np.float64)) > TINY]
    rows = -(-values.size // 32) * 32
    matrix = np.zeros((rows, 32), np.float32)
    matrix[: values.size, 0] = values.astype(np.float32)
    tensor = torch.from_numpy(matrix).to(TORCH[dtype])
    with comfy_kitchen.use_backend("eager"):
        codes, scales = comfy_kitchen.quantize_mxfp8(tensor)
    encoded = zm.quantize(tensor)
    assert torch.equal(encoded.codes.view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(encoded.scales, scales.view(torch.uint8))


def test_e4m3_rounding_equals_ml_dtypes_and_torch(cpu_target: str) -> None:
    # With a maximum of 448 the scale is 1, and codes are plain E4M3 conversions.
    random = np.random.default_rng(2)
    matrix = (
        random.standard_normal((256, 64)) * np.exp2(random.uniform(-12, 7, (256, 64)))
    ).astype(np.float32)
    matrix = np.clip(matrix, -448, 448)
    matrix[:, ::32] = 448
    codes, scales = encode(matrix)
    assert (scales == 127).all()
    np.testing.assert_array_equal(codes, matrix.astype(ml_dtypes.float8_e4m3fn).view(np.uint8))
    by_torch = torch.from_numpy(matrix).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(codes, by_torch)


@pytest.mark.parametrize("dtype", DTYPES)
def test_decodes_every_code_under_every_scale(cpu_target: str, dtype: str) -> None:
    codes = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    scales = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 8, axis=1)
    decoded = zm.dequantize(zm.MXFP8Array(codes, zm.to_blocked(scales), (256, 256)), dtype)
    exact = np.array([[reference.decode(code, byte) for code in range(256)] for byte in range(256)])
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        want = exact.astype(np.float32).astype(DTYPES[dtype])
    nan = np.isnan(exact)
    assert np.isnan(decoded.astype(np.float32))[nan].all()
    bits = f"u{DTYPES[dtype].itemsize}"
    np.testing.assert_array_equal(decoded.view(bits)[~nan], want.view(bits)[~nan])


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
def test_cast_equals_ml_dtypes(cpu_target: str, source: str, target: str) -> None:
    random = np.random.default_rng(3)
    raw = random.integers(0, 2**32, (64, 333), dtype=np.uint64).astype(np.uint32)
    raw[0] = 0x47000000 + np.arange(333) * 0x1000  # around float16's largest value and infinity
    raw[1] = 0x33000000 + np.arange(333) * 0x800000 // 8  # around its subnormals
    values = raw.view(np.float32)
    with np.errstate(all="ignore"):
        values = values.astype(DTYPES[source])
        want = values.astype(np.float32).astype(DTYPES[target])
    item, out_item = DTYPES[source].itemsize, DTYPES[target].itemsize
    result = np.zeros(values.shape, f"u{out_item}")
    _core.cast(values.view(f"u{item}"), source, result, target)
    nan = np.isnan(want.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(result.view(DTYPES[target]).astype(np.float32)), nan)
    np.testing.assert_array_equal(result[~nan], want.view(f"u{out_item}")[~nan])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nonfinite_values_are_errors(cpu_target: str, dtype: str, value: float) -> None:
    matrix = np.ones((300, 700), DTYPES[dtype])
    matrix[77, 691] = value
    matrix[78, 3] = value
    for threads in (1, 4):
        with pytest.raises(zm.NonFiniteError, match="row 77, column 691") as caught:
            zm.quantize(matrix, threads=threads)
        assert (caught.value.row, caught.value.column) == (77, 691)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_nonfinite_pattern_is_found(cpu_target: str, dtype: str) -> None:
    patterns = np.arange(65536, dtype=np.uint16)
    nonfinite = patterns[~np.isfinite(patterns.view(DTYPES[dtype]).astype(np.float32))]
    assert nonfinite.size == (256 if dtype == "bfloat16" else 2048)
    row = np.zeros((1, 40), np.uint16)
    for pattern in nonfinite:
        row[0, 37] = pattern
        assert _core.find_nonfinite(row, dtype) == (0, 37)


@pytest.mark.usefixtures("restored_target")
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bytes_on_every_target_and_thread_count(dtype: str) -> None:
    random = np.random.default_rng(4)
    matrix = (random.standard_normal((700, 1000)) * 0.02).astype(DTYPES[dtype])
    results = set()
    for target in _core.available_cpu_targets():
        _core.force_cpu_target(target)
        for threads in (0, 1, 3, 16):
            encoded = zm.quantize(matrix, threads=threads)
            plain = zm.dequantize(encoded, threads=threads)
            stats = _core.measure_residual(
                matrix.view(f"u{matrix.itemsize}"), dtype, encoded.codes, encoded.scales, threads
            )
            x = random.standard_normal(1000) if not results else x  # noqa: F821
            out = np.empty(700)
            _core.residual_times_vector(
                matrix.view(f"u{matrix.itemsize}"), dtype, encoded.codes, encoded.scales, x, out
            )
            results.add(
                (
                    encoded.codes.tobytes(),
                    encoded.scales.tobytes(),
                    plain.tobytes(),
                    struct.pack("3d", *stats),
                    out.tobytes(),
                )
            )
    assert len(results) == 1


def test_residuals_equal_numpy(cpu_target: str) -> None:
    random = np.random.default_rng(5)
    matrix = random.standard_normal((150, 333)).astype(np.float32)
    encoded = zm.quantize(matrix)
    difference = matrix.astype(np.float64) - zm.dequantize(encoded).astype(np.float64)
    error, signal, worst = _core.measure_residual(matrix, "float32", encoded.codes, encoded.scales)
    np.testing.assert_allclose(error, (difference**2).sum(), rtol=1e-12)
    np.testing.assert_allclose(signal, (matrix.astype(np.float64) ** 2).sum(), rtol=1e-12)
    assert worst == np.abs(difference).max()
    x, out = random.standard_normal(333), np.empty(150)
    _core.residual_times_vector(matrix, "float32", encoded.codes, encoded.scales, x, out)
    np.testing.assert_allclose(out, difference @ x, rtol=1e-10, atol=1e-12)


def test_denormals_count_in_flush_to_zero_mode() -> None:
    matrix = np.zeros((1, 32), np.float32)
    matrix[0, :4] = [TINY, 2.0**-127, -(2.0**-130), 2.0**-149]
    want_codes, _ = expected(matrix)
    before = zm.quantize(matrix)
    assert torch.set_flush_denormal(True)
    try:
        flushed = zm.quantize(matrix)
        back = zm.dequantize(flushed)
    finally:
        torch.set_flush_denormal(False)
    np.testing.assert_array_equal(flushed.codes[:1], want_codes)
    np.testing.assert_array_equal(back.view(np.uint32), zm.dequantize(before).view(np.uint32))


def test_accepts_views_and_keeps_the_kind() -> None:
    base = np.random.default_rng(6).standard_normal((64, 96)).astype(np.float32)
    want = zm.quantize(np.ascontiguousarray(base[::2, :70]))
    for view in (base[::2, :70], np.asfortranarray(base[::2, :70])):
        assert zm.quantize(view).codes.tobytes() == want.codes.tobytes()
    tensor = torch.from_numpy(base.copy())[::2, :70].requires_grad_()
    encoded = zm.quantize(tensor)
    assert isinstance(encoded.codes, torch.Tensor)
    assert encoded.codes.view(torch.uint8).numpy().tobytes() == want.codes.tobytes()
    assert torch.equal(zm.dequantize(encoded, "bfloat16"), zm.dequantize(encoded, torch.bfloat16))
    transposed = torch.from_numpy(base.copy()).T
    assert zm.quantize(transposed).codes.view(torch.uint8).numpy().tobytes() == (
        zm.quantize(base.T).codes.tobytes()
    )
    read_only = base[::2, :70].copy()
    read_only.flags.writeable = False
    assert zm.quantize(read_only).codes.tobytes() == want.codes.tobytes()
    with_float8 = zm.MXFP8Array(want.codes.view(ml_dtypes.float8_e4m3fn), want.scales, want.shape)
    np.testing.assert_array_equal(zm.dequantize(with_float8), zm.dequantize(want))
    assert zm.quantize(base.astype(">f4")).codes.tobytes() == zm.quantize(base).codes.tobytes()


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: zm.quantize(np.zeros(32, np.float32)), "2 dimensions"),
        (lambda: zm.quantize(np.zeros((2, 32))), "not float64"),
        (lambda: zm.quantize(np.zeros((2, 32), np.int32)), "not int32"),
        (lambda: zm.quantize([[1.0]]), "not list"),
        (lambda: zm.quantize(torch.zeros(2, 2, device="meta")), "on meta"),
        (lambda: zm.quantize(np.zeros((2, 32), np.float32), threads=-1), "threads"),
        (lambda: zm.dequantize(zm.quantize(np.ones((2, 32), np.float32)), "float64"), "float64"),
        (lambda: zm.dequantize(zm.quantize(np.ones((2, 32), np.float32)), np.int8), "int8"),
        (
            lambda: zm.dequantize(
                zm.MXFP8Array(np.zeros((32, 32), np.uint8), np.zeros((128, 4), np.uint8), (2, 33))
            ),
            "codes of a 2x33 matrix",
        ),
        (
            lambda: zm.dequantize(
                zm.MXFP8Array(np.zeros((32, 32), np.uint8), np.zeros((1, 4), np.uint8), (2, 32))
            ),
            "scales of a 2x32 matrix",
        ),
        (lambda: zm.to_blocked(np.zeros((2, 2), np.float32)), "must be uint8 or float8_e8m0fnu"),
        (lambda: zm.to_blocked(np.zeros(4, np.uint8)), "2 dimensions"),
        (lambda: zm.from_blocked(np.zeros(4, np.uint8), 128, 4), "512 bytes"),
        (lambda: _core.quantize(np.zeros((1, 32), np.float32), "float16", b"", b""), "writable"),
        (lambda: _core.quantize(object(), "float32", b"", b""), "buffer protocol or DLPack"),
    ],
)
def test_misuse_is_a_typed_error(call: object, sentence: str) -> None:
    with pytest.raises(zm.InvalidArgumentError, match=sentence):
        call()  # type: ignore[operator]


@pytest.mark.parametrize("shape", [(0, 0), (0, 32), (5, 0)])
def test_empty_matrices(shape: tuple[int, int]) -> None:
    encoded = zm.quantize(np.zeros(shape, np.float32))
    assert zm.dequantize(encoded).shape == shape


@settings(deadline=None)
@given(rows=st.integers(1, 300), cols=st.integers(1, 20), seed=st.integers(0, 9))
def test_scale_layout(rows: int, cols: int, seed: int) -> None:
    scales = np.random.default_rng(seed).integers(0, 256, (rows, cols), dtype=np.uint8)
    blocked = zm.to_blocked(scales)
    assert blocked.shape == (-(-rows // 128) * 128, -(-cols // 4) * 4)
    by_peer = comfy_kitchen.float_utils.to_blocked(torch.from_numpy(scales), flatten=False)
    np.testing.assert_array_equal(blocked, by_peer.numpy())
    np.testing.assert_array_equal(zm.from_blocked(blocked, rows, cols), scales)
    as_tensor = zm.to_blocked(torch.from_numpy(scales))
    assert torch.equal(as_tensor, torch.from_numpy(blocked))


def test_other_python_threads_run_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = np.ones((8192, 8192), np.float32)
    events = []

    def work() -> None:
        events.append("begin")
        zm.quantize(matrix, threads=1)
        events.append("end")

    # Nothing but a call that releases the GIL, such as sleep, lets another thread run now.
    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)
    try:
        worker = threading.Thread(target=work)
        worker.start()
        seen = []
        while worker.is_alive():
            seen.append(tuple(events))
            time.sleep(0.001)
    finally:
        sys.setswitchinterval(interval)
    worker.join()
    assert seen.count(("begin",)) >= 3


def test_views_with_odd_strides() -> None:
    base = np.random.default_rng(8).standard_normal((6, 64)).astype(np.float32)
    for view in (base[::-1], np.broadcast_to(base[:1], (5, 64)), base[:, ::-1]):
        want = zm.quantize(view.copy())
        assert zm.quantize(view).codes.tobytes() == want.codes.tobytes()
    tensor = torch.from_numpy(base)
    expanded = zm.quantize(tensor[:1].expand(5, 64)).codes.view(torch.uint8)
    assert torch.equal(expanded, zm.quantize(tensor[:1].repeat(5, 1)).codes.view(torch.uint8))
    with pytest.raises(zm.InvalidArgumentError, match="elements without bytes"):
        _core.to_blocked(np.empty((2, 2), "V0"), np.zeros(512, np.uint8))


def run_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        check=False,
    )


def test_target_is_forced_by_the_environment(cpu_target: str) -> None:
    code = "from zimage_mxfp8 import _core; print(_core.active_cpu_target())"
    assert run_python(code, ZIMAGE_MXFP8_CPU=cpu_target).stdout.strip() == cpu_target


def test_unknown_target_in_the_environment() -> None:
    code = (
        "import numpy as np, zimage_mxfp8 as zm\n"
        "try: zm.quantize(np.ones((2, 32), np.float32))\n"
        "except zm.InvalidArgumentError as error: print(error)"
    )
    result = run_python(code, ZIMAGE_MXFP8_CPU="sse9")
    assert 'unknown CPU target "sse9"' in result.stdout
    assert "or unset ZIMAGE_MXFP8_CPU in the environment" in result.stdout


def test_converting_imports_no_torch(small_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "o.safetensors"
    code = (
        "import sys, numpy as np, zimage_mxfp8 as zm\n"
        "zm.dequantize(zm.quantize(np.ones((2, 32), np.float32)))\n"
        "from zimage_mxfp8.cli.main import main\n"
        f"assert main(['convert', {str(small_file)!r}, {str(output)!r}]) == 0\n"
        f"assert main(['validate', {str(output)!r}]) == 0\n"
        "print('torch' in sys.modules)"
    )
    assert run_python(code).stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("command", ["probe", "compare"])
def test_analysing_weights_imports_no_torch(small_file: Path, tmp_path: Path, command: str) -> None:
    options = ["--low-rank", "none"] if command == "compare" else []
    arguments = [command, str(small_file), "--html", str(tmp_path / "page.html"), *options]
    code = (
        "import sys\n"
        "from zimage_mxfp8.cli.main import main\n"
        f"assert main({arguments!r}) == 0\n"
        "print('torch' in sys.modules)"
    )
    assert run_python(code).stdout.splitlines()[-1] == "False"
