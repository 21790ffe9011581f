"""Products on a CUDA device, of every kernel that the device has, against the reference.

    pytest -m gpu

The reference itself is checked on the CPU by test_matmul.py, and here against the CPU.
"""

from __future__ import annotations

import re
import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import zimage_mxfp8 as zm
from zimage_mxfp8 import _core
from zimage_mxfp8.ops import gemm as matmul

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# [N, K] of Z-Image's linears, and the odd ones that the API promises.
MODEL_SHAPES = [(11520, 3840), (3840, 3840), (10240, 3840), (3840, 10240), (15360, 256)]
ODD_SHAPES = [(8, 32), (40, 96), (264, 160), (136, 3872), (11400, 160)]
# Relative error (Frobenius) against the reference in float32: order of sums alone, or
# the FP8 tensor cores' narrower sums. Rounding to the output type comes on top.
SUMS = {
    "dequantize": 1e-5,
    "fp8_rowwise": 5e-3,
    "mixed_sm90": 1e-5,
    "mxfp8_sm100": 1e-5,
    "mxfp8_sm120": 1e-5,
}
ROUNDING = {torch.bfloat16: 3e-3, torch.float16: 4e-4, torch.float32: 0.0}
OPERANDS = {
    "dequantize": [("mxfp8", "mxfp8"), ("bfloat16", "mxfp8")],
    "fp8_rowwise": [("row-scaled", "row-scaled")],
    "mixed_sm90": [("bfloat16", "mxfp8")],
    "mxfp8_sm100": [("mxfp8", "mxfp8")],
    "mxfp8_sm120": [("mxfp8", "mxfp8")],
}


def kernels() -> list[str]:
    """The fast kernels of the device that is there."""
    if not torch.cuda.is_available() or not _core.build_info().cuda:
        return list(OPERANDS)
    found = []
    for kernel, operands in OPERANDS.items():
        problem = _core.GemmProblem(32, 32, 32, *operands[0], "bfloat16", False)
        if not _core.gemm_unsupported(kernel, problem, torch.cuda.current_device()):
            found.append(kernel)
    return found


def operand(kind: str, matrix: torch.Tensor) -> Any:
    if kind == "mxfp8":
        return zm.quantize(matrix)
    return zm.quantize_rows(matrix) if kind == "row-scaled" else matrix.bfloat16()


def random(rows: int, cols: int, seed: int) -> torch.Tensor:
    generator = torch.Generator(device="cuda").manual_seed(seed)
    matrix = torch.randn(rows, cols, generator=generator, device="cuda")
    return matrix * torch.exp2(
        torch.randint(-3, 3, matrix.shape, generator=generator, device="cuda")
    )


def on_host(array: Any) -> Any:
    if isinstance(array, zm.MXFP8Array):
        return zm.MXFP8Array(array.codes.cpu(), array.scales.cpu(), array.shape)
    if isinstance(array, zm.RowScaledArray):
        return zm.RowScaledArray(array.codes.cpu(), array.scales.cpu())
    return array.cpu()


def relative_error(result: torch.Tensor, want: torch.Tensor) -> float:
    return ((result.double() - want.double()).norm() / want.double().norm()).item()


def check(
    kernel: str, kinds: tuple[str, str], m: int, n: int, k: int, bias: bool, dtype: torch.dtype
) -> None:
    a, b = operand(kinds[0], random(m, k, 1)), operand(kinds[1], random(n, k, 2))
    vector = random(1, n, 3)[0].bfloat16() * k**0.5 if bias else None
    want = zm.gemm(a, b, vector, dtype=torch.float32, kernel="reference")
    torch.full((1 << 24,), 0x7F, dtype=torch.uint8, device="cuda")  # NaN in what is allocated next
    result = zm.gemm(a, b, vector, dtype=dtype, kernel=kernel)
    assert result.dtype == dtype and result.is_cuda
    if dtype == torch.float16:  # beyond its range both are infinite
        want, result = want.clamp(-65504, 65504), result.clamp(-65504, 65504)
    assert relative_error(result, want) <= SUMS[kernel] + ROUNDING[dtype]


@pytest.mark.parametrize("kernel", kernels())
@pytest.mark.parametrize("m", [1, 32, 64, 77, 129, 4224])
@pytest.mark.parametrize(("n", "k"), MODEL_SHAPES)
def test_model_shapes(kernel: str, m: int, n: int, k: int) -> None:
    for kinds in OPERANDS[kernel]:
        check(kernel, kinds, m, n, k, bias=m != 77, dtype=torch.bfloat16)


@pytest.mark.parametrize("kernel", kernels())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("n", "k"), ODD_SHAPES)
def test_odd_shapes_and_outputs(
    kernel: str, dtype: torch.dtype, bias: bool, n: int, k: int
) -> None:
    if kernel == "mixed_sm90" and dtype != torch.bfloat16:
        pytest.skip("mixed_sm90 writes bfloat16 only; test_misuse checks that it says so")
    for kinds in OPERANDS[kernel]:
        for m in (1, 5, 40, 128, 300, 4097):
            check(kernel, kinds, m, n, k, bias, dtype)


@settings(deadline=None, max_examples=40)
@given(
    m=st.integers(1, 200),
    n=st.integers(1, 20).map(lambda i: 8 * i),
    k=st.integers(1, 10).map(lambda i: 32 * i),
    kinds=st.tuples(*[st.sampled_from(["mxfp8", "row-scaled", "bfloat16"])] * 2),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
)
def test_emulated_has_the_bits_of_the_cpu(
    m: int, n: int, k: int, kinds: tuple[str, str], dtype: torch.dtype, bias: bool
) -> None:
    a, b = operand(kinds[0], random(m, k, 1)), operand(kinds[1], random(n, k, 2))
    vector = random(1, n, 3)[0].bfloat16() if bias else None
    result = zm.gemm(a, b, vector, dtype=dtype, kernel="reference").cpu()
    want = zm.gemm(on_host(a), on_host(b), None if vector is None else vector.cpu(), dtype=dtype)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(result.view(bits), want.view(bits))


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 200),
    cols=st.integers(1, 900),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_quantize_rows_has_the_bytes_of_the_cpu(
    rows: int, cols: int, dtype: torch.dtype, seed: int
) -> None:
    matrix = random(rows, cols, seed).to(dtype)
    matrix[0] = 0
    if rows > 2:
        matrix[1, cols // 2] = torch.inf
        matrix[2] *= 1e-35
    device, host = zm.quantize_rows(matrix), zm.quantize_rows(matrix.cpu())
    assert torch.equal(device.codes.view(torch.uint8).cpu(), host.codes.view(torch.uint8))
    assert torch.equal(device.scales.cpu().view(torch.int32), host.scales.view(torch.int32))


@pytest.mark.parametrize("cols", [2048, 2049, 4096, 4097, 5001, 10240, 30000])
def test_quantize_rows_of_every_length(cols: int) -> None:
    """A warp's rows, a block's, and those longer than registers hold."""
    for dtype in DTYPES:
        matrix = random(11, cols, 4).to(dtype)
        device, host = zm.quantize_rows(matrix), zm.quantize_rows(matrix.cpu())
        assert torch.equal(device.codes.view(torch.uint8).cpu(), host.codes.view(torch.uint8))


@pytest.mark.parametrize("kernel", kernels())
def test_strided_operands_and_output(kernel: str) -> None:
    kinds = OPERANDS[kernel][-1]
    a, b = operand(kinds[0], random(130, 288, 5)), operand(kinds[1], random(72, 288, 6))
    want = zm.gemm(a, b, dtype=torch.float32, kernel="reference")
    if kinds[0] == "bfloat16":
        wide = torch.full((130, 400), torch.nan, dtype=torch.bfloat16, device="cuda")
        wide[:, 8:296] = a
        assert relative_error(zm.gemm(wide[:, 8:296], b, kernel=kernel), want) < 5e-3
    result = torch.full((130, 96), 7.0, dtype=torch.bfloat16, device="cuda")
    problem = _core.GemmProblem(130, 72, 288, *kinds, "bfloat16", False)
    nbytes = _core.gemm_workspace_size(kernel, problem, 0)
    workspace = torch.empty(nbytes, dtype=torch.uint8, device="cuda") if nbytes else None
    parts = [matmul.operand(x, "x") for x in (a, b)]
    _core.gemm(kernel, *parts, None, result[:, :72], "bfloat16", workspace, 0, 0)
    torch.cuda.synchronize()
    assert relative_error(result[:, :72], want) < 8e-3
    assert (result[:, 72:] == 7).all()


@pytest.mark.parametrize("kernel", [*kernels(), "reference"])
def test_empty_products(kernel: str) -> None:
    kinds = OPERANDS.get(kernel, [("mxfp8", "mxfp8")])[0]
    b, bias = operand(kinds[1], random(16, 64, 1)), random(1, 16, 2)[0].bfloat16()
    empty = torch.zeros(0, 64, device="cuda")
    assert zm.gemm(operand(kinds[0], empty), b, bias, kernel=kernel).shape == (0, 16)
    nothing = [
        operand(kind, torch.zeros(rows, 0, device="cuda"))
        for kind, rows in zip(kinds, (3, 16), strict=True)
    ]
    assert torch.equal(zm.gemm(*nothing, bias, kernel=kernel), bias.repeat(3, 1))


@pytest.mark.parametrize("kernel", kernels())
def test_a_bias_that_is_a_view(kernel: str) -> None:
    kinds = OPERANDS[kernel][0]
    a, b = operand(kinds[0], random(40, 288, 1)), operand(kinds[1], random(72, 288, 2))
    bias = random(1, 80, 3)[0].bfloat16()[3:75]
    want = zm.gemm(a, b, bias, dtype=torch.float32, kernel="reference")
    assert (
        relative_error(zm.gemm(a, b, bias, kernel=kernel), want)
        <= SUMS[kernel] + ROUNDING[torch.bfloat16]
    )


@pytest.mark.parametrize("kernel", kernels())
@pytest.mark.parametrize("tokens", [100, 4096])
def test_many_streams(kernel: str, tokens: int) -> None:
    kinds = OPERANDS[kernel][0]
    b = operand(kinds[1], random(3840, 3840, 7))
    inputs = [operand(kinds[0], random(tokens + 50 * i, 3840, i)) for i in range(8)]
    wants = [zm.gemm(a, b, kernel=kernel) for a in inputs]
    torch.cuda.synchronize()
    results: list[Any] = [None] * len(inputs)

    def work(i: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(5):
                results[i] = zm.gemm(inputs[i], b, kernel=kernel)
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result, want in zip(results, wants, strict=True):
        assert relative_error(result, want) < 1e-4


@pytest.mark.parametrize("kernel", kernels())
@pytest.mark.parametrize("m", [300, 4300])
def test_graph_capture(kernel: str, m: int) -> None:
    kinds = OPERANDS[kernel][0]
    static = random(m, 3840, 8)
    b = operand(kinds[1], random(3840, 3840, 9))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        zm.gemm(operand(kinds[0], static), b, kernel=kernel)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        result = zm.gemm(operand(kinds[0], static), b, kernel=kernel)
    for seed in (10, 11):
        static.copy_(random(m, 3840, seed))
        graph.replay()
        want = zm.gemm(operand(kinds[0], static), b, kernel="reference")
        assert relative_error(result, want) < SUMS[kernel] + ROUNDING[torch.bfloat16] * 2


@pytest.mark.parametrize("kernel", kernels())
@pytest.mark.parametrize("m", [3, 50, 100, 200, 4200])
def test_every_code_under_every_scale(kernel: str, m: int) -> None:
    """Weights whose blocks run through all codes and scales, beyond what a quantiser makes."""
    if kernel == "fp8_rowwise":
        pytest.skip("has no scales of blocks")
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    codes[127] = codes[255] = 0  # NaN
    codes = codes.reshape(8, 32).repeat(26, 1)  # [208, 32]: a block a row
    scales = torch.arange(24, 232, dtype=torch.int32).to(torch.uint8)[:, None]
    b = zm.MXFP8Array(
        torch.nn.functional.pad(codes, (0, 0, 0, 16)).cuda(),
        zm.to_blocked(scales).cuda(),
        (208, 32),
    )
    a = (random(m, 32, 16) / 16).bfloat16()
    left = zm.quantize(a) if OPERANDS[kernel][-1][0] == "mxfp8" else a
    want = zm.gemm(left, b, dtype=torch.float32, kernel="reference")
    result = zm.gemm(left, b, kernel=kernel).float()
    assert want.isfinite().all()
    scale = want.abs().amax(dim=0)  # of a column: its block's
    assert ((result - want).abs() <= scale * 2.0**-8).all()
    nan = zm.MXFP8Array(b.codes, b.scales.clone(), b.shape)
    nan.scales.view(-1)[5 * 16] = 255  # row 5, block 0
    columns = zm.gemm(left, nan, kernel=kernel).isnan().any(dim=0).nonzero().flatten().tolist()
    assert columns == [5]


def test_folded_weights_compute_the_same() -> None:
    weight = zm.quantize(random(512, 3840, 12))
    folded, stats = zm.fold(weight)
    a = random(64, 3840, 13)
    exact = a.double() @ zm.dequantize(weight).double().T
    result = zm.gemm(a.bfloat16(), folded, dtype="float32", kernel="reference")
    assert stats.relative_error < 1e-4
    assert relative_error(result, exact) < 3e-3  # a in bfloat16


def test_the_device_has_the_kernels_of_its_family() -> None:
    """Else all that is above would pass without having run."""
    families = {
        (9, 0): {"dequantize", "fp8_rowwise", "mixed_sm90"},
        (10, 0): {"dequantize", "mxfp8_sm100"},
        (10, 3): {"dequantize", "mxfp8_sm100"},
        (12, 0): {"dequantize", "mxfp8_sm120"},
        (12, 1): {"dequantize", "mxfp8_sm120"},
    }
    assert set(kernels()) == families.get(torch.cuda.get_device_capability(), {"dequantize"})


def test_the_device_has_a_kernel() -> None:
    a = zm.quantize(random(4, 32, 14))
    assert zm.gemm_kernel(a, zm.quantize(random(8, 32, 15))) in kernels()


def test_misuse_is_a_typed_error() -> None:
    a, b = zm.quantize(random(16, 64, 1)), zm.quantize(random(16, 64, 2))
    parts = [matmul.operand(x, "x") for x in (a, b)]
    out = torch.zeros(16, 16, dtype=torch.bfloat16, device="cuda")
    flat = torch.zeros(600, dtype=torch.bfloat16, device="cuda")
    small = torch.zeros(1024, dtype=torch.uint8, device="cuda")
    strided = torch.zeros(16, 17, dtype=torch.bfloat16, device="cuda")[:, :16]
    large = torch.zeros(40 << 20, dtype=torch.uint8, device="cuda")
    inside = large[1 << 20 : (1 << 20) + 512].view(torch.bfloat16).view(16, 16)
    shifted = flat[4:260].view(16, 16)

    def gemm(d: Any, workspace: Any = None, bias: Any = None, kernel: str = "dequantize") -> None:
        _core.gemm(kernel, *parts, bias, d, "bfloat16", workspace, 0, 0)

    for call, sentence in (
        (lambda: gemm(out), 'the workspace has 0 bytes, and the kernel "dequantize" needs'),
        (lambda: gemm(out, small), "the workspace has 1024 bytes"),
        (lambda: gemm(out, large[8:]), "the workspace must be aligned to 256 bytes"),
        (lambda: gemm(inside, large), "the workspace overlaps with D"),
        (lambda: gemm(shifted, large), "D must be aligned to 16 bytes"),
        (lambda: gemm(strided, large), "the rows of D must begin at multiples of 16 bytes"),
        (lambda: gemm(out.cpu(), large), "A is on CUDA device 0 but D is on the CPU"),
        (lambda: gemm(out, large.cpu()), "A is on CUDA device 0 but the workspace is on the CPU"),
        (lambda: gemm(out.t()[:, :8], large), "adjacent elements"),
        (lambda: zm.gemm(a, on_host(b)), "is on the CPU"),
    ):
        with pytest.raises(zm.InvalidArgumentError, match=sentence):
            call()
    if "mixed_sm90" in kernels():
        with pytest.raises(zm.UnsupportedError, match="mixed_sm90 does not write F32"):
            check("mixed_sm90", ("bfloat16", "mxfp8"), 8, 8, 32, False, torch.float32)
    for kernel in set(OPERANDS) - set(kernels()):
        with pytest.raises(zm.UnsupportedError, match=f"{kernel} needs|no kernels for sm") as e:
            check(kernel, OPERANDS[kernel][0], 8, 8, 32, False, torch.bfloat16)
        there = {"reference"} | {p for p in kernels() if OPERANDS[kernel][0] in OPERANDS[p]}
        assert set(re.findall('"(.+?)"', str(e.value).split(" is computed by ")[1])) == there
        assert str(e.value).endswith(f" on {torch.cuda.get_device_name()}")
