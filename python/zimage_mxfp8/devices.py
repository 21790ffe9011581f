"""Names of devices: "cpu", "cuda", "cuda:1"."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from . import _core
from .errors import CudaError, UnsupportedError, UsageError

if TYPE_CHECKING:
    import torch


def cuda_index(device: str) -> int | None:
    """The index of the CUDA device that a name means; None for "cpu", which is "cpu:0" too.

    Raises:
        UsageError: not the name of a device.
        UnsupportedError: this build has no CUDA, or this machine no such device.
    """
    device = str(device)  # a torch.device too
    if device in ("cpu", "cpu:0"):
        return None
    match = re.fullmatch(r"cuda(?::([0-9]{1,3}))?", device)
    if match is None:
        raise UsageError(f'device must be "cpu", "cuda" or "cuda:N", not "{device[:40]}"')
    if not _core.build_info().cuda:
        raise UnsupportedError(
            f"device {device}: this build has no CUDA kernels; use cpu, or install with ZM_CUDA=ON"
        )
    index, found = int(match[1] or 0), len(_core.cuda_devices())
    if index >= found:
        raise UnsupportedError(f"device {device}: {found} CUDA devices found; use cpu")
    return index


def torch_device(device: str | torch.device | None) -> torch.device:
    """The device that a name means, with an index if it is a CUDA device.

    Args:
        device: None stands for the current CUDA device where torch and this build have one, else
            for the CPU.

    Raises:
        UsageError: not the name of a device.
        UnsupportedError: this build or torch has no CUDA, or this machine no such device.
    """
    import torch

    if device is None:
        device = "cuda" if _core.build_info().cuda and torch.cuda.is_available() else "cpu"
    if cuda_index(str(device)) is None:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UnsupportedError(
            f"device {device}: the torch that is installed ({torch.__version__}) finds no CUDA "
            "device; use cpu, or install torch for CUDA"
        )
    place = torch.device(device)
    return torch.device("cuda", torch.cuda.current_device() if place.index is None else place.index)


def core_index(device: torch.device) -> int:
    """The number by which the core knows a torch device: of a CUDA device; -1 for the CPU."""
    return int(device.index) if device.type == "cuda" else -1


@contextmanager
def memory_for(what: str, device: torch.device, remedy: str) -> Iterator[None]:
    """Turns what torch raises when memory runs out into a sentence.

    Raises:
        CudaError, UnsupportedError: the device's memory ran out, or the CPU's.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info(device)
        raise CudaError(
            f"{device} ran out of memory for {what}: {_asked_for(error)}{free / 2**30:.1f} of "
            f"{total / 2**30:.1f} GiB are free; close other programs, or {remedy}"
        ) from None
    except RuntimeError as error:
        if not is_out_of_host_memory(error):
            raise
        raise UnsupportedError(f"not enough memory for {what}; {remedy}") from None


def _asked_for(error: torch.OutOfMemoryError) -> str:
    """The beginning of a sentence: what torch could not get, which only its message says."""
    found = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
    return f"another {found[1]} were needed, and " if found else ""


def is_out_of_host_memory(error: Exception) -> bool:
    """Whether torch's error is that the CPU's memory ran out, which has no class of its own."""
    return "DefaultCPUAllocator" in str(error)
