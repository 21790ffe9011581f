"""Tables of `bench`."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from ..text import plural
from .screen import Screen, size_text

if TYPE_CHECKING:
    from ..bench.report import BenchReport, GemmTime

_Key = TypeVar("_Key", bound=Hashable)
_FORMATS = {
    "bfloat16": "BF16",
    "float16": "FP16",
    "mxfp8": "MXFP8",
    "row-scaled": "FP8",
    "int8": "INT8",
}


def print_bench(report: BenchReport, screen: Screen) -> None:
    """Print the device, the times, and what was not measured."""
    screen.text(_device(report))
    _print_forwards(report, screen)
    tokens = dict.fromkeys(gemm.m for gemm in report.gemms)
    for count in tokens:
        _print_gemms([gemm for gemm in report.gemms if gemm.m == count], count, screen)
    if report.missing:
        screen.table(
            None,
            ["not measured", "because"],
            [[f"{each.part} {each.what}", each.reason] for each in report.missing],
        )


def _device(report: BenchReport) -> str:
    device, installation = report.device, report.installation
    parts = [f"{device.name}: {plural(installation.threads, 'core')}, {installation.cpu_target}"]
    if device.memory:
        parts = [f"{device.name}: compute capability {device.capability}"]
        parts.append(size_text(device.memory))
        parts.append(f"driver {device.driver or 'unknown'}")
        parts.append(f"kernels {', '.join(installation.architectures) or 'none'}")
    parts.append(f"torch {installation.libraries.get('torch', 'unknown')}")
    commit = f" ({report.commit})" if report.commit else ""
    return ", ".join([*parts, f"zimage-mxfp8 {installation.version}{commit}", report.date])


def _print_forwards(report: BenchReport, screen: Screen) -> None:
    sizes, config = report.workload, report.workload.config
    graphs = dict.fromkeys(time.graph for time in report.forwards)
    columns = [(side, graph) for side in sizes.sides for graph in graphs]
    times: dict[tuple[str, str, str], dict[tuple[int, bool], float]] = {}
    for time in report.forwards:
        of_model = times.setdefault((time.program, time.weights, time.mode), {})
        of_model[time.side, time.graph] = time.milliseconds
    blocks = config.n_layers + 2 * config.n_refiner_layers
    screen.table(
        f"Milliseconds of one forward: width {config.dim}, {plural(blocks, 'block')} that share "
        f"the random weights of {report.distinct_blocks}, one image and {sizes.caption_tokens} "
        "caption tokens",
        [
            *("program", "weights", "mode"),
            *(f"{side}x{side}{', graph' if graph else ''}>" for side, graph in columns),
        ],
        [
            [program, _FORMATS[weights], mode or _FORMATS[weights], *_cells(of_model, columns)]
            for (program, weights, mode), of_model in times.items()
        ],
    )


def _print_gemms(gemms: list[GemmTime], tokens: int, screen: Screen) -> None:
    layers = list(dict.fromkeys(gemm.layer for gemm in gemms))
    rates: dict[tuple[str, str], dict[str, float]] = {}
    for gemm in gemms:
        fused = "" if gemm.epilogue == "none" else f", {gemm.epilogue}"
        operands = " x ".join(_FORMATS.get(name, name) for name in (gemm.a, gemm.b))
        rates.setdefault((gemm.kernel + fused, operands), {})[gemm.layer] = gemm.tflops
    screen.table(
        f"TFLOP/s of a block's GEMMs at {tokens:,} tokens, without encoding the activations",
        ["kernel", "operands", *(f"{layer}>" for layer in layers)],
        [[*way, *_cells(of_way, layers)] for way, of_way in rates.items()],
    )


def _cells(found: Mapping[_Key, float], columns: Sequence[_Key]) -> list[str]:
    return [f"{found[key]:.1f}" if key in found else "" for key in columns]
