"""Runs every CUDA kernel of the package once at small ragged shapes, for compute-sanitizer.

    compute-sanitizer --tool TOOL python tests/python/sanitize.py

where TOOL is memcheck, racecheck, initcheck and synccheck in turn.

The results are compared with the CPU's; test_cuda_codec.py and test_cuda_matmul.py look closer.
"""

from __future__ import annotations

import argparse

import torch

import zimage_mxfp8 as zm
from zimage_mxfp8 import _core

TOLERANCE = {"emulated": 1e-6, "decode": 5e-3, "row-scaled": 1e-2, "sm90": 5e-3}


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


def main() -> None:
    parser = argparse.ArgumentParser(description="run every CUDA kernel at small ragged shapes")
    parser.add_argument("--skip", nargs="*", default=[], metavar="PATH", help="of the products")
    skipped = parser.parse_args().skip
    torch.manual_seed(0)
    shapes = ((1, 1), (5, 40), (33, 131), (130, 300))
    for rows, cols in shapes:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            check_codec(rows, cols, dtype)
    for m in (1, 40, 100, 200, 4100):
        check_products(m, 72, 288, skipped)
    check_products(70, 17024, 64, skipped)  # more tiles than multiprocessors
    quantizer = _core.StagedQuantizer(0)
    matrix = torch.randn(100, 70)
    want = zm.quantize(matrix)
    codes, scales = torch.zeros(128, 96, dtype=torch.uint8), torch.zeros(128, 4, dtype=torch.uint8)
    quantizer.quantize(matrix, "float32", codes, scales)
    assert torch.equal(codes, want.codes.view(torch.uint8))
    print("all kernels ran and agree")


if __name__ == "__main__":
    main()
