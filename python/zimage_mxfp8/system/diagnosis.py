"""Diagnosis of this installation and this machine."""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .. import _core
from ..errors import UnsupportedError
from ..transformer.compute import (
    COMPUTE_MODES,
    default_dtype_of,
    modes_of,
    supported,
    unsupported,
)
from . import driver
from .devices import has_kernels
from .extras import Extra, find_extras

_LIBRARIES = ("torch", "numpy", "safetensors", "diffusers", "transformers", "comfy-kitchen")
# GEMMs of the transformer, by their operands.
_GEMMS = {
    "MXFP8 x MXFP8": ("mxfp8", "mxfp8"),
    "BF16 x MXFP8": ("bfloat16", "mxfp8"),
    "row-scaled FP8": ("row-scaled", "row-scaled"),
    "INT8": ("int8", "int8"),
}
_SIZE = 4096  # of the problems to find kernels for


@dataclass(frozen=True)
class Kernels:
    """Kernels and compute modes of the CPU or a CUDA device.

    Attributes:
        chosen: the kernel of each kind of GEMM; "" without one. Empty without kernels.
        reasons: why a kernel of the table is missing, by its name, for operands that it
            multiplies. Empty without kernels.
        compute: the transformer's compute modes; "auto" takes the first.
        missing_modes: why a compute mode is missing, by mode.
        dtype: the transformer's default dtype, of what is not 8 bits wide.
    """

    chosen: dict[str, str]
    reasons: dict[str, str]
    compute: list[str]
    missing_modes: dict[str, str]
    dtype: str


@dataclass(frozen=True)
class Device:
    """A CUDA device.

    Attributes:
        name: name of the device.
        capability: compute capability, such as "9.0".
        memory: bytes.
        kernels: whether this build has kernels for it.
        with_kernels: compute modes of such a device with kernels.
        without_kernels: compute modes through torch alone.
        gemm: its kernels and compute modes.
    """

    name: str
    capability: str
    memory: int
    kernels: bool
    with_kernels: list[str]
    without_kernels: list[str]
    gemm: Kernels


@dataclass(frozen=True)
class Diagnosis:
    """Properties of this installation and this machine.

    Attributes:
        version: version of this package.
        python: version of Python, and platform.
        cuda: version of the CUDA compiler that built the kernels; "" without CUDA.
        no_cuda: why this build is without CUDA; "" with CUDA.
        driver: the newest CUDA version that the NVIDIA driver supports; "" without a driver.
        no_devices: why there are no CUDA devices; "" if there are.
        torch_cuda: version of CUDA that torch is built for; "" without CUDA, or without torch.
        architectures: CUDA targets that were compiled in.
        cutlass: version of CUTLASS in the kernels; "" without them.
        cublaslt: version of cuBLASLt that was found; "" without one.
        cpu_targets: instruction sets with kernels that this processor has.
        cpu_target: the instruction set in use.
        threads: cores that this process may use.
        libraries: versions of the installed libraries.
        extras: the extras, each with its missing packages.
        cpu: kernels and compute modes of the CPU.
        devices: CUDA devices.
    """

    version: str
    python: str
    cuda: str
    no_cuda: str
    driver: str
    no_devices: str
    torch_cuda: str
    architectures: list[str]
    cutlass: str
    cublaslt: str
    cpu_targets: list[str]
    cpu_target: str
    threads: int
    libraries: dict[str, str]
    extras: list[Extra]
    cpu: Kernels
    devices: list[Device]

    def __str__(self) -> str:
        from ..printing.diagnosis import print_diagnosis
        from ..printing.screen import as_text

        return as_text(lambda screen: print_diagnosis(self, screen))

    def to_dict(self) -> dict[str, Any]:
        """Return the values for JSON."""
        return asdict(self)


def cmake_dir() -> Path:
    """Return the folder of the CMake package, for `find_package(zimage_mxfp8 CONFIG)`."""
    return Path(os.path.abspath(_core.__file__)).parent / "lib" / "cmake" / "zimage_mxfp8"  # noqa: PTH100


def diagnose() -> Diagnosis:
    """Examine this installation and this machine."""
    build, found = _core.build_info(), driver.look()
    torch = None
    if build.cuda or found.gpus:
        # torch brings cuBLASLt: after its import the result is the same as in a program with torch.
        with contextlib.suppress(ImportError, OSError):
            torch = importlib.import_module("torch")
    libraries = {}
    for name in _LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            libraries[name] = version(name)
    return Diagnosis(
        version=build.version,
        python=f"{platform.python_version()}, {platform.system()} {platform.machine()}",
        cuda=build.cuda,
        no_cuda=build.no_cuda,
        driver=found.cuda,
        no_devices=found.problem,
        torch_cuda=(torch.version.cuda or "") if torch else "",
        architectures=build.architectures,
        cutlass=build.cutlass,
        cublaslt=_core.cublaslt_version(),
        cpu_targets=_core.available_cpu_targets(),
        cpu_target=_core.active_cpu_target(),
        threads=_core.default_threads(),
        libraries=libraries,
        extras=find_extras(),
        cpu=_kernels(-1, None, ""),
        devices=[_device(index, gpu, torch) for index, gpu in enumerate(found.gpus)],
    )


def _device(index: int, gpu: driver.Gpu, torch: Any) -> Device:
    no_torch = ""
    if torch is None:
        no_torch = "torch is not installed, or cannot be imported"
    elif index >= torch.cuda.device_count():
        no_torch = f"the torch that is installed ({torch.__version__}) does not find this device"
    return Device(
        gpu.name,
        "{}.{}".format(*gpu.capability),
        gpu.memory,
        has_kernels(index),
        list(modes_of(gpu.capability, kernels=True)),
        list(modes_of(gpu.capability, kernels=False)),
        _kernels(index, gpu.capability, no_torch),
    )


def _kernels(device: int, capability: tuple[int, int] | None, no_torch: str) -> Kernels:
    """Return kernels of a CUDA device or the CPU (-1); `no_torch`: why torch cannot use it."""
    missing: dict[str, str] = {
        mode: no_torch or unsupported(mode, device) for mode in COMPUTE_MODES
    }
    missing = {mode: why for mode, why in missing.items() if why}
    modes: list[str] = [] if no_torch else list(supported(device))
    if device < 0:  # the choice of "auto" there
        modes.sort(key=lambda mode: mode != "weight-only")
    dtype = default_dtype_of(capability)
    if not has_kernels(device):
        return Kernels({}, {}, modes, missing, dtype)
    chosen, reasons = dict.fromkeys(_GEMMS, ""), {}
    for what, operands in _GEMMS.items():
        with contextlib.suppress(UnsupportedError):
            chosen[what] = _core.choose_gemm(_problem(operands, "none"), device)
    for kernel in _core.gemm_kernels():
        problem = _problem(kernel.operands[0], kernel.epilogues[0])
        if why := _core.gemm_unsupported(kernel.name, problem, device):
            reasons[kernel.name] = why
    return Kernels(chosen, reasons, modes, missing, dtype)


def _problem(operands: tuple[str, str], epilogue: str) -> _core.GemmProblem:
    return _core.GemmProblem(_SIZE, _SIZE, _SIZE, *operands, "bfloat16", False, epilogue)
