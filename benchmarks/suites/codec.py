"""Speed of the codec on a CUDA device, beside device copies and comfy-kitchen, in one run.

    python benchmarks/cuda_codec.py

Bandwidth counts bytes read and written. Each shape is worked on in several copies in turn, so that
they do not fit in the cache, and a CUDA graph holds the calls, so that launching costs nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from timing import copy_bandwidth, microseconds

import zimage_mxfp8 as zm
from zimage_mxfp8 import _core

SHAPES = ((11520, 3840), (10240, 3840), (4224, 10240), (4224, 3840))
ROTATED_BYTES = 1 << 30


def measure(shape: tuple[int, int], dtype: torch.dtype) -> dict[str, tuple[float, float]]:
    """TB/s and microseconds of each operation at a shape."""
    rows, cols = shape
    item = torch.finfo(dtype).bits // 8
    moved = rows * cols * (item + 1) + rows * cols // 32
    copies = max(ROTATED_BYTES // moved, 2)
    name = str(dtype).removeprefix("torch.")
    inputs = [torch.randn(shape, device="cuda").to(dtype) for _ in range(copies)]
    encoded = [zm.quantize(x) for x in inputs]
    codes = [e.codes.view(torch.uint8) for e in encoded]

    def ours_quantize(i: int) -> Callable[[], object]:
        return lambda: _core.quantize(
            inputs[i], name, codes[i], encoded[i].scales, 0, torch.cuda.current_stream().cuda_stream
        )

    def ours_dequantize(i: int) -> Callable[[], object]:
        return lambda: _core.dequantize(
            codes[i], encoded[i].scales, inputs[i], name, 0, torch.cuda.current_stream().cuda_stream
        )

    calls: dict[str, list[Callable[[], object]]] = {
        "quantize": [ours_quantize(i) for i in range(copies)],
        "dequantize": [ours_dequantize(i) for i in range(copies)],
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
            calls["comfy-kitchen quantize"] = [
                lambda i=i: ck.quantize_mxfp8(inputs[i]) for i in few
            ]
            calls["comfy-kitchen dequantize"] = [
                lambda i=i: ck.dequantize_mxfp8(encoded[i].codes, scales[i], dtype) for i in few
            ]
    result = {}
    for what, functions in calls.items():
        us = microseconds(functions)
        result[what] = (moved / us / 1e6, us)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures to a file too")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    arguments = parser.parse_args()
    copy = copy_bandwidth()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, device copy {copy:.2f} TB/s\n"
    )
    print("| operation | dtype | shape | us | TB/s | of copy |")
    print("| --- | --- | --- | ---: | ---: | ---: |")
    rows = []
    for dtype in arguments.dtypes:
        for shape in SHAPES:
            for what, (bandwidth, us) in measure(shape, getattr(torch, dtype)).items():
                share = bandwidth / copy
                rows.append(
                    {"operation": what, "dtype": dtype, "shape": shape, "us": us, "share": share}
                )
                text = f"{shape[0]}x{shape[1]}"
                print(f"| {what} | {dtype} | {text} | {us:.1f} | {bandwidth:.2f} | {share:.0%} |")
    if arguments.json:
        arguments.json.write_text(json.dumps({"copy": copy, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
