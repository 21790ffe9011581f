"""Warnings, once per process, about a device that was chosen for the user.

Commands print these warnings as lines of stderr (`cli/device_warnings.py`).
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from .. import _core
from ..errors import DeviceWarning
from . import driver
from .devices import HOW_TO_GET_KERNELS, core_index, has_kernels, why_no_kernels

if TYPE_CHECKING:
    import torch

_warned: set[str] = set()


def report_line(device: torch.device, asked: object) -> None:
    """Warn if a GPU is not used, or used without this package's kernels.

    Args:
        device: the device that will do the work.
        asked: the device that the user named; None if it was chosen.
    """
    if device.type == "cpu":
        note = "" if asked is not None else _why_no_gpu()
    else:
        note = "" if has_kernels(core_index(device)) else _without_kernels(device)
    if note and note not in _warned:
        _warned.add(note)
        warnings.warn(note, DeviceWarning, stacklevel=3)


def _without_kernels(device: torch.device) -> str:
    remedy = "" if _core.build_info().cuda else f". To get them, {HOW_TO_GET_KERNELS}"
    return (
        f"{device} works through torch, without CUDA kernels of this package: {why_no_kernels()}. "
        "That is slower (2 to 3 times at 1024x1024 on an H100), because torch decodes weights, "
        "encodes activations and does the work between the GEMMs in many operations where "
        f"kernels need one, and mode mxfp8 is missing{remedy}"
    )


def _why_no_gpu() -> str:
    """Return why the CPU was chosen although there is a GPU or torch for CUDA; "" without them."""
    import torch

    found, version = driver.look(), torch.__version__
    remedy = 'or name the device "cpu" to use it'
    if found.gpus:
        names = ", ".join(gpu.name for gpu in found.gpus)
        if torch.version.cuda is None:
            return (
                f"the work is done on the CPU, though there is a GPU ({names}): the torch that is "
                f"installed ({version}) is built without CUDA; install torch for CUDA, {remedy}"
            )
        return (
            f"the work is done on the CPU, though there is a GPU ({names}): the torch that is "
            f"installed ({version}, CUDA {torch.version.cuda}) does not find it; the driver "
            f"supports CUDA {found.cuda or 'of an unknown version'}: update it, or install a torch "
            f"for that version, {remedy}"
        )
    if torch.version.cuda is not None:
        return (
            f"the work is done on the CPU, though torch ({version}) is built for CUDA: "
            f"{found.problem}; install the driver, {remedy}"
        )
    return ""
