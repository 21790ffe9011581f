"""`bench` on a CUDA device: a row for everything that the device has, a reason for the rest."""

from __future__ import annotations

import itertools

import pytest
import torch

from zimage_mxfp8 import _core
from zimage_mxfp8.bench.report import BenchReport
from zimage_mxfp8.bench.run import bench
from zimage_mxfp8.bench.workload import Workload
from zimage_mxfp8.system.devices import has_kernels
from zimage_mxfp8.transformer.compute import COMPUTE_MODES, supported
from zimage_mxfp8.zimage.config import ZImageConfig
from zimage_mxfp8.zimage.layers import zimage_shapes

SIDES = (128, 256)
SMALL = Workload(ZImageConfig.of_shapes(zimage_shapes(dim=384, layers=4)), SIDES, 64)


@pytest.fixture(scope="module")
def report() -> BenchReport:
    return bench("cuda", workload=SMALL)


def check_forwards(report: BenchReport) -> None:
    modes = supported(torch.cuda.current_device())
    wanted = {("zimage-mxfp8", mode, graph) for mode in ["", *modes] for graph in (False, True)}
    wanted.add(("diffusers", "", False))
    found = [(row.program, row.mode, row.graph, row.side) for row in report.forwards]
    assert sorted(found) == sorted((*x, side) for x, side in itertools.product(wanted, SIDES))
    left_out = {each.what for each in report.missing if each.part == "forward"}
    assert left_out == set(COMPUTE_MODES) - set(modes)


@pytest.mark.gpu
def test_every_mode_and_kernel(report: BenchReport) -> None:
    check_forwards(report)
    missing = {each.what for each in report.missing if each.part == "gemm"}
    kernels = {kernel.name for kernel in _core.gemm_kernels()} - {"reference"}
    measured = {row.kernel for row in report.gemms} - {"torch linear"}
    assert missing.isdisjoint(measured)
    assert missing | measured == kernels | {"torch._scaled_mm", "torch._int_mm"}
    rows = [(row.kernel, row.layer, row.m) for row in report.gemms if row.epilogue == "none"]
    plain = {kernel for kernel, *_ in rows}
    wanted = itertools.product(plain, ("qkv", "out", "w1+w3", "w2"), SMALL.tokens)
    assert set(rows) == set(wanted)
    fused = {(row.epilogue, row.layer) for row in report.gemms if row.epilogue != "none"}
    assert fused <= {("rotate_heads", "qkv"), ("silu_multiply", "w1+w3")}


@pytest.mark.gpu(kernels=False)
def test_every_mode_without_kernels(report: BenchReport) -> None:
    assert not has_kernels(torch.cuda.current_device())
    check_forwards(report)
    assert "kernels of this package" in {each.what for each in report.missing}
