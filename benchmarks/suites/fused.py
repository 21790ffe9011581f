"""Speed of the fused kernels on a CUDA device, beside torch eager, torch.compile and device copies.

    python benchmarks/cuda_fused.py

Shapes are Z-Image's. Bandwidth counts the bytes that must be read and written, of the activations
alone, whoever computes. Each call works on the next of several copies, so that they do not fit in
the cache, and a CUDA graph holds the calls, so that launching costs nothing. torch allocates the
results of its own calls, and may so write to memory that the cache still holds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timing import copy_bandwidth, microseconds
from torch.nn.functional import rms_norm, silu

from zimage_mxfp8 import _core
from zimage_mxfp8.ops import fused

ROWS, HIDDEN, FEED_FORWARD, HEADS = 4224, 3840, 10240, 30
ROTATED_BYTES = 1 << 30
FORMS: tuple[fused.Form, ...] = ("bfloat16", "row-scaled", "mxfp8")
BITS = {"bfloat16": 16.0, "row-scaled": 8.0, "mxfp8": 8.25}

Tensors = Sequence[torch.Tensor]


def bfloat16(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda").bfloat16()


WEIGHT, SCALE, GATE = bfloat16(HIDDEN), bfloat16(1, HIDDEN), bfloat16(1, HIDDEN)
HEAD = bfloat16(128)
EPS = 1e-5


def stream() -> int:
    return torch.cuda.current_stream().cuda_stream


def encode_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    amax = x.abs().amax(-1, keepdim=True).float()
    return (x.float() * (448 / amax)).to(torch.float8_e4m3fn), amax / 448


@dataclass
class Kernel:
    name: str
    make: Callable[[], Tensors]  # what one call works on
    kept: int  # bytes read and written, without a result in one of the forms
    columns: int  # of that result; 0 if there is none
    ours: Callable[[Tensors, Any], object]
    torch: Callable[[Tensors], Any]  # the same, by torch's operations
    forms: Sequence[fused.Form] = FORMS

    def moved(self, form: fused.Form) -> float:
        return self.kept + ROWS * self.columns * BITS[form] / 8


def torch_add_norm(t: Tensors) -> torch.Tensor:
    x, y = t
    x += torch.tanh(GATE) * rms_norm(y, (HIDDEN,), WEIGHT, EPS)
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


def encode(t: Tensors, target: Any) -> None:
    form, codes, scales, *_ = target
    kernel = _core.quantize_rows if form == "row-scaled" else _core.quantize
    kernel(t[0], "bfloat16", codes, scales, 0, stream())


KERNELS = (
    Kernel(
        "silu_multiply",
        lambda: bfloat16(ROWS, 2 * FEED_FORWARD).chunk(2, dim=1),
        ROWS * FEED_FORWARD * 4,
        FEED_FORWARD,
        lambda t, target: _core.silu_multiply(*t, target, stream()),
        lambda t: silu(t[0]) * t[1],
    ),
    Kernel(
        "norm_modulate",
        lambda: [bfloat16(ROWS, HIDDEN)],
        ROWS * HIDDEN * 2,
        HIDDEN,
        lambda t, target: _core.norm_modulate(*t, WEIGHT, SCALE, None, EPS, target, stream()),
        lambda t: rms_norm(t[0], (HIDDEN,), WEIGHT, EPS) * (1 + SCALE),
    ),
    Kernel(
        "add_norm_modulate",
        lambda: [bfloat16(ROWS, HIDDEN), bfloat16(ROWS, HIDDEN)],
        ROWS * HIDDEN * 6,
        HIDDEN,
        lambda t, target: _core.add_norm_modulate(
            *t, WEIGHT, GATE, WEIGHT, SCALE, None, EPS, target, stream()
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
        lambda t, _: _core.rotate_heads(
            t[0], HEAD, HEAD, t[1].view(ROWS, 128), HEADS, EPS, stream()
        ),
        torch_rotate,
        FORMS[:1],
    ),
    Kernel(
        "encode what attention gives",
        lambda: [bfloat16(ROWS, HIDDEN)],
        ROWS * HIDDEN * 2,
        HIDDEN,
        encode,
        lambda t: t[0],
        FORMS[1:],
    ),
)


def measure(kernel: Kernel, form: fused.Form, peers: Sequence[str]) -> dict[str, float]:
    """Microseconds of ours and of the peers."""
    copies = max(int(ROTATED_BYTES // kernel.moved(form)), 2)
    inputs = [kernel.make() for _ in range(copies)]
    targets: list[Any] = [None] * copies
    if kernel.columns:
        like = torch.empty(ROWS, kernel.columns, dtype=torch.bfloat16, device="cuda")
        targets = [fused._Activation(form, like).parts for _ in range(copies)]
    result = {
        "ours": microseconds(
            [lambda i=i: kernel.ours(inputs[i], targets[i]) for i in range(copies)]
        )
    }

    def composition(tensors: Tensors) -> Any:
        plain = kernel.torch(tensors)
        return encode_rows(plain) if form == "row-scaled" else plain

    # The blocked scales of MXFP8 have no short composition in torch.
    for peer in peers if form != "mxfp8" else ():
        function = torch.compile(composition, dynamic=False) if peer == "compile" else composition
        result[f"torch {peer}"] = microseconds(
            [lambda i=i, f=function: f(inputs[i]) for i in range(copies)]
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures to a file too")
    parser.add_argument("--peers", nargs="*", default=["eager", "compile"], metavar="PEER")
    arguments = parser.parse_args()
    copy = copy_bandwidth()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, device copy {copy:.2f} TB/s, "
        f"{ROWS} rows\n"
    )
    print("| operation | form | who | us | TB/s | of copy |")
    print("| --- | --- | --- | ---: | ---: | ---: |")
    rows = []
    for kernel in KERNELS:
        for form in kernel.forms:
            for who, us in measure(kernel, form, arguments.peers).items():
                bandwidth = kernel.moved(form) / us / 1e6
                share = bandwidth / copy
                rows.append(
                    {"operation": kernel.name, "form": form, "who": who, "us": us, "share": share}
                )
                print(
                    f"| {kernel.name} | {form} | {who} | {us:.1f} | {bandwidth:.2f} | {share:.0%} |"
                )
    if arguments.json:
        arguments.json.write_text(json.dumps({"copy": copy, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
