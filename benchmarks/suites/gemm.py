"""Speed of GEMMs on a CUDA device, next to cuBLAS and torch's 8-bit GEMMs, in one run.

Shapes are Z-Image's linears; M is the number of tokens. A CUDA graph holds the calls of each way to
multiply, and the ways take turns; with few tokens calls rotate through several weights, more than
the cache holds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

import zimage_mxfp8 as zm
from zimage_mxfp8 import _core
from zimage_mxfp8.ops import fused

from ..report import Report
from ..timing import microseconds_in_turn

LINEARS = {
    "qkv": (11520, 3840),
    "out": (3840, 3840),
    "w1": (10240, 3840),
    "w2": (3840, 10240),
}
CACHE_BYTES = 300 << 20
Call = Callable[[], object]


COLUMNS = {"m": "tokens", "linear": "", "way": "", "us": "us", "ratio": "times cuBLAS's speed"}
KERNELS = [
    kernel.name
    for kernel in _core.gemm_kernels()
    if kernel.name != "reference" and "none" in kernel.epilogues
]


def supported(kernel: str, a: object, b: object) -> bool:
    try:
        zm.gemm(a, b, kernel=kernel)
    except zm.UnsupportedError:
        return False
    return True


def measure(m: int, n: int, k: int, only: str) -> dict[str, float]:
    """Return microseconds of each way to multiply."""
    copies = 1 if m > 1024 else max(CACHE_BYTES // (n * k), 1)
    x = torch.randn(m, k, device="cuda").bfloat16()
    weights = [torch.randn(n, k, device="cuda").bfloat16() * 0.02 for _ in range(copies)]
    encoded = [zm.quantize(w) for w in weights]
    x_mx, x_rows = zm.quantize(x), zm.quantize_rows(x)
    row_scaled = [zm.quantize_rows(w) for w in weights]
    x_int8, in_int8 = fused.quantize_rotated(x), [fused.quantize_rotated(w) for w in weights]

    def scaled_mm(b: zm.RowScaledArray) -> Call:
        return lambda: torch._scaled_mm(
            x_rows.codes,
            b.codes.t(),
            scale_a=x_rows.scales[:, None],
            scale_b=b.scales[None, :],
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )

    calls: dict[str, list[Call]] = {
        "cuBLAS BF16": [lambda w=w: torch.nn.functional.linear(x, w) for w in weights],
    }
    if torch.cuda.get_device_capability() >= (8, 9):
        calls["torch._scaled_mm"] = [scaled_mm(b) for b in row_scaled]
    if m >= 32:  # with fewer rows torch refuses
        # Sums alone, without scales and in int32.
        calls["torch._int_mm"] = [
            lambda b=b: torch._int_mm(x_int8.codes, b.codes.t()) for b in in_int8
        ]
    for kernel in KERNELS:
        if supported(kernel, x_int8, in_int8[0]):
            calls[kernel] = [
                lambda b=b, kernel=kernel: zm.gemm(x_int8, b, kernel=kernel) for b in in_int8
            ]
        if supported(kernel, x_rows, row_scaled[0]):
            calls[kernel] = [
                lambda b=b, kernel=kernel: zm.gemm(x_rows, b, kernel=kernel) for b in row_scaled
            ]
            calls[f"{kernel} + quantize_rows"] = [
                lambda b=b, kernel=kernel: zm.gemm(zm.quantize_rows(x), b, kernel=kernel)
                for b in row_scaled
            ]
        for name, a in (("BF16", x), ("MXFP8", x_mx)):
            if supported(kernel, a, encoded[0]):
                calls[f"{kernel}, {name} x MXFP8"] = [
                    lambda a=a, b=b, kernel=kernel: zm.gemm(a, b, kernel=kernel) for b in encoded
                ]
    peers = ("cuBLAS BF16", "torch._scaled_mm", "torch._int_mm")
    return microseconds_in_turn({w: c for w, c in calls.items() if w in peers or only in w}, 40)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, nargs="+", default=[4224, 128, 32])
    parser.add_argument("--only", default="", help="of our kernels, those with this in the name")


def run(arguments: argparse.Namespace, report: Report) -> None:
    for m in arguments.tokens:
        for linear, (n, k) in LINEARS.items():
            times = measure(m, n, k, arguments.only)
            for way, us in times.items():
                ratio = times["cuBLAS BF16"] / us
                report.add(m=m, linear=linear, way=way, us=us, ratio=ratio)
