"""This machine's GPUs according to the NVIDIA driver, without torch or a build with CUDA.

The driver's library has a C interface that does not change between versions; ctypes calls it.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from dataclasses import dataclass

_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_NAME_SIZE = 256
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        name: name of the GPU.
        capability: compute capability.
        memory: bytes.
    """

    name: str
    capability: tuple[int, int]
    memory: int


@dataclass(frozen=True)
class Driver:
    """The driver and the GPUs that it lets this process use.

    Attributes:
        cuda: the newest version of CUDA that the driver supports, such as "13.0"; "" without a
            driver.
        gpus: in CUDA's order, which CUDA_VISIBLE_DEVICES changes.
        problem: why there are no GPUs; "" if there are.
    """

    cuda: str
    gpus: tuple[Gpu, ...]
    problem: str


def look() -> Driver:
    """Query the driver."""
    try:
        library = ctypes.CDLL(_LIBRARY)
        version = _version(library)
    except (OSError, AttributeError):  # missing, or another library of that name
        return Driver("", (), f"no NVIDIA driver was found ({_LIBRARY})")
    try:
        _call(library, "cuInit", ctypes.c_uint(0))
        gpus = tuple(_gpu(library, index) for index in range(_count(library)))
    except (_DriverError, AttributeError) as error:
        return Driver(version, (), f"the NVIDIA driver finds no GPU: {error}")
    return Driver(version, gpus, "" if gpus else "the NVIDIA driver finds no GPU")


def release() -> str:
    """Return the driver's own version, such as "580.95.05", by nvidia-smi; "" if that is missing.

    The library that `look` calls has only the version of CUDA.
    """
    command = ["nvidia-smi", "-q", "-x"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    found = re.search(r"<driver_version>\s*([\d.]+)", result.stdout)
    return found[1] if found else ""


class _DriverError(Exception):
    pass


def _call(library: ctypes.CDLL, name: str, *arguments: object) -> None:
    error = getattr(library, name)(*arguments)
    if error:
        raise _DriverError(f"{name} gives error {error}")


def _version(library: ctypes.CDLL) -> str:
    number = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(number)):
        return ""
    return f"{number.value // 1000}.{number.value % 1000 // 10}"


def _count(library: ctypes.CDLL) -> int:
    count = ctypes.c_int()
    _call(library, "cuDeviceGetCount", ctypes.byref(count))
    return count.value


def _gpu(library: ctypes.CDLL, index: int) -> Gpu:
    device = ctypes.c_int()
    _call(library, "cuDeviceGet", ctypes.byref(device), ctypes.c_int(index))
    name = ctypes.create_string_buffer(_NAME_SIZE)
    _call(library, "cuDeviceGetName", name, ctypes.c_int(_NAME_SIZE), device)
    memory = ctypes.c_size_t()
    _call(library, "cuDeviceTotalMem_v2", ctypes.byref(memory), device)
    parts = []
    for attribute in (_MAJOR, _MINOR):
        value = ctypes.c_int()
        _call(library, "cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(attribute), device)
        parts.append(value.value)
    return Gpu(name.value.decode("utf-8", "replace"), (parts[0], parts[1]), memory.value)
