"""A benchmark of a device, from the first forward to the report."""

from __future__ import annotations

import datetime
from contextlib import nullcontext

import torch

from ..printing.progress import analysis_bar, shown
from ..streaming.jobs import StageCallback
from ..system import driver
from ..system.device_notes import report_line
from ..system.devices import torch_device
from ..system.diagnosis import diagnose
from .attempts import Attempts
from .commit import installed_commit
from .forwards import MODEL_COUNT, Forwards
from .gemms import Gemms, block_gemms
from .models import DISTINCT_BLOCKS
from .report import BenchReport, MeasuredDevice
from .workload import SMALL, WHOLE, Workload


def bench(
    device: str | torch.device | None = None,
    *,
    workload: Workload | None = None,
    progress: StageCallback | bool | None = None,
) -> BenchReport:
    """Measure forwards of the transformer in every compute mode, and on CUDA devices its GEMMs.

    Weights are random, and few blocks have weights of their own, so that GPUs with little memory
    can be measured. What the device lacks, or has no memory for, is left out with a reason.

    Args:
        device: see `ZImageTransformer.from_checkpoint`.
        workload: sizes; by default the whole Z-Image on CUDA devices, a small one on the CPU.
        progress: called with a `StageProgress`; True draws a bar on a terminal, or prints lines.

    Raises:
        UsageError: not the name of a device.
        UnsupportedError: this machine does not have the device.

    Warns:
        DeviceWarning: as from `ZImageTransformer.from_checkpoint`.
    """
    place = torch_device(device)
    report_line(place, device)
    on_gpu = place.type == "cuda"
    sizes = workload or (WHOLE if on_gpu else SMALL)
    # Before the measurements: if these fail, nothing is lost.
    commit, measured, installation = installed_commit(), _measured(place), diagnose()
    gemms = len(block_gemms(sizes.config)) * len(sizes.tokens) if on_gpu else 0
    with (
        shown(progress, analysis_bar) as callback,
        torch.cuda.device(place) if on_gpu else nullcontext(),
    ):
        attempts = Attempts(place, MODEL_COUNT + gemms, callback)
        forwards, products = Forwards(sizes, place, attempts), Gemms(sizes, place, attempts)
        forwards.measure()
        if on_gpu:
            products.measure()
    return BenchReport(
        datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        commit,
        measured,
        installation,
        sizes,
        DISTINCT_BLOCKS,
        forwards.times,
        products.times,
        attempts.missing,
    )


def _measured(place: torch.device) -> MeasuredDevice:
    if place.type != "cuda":
        return MeasuredDevice("cpu", "CPU", "", 0, "")
    found = torch.cuda.get_device_properties(place)
    capability = f"{found.major}.{found.minor}"
    return MeasuredDevice(str(place), found.name, capability, found.total_memory, driver.release())
