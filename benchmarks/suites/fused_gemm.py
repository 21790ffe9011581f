"""Speed of FP8 GEMMs with fused epilogues on Hopper, next to cuBLASLt's and our kernels.

All ways begin with activations in row-scaled FP8 and end with the transformer's next input: q, k
and v with heads normed and rotated, or the input of w2 in row-scaled FP8. All ways take turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

import zimage_mxfp8 as zm
from zimage_mxfp8.ops import fused, gemm_epilogues

from ..report import Report
from ..timing import microseconds_in_turn

HIDDEN, FEED_FORWARD, HEADS = 3840, 10240, 30

COLUMNS = {"tokens": "", "rows": "of the weights", "way": "", "us": "us", "rate": "TFLOP/s"}

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
            fused.rotate_heads(result, norm, norm, rotations, HEADS, HEADS),
        ),
        "gemm_rotate_heads": lambda: gemm_epilogues.gemm_rotate_heads(
            x, weights, norm, norm, rotations, HEADS, HEADS, kernel="fp8_sm90"
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
        "gemm_silu_multiply alone": lambda: gemm_epilogues.gemm_silu_multiply(
            x, weights, kernel="fp8_sm90"
        ),
        "gemm_silu_multiply, quantize_rows": lambda: zm.quantize_rows(
            gemm_epilogues.gemm_silu_multiply(x, weights, kernel="fp8_sm90")
        ),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, nargs="+", default=[1152, 2112, 4224, 16512])


def run(arguments: argparse.Namespace, report: Report) -> None:
    for tokens in arguments.tokens:
        for ways, rows in ((qkv_ways, 3 * HIDDEN), (feed_forward_ways, 2 * FEED_FORWARD)):
            calls = {way: [call] * 4 for way, call in ways(tokens).items()}
            for way, us in microseconds_in_turn(calls).items():
                rate = 2 * tokens * rows * HIDDEN / us / 1e6
                report.add(tokens=tokens, rows=rows, way=way, us=us, rate=rate)
