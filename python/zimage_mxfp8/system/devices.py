"""Names of devices ("cpu", "cuda", "cuda:1"), and the devices that this build has kernels for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

from .. import _core
from ..errors import CudaError, UnsupportedError, UsageError
from ..text import plural

if TYPE_CHECKING:
    import torch

_FIRST_MAJOR = 8  # the lowest compute capability that kernels are compiled for
HOW_TO_GET_KERNELS = (
    "install nvcc 12.8 or newer, then run ZM_CUDA=ON pip install . in this package's source folder"
)


def has_kernels(device: int) -> bool:
    """Return whether this build has kernels for a device; without them torch does the work.

    Args:
        device: index of a CUDA device, or -1 for the CPU, which always has them.
    """
    return device < 0 or _has_cuda_kernels(device)


@cache
def _has_cuda_kernels(device: int) -> bool:
    found = _core.cuda_devices()
    return device < len(found) and found[device].major >= _FIRST_MAJOR


def can_have_kernels(device: str | None) -> bool:
    """Return whether a name may mean a GPU with kernels; does not import torch.

    Args:
        device: its name; None: the one that torch chooses.
    """
    if device is None:
        return bool(_core.cuda_devices())
    return not is_cpu(device)


# The result is a constant for torch.compile. This is what torch.compiler.assume_constant_result
# does, but that imports the compiler, which takes longer than importing torch.
has_kernels.__dict__["_dynamo_marked_constant"] = True


def capability(device: int) -> tuple[int, int]:
    """Return the compute capability of a CUDA device that torch finds.

    ZIMAGE_MXFP8_CAPABILITY in the environment limits it, for tests of what older devices do.
    """
    import torch

    found: tuple[int, int] = torch.cuda.get_device_capability(device)
    limit = _core.capability_limit()
    return min(found, divmod(limit, 10)) if limit else found


def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors of a CUDA device, 1 for the CPU."""
    import torch

    if device.type != "cuda":
        return 1
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def has_fused_kernels(device: torch.device) -> bool:
    """Return whether a torch device has the kernels of `fused` and `gemm_epilogues` (CUDA only)."""
    return device.type == "cuda" and has_kernels(device.index)


def native_gemm_unsupported(operand_format: str, device: int) -> str:
    """Why a device has no GEMM kernel made for two operands in a format; "" if it has one.

    Kernels that take other operands too, because they decode them, do not count.

    Args:
        operand_format: "mxfp8", "row-scaled" or "int8".
        device: index of a CUDA device with kernels, or -1 for the CPU.
    """
    problem = _core.GemmProblem(128, 128, 128, operand_format, operand_format, "bfloat16", False)
    native = [
        kernel.name
        for kernel in _core.gemm_kernels()
        if kernel.operands == [(operand_format, operand_format)] and "none" in kernel.epilogues
    ]
    reasons = [_core.gemm_unsupported(kernel, problem, device) for kernel in native]
    return "" if "" in reasons else reasons[0]


def why_no_kernels() -> str:
    """Return why a CUDA device has no kernels, as a clause."""
    build = _core.build_info()
    if build.cuda:
        return f"those of this build need compute capability {_FIRST_MAJOR}.0 or newer"
    return f"this build has none ({build.no_cuda})"


def cuda_index(device: str) -> int | None:
    """Return the index of a CUDA device with kernels by its name; None for "cpu" and "cpu:0".

    Raises:
        UsageError: not the name of a device.
        UnsupportedError: this build has no CUDA, or this machine does not have the device.
    """
    index = _index(device)
    if index is None:
        return None
    if not _core.build_info().cuda:
        raise UnsupportedError(
            f"device {device} needs CUDA kernels, and {why_no_kernels()}; use cpu, or "
            f"{HOW_TO_GET_KERNELS}"
        )
    found = len(_core.cuda_devices())
    if max(index, 0) >= found:
        raise UnsupportedError(f"device {device}: {found} CUDA devices found; use cpu")
    return max(index, 0)


def check_name(device: str) -> None:
    """Check the name of a device, which this machine need not have.

    Raises:
        UsageError: not the name of a device.
    """
    _index(device)


def is_cpu(device: str) -> bool:
    """Return whether a name is the CPU's.

    Raises:
        UsageError: not the name of a device.
    """
    return _index(device) is None


def _index(device: object) -> int | None:
    """Return the index in a name: None for the CPU, -1 for a CUDA device without a number."""
    name = str(device)  # also of a torch.device
    if name in ("cpu", "cpu:0"):
        return None
    match = re.fullmatch(r"cuda(?::([0-9]{1,3}))?", name)
    if match is None:
        raise UsageError("device", f'must be "cpu", "cuda" or "cuda:N", not "{name[:40]}"')
    return -1 if match[1] is None else int(match[1])


def torch_device(device: str | torch.device | None) -> torch.device:
    """Return the device of a name, with an index if it is a CUDA device.

    Args:
        device: its name; None for the current CUDA device if torch has one, else the CPU.

    Raises:
        UsageError: not the name of a device.
        UnsupportedError: torch has no CUDA, or this machine does not have the device.
    """
    import torch

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    index = _index(device)
    if index is None:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UnsupportedError(
            f"device {device}: the torch that is installed ({torch.__version__}) finds no CUDA "
            "device; use cpu, or install torch for CUDA"
        )
    if index >= (found := torch.cuda.device_count()):
        raise UnsupportedError(f"device {device}: torch finds {found} CUDA devices; use cpu")
    return torch.device("cuda", torch.cuda.current_device() if index < 0 else index)


def first_gpus(count: int) -> list[torch.device]:
    """Return the first CUDA devices.

    Raises:
        UnsupportedError: torch finds fewer.
    """
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count > found:
        raise UnsupportedError(
            f"{plural(count, 'GPU is', 'GPUs are')} asked for, and torch finds {found}",
            "ask for no more than that" if found else "leave `gpus` out to draw on the CPU",
        )
    return [torch.device("cuda", index) for index in range(count)]


def core_index(device: torch.device) -> int:
    """Return the core's number of a torch device: a CUDA device's index, -1 for the CPU."""
    return int(device.index) if device.type == "cuda" else -1


@contextmanager
def memory_for(what: str, device: torch.device, remedy: str) -> Iterator[None]:
    """Turn torch's errors about exhausted memory into a sentence.

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
            f"{total / 2**30:.1f} GiB are free",
            f"close other programs, or {remedy}",
        ) from None
    except RuntimeError as error:
        if not is_out_of_host_memory(error):
            raise
        raise UnsupportedError(f"not enough memory for {what}", remedy) from None


def _asked_for(error: torch.OutOfMemoryError) -> str:
    """Return the beginning of a sentence: the size of a failed allocation, if torch names it."""
    found = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
    return f"another {found[1]} were needed, and " if found else ""


def is_out_of_host_memory(error: Exception) -> bool:
    """Return whether torch's error means that host memory ran out; it has no class of its own."""
    return "DefaultCPUAllocator" in str(error)
