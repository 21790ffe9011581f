"""Speed of the codec on a CUDA device, next to device copies and comfy-kitchen, in one run.

Bandwidth counts bytes read and written. The calls of each shape rotate through several copies,
more than the cache holds, and a CUDA graph holds them, so that launching costs nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

import zimage_mxfp8 as zm

from ..report import Report
from ..timing import copy_bandwidth, microseconds

SHAPES = ((11520, 3840), (10240, 3840), (4224, 10240), (4224, 3840))
ROTATED_BYTES = 1 << 30
COLUMNS = {
    "operation": "",
    "by": "",
    "dtype": "",
    "shape": "",
    "us": "us",
    "bandwidth": "TB/s",
    "share": "of the best device copy",
}


def measure(
    shape: tuple[int, int], dtype: torch.dtype
) -> dict[tuple[str, str], tuple[float, float]]:
    """Return TB/s and microseconds of each operation at a shape, by (operation, library)."""
    rows, cols = shape
    item = torch.finfo(dtype).bits // 8
    moved = rows * cols * (item + 1) + rows * cols // 32
    copies = max(ROTATED_BYTES // moved, 2)
    inputs = [torch.randn(shape, device="cuda").to(dtype) for _ in range(copies)]
    encoded = [zm.quantize(x) for x in inputs]
    calls: dict[tuple[str, str], list[Callable[[], object]]] = {
        ("quantize", "ours"): [lambda x=x: zm.quantize(x) for x in inputs],
        ("dequantize", "ours"): [lambda e=e: zm.dequantize(e, dtype) for e in encoded],
    }
    try:
        import comfy_kitchen as ck
    except ImportError:
        pass
    else:
        if dtype != torch.float32:
            few = range(min(copies, 4))
            with ck.use_backend("cuda"):
                scales = [ck.quantize_mxfp8(inputs[i])[1] for i in few]
            calls["quantize", "comfy-kitchen"] = [
                lambda i=i: ck.quantize_mxfp8(inputs[i]) for i in few
            ]
            calls["dequantize", "comfy-kitchen"] = [
                lambda i=i: ck.dequantize_mxfp8(encoded[i].codes, scales[i], dtype) for i in few
            ]
    result = {}
    for what, functions in calls.items():
        us = microseconds(functions)
        result[what] = (moved / us / 1e6, us)
    return result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])


def run(arguments: argparse.Namespace, report: Report) -> None:
    copy = copy_bandwidth()
    report.add(operation="device copy", bandwidth=copy)
    for dtype in arguments.dtypes:
        for shape in SHAPES:
            for (operation, by), (bandwidth, us) in measure(shape, getattr(torch, dtype)).items():
                report.add(
                    operation=operation,
                    by=by,
                    dtype=dtype,
                    shape=f"{shape[0]}x{shape[1]}",
                    us=us,
                    bandwidth=bandwidth,
                    share=bandwidth / copy,
                )
