"""Speed of the matrix products on a CUDA device, beside cuBLAS and `torch._scaled_mm`, in one run.

    python benchmarks/cuda_gemm.py

Shapes are Z-Image's linears; M is the number of tokens. A CUDA graph holds the calls of each way to
multiply, and the ways take turns; with few tokens calls rotate through several weights, more than
the cache holds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from timing import microseconds_in_turn

import zimage_mxfp8 as zm
from zimage_mxfp8 import _core
from zimage_mxfp8.ops import gemm as matmul

LINEARS = {
    "qkv": (11520, 3840),
    "out": (3840, 3840),
    "w1": (10240, 3840),
    "w2": (3840, 10240),
}
CACHE_BYTES = 300 << 20
Call = Callable[[], object]


def paths() -> list[str]:
    return [p for p in _core.gemm_paths() if p != "emulated"]


class Ours:
    """Calls of one path, with preallocated memory."""

    def __init__(self, path: str, a: object, b: object, m: int, n: int) -> None:
        self.path = path
        self.parts = [matmul._operand(x, "x") for x in (a, b)]
        problem = _core.GemmProblem(
            m, n, self.parts[0][4], self.parts[0][0], self.parts[1][0], "bfloat16", False
        )
        nbytes = _core.gemm_workspace_size(path, problem, torch.cuda.current_device())
        self.workspace = torch.empty(max(nbytes, 1), dtype=torch.uint8, device="cuda")
        self.out = torch.empty(m, n, dtype=torch.bfloat16, device="cuda")

    def __call__(self) -> None:
        stream = torch.cuda.current_stream().cuda_stream
        _core.gemm(self.path, *self.parts, None, self.out, "bfloat16", self.workspace, 0, stream)


def supported(path: str, a: str, b: str) -> bool:
    problem = _core.GemmProblem(128, 128, 128, a, b, "bfloat16", False)
    return not _core.gemm_unsupported(path, problem, torch.cuda.current_device())


def measure(m: int, n: int, k: int, only: str) -> dict[str, float]:
    """Microseconds of each way to multiply."""
    copies = 1 if m > 1024 else max(CACHE_BYTES // (n * k), 1)
    x = torch.randn(m, k, device="cuda").bfloat16()
    weights = [torch.randn(n, k, device="cuda").bfloat16() * 0.02 for _ in range(copies)]
    encoded = [zm.quantize(w) for w in weights]
    x_mx, x_rows = zm.quantize(x), zm.quantize_rows(x)
    row_scaled = [zm.quantize_rows(w) for w in weights]

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
    for path in paths():
        if supported(path, "row-scaled", "row-scaled"):
            products = [Ours(path, x_rows, b, m, n) for b in row_scaled]
            calls[f"{path}"] = list(products)
            codes, scales = x_rows.codes.view(torch.uint8), x_rows.scales

            def with_quantize(
                product: Ours, codes: torch.Tensor = codes, scales: torch.Tensor = scales
            ) -> None:
                stream = torch.cuda.current_stream().cuda_stream
                _core.quantize_rows(x, "bfloat16", codes, scales, 0, stream)
                product()

            calls[f"{path} + quantize_rows"] = [lambda p=p: with_quantize(p) for p in products]
        if supported(path, "bfloat16", "mxfp8"):
            calls[f"{path}, BF16 x MXFP8"] = [Ours(path, x, b, m, n) for b in encoded]
        if supported(path, "mxfp8", "mxfp8"):
            calls[f"{path}, MXFP8 x MXFP8"] = [Ours(path, x_mx, b, m, n) for b in encoded]
    peers = ("cuBLAS BF16", "torch._scaled_mm")
    return microseconds_in_turn({w: c for w, c in calls.items() if w in peers or only in w}, 40)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures to a file too")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4224, 128, 32])
    parser.add_argument("--only", default="", help="of our products, those with this in the name")
    arguments = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    print("| M | linear | product | us | TFLOP/s | of cuBLAS BF16 | of _scaled_mm |")
    print("| ---: | --- | --- | ---: | ---: | ---: | ---: |")
    rows = []
    for m in arguments.tokens:
        for linear, (n, k) in LINEARS.items():
            times = measure(m, n, k, arguments.only)
            bf16, fp8 = times["cuBLAS BF16"], times.get("torch._scaled_mm", float("nan"))
            for what, us in times.items():
                rows.append({"m": m, "linear": linear, "product": what, "us": us})
                print(
                    f"| {m} | {linear} | {what} | {us:.1f} | {2 * m * n * k / us / 1e6:.0f} "
                    f"| {bf16 / us:.2f} | {fp8 / us:.2f} |"
                )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
