"""What a call of the transformer's arithmetic costs in eager code, on the CPU or a CUDA device.

    python benchmarks/eager_dispatch.py [--device cuda] [--json FILE]

Three ways to encode and to multiply a small matrix, which take turns: the choice by device alone,
`arithmetic.on`, which also asks whether torch traces and is what layers call, and the registered
operation. The work is small, so that the calls are what is measured. The figures are the least of
many repeats; ratios are to the choice by device alone.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

import zimage_mxfp8 as zm
from zimage_mxfp8.system import devices
from zimage_mxfp8.transformer import arithmetic
from zimage_mxfp8.transformer.arithmetic import Arithmetic, by_core, by_torch, torch_library

CALLS, REPEATS = 200, 41


def microseconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - begin) / CALLS * 1e6


def by_device(device: torch.device) -> Arithmetic:
    """What `arithmetic.on` is without registered operations."""
    return by_core if devices.has_kernels(devices.core_index(device)) else by_torch


def ways(device: torch.device) -> dict[str, dict[str, Callable[[], object]]]:
    x = torch.randn(1, 32, device=device).bfloat16()
    rows = by_core.quantize_rows(x)
    weights = by_core.quantize_rows(torch.randn(8, 32, device=device).bfloat16())
    fp8 = (rows.codes, rows.scales, weights.codes, weights.scales, torch.bfloat16)
    return {
        "quantize_rows": {
            "by device": lambda: by_device(device).quantize_rows(x),
            "arithmetic.on": lambda: arithmetic.on(device).quantize_rows(x),
            "registered": lambda: torch_library.quantize_rows(x),
        },
        "gemm_row_scaled": {
            "by device": lambda: by_device(device).multiply_row_scaled(
                rows, weights, torch.bfloat16
            ),
            "arithmetic.on": lambda: arithmetic.on(device).multiply_row_scaled(
                rows, weights, torch.bfloat16
            ),
            "registered": lambda: torch_library.gemm_row_scaled(*fp8),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write the figures to a file too")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    print(f"zimage-mxfp8 {zm.__version__}, torch {torch.__version__}, {device}\n")
    print("| operation | way | us | ratio |")
    print("| --- | --- | ---: | ---: |")
    rows = []
    for operation, calls in ways(device).items():
        times: dict[str, list[float]] = {way: [] for way in calls}
        for _ in range(REPEATS):
            for way, call in calls.items():
                times[way].append(microseconds(call))
        least = {way: min(of_way) for way, of_way in times.items()}
        for way, us in least.items():
            ratio = us / least["by device"]
            rows.append({"operation": operation, "way": way, "us": us, "ratio": ratio})
            print(f"| {operation} | {way} | {us:.1f} | {ratio:.2f} |")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
