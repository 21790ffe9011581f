"""Forwards that 1, 2, 4, ... CUDA devices share, in one run.

The checkpoint is synthetic, of the full size, and needs 20 GB of disk. Inputs are random latents
and a caption of 128 tokens; a second item has one of 32 tokens, as with guidance.
`speedup` is the median time on one device over that on several. `error` is the relative difference
from one device's output for each item alone: devices that share the items compute that, and a batch
has other roundings. With several devices it ends the program if it is above 1e-3. `peak_gb` is of
torch's memory on the first device.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from zimage_mxfp8.transformer.model import ZImageTransformer
from zimage_mxfp8.zimage.layers import zimage_shapes

from ..report import Report
from .additions import converted
from .transformer import MODES, Inputs, free, milliseconds, modes, random_inputs

COLUMNS = {
    "mode": "",
    "image": "pixels of a side",
    "items": "",
    "devices": "",
    "ms": "ms, median",
    "speedup": "over one device",
    "error": "relative, to items alone",
    "peak_gb": "GB of torch's memory, without peers' memory",
}
_CAPTIONS = (128, 32)
_MAX_ERROR = 1e-3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "zimage-mxfp8")
    parser.add_argument("--sides", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--items", type=int, nargs="+", choices=(1, 2), default=[1, 2])
    parser.add_argument("--devices", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--repeats", type=int, default=10, help="timed forwards")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)


def _inputs(side: int, items: int) -> Inputs:
    parts = [random_inputs(side, 1, tokens, seed) for seed, tokens in enumerate(_CAPTIONS[:items])]
    images, times, captions = zip(*parts, strict=True)
    return [x for (x,) in images], torch.cat(times), [x for (x,) in captions]


def _items(inputs: Inputs) -> list[Inputs]:
    """Return each item of a batch as a batch of its own."""
    images, times, captions = inputs
    return [
        ([image], times[i : i + 1], [caption])
        for i, (image, caption) in enumerate(zip(images, captions, strict=True))
    ]


def _output(model: ZImageTransformer, *batches: Inputs) -> torch.Tensor:
    samples = [sample for inputs in batches for sample in model(*inputs).sample]
    return torch.cat([sample.flatten().float() for sample in samples])


def run(arguments: argparse.Namespace, report: Report) -> None:
    arguments.folder.mkdir(parents=True, exist_ok=True)
    file = converted(arguments.folder, "mxfp8-30", zimage_shapes())
    cases = [(side, items) for side in arguments.sides for items in arguments.items]
    counts = [n for n in arguments.devices if n <= torch.cuda.device_count()]
    for mode in modes(arguments.modes):
        alone: dict[tuple[int, int], tuple[float, torch.Tensor]] = {}
        for count in (1, *counts):
            free()
            devices = [f"cuda:{i}" for i in range(count)]
            model = ZImageTransformer.from_checkpoint(file, compute=mode, devices=devices)
            for case in cases:
                inputs = _inputs(*case)
                torch.cuda.reset_peak_memory_stats()
                ms = milliseconds(lambda i=inputs, m=model: m(*i), arguments.repeats)
                peak = torch.cuda.max_memory_allocated() / 1e9
                if count == 1:
                    alone[case] = ms, _output(model, *_items(inputs))
                one_ms, one = alone[case]
                output = _output(model, inputs)
                error = float((output - one).norm() / one.norm())
                report.add(
                    mode=mode,
                    image=case[0],
                    items=case[1],
                    devices=count,
                    ms=ms,
                    speedup=one_ms / ms,
                    error=error,
                    peak_gb=peak,
                )
                if count > 1 and error > _MAX_ERROR:
                    sys.exit(f"{count} devices differ from one by {error:.1e}")
            model = None
