"""Speed of FP8 products with fused epilogues on Hopper, beside cuBLASLt's product and our kernels.

    python benchmarks/cuda_fused_gemm.py

Both ways begin with activations in row-scaled FP8 and end with what the transformer needs next: q,
k and v with heads normed and rotated, or the input of w2 in row-scaled FP8. All ways take turns.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from timing import microseconds_in_turn

import zimage_mxfp8 as zm
from zimage_mxfp8.ops import fused, fused_gemm

HIDDEN, FEED_FORWARD, HEADS = 3840, 10240, 30

Ways = dict[str, Callable[[], object]]


def operand(rows: int) -> zm.RowScaledArray:
    encoded: zm.RowScaledArray = zm.quantize_rows(torch.randn(rows, HIDDEN, device="cuda") * 0.02)
    return encoded


def qkv_ways(tokens: int) -> Ways:
    x, weights = operand(tokens), operand(3 * HIDDEN)
    norm = torch.ones(128, dtype=torch.bfloat16, device="cuda")
    rotations = torch.nn.functional.normalize(torch.randn(tokens, 64, 2, device="cuda"), dim=-1)
    result = zm.gemm(x, weights)
    return {
        "cuBLASLt alone": lambda: zm.gemm(x, weights),
        "cuBLASLt, rotate_heads": lambda: (
            zm.gemm(x, weights),
            fused.rotate_heads(result, norm, norm, rotations, HEADS),
        ),
        "gemm_rotate_heads": lambda: fused_gemm.gemm_rotate_heads(
            x, weights, norm, norm, rotations, HEADS
        ),
    }


def feed_forward_ways(tokens: int) -> Ways:
    x, weights = operand(tokens), operand(2 * FEED_FORWARD)

    def apart() -> object:
        gate, up = zm.gemm(x, weights).chunk(2, dim=1)
        return fused.silu_multiply(gate, up, "row-scaled")

    return {
        "cuBLASLt alone": lambda: zm.gemm(x, weights),
        "cuBLASLt, silu_multiply": apart,
        "gemm_silu_multiply alone": lambda: fused_gemm.gemm_silu_multiply(x, weights),
        "gemm_silu_multiply, quantize_rows": lambda: zm.quantize_rows(
            fused_gemm.gemm_silu_multiply(x, weights)
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[1152, 4224, 16512])
    parser.add_argument("--json", type=Path, help="write the figures to a file too")
    arguments = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    print("| tokens | way | us | TFLOP/s of the product |")
    print("| ---: | --- | ---: | ---: |")
    figures = []
    for tokens in arguments.tokens:
        for ways, rows in ((qkv_ways, 3 * HIDDEN), (feed_forward_ways, 2 * FEED_FORWARD)):
            calls = {way: [call] * 4 for way, call in ways(tokens).items()}
            for way, us in microseconds_in_turn(calls).items():
                rate = 2 * tokens * rows * HIDDEN / us / 1e6
                figures.append({"tokens": tokens, "rows": rows, "way": way, "us": us})
                print(f"| {tokens} | {way} | {us:.1f} | {rate:.0f} |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
