"""Time of a call of the transformer's arithmetic in eager code, on the CPU or a CUDA device.

Three ways to encode and to multiply a small matrix, which take turns: the choice by device alone,
`arithmetic.on`, which also asks whether torch traces and is what layers call, and the registered
operation. The work is small, so that the time of the calls dominates. The figures are the least of
many repeats; ratios are to the choice by device alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from zimage_mxfp8.system import devices
from zimage_mxfp8.transformer import arithmetic
from zimage_mxfp8.transformer.arithmetic import Arithmetic, by_core, by_torch, torch_library

from ..report import Report

CALLS, REPEATS = 200, 41
COLUMNS = {"operation": "", "way": "", "us": "us", "ratio": "to the choice by device"}


def microseconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - begin) / CALLS * 1e6


def by_device(device: torch.device) -> Arithmetic:
    """Choose like `arithmetic.on` without registered operations."""
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu")


def run(arguments: argparse.Namespace, report: Report) -> None:
    device = torch.device(arguments.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    for operation, calls in ways(device).items():
        times: dict[str, list[float]] = {way: [] for way in calls}
        for _ in range(REPEATS):
            for way, call in calls.items():
                times[way].append(microseconds(call))
        least = {way: min(of_way) for way, of_way in times.items()}
        for way, us in least.items():
            report.add(operation=operation, way=way, us=us, ratio=us / least["by device"])
