"""Compute modes: how the quantised layers of the transformer are multiplied."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from ..errors import UnsupportedError, UsageError
from ..system import devices

Compute = Literal["mxfp8", "fp8", "weight-only", "int8", "mxfp8-emulated"]
COMPUTE_MODES: tuple[Compute, ...] = ("mxfp8", "fp8", "weight-only", "int8", "mxfp8-emulated")

_HOPPER, _BLACKWELL = (9, 0), (10, 0)

# Modes that multiply the codes of the file. The others make weights of their own from them.
IN_PLACE_MODES: tuple[Compute, ...] = tuple(mode for mode in COMPUTE_MODES if mode != "int8")

# Formats that the layers of a file are stored in, and the modes that can multiply them.
Weights = Literal["plain", "mxfp8", "int8-convrot"]
MODES: dict[Weights, tuple[Compute, ...]] = {
    "plain": ("weight-only",),
    "mxfp8": COMPUTE_MODES,
    "int8-convrot": ("int8", "weight-only"),
}

DESCRIPTIONS: dict[Compute, str] = {
    "mxfp8": "MXFP8 x MXFP8 on block-scaled tensor cores (never run on such a device yet)",
    "fp8": "scales folded to one per row, FP8 tensor cores",
    "weight-only": "weights decoded exactly, activations not quantised",
    "int8": "weights and activations rotated and rounded to INT8 (of GPUs it ran on an H200 alone)",
    "mxfp8-emulated": "Blackwell's numerics: activations in MXFP8 too, GEMMs of decoded numbers",
}

_NATIVE_CAPABILITIES = ((10, 0), (10, 3), (12, 0), (12, 1))
_FP8_CAPABILITY = (8, 9)
_INT8_CAPABILITY = (7, 5)
_BFLOAT16_CAPABILITY = (8, 0)


def unsupported(compute: Compute, device: int) -> str:
    """Return why a device does not have a mode; "" if it has.

    Args:
        compute: the mode.
        device: index of a CUDA device, or -1 for the CPU.
    """
    if compute == "mxfp8":
        if device < 0:
            return (
                "it needs the block-scaled tensor cores of a GPU, and this package's CUDA kernels"
            )
        if not devices.has_kernels(device):
            return f"it needs CUDA kernels, and {devices.why_no_kernels()}"
        return devices.native_gemm_unsupported("mxfp8", device)
    if compute == "fp8" and device >= 0:
        try:
            from .arithmetic import by_core, scaled_mm
        except ImportError:
            return "torch is not installed"
        if devices.has_kernels(device) and not by_core.row_scaled_unsupported(device):
            return ""
        return scaled_mm.unsupported(device)
    if compute == "int8" and device >= 0:
        try:
            from .arithmetic import by_core, int8
        except ImportError:
            return "torch is not installed"
        if devices.has_kernels(device) and not by_core.int8_unsupported(device):
            return ""
        return int8.unsupported(device)
    return ""


def default_dtype_of(capability: tuple[int, int] | None) -> Literal["bfloat16", "float16"]:
    """Return the default dtype of a model: float16 where tensor cores have no bfloat16.

    Args:
        capability: of a CUDA device; None for the CPU.
    """
    has_bfloat16 = capability is None or capability >= _BFLOAT16_CAPABILITY
    return "bfloat16" if has_bfloat16 else "float16"


def preference(capability: tuple[int, int], kernels: bool) -> list[Compute]:
    """Return all modes in the order in which "auto" prefers them on CUDA devices.

    INT8 has the rate of FP8 up to Hopper, where torch's GEMMs alone reach half of it, and its
    images are closer to those of BF16 (docs/performance.md, docs/methodology.md).

    Args:
        capability: compute capability of the device.
        kernels: whether it has kernels of this package.
    """
    modes: list[Compute] = [mode for mode in COMPUTE_MODES if mode != "int8"]
    is_first = capability < (_BLACKWELL if kernels else _HOPPER)
    modes.insert(modes.index("fp8") + (not is_first), "int8")
    return modes


def _preference_of(device: int) -> list[Compute]:
    return preference(devices.capability(device), devices.has_kernels(device))


def modes_of(capability: tuple[int, int], kernels: bool) -> list[Compute]:
    """Return the modes of CUDA devices of a compute capability, with or without kernels.

    They are in the order of `preference`. An installation may support fewer; `unsupported` says
    which and why.
    """
    modes = preference(capability, kernels)
    if not kernels or capability not in _NATIVE_CAPABILITIES:
        modes.remove("mxfp8")
    if capability < _FP8_CAPABILITY:
        modes.remove("fp8")
    if capability < _INT8_CAPABILITY:
        modes.remove("int8")
    return modes


def supported(device: int) -> list[Compute]:
    """Return the modes that a device has, on a GPU in the order of `preference`."""
    modes = _preference_of(device) if device >= 0 else COMPUTE_MODES
    return [mode for mode in modes if not unsupported(mode, device)]


def check_mode(compute: str, weights: Weights) -> Compute | Literal["auto"]:
    """Return a mode that layers can be multiplied in on some device, or "auto".

    Args:
        compute: "auto" or a mode.
        weights: what the layers are stored in.

    Raises:
        UsageError: no such mode, or one that the layers cannot be multiplied in.
    """
    modes = {str(mode): mode for mode in COMPUTE_MODES}
    if not isinstance(compute, str) or compute not in ("auto", *modes):
        raise UsageError("compute", f"must be auto, {', '.join(modes)}, not {repr(compute)[:80]}")
    if compute == "auto":
        return "auto"
    mode = modes[compute]
    if mode not in MODES[weights] and weights == "int8-convrot":
        raise UsageError(
            "compute",
            f"{mode} is for MXFP8 checkpoints, and this one is INT8 ConvRot",
            'use `compute="int8"`, or weight-only',
        )
    if mode not in MODES[weights]:
        raise UsageError(
            "compute",
            f"{mode} is for MXFP8 checkpoints, and this one is not quantised",
            'convert it first (zimage-mxfp8 convert), or use `compute="weight-only"`',
        )
    return mode


def check_device(compute: str, device: str | None) -> None:
    """Check that a device can have a mode, as far as this is known without torch.

    Args:
        compute: "auto" or a mode.
        device: its name; None: the one that torch chooses.

    Raises:
        UnsupportedError: no device of that name has the mode.
    """
    if compute == "mxfp8" and not devices.can_have_kernels(device):
        raise _no_such_mode("mxfp8", -1)


def choose(
    compute: str, device: int, weights: Weights, among: Collection[Compute] = COMPUTE_MODES
) -> Compute:
    """Return the mode to run in.

    Args:
        compute: "auto" (chosen for the device) or a mode.
        device: where the model will be: index of a CUDA device, or -1 for the CPU.
        weights: what the layers are stored in.
        among: the modes that "auto" may choose.

    Raises:
        UsageError: as for `check_mode`.
        UnsupportedError: the device does not have the mode.
    """
    mode = check_mode(compute, weights)
    if mode == "auto":
        if device < 0:  # nothing is faster in 8 bits there
            return "weight-only"
        modes = _preference_of(device)
        allowed = [mode for mode in modes if mode in MODES[weights] and mode in among]
        return next(mode for mode in allowed if not unsupported(mode, device))
    if unsupported(mode, device):
        raise _no_such_mode(mode, device)
    return mode


def _no_such_mode(mode: Compute, device: int) -> UnsupportedError:
    place = f"cuda:{device}" if device >= 0 else "the CPU"
    return UnsupportedError(
        f"compute mode {mode}: {unsupported(mode, device)}",
        f"{place} has {', '.join(supported(device))}",
    )
