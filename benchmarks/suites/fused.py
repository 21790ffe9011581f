"""Speed of the fused kernels on a CUDA device, in one run.

Next to them: torch eager, torch.compile and device copies. Shapes are Z-Image's. Bandwidth counts
the bytes of activations that any implementation must read and write. Calls rotate through several
copies, more than the cache holds, and a CUDA graph holds them, so that launching costs nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import rms_norm, silu

import zimage_mxfp8 as zm
from zimage_mxfp8.ops import fused

from ..report import Report
from ..timing import copy_bandwidth, microseconds

ROWS, HIDDEN, FEED_FORWARD, HEADS = 4224, 3840, 10240, 30
ROTATED_BYTES = 1 << 30
FORMATS: tuple[fused.ActivationFormat, ...] = ("bfloat16", "row-scaled", "mxfp8", "int8")
COLUMNS = {
    "operation": "",
    "format": "",
    "by": "",
    "rows": "",
    "us": "us",
    "bandwidth": "TB/s",
    "share": "of the best device copy",
}
BITS = {"bfloat16": 16.0, "row-scaled": 8.0, "mxfp8": 8.25, "int8": 8.0}

Tensors = Sequence[torch.Tensor]


def bfloat16(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda").bfloat16()


WEIGHT, SCALE, GATE = bfloat16(HIDDEN), bfloat16(1, HIDDEN), bfloat16(1, HIDDEN)
HEAD = bfloat16(128)
FACTOR = torch.full((1,), 0.5, device="cuda")
EPS = 1e-5


def encode_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    amax = x.abs().amax(-1, keepdim=True).float()
    return (x.float() * (448 / amax)).to(torch.float8_e4m3fn), amax / 448


@dataclass
class Kernel:
    name: str
    make: Callable[[], Tensors]  # operands of one call
    kept: int  # bytes read and written, without a result in one of the formats
    columns: int  # of that result; 0 without one
    ours: Callable[[Tensors, fused.ActivationFormat], object]
    torch: Callable[[Tensors], Any]  # the same, by torch's operations
    formats: Sequence[fused.ActivationFormat] = FORMATS

    def moved(self, output_format: fused.ActivationFormat) -> float:
        return self.kept + ROWS * self.columns * BITS[output_format] / 8


def torch_add_norm(t: Tensors) -> torch.Tensor:
    x, y, *addend = t
    x += torch.tanh(GATE) * rms_norm(y, (HIDDEN,), WEIGHT, EPS)
    for each in addend:
        x += FACTOR * each
    return rms_norm(x, (HIDDEN,), WEIGHT, EPS) * (1 + SCALE)


def torch_rotate(t: Tensors) -> None:
    qkv, rotations = t
    heads = qkv.view(ROWS, 3, HEADS, 64, 2)
    cosine, sine = rotations[:, None, :, 0], rotations[:, None, :, 1]
    for i in range(2):
        normed = rms_norm(heads[:, i].flatten(-2), (128,), HEAD, EPS).float()
        real, imag = normed.unflatten(-1, (64, 2)).unbind(-1)
        heads[:, i, ..., 0] = (real * cosine - imag * sine).bfloat16()
        heads[:, i, ..., 1] = (real * sine + imag * cosine).bfloat16()


def encode(t: Tensors, output_format: fused.ActivationFormat) -> object:
    encoders = {"row-scaled": zm.quantize_rows, "int8": fused.quantize_rotated}
    return encoders.get(output_format, zm.quantize)(t[0])


KERNELS = (
    Kernel(
        "silu_multiply",
        lambda: bfloat16(ROWS, 2 * FEED_FORWARD).chunk(2, dim=1),
        ROWS * FEED_FORWARD * 4,
        FEED_FORWARD,
        lambda t, output_format: fused.silu_multiply(*t, output_format),
        lambda t: silu(t[0]) * t[1],
    ),
    Kernel(
        "norm_modulate",
        lambda: [bfloat16(ROWS, HIDDEN)],
        ROWS * HIDDEN * 2,
        HIDDEN,
        lambda t, output_format: fused.norm_modulate(*t, WEIGHT, SCALE, None, output_format, EPS),
        lambda t: rms_norm(t[0], (HIDDEN,), WEIGHT, EPS) * (1 + SCALE),
    ),
    Kernel(
        "add_norm_modulate",
        lambda: [bfloat16(ROWS, HIDDEN), bfloat16(ROWS, HIDDEN)],
        ROWS * HIDDEN * 6,
        HIDDEN,
        lambda t, output_format: fused.add_norm_modulate(
            *t, WEIGHT, GATE, WEIGHT, SCALE, None, output_format, EPS
        ),
        torch_add_norm,
    ),
    Kernel(
        "add_norm_modulate with an addend",
        lambda: [bfloat16(ROWS, HIDDEN), bfloat16(ROWS, HIDDEN), bfloat16(ROWS, HIDDEN)],
        ROWS * HIDDEN * 8,
        HIDDEN,
        lambda t, output_format: fused.add_norm_modulate(
            *t[:2], WEIGHT, GATE, WEIGHT, SCALE, None, output_format, EPS, t[2], FACTOR
        ),
        torch_add_norm,
    ),
    Kernel(
        "rotate_heads",
        lambda: [
            bfloat16(ROWS, 3 * HIDDEN),
            torch.nn.functional.normalize(torch.randn(ROWS, 64, 2, device="cuda"), dim=-1),
        ],
        ROWS * (HIDDEN * 8 + 512),
        0,
        lambda t, _: fused.rotate_heads(t[0], HEAD, HEAD, t[1], HEADS, HEADS, EPS),
        torch_rotate,
        FORMATS[:1],
    ),
    Kernel(
        "encode the result of attention",
        lambda: [bfloat16(ROWS, HIDDEN)],
        ROWS * HIDDEN * 2,
        HIDDEN,
        encode,
        lambda t: t[0],
        FORMATS[1:],
    ),
)


def measure(
    kernel: Kernel, output_format: fused.ActivationFormat, peers: Sequence[str]
) -> dict[str, float]:
    """Return microseconds of ours and of the peers."""
    copies = max(int(ROTATED_BYTES // kernel.moved(output_format)), 2)
    inputs = [kernel.make() for _ in range(copies)]
    result = {"ours": microseconds([lambda x=x: kernel.ours(x, output_format) for x in inputs])}

    def composition(tensors: Tensors) -> Any:
        plain = kernel.torch(tensors)
        return encode_rows(plain) if output_format == "row-scaled" else plain

    # The blocked scales of MXFP8 and the rotation of INT8 have no short composition in torch.
    for peer in peers if output_format not in ("mxfp8", "int8") else ():
        function = torch.compile(composition, dynamic=False) if peer == "compile" else composition
        result[f"torch {peer}"] = microseconds([lambda x=x, f=function: f(x) for x in inputs])
    return result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--peers", nargs="*", default=["eager", "compile"], metavar="PEER")


def run(arguments: argparse.Namespace, report: Report) -> None:
    copy = copy_bandwidth()
    report.add(operation="device copy", bandwidth=copy)
    for kernel in KERNELS:
        for output_format in kernel.formats:
            for by, us in measure(kernel, output_format, arguments.peers).items():
                bandwidth = kernel.moved(output_format) / us / 1e6
                report.add(
                    operation=kernel.name,
                    format=output_format,
                    by=by,
                    rows=ROWS,
                    us=us,
                    bandwidth=bandwidth,
                    share=bandwidth / copy,
                )
