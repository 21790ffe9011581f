"""Error of an adapter on MXFP8 weights: live, merged before conversion, and added to the file.

The model is synthetic. Adapters of rank 16 are on every linear of its blocks, at three sizes
relative to the weights. `weights` is the error of the change of the weights over the change itself:
(W' - W'0) - dW, where W'0 is the decoded weight without the adapter. `change` is the same figure
for the model's output: how far the change that the adapter makes to the file's output is from the
one that it makes to the original's, over the latter. `output` is how far the output is from that
of the original weights with the adapter, over the same; it includes the format's own error.

- live: this package's branch beside the MXFP8 GEMM, in BF16 and in float32.
- merged: `convert` of the original weights with the adapter added.
- added: what ComfyUI does with a quantised layer: decode, add, quantise again with new scales,
  rounding stochastically (its default) or to nearest. Simulated here; a test compares the
  rounding with ComfyUI's.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import zimage_mxfp8 as zm
from zimage_mxfp8.checkpoint.synthetic import write_synthetic_checkpoint
from zimage_mxfp8.transformer.model import ZImageTransformer
from zimage_mxfp8.zimage.layers import zimage_shapes

from ..layers import LINEARS
from ..report import Report

COLUMNS = {
    "size": "of the adapter",
    "way": "",
    "weights": "of its change",
    "change": "of its effect",
    "output": "of its effect",
}
SIZES = (0.005, 0.02, 0.1)
RANK = 16
Tensors = dict[str, torch.Tensor]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dim", type=int, default=512, help="width of the model")
    parser.add_argument("--layers", type=int, default=6)


def random_adapter(weights: Tensors, size: float) -> Tensors:
    """An adapter of that norm relative to each weight."""
    random = torch.Generator().manual_seed(1)
    adapter = {}
    for name, weight in weights.items():
        layer = name.removesuffix(".weight")
        if not layer.endswith(LINEARS):
            continue
        down = torch.randn(RANK, weight.shape[1], generator=random)
        up = torch.randn(weight.shape[0], RANK, generator=random)
        up *= size * weight.float().norm() / (up @ down).norm()
        adapter |= {f"diffusion_model.{layer}.lora_A.weight": down}
        adapter |= {f"diffusion_model.{layer}.lora_B.weight": up}
    return adapter


def changes_of(adapter: Tensors) -> Tensors:
    """Dense changes by the weight's name."""
    downs = [name for name in adapter if ".lora_A." in name]
    return {
        name.removeprefix("diffusion_model.").replace(".lora_A", ""): (
            adapter[name.replace("lora_A", "lora_B")] @ adapter[name]
        )
        for name in downs
    }


def plus(weights: Tensors, changes: Tensors) -> Tensors:
    return {
        name: weight.float() + changes[name] if name in changes else weight
        for name, weight in weights.items()
    }


def encode_stochastically(matrix: torch.Tensor) -> torch.Tensor:
    """MXFP8 with round-up scales, each element rounded up or down by chance; decoded."""
    random = np.random.default_rng(2)
    blocks = matrix.numpy().reshape(-1, 32)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    scales = np.exp2(np.ceil(np.log2(np.maximum(largest, 1e-30) / 448)))
    scaled = blocks / scales
    exponents = np.maximum(np.floor(np.log2(np.maximum(np.abs(scaled), 1e-30))), -6)
    steps = np.exp2(exponents - 3)
    rounded = np.floor(scaled / steps + random.random(scaled.shape)) * steps
    decoded = np.clip(rounded, -448, 448) * scales
    return torch.from_numpy(decoded.reshape(matrix.shape).astype(np.float32))


def run(arguments: argparse.Namespace, report: Report) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        bench = _Bench(Path(scratch), arguments.dim, arguments.layers)
        for size in SIZES:
            for row in bench.measure(size):
                report.add(size=size, **row)


class _Bench:
    def __init__(self, folder: Path, dim: int, layers: int) -> None:
        self._folder = folder
        self._source = folder / "source.safetensors"
        shapes = zimage_shapes(dim, layers, refiner_layers=1, caption_dim=128)
        write_synthetic_checkpoint(self._source, shapes)
        self._original = load_file(self._source)
        self._file = folder / "mxfp8.safetensors"
        zm.convert(self._source, self._file, bias_correction="none")
        self._decoded = self._decode(self._file)
        random = torch.Generator().manual_seed(0)
        self._inputs = (
            [torch.randn(16, 1, 32, 32, generator=random)],
            torch.tensor([0.4]),
            [torch.randn(20, 128, generator=random)],
        )

    def measure(self, size: float):
        adapter = random_adapter(self._original, size)
        changes = changes_of(adapter)
        without = self._run(self._plain(self._original))
        base = self._run(self._file)
        wanted = self._run(self._plain(plus(self._original, changes)))
        effect = (wanted - without).norm()

        def row(way: str, decoded: Tensors | None, output: torch.Tensor):
            error = energy = 0.0
            for name, change in changes.items() if decoded else ():
                made = decoded[name].float() - self._decoded[name].float()
                error += float((made - change).square().sum())
                energy += float(change.square().sum())
            return {
                "way": way,
                "weights": (error / energy) ** 0.5 if decoded else 0.0,
                "change": float((output - base - (wanted - without)).norm() / effect),
                "output": float((output - wanted).norm() / effect),
            }

        def live(model: ZImageTransformer) -> torch.Tensor:
            model.load_lora(adapter)
            return self._output(model)

        yield row("live, float32", None, live(self._load(self._file)))
        yield row("live, BF16", None, live(self._load(self._file, torch.bfloat16)))
        merged = self._folder / "merged.safetensors"
        source = self._write("with.safetensors", plus(self._original, changes))
        zm.convert(source, merged, bias_correction="none", overwrite=True)
        yield row("merged", self._decode(merged), self._run(merged))
        quantised = {
            name
            for name, weight in self._decoded.items()
            if name in changes and not torch.equal(weight.float(), self._original[name].float())
        }
        ways: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
            "added, stochastic": encode_stochastically,
            "added, nearest": _nearest,
        }
        for way, encode in ways.items():
            added = plus(self._decoded, changes)
            added |= {name: encode(added[name]) for name in quantised}
            yield row(way, added, self._run(self._plain(added)))

    def _write(self, name: str, tensors: Tensors) -> Path:
        path = self._folder / name
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        return path

    def _plain(self, tensors: Tensors) -> Path:
        return self._write("plain.safetensors", {k: v.float() for k, v in tensors.items()})

    def _decode(self, file: Path) -> Tensors:
        zm.dequantize_checkpoint(file, self._folder / "decoded.safetensors", overwrite=True)
        return load_file(self._folder / "decoded.safetensors")

    def _load(self, file: Path, dtype: torch.dtype = torch.float32) -> ZImageTransformer:
        return ZImageTransformer.from_checkpoint(file, "cpu", "weight-only", dtype)

    def _run(self, file: Path) -> torch.Tensor:
        return self._output(self._load(file))

    def _output(self, model: ZImageTransformer) -> torch.Tensor:
        return model(*self._inputs).sample[0].float()


def _nearest(matrix: torch.Tensor) -> torch.Tensor:
    decoded: torch.Tensor = zm.dequantize(zm.quantize(matrix))
    return decoded
