"""Mean output error of the modulation layers under each bias correction.

Makes a synthetic checkpoint with a few blocks of full width, converts it with each mode (one
of them needs torch) and measures the mean output error over Turbo's timesteps.
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

from ..report import Report

COLUMNS = {
    "correction": "",
    "rms": "of the mean output error",
    "relative": "to none",
    "largest": "",
}
LAYERS = [f"layers.{i}.adaLN_modulation.0" for i in range(4)]


def matrix(tensor: SourceTensor) -> np.ndarray:
    with TensorReader() as reader:
        return to_float64(tensor, reader.read(tensor)).reshape(tensor.shape)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dim", type=int, default=3840, help="width of the model")


def run(arguments: argparse.Namespace, report: Report) -> None:
    dim = arguments.dim
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "in.safetensors"
        # The modulations need their full width; everything else is small.
        shapes = zimage_shapes(dim, len(LAYERS), refiner_layers=1, caption_dim=64, hidden=64)
        write_synthetic_checkpoint(source, shapes)
        original = open_checkpoint(source).tensors
        inputs = embedder_outputs(open_checkpoint(source), "", sampler_timesteps("turbo"))
        print(f"{len(LAYERS)} layers {4 * dim}x{inputs.shape[1]}, 8 timesteps")
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
            largest = float(np.abs(error).max())
            report.add(correction=mode, rms=rms, relative=rms / reference, largest=largest)
        biases = np.concatenate([matrix(original[f"{layer}.bias"]) for layer in LAYERS])
        half = np.exp2(np.floor(np.log2(np.abs(biases).max())) - 8)
        print(f"\nrounding a BF16 bias to nearest moves it by up to {half:.2e}")
