r"""Runs every CUDA kernel of the package once at small ragged shapes, for compute-sanitizer.

    compute-sanitizer --tool memcheck python tests/python/programs/sanitize.py
    compute-sanitizer --tool synccheck python tests/python/programs/sanitize.py
    compute-sanitizer --tool racecheck python tests/python/programs/sanitize.py \
        --skip dequantize fp8_rowwise
    compute-sanitizer --tool initcheck python tests/python/programs/sanitize.py \
        --skip dequantize fp8_rowwise mixed_sm90
    compute-sanitizer --tool initcheck python tests/python/programs/sanitize.py --blind-spot

racecheck (CUDA 13.0, on an H100) dies inside cuBLASLt's kernels with "failed to handle a hardware
exception", even if `--kernel-name kns=zimage_mxfp8` keeps it to ours, hence the two kernels that it
cannot run.

initcheck must see all kernels: with that filter it misses what torch's wrote, and reports that as
uninitialised. It does not see what cuBLASLt's kernels write, nor what bulk tensor copies do, with
which sm90 stores results: reading those is reported, by our kernels and by copies to the host. The
last command runs nothing of ours, only torch's products and torch's kernels that read them.

The results are compared with the CPU's or torch's; test_cuda_*.py look closer.
"""

from __future__ import annotations

import argparse

import torch

import zimage_mxfp8 as zm
from zimage_mxfp8 import _core
from zimage_mxfp8.ops import fused, gemm_epilogues, low_rank
from zimage_mxfp8.transformer.arithmetic import int8
from zimage_mxfp8.transformer.fused_low_rank import two_int8_terms, two_terms

TOLERANCE = {"reference": 1e-6, "dequantize": 5e-3, "fp8_rowwise": 1e-2, "mixed_sm90": 5e-3}
# M, N and K: every kernel's number of tokens, and weights enough for every multiprocessor.
PRODUCTS = (
    *((m, 72, 288) for m in (1, 40, 100, 200, 4100)),
    *((m, 17024, 64) for m in (40, 70)),
)


def check_codec(rows: int, cols: int, dtype: torch.dtype) -> None:
    matrix = torch.randn(rows, cols).to(dtype)
    encoded, want = zm.quantize(matrix.cuda()), zm.quantize(matrix)
    assert torch.equal(encoded.codes.view(torch.uint8).cpu(), want.codes.view(torch.uint8))
    assert torch.equal(encoded.scales.cpu(), want.scales)
    for target in (torch.bfloat16, torch.float16, torch.float32):
        assert torch.equal(zm.dequantize(encoded, target).cpu(), zm.dequantize(want, target))
    by_rows, rows_want = zm.quantize_rows(matrix.cuda()), zm.quantize_rows(matrix)
    assert torch.equal(by_rows.codes.view(torch.uint8).cpu(), rows_want.codes.view(torch.uint8))


def check_fold(rows: int, cols: int) -> None:
    host = zm.quantize(torch.randn(rows, cols) * torch.exp2(torch.randint(-9, 9, (rows, cols))))
    device = zm.MXFP8Array(host.codes.cuda(), host.scales.cuda(), host.shape)
    folded, want = zm.fold(device, bound=1)[0], zm.fold(host, bound=1)[0]
    assert torch.equal(folded.codes.view(torch.uint8).cpu(), want.codes.view(torch.uint8))


def check_close(result: object, want: torch.Tensor, rows: int, cols: int) -> None:
    if isinstance(result, zm.Int8Array):
        # The rotation is its own inverse.
        result = int8.rotate_columns(result.codes.float() * result.scales[:, None])[:, :cols]
    elif isinstance(result, zm.RowScaledArray):
        result = result.codes.float() * result.scales[:, None]
    elif isinstance(result, zm.MXFP8Array):
        result = zm.dequantize(result)
    assert isinstance(result, torch.Tensor) and result.shape == (rows, cols)
    assert ((result.float() - want).norm() / want.norm()).item() < 7e-2  # E4M3 alone: 2^-4


def check_fused(rows: int, cols: int) -> None:
    x, y = (torch.randn(rows, cols, device="cuda").bfloat16() for _ in range(2))
    weight = torch.randn(cols, device="cuda").bfloat16()
    scale = torch.randn(2, cols, device="cuda").bfloat16()
    items = torch.arange(rows, dtype=torch.int32, device="cuda") % 2
    factor = weight.float() * (1 + scale.float()[items])

    def norm(matrix: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(matrix.float(), (cols,), eps=1e-5)

    added = x.float() + torch.tanh(scale.float()[items]) * norm(y) * weight.float()
    fused.add_norm_modulate(x.clone(), y, weight)
    formats = ["bfloat16", "row-scaled", "mxfp8"]
    if cols % 32 == 0:
        formats.append("int8")
        check_close(fused.quantize_rotated(x), x.float(), rows, cols)
    for output_format in formats:
        for split in (0, cols // 3, cols // 16 * 8):
            result = fused.join_columns(x[:, :split], x[:, split:], output_format)
            check_close(result, x.float(), rows, cols)
        result = fused.silu_multiply(x, y, output_format)
        check_close(result, torch.nn.functional.silu(x.float()) * y.float(), rows, cols)
        check_close(
            fused.norm_modulate(x, weight, scale, items, output_format),
            norm(x) * factor,
            rows,
            cols,
        )
        for addend, of_addend in ((None, None), (y, torch.tensor([0.5], device="cuda"))):
            in_place = x.clone()
            norms = weight, scale, weight, scale, items
            result = fused.add_norm_modulate(
                in_place, y, *norms, output_format, addend=addend, addend_factor=of_addend
            )
            check_close(in_place, added if addend is None else added + 0.5 * y, rows, cols)
            check_close(result, norm(in_place) * factor, rows, cols)


def check_heads(rows: int, heads: int, gap: int) -> None:
    qkv = torch.randn(rows, heads * 384 + gap, device="cuda").bfloat16()[:, gap:]
    weight = torch.ones(128, device="cuda").bfloat16()
    quarter_turn = torch.tensor([0.0, 1.0], device="cuda").expand(rows, 64, 2)
    before = qkv.float()
    fused.rotate_heads(qkv, weight, weight, quarter_turn, heads, heads)
    normed = torch.nn.functional.rms_norm(before.reshape(rows, -1, 64, 2), (64, 2), eps=1e-5)
    want = torch.stack([-normed[..., 1], normed[..., 0]], -1).reshape(rows, -1)
    check_close(qkv[:, : heads * 256], want[:, : heads * 256], rows, heads * 256)


def check_fused_products(tokens: int, columns: int, heads: int, depth: int) -> None:
    """The products with fused epilogues, against a product and the fused operation."""
    x = zm.quantize_rows(torch.randn(tokens, depth, device="cuda"))
    both = zm.quantize_rows(torch.randn(2 * columns, depth, device="cuda"))
    gate, up = zm.gemm(x, both, kernel="reference").chunk(2, dim=1)
    want = fused.silu_multiply(gate, up).float()
    check_close(
        gemm_epilogues.gemm_silu_multiply(x, both, kernel="fp8_sm90"), want, tokens, columns
    )
    weights = zm.quantize_rows(torch.randn(384 * heads, depth, device="cuda"))
    qkv = zm.gemm(x, weights, kernel="reference")
    norm = torch.rand(128, device="cuda").bfloat16()
    rotations = torch.randn(tokens, 64, 2, device="cuda")
    fused.rotate_heads(qkv, norm, norm, rotations, heads, heads)
    result = gemm_epilogues.gemm_rotate_heads(
        x, weights, norm, norm, rotations, heads, heads, kernel="fp8_sm90"
    )
    check_close(result, qkv.float(), tokens, 384 * heads)


def check_addend(tokens: int, rows: int, depth: int, rank: int) -> None:
    """A low-rank addend whose x comes from a narrow GEMM, against the dense matrix."""
    x = zm.quantize_rows(torch.randn(tokens, depth, device="cuda"))
    weights = zm.quantize_rows(torch.randn(rows, depth, device="cuda"))
    down = torch.randn(rank, depth, device="cuda")
    up = (torch.randn(rows, rank, device="cuda") / weights.scales[:, None]).bfloat16()
    narrow = low_rank.narrow_gemm(x, two_terms(down), torch.ones(rank, device="cuda"))
    addend = low_rank.LowRankAddend(narrow, up)
    decoded = x.codes.float() * x.scales[:, None]
    want = zm.gemm(x, weights, dtype=torch.float32, kernel="reference")
    want += decoded @ down.T @ (up.float() * weights.scales[:, None]).T
    check_close(gemm_epilogues.gemm_low_rank(x, weights, addend), want, tokens, rows)
    plain, mxfp8 = torch.randn(tokens, depth, device="cuda").bfloat16(), zm.quantize(down)
    up = torch.randn(rank, rank, device="cuda").bfloat16()
    narrow = low_rank.narrow_gemm(plain, down.bfloat16(), torch.ones(rank, device="cuda"))
    addend = low_rank.LowRankAddend(narrow, up)
    want = zm.gemm(plain, mxfp8, dtype=torch.float32, kernel="reference")
    want += addend.x.float() @ addend.u.float().T
    check_close(gemm_epilogues.gemm_low_rank(plain, mxfp8, addend), want, tokens, rank)


def random_int8(rows: int, depth: int) -> zm.Int8Array:
    codes = torch.randint(-127, 128, (rows, depth), device="cuda", dtype=torch.int8)
    return zm.Int8Array(codes, torch.rand(rows, device="cuda") / 1000)


def decoded_int8(array: zm.Int8Array) -> torch.Tensor:
    return array.codes.double() * array.scales.double()[:, None]


def check_int8_products(tokens: int, columns: int, heads: int, depth: int) -> None:
    """INT8 GEMMs by every kernel, and with the epilogues, against float64."""
    a, both = random_int8(tokens, depth), random_int8(2 * columns, depth)
    product = decoded_int8(a) @ decoded_int8(both).T
    for kernel in [k.name for k in _core.gemm_kernels()]:
        problem = _core.GemmProblem(tokens, 2 * columns, depth, "int8", "int8", "bfloat16", False)
        if not _core.gemm_unsupported(kernel, problem, 0):
            result = zm.gemm(a, both, kernel=kernel)
            check_close(result, product.float(), tokens, 2 * columns)
    gate, up = product.float().chunk(2, dim=1)
    for output_format in ("bfloat16", "int8") if columns % 32 == 0 else ("bfloat16",):
        result = gemm_epilogues.gemm_silu_multiply(a, both, output_format)
        check_close(result, torch.nn.functional.silu(gate) * up, tokens, columns)
    weights = random_int8(384 * heads, depth)
    qkv = (decoded_int8(a) @ decoded_int8(weights).T).bfloat16()
    norm = torch.rand(128, device="cuda").bfloat16()
    rotations = torch.randn(tokens, 64, 2, device="cuda")
    fused.rotate_heads(qkv, norm, norm, rotations, heads, heads)
    result = gemm_epilogues.gemm_rotate_heads(a, weights, norm, norm, rotations, heads, heads)
    check_close(result, qkv.float(), tokens, 384 * heads)


def check_int8_addend(tokens: int, columns: int, heads: int, depth: int, rank: int) -> None:
    """A low-rank addend of INT8 GEMMs, alone and under the epilogues, against float64."""
    a, down = random_int8(tokens, depth), torch.randn(rank, depth, device="cuda") / depth**0.5
    narrow = low_rank.narrow_gemm(a, two_int8_terms(down), torch.ones(rank, device="cuda"))
    rotated = int8.rotate_columns(down).double()
    check_close(narrow, (decoded_int8(a) @ rotated.T).float(), tokens, rank)

    def sums(weights: zm.Int8Array, up: torch.Tensor) -> torch.Tensor:
        product = decoded_int8(a) @ decoded_int8(weights).T
        return (product + narrow.double() @ up.double().T).float()

    both = random_int8(2 * columns, depth)
    up = (torch.randn(2 * columns, rank, device="cuda") / 10).bfloat16()
    addend, want = low_rank.LowRankAddend(narrow, up), sums(both, up)
    check_close(gemm_epilogues.gemm_low_rank(a, both, addend), want, tokens, 2 * columns)
    gate, right = want.chunk(2, dim=1)
    result = gemm_epilogues.gemm_silu_multiply(a, both, addend=addend)
    check_close(result, torch.nn.functional.silu(gate) * right, tokens, columns)
    weights = random_int8(384 * heads, depth)
    up = (torch.randn(384 * heads, rank, device="cuda") / 10).bfloat16()
    qkv = sums(weights, up).bfloat16()
    norm = torch.rand(128, device="cuda").bfloat16()
    rotations = torch.randn(tokens, 64, 2, device="cuda")
    fused.rotate_heads(qkv, norm, norm, rotations, heads, heads)
    result = gemm_epilogues.gemm_rotate_heads(
        a, weights, norm, norm, rotations, heads, heads, addend=low_rank.LowRankAddend(narrow, up)
    )
    check_close(result, qkv.float(), tokens, 384 * heads)


def check_products(m: int, n: int, k: int, skipped: list[str]) -> None:
    a, b = torch.randn(m, k), torch.randn(n, k)
    bias = torch.randn(n).bfloat16()
    kinds = {
        "mxfp8": zm.quantize,
        "row-scaled": zm.quantize_rows,
        "bfloat16": torch.Tensor.bfloat16,
    }
    for first, second in (("mxfp8", "mxfp8"), ("bfloat16", "mxfp8"), ("row-scaled", "row-scaled")):
        left, right = kinds[first](a.cuda()), kinds[second](b.cuda())
        want = zm.gemm(kinds[first](a), kinds[second](b), bias, dtype=torch.float32)
        for kernel in [k.name for k in _core.gemm_kernels()]:
            for dtype in ("bfloat16", "float16", "float32"):
                problem = _core.GemmProblem(m, n, k, first, second, dtype, True)
                if kernel in skipped or _core.gemm_unsupported(kernel, problem, 0):
                    continue
                result = zm.gemm(left, right, bias.cuda(), dtype=dtype, kernel=kernel).cpu().float()
                error = ((result - want).norm() / want.norm()).item()
                assert error < TOLERANCE.get(kernel, 5e-3) + (0 if dtype == "float32" else 4e-3)


def check_torch(m: int, n: int, k: int) -> None:
    """What our kernels over cuBLASLt do, by torch alone: a product, and a kernel that reads it."""
    a, b = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16()
    want = a.double() @ b.double().T + 1
    left, right = a.cuda(), b.cuda().T
    for library in ("cublas", "cublaslt"):
        torch.backends.cuda.preferred_blas_library(library)
        for dtype in (torch.bfloat16, torch.float32):
            result = (torch.mm(left, right, out_dtype=dtype) + 1).cpu().double()
            assert ((result - want).norm() / want.norm()).item() < 5e-3


def main() -> None:
    parser = argparse.ArgumentParser(description="run every CUDA kernel at small ragged shapes")
    parser.add_argument("--skip", nargs="*", default=[], metavar="PATH", help="of the products")
    parser.add_argument(
        "--blind-spot", action="store_true", help="run torch's own kernels instead, for initcheck"
    )
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.cuda.init()
    # The tools know allocations, not the tensors that torch would place in them.
    torch.cuda.caching_allocator_enable(False)
    if arguments.blind_spot:
        for product in PRODUCTS:
            check_torch(*product)
        print("torch's own kernels ran and are right")
        return
    shapes = ((1, 1), (5, 40), (33, 131), (130, 300))
    # The last two are rows that quantize_rows gives a block each.
    for rows, cols in (*shapes, (3, 5001), (2, 8192)):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            check_codec(rows, cols, dtype)
        check_fold(rows, cols)
    for rows, cols in (*shapes, (3, 3840), (2, 10240), (2, 16384), (3, 16383)):
        check_fused(rows, cols)
    for rows, heads, gap in ((3, 30, 0), (2, 1, 5), (2, 35, 8)):
        check_heads(rows, heads, gap)
    for product in PRODUCTS:
        check_products(*product, arguments.skip)
    if "mixed_sm90" not in arguments.skip and "90a" in _core.build_info().architectures:
        # 4,100 tokens: several tiles for each block; 192 and 320: the last 64 are half a tile.
        for tokens, columns, heads, depth in (
            (5, 8, 1, 32),
            (130, 72, 3, 416),
            (300, 1000, 7, 96),
            (4100, 1024, 2, 64),
            (192, 10240, 1, 64),
            (320, 64, 30, 64),
        ):
            check_fused_products(tokens, columns, heads, depth)
        for tokens, columns, heads, depth in (
            (5, 32, 1, 32),
            (130, 96, 3, 416),
            (4100, 1024, 2, 64),
            (192, 10240, 1, 64),
        ):
            check_int8_products(tokens, columns, heads, depth)
            check_int8_addend(tokens, columns, heads, depth, rank=32 * heads)
        for tokens, rows, depth, rank in (
            (1, 8, 32, 32),
            (130, 520, 416, 96),
            (4100, 1024, 64, 64),
        ):
            check_addend(tokens, rows, depth, rank)
    quantizer = _core.StagedQuantizer(0)
    matrix = torch.randn(100, 70)
    want = zm.quantize(matrix)
    codes, scales = torch.zeros(128, 96, dtype=torch.uint8), torch.zeros(128, 4, dtype=torch.uint8)
    quantizer.quantize(matrix, "float32", codes, scales)
    assert torch.equal(codes, want.codes.view(torch.uint8))
    print("all kernels ran and agree")


if __name__ == "__main__":
    main()
