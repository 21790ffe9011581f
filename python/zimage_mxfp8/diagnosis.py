"""What this installation is and what this machine lets it do."""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from . import _core
from .errors import UnsupportedError
from .transformer.compute import choose, supported

_LIBRARIES = ("torch", "numpy", "safetensors", "diffusers", "transformers", "comfy-kitchen")
# Kinds of product and their operands, and the one that each path is made for.
_PRODUCTS = {
    "MXFP8 x MXFP8": ("mxfp8", "mxfp8"),
    "BF16 x MXFP8": ("bfloat16", "mxfp8"),
    "row-scaled FP8": ("row-scaled", "row-scaled"),
}
_MADE_FOR = {
    "decode": "BF16 x MXFP8",
    "row-scaled": "row-scaled FP8",
    "sm90": "BF16 x MXFP8",
    "sm100": "MXFP8 x MXFP8",
    "sm120": "MXFP8 x MXFP8",
}


@dataclass(frozen=True)
class Paths:
    """How the CPU or a CUDA device computes products.

    Attributes:
        preferred: the path of each kind of product; "" where there is none.
        reasons: why a path is not there, by path, for the kind of operands that it is made for.
        compute: the transformer's compute modes, the one that "auto" takes first.
    """

    preferred: dict[str, str]
    reasons: dict[str, str]
    compute: list[str]


@dataclass(frozen=True)
class Device:
    """A CUDA device.

    Attributes:
        name: its name.
        capability: compute capability, such as "9.0".
        memory: bytes.
        paths: how it computes products.
    """

    name: str
    capability: str
    memory: int
    paths: Paths


@dataclass(frozen=True)
class Diagnosis:
    """What this installation is and what this machine lets it do.

    Attributes:
        version: of this package.
        python: version and platform.
        cuda: version of the CUDA compiler that built the kernels; "" without CUDA.
        architectures: CUDA targets that were compiled in.
        cutlass: version of CUTLASS that the kernels are made of; "" where there are none.
        cublaslt: version of cuBLASLt that was found; "" if none was.
        cpu_targets: instruction sets with kernels that this processor has.
        cpu_target: the one that is used.
        threads: cores that this process may use.
        libraries: versions of the libraries that are installed.
        cpu: how the CPU computes products.
        devices: CUDA devices.
    """

    version: str
    python: str
    cuda: str
    architectures: list[str]
    cutlass: str
    cublaslt: str
    cpu_targets: list[str]
    cpu_target: str
    threads: int
    libraries: dict[str, str]
    cpu: Paths
    devices: list[Device]

    def to_dict(self) -> dict[str, Any]:
        """As JSON-compatible values."""
        return asdict(self)


def cmake_dir() -> Path:
    """The folder of the CMake package, for `find_package(zimage_mxfp8 CONFIG)`."""
    return Path(os.path.abspath(_core.__file__)).parent / "lib" / "cmake" / "zimage_mxfp8"  # noqa: PTH100


def diagnose() -> Diagnosis:
    """Look at this installation and this machine."""
    build = _core.build_info()
    if build.cuda:
        # torch brings cuBLASLt along: what is found is then what a program with torch finds.
        with contextlib.suppress(ImportError, OSError):
            importlib.import_module("torch")
    libraries = {}
    for name in _LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            libraries[name] = version(name)
    return Diagnosis(
        version=build.version,
        python=f"{platform.python_version()}, {platform.system()} {platform.machine()}",
        cuda=build.cuda,
        architectures=build.architectures,
        cutlass=build.cutlass,
        cublaslt=_core.cublaslt_version(),
        cpu_targets=_core.available_cpu_targets(),
        cpu_target=_core.active_cpu_target(),
        threads=_core.default_threads(),
        libraries=libraries,
        cpu=_paths(-1),
        devices=[
            Device(
                device.name, f"{device.major}.{device.minor}", device.memory, _paths(device.index)
            )
            for device in _core.cuda_devices()
        ],
    )


def _paths(device: int) -> Paths:
    """Those of a CUDA device, or of the CPU (-1)."""
    preferred, reasons = dict.fromkeys(_PRODUCTS, ""), {}
    for what, operands in _PRODUCTS.items():
        problem = _core.GemmProblem(4096, 4096, 4096, *operands, "bfloat16", False)
        with contextlib.suppress(UnsupportedError):
            preferred[what] = _core.gemm_preferred_path(problem, device)
        for path, kind in _MADE_FOR.items():
            if kind == what and (why := _core.gemm_unsupported(path, problem, device)):
                reasons[path] = why
    first = choose("auto", device, quantized=True)
    return Paths(preferred, reasons, [first, *(m for m in supported(device) if m != first)])
