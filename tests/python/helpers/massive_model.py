"""A small model whose activations leave the range of float16."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import ZImageTransformer2DModel

import zimage_mxfp8 as zm
from helpers.diffusers_reference import load_reference, make_reference

_GAINS = {"w1.weight": 60, "w2.weight": 30, "w3.weight": 60}


def make_massive() -> ZImageTransformer2DModel:
    """Diffusers' model in float32.

    Products of gate and up exceed 2.5e4, and sums over them the largest number of float16.
    """
    model = make_reference(dim=384, layers=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(_GAINS.get(name.rpartition("feed_forward.")[2], 1))
    return model


class MassiveModel:
    """Files of the model, and diffusers' with the weights that the codes stand for.

    Attributes:
        reference: diffusers' model in float32.
        quantized: in MXFP8.
        plain: the decoded weights.
    """

    def __init__(self, folder: Path) -> None:
        self.reference = make_massive()
        self.reference.save_pretrained(folder / "transformer")
        self.quantized, self.plain = folder / "mxfp8.safetensors", folder / "plain.safetensors"
        zm.convert(folder / "transformer", self.quantized)
        zm.dequantize_checkpoint(self.quantized, self.plain)
        load_reference(self.reference, self.plain)

    def load(
        self, mode: str, dtype: torch.dtype | None, device: str = "cpu"
    ) -> zm.ZImageTransformer:
        """Load it in a mode, or "plain" for the decoded weights."""
        path, compute = (self.plain, "auto") if mode == "plain" else (self.quantized, mode)
        return zm.ZImageTransformer.from_checkpoint(path, device, compute, dtype)
