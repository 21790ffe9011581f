"""What a benchmark measured, and the layout of its JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..system.diagnosis import Diagnosis
from .workload import Workload

SCHEMA = 1  # of the JSON: the number changes when a key changes its meaning or goes


@dataclass(frozen=True)
class MeasuredDevice:
    """The device that was measured.

    Attributes:
        place: its name in torch, such as "cuda:0", or "cpu".
        name: name of the GPU; "CPU" for the processor.
        capability: compute capability, such as "9.0"; "" for the processor.
        memory: bytes of a GPU; 0 for the processor.
        driver: version of the NVIDIA driver; "" without one, or without nvidia-smi.
    """

    place: str
    name: str
    capability: str
    memory: int
    driver: str


@dataclass(frozen=True)
class ForwardTime:
    """The time of one forward of the transformer.

    Attributes:
        program: "zimage-mxfp8" or "diffusers".
        weights: what the weights of the blocks are stored in: "bfloat16", "float16" or "mxfp8".
        mode: the compute mode; "" for weights that are not quantised.
        graph: whether a CUDA graph ran; else operations were launched one by one.
        side: side of the square image in pixels.
        milliseconds: the median.
        runs: forwards that were timed.
    """

    program: str
    weights: str
    mode: str
    graph: bool
    side: int
    milliseconds: float
    runs: int


@dataclass(frozen=True)
class GemmTime:
    """The time of one GEMM, without the encoding of its operands.

    Attributes:
        kernel: name in the library's table, or torch's function.
        a: format of the activations.
        b: format of the weights.
        epilogue: the operation that the kernel adds; "none" without one.
        layer: the layer of a block that has these weights.
        m: tokens.
        n: rows of the weights.
        k: their columns.
        microseconds: the median.
    """

    kernel: str
    a: str
    b: str
    epilogue: str
    layer: str
    m: int
    n: int
    k: int
    microseconds: float

    @property
    def tflops(self) -> float:
        """Multiplications and additions per second, in 10^12."""
        return 2 * self.m * self.n * self.k / self.microseconds / 1e6


@dataclass(frozen=True)
class Missing:
    """What was not measured.

    Attributes:
        part: "forward" or "gemm".
        what: the mode, program or kernel, and the size if it is missing at that size alone.
        reason: why, as a clause.
    """

    part: str
    what: str
    reason: str


@dataclass(frozen=True)
class BenchReport:
    """The speed of a device.

    Attributes:
        date: day of the measurement, UTC, such as "2026-11-29".
        commit: of the source folder that the package is installed from; "" if it is unknown.
        device: the device.
        installation: the report of `doctor`.
        workload: sizes of the transformer and the images.
        distinct_blocks: blocks with weights of their own, which the others share.
        forwards: times of forwards.
        gemms: times of GEMMs, on GPUs.
        missing: what is missing there, with reasons.
    """

    date: str
    commit: str
    device: MeasuredDevice
    installation: Diagnosis
    workload: Workload
    distinct_blocks: int
    forwards: list[ForwardTime]
    gemms: list[GemmTime]
    missing: list[Missing]

    def to_dict(self) -> dict[str, Any]:
        """Return the values for JSON."""
        gemms = [{**asdict(gemm), "tflops": gemm.tflops} for gemm in self.gemms]
        return {"schema": SCHEMA, **asdict(self), "gemms": gemms}
