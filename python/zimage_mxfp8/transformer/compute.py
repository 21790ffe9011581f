"""Compute modes: how the quantised layers of the transformer are multiplied."""

from __future__ import annotations

from typing import Literal

import torch

from .. import _core
from ..errors import UnsupportedError, UsageError

Compute = Literal["mxfp8", "folded", "exact", "emulated"]
COMPUTE_MODES: tuple[Compute, ...] = ("mxfp8", "folded", "exact", "emulated")

# The form in which a mode's layers take their activations.
Form = Literal["bfloat16", "row-scaled", "mxfp8"]
FORMS: dict[Compute, Form] = {
    "mxfp8": "mxfp8",
    "folded": "row-scaled",
    "exact": "bfloat16",
    "emulated": "mxfp8",
}

DESCRIPTIONS: dict[Compute, str] = {
    "mxfp8": "MXFP8 x MXFP8 on block-scaled tensor cores (never run on such a device yet)",
    "folded": "scales folded to one a row, FP8 tensor cores",
    "exact": "weights decoded exactly, activations as they are",
    "emulated": "Blackwell's numerics: activations in MXFP8 too, products of decoded numbers",
}

_NATIVE_PATHS = ("sm100", "sm120")


def unsupported(compute: Compute, device: torch.device) -> str:
    """Why a mode is not to be had on a device; "" if it is.

    Args:
        compute: the mode.
        device: with an index, if it is a CUDA device.
    """
    index = device.index if device.type == "cuda" else -1
    if device.type == "cuda" and not _core.build_info().cuda:
        return "this build has no CUDA kernels; install with ZM_CUDA=ON"
    if compute == "mxfp8":
        problem = _core.GemmProblem(128, 128, 128, "mxfp8", "mxfp8", "bfloat16", False)
        reasons = [_core.gemm_unsupported(path, problem, index) for path in _NATIVE_PATHS]
        return "" if "" in reasons else reasons[0]
    if compute == "folded" and index >= 0:
        problem = _core.GemmProblem(128, 128, 128, "row-scaled", "row-scaled", "bfloat16", False)
        return _core.gemm_unsupported("row-scaled", problem, index)
    return ""


def choose(compute: str, device: torch.device, quantized: bool) -> Compute:
    """The mode to run in.

    Args:
        compute: "auto" (the fastest that the device has) or a mode.
        device: where the model will be.
        quantized: whether the checkpoint has MXFP8 layers; without, there is nothing to choose.

    Raises:
        UsageError: no such mode, or one for quantised layers and there are none.
        UnsupportedError: the device does not have the mode.
    """
    if compute == "auto":
        if not quantized or device.type != "cuda":
            return "exact"
        return next(mode for mode in COMPUTE_MODES if not unsupported(mode, device))
    modes = {str(mode): mode for mode in COMPUTE_MODES}
    if compute not in modes:
        raise UsageError(f"compute must be auto, {', '.join(COMPUTE_MODES)}, not {compute!r}")
    mode = modes[compute]
    if not quantized and mode != "exact":
        raise UsageError(
            f"compute={mode} is for MXFP8 checkpoints, and this one is not quantised; convert it "
            "first (zimage-mxfp8 convert), or use compute=exact"
        )
    if why := unsupported(mode, device):
        usable = [name for name in COMPUTE_MODES if not unsupported(name, device)]
        raise UnsupportedError(f"compute={mode}: {why}; {device} has {', '.join(usable)}")
    return mode
