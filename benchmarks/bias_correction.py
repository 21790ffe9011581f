"""What each bias correction does to the mean output of the modulation layers.

    python benchmarks/bias_correction.py            # full-width layers; needs torch

Makes a synthetic checkpoint with full-width modulations, converts it with each mode and prints the
mean output error over Turbo's timesteps, relative to the spread of the layers' outputs.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

import zimage_mxfp8 as zm
from zimage_mxfp8.checkpoint.source import SourceTensor, TensorReader, open_checkpoint
from zimage_mxfp8.checkpoint.synthetic import write_synthetic_checkpoint
from zimage_mxfp8.conversion.bias_correction import (
    embedder_outputs,
    to_float64,
)
from zimage_mxfp8.zimage.layers import zimage_shapes
from zimage_mxfp8.zimage.sampling import sampler_timesteps

LAYERS = [f"layers.{i}.adaLN_modulation.0" for i in range(4)]


def matrix(tensor: SourceTensor) -> np.ndarray:
    with TensorReader() as reader:
        return to_float64(tensor, reader.read(tensor)).reshape(tensor.shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=3840, help="width of the model")
    dim = parser.parse_args().dim
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "in.safetensors"
        # Only the modulations need their full width: the other layers of a block stay small.
        shapes = zimage_shapes(128, layers=len(LAYERS), caption_dim=64)
        wide = {n: s for n, s in zimage_shapes(dim, len(LAYERS)).items() if "adaLN" in n}
        embedder = {n: s for n, s in zimage_shapes(dim).items() if n.startswith("t_embedder")}
        write_synthetic_checkpoint(source, shapes | wide | embedder)
        original = open_checkpoint(source).tensors
        inputs = embedder_outputs(open_checkpoint(source), "", sampler_timesteps("turbo"))
        print(f"{len(LAYERS)} layers {4 * dim}x{inputs.shape[1]}, 8 timesteps\n")
        print("| correction | RMS of the mean output error | relative to none | largest |")
        print("| --- | ---: | ---: | ---: |")
        reference = None
        for mode in ("none", "synthetic", "timesteps"):
            output = Path(folder) / f"{mode}.safetensors"
            zm.convert(source, output, bias_correction=mode)
            plain = Path(folder) / f"{mode}-plain.safetensors"
            zm.dequantize_checkpoint(output, plain)
            found = open_checkpoint(plain).tensors
            errors = []
            for layer in LAYERS:
                change = matrix(found[f"{layer}.weight"]) - matrix(original[f"{layer}.weight"])
                bias = matrix(found[f"{layer}.bias"]) - matrix(original[f"{layer}.bias"])
                errors.append(change @ inputs.mean(axis=0) + bias)
            error = np.concatenate(errors)
            rms = float(np.sqrt((error**2).mean()))
            reference = reference or rms
            print(f"| {mode} | {rms:.2e} | {rms / reference:.2f} | {np.abs(error).max():.2e} |")
        biases = np.concatenate([matrix(original[f"{layer}.bias"]) for layer in LAYERS])
        half = np.exp2(np.floor(np.log2(np.abs(biases).max())) - 8)
        print(f"\nrounding a BF16 bias to nearest moves it by up to {half:.2e}")


if __name__ == "__main__":
    main()
