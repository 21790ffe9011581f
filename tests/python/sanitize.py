"""Runs every CUDA kernel of the package once at small ragged shapes, for compute-sanitizer.

    compute-sanitizer --tool memcheck python tests/python/sanitize.py
    compute-sanitizer --tool synccheck python tests/python/sanitize.py
    compute-sanitizer --tool racecheck python tests/python/sanitize.py --skip decode row-scaled
    compute-sanitizer --tool initcheck python tests/python/sanitize.py
    compute-sanitizer --tool initcheck python tests/python/sanitize.py --blind-spot

racecheck (CUDA 13.0, on an H100) dies inside cuBLASLt's kernels with "failed to handle a hardware
exception", even if `--kernel-name kns=zimage_mxfp8` keeps it to ours, hence the two paths that it
cannot run.

initcheck must see all kernels: with that filter it misses what torch's wrote, and reports that as
uninitialised. It also reports what our kernels read of cuBLASLt's results; the last command runs
nothing of ours, only torch's products and torch's kernels that read them, and so tells whether
those reports are the tool's own.

The results are compared with the CPU's; test_cuda_codec.py and test_cuda_matmul.py look closer.
"""

from __future__ import annotations

import argparse

import torch

import zimage_mxfp8 as zm
from zimage_mxfp8 import _core

TOLERANCE = {"emulated": 1e-6, "decode": 5e-3, "row-scaled": 1e-2, "sm90": 5e-3}
# [M, N, K]; the last has more tiles than there are multiprocessors.
PRODUCTS = ((1, 72, 288), (40, 72, 288), (100, 72, 288), (200, 72, 288), (70, 17024, 64))


def check_codec(rows: int, cols: int, dtype: torch.dtype) -> None:
    matrix = torch.randn(rows, cols).to(dtype)
    encoded, want = zm.quantize(matrix.cuda()), zm.quantize(matrix)
    assert torch.equal(encoded.codes.view(torch.uint8).cpu(), want.codes.view(torch.uint8))
    assert torch.equal(encoded.scales.cpu(), want.scales)
    for target in (torch.bfloat16, torch.float16, torch.float32):
        assert torch.equal(zm.dequantize(encoded, target).cpu(), zm.dequantize(want, target))
    by_rows, rows_want = zm.quantize_rows(matrix.cuda()), zm.quantize_rows(matrix)
    assert torch.equal(by_rows.codes.view(torch.uint8).cpu(), rows_want.codes.view(torch.uint8))


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
        for path in _core.gemm_paths():
            for dtype in ("bfloat16", "float16", "float32"):
                problem = _core.GemmProblem(m, n, k, first, second, dtype, True)
                if path in skipped or _core.gemm_unsupported(path, problem, 0):
                    continue
                result = zm.gemm(left, right, bias.cuda(), dtype=dtype, path=path).cpu().float()
                error = ((result - want).norm() / want.norm()).item()
                assert error < TOLERANCE.get(path, 5e-3) + (0 if dtype == "float32" else 4e-3)


def check_torch(m: int, n: int, k: int) -> None:
    """What our paths over cuBLASLt do, by torch alone: a product, and a kernel that reads it."""
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
    for rows, cols in shapes:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            check_codec(rows, cols, dtype)
    for product in PRODUCTS:
        check_products(*product, arguments.skip)
    quantizer = _core.StagedQuantizer(0)
    matrix = torch.randn(100, 70)
    want = zm.quantize(matrix)
    codes, scales = torch.zeros(128, 96, dtype=torch.uint8), torch.zeros(128, 4, dtype=torch.uint8)
    quantizer.quantize(matrix, "float32", codes, scales)
    assert torch.equal(codes, want.codes.view(torch.uint8))
    print("all kernels ran and agree")


if __name__ == "__main__":
    main()
