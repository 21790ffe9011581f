"""Forwards with adapters and with a ControlNet on a CUDA device, next to those without.

All weights are synthetic, of the full size, which needs 30 GB of disk. Adapters are on every linear
of all blocks; their weights change between the timed forwards, outside the time. `ratio` is the
median of the forward over that of the forward without, measured in turns. `change` is how far the
output is from the one without, relative to it: not 0, so the branch did run. The ControlNet has the
tensors of 2.1.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

import zimage_mxfp8 as zm
from zimage_mxfp8.checkpoint.synthetic import write_synthetic_checkpoint
from zimage_mxfp8.transformer.model import ZImageTransformer
from zimage_mxfp8.zimage.control import CONTROLNET, INPAINT_CHANNELS
from zimage_mxfp8.zimage.layers import zimage_shapes

from ..layers import LINEARS, MODULATIONS
from ..report import Report
from .transformer import MODES, Inputs, free, modes, random_inputs

COLUMNS = {
    "mode": "",
    "image": "pixels of a side",
    "with": "",
    "ms": "ms, median",
    "ratio": "to the forward without",
    "change": "of the output, relative",
}
ADAPTERS = {"1 adapter of rank 32": (1, 32), "2 adapters of rank 64": (2, 64)}
_CONTROL_BLOCKS, _CONTROL_REFINER_BLOCKS = 15, 2  # of Fun-Controlnet-Union 2.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "zimage-mxfp8")
    parser.add_argument("--sides", type=int, nargs="+", default=[1024, 512])
    parser.add_argument("--repeats", type=int, default=10, help="timed forwards")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--only", choices=("adapters", "controlnet"), help="one kind of addition")


def random_adapter(rank: int, seed: int) -> dict[str, torch.Tensor]:
    """Return an adapter on every linear of the blocks. Both of its factors are random."""
    random = torch.Generator("cuda").manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random, device="cuda", dtype=torch.bfloat16).cpu()

    adapter = {}
    for name, shape in zimage_shapes().items():
        layer = name.removesuffix(".weight")
        if not (name.endswith(".weight") and layer.endswith((*LINEARS, *MODULATIONS))):
            continue
        adapter[f"diffusion_model.{layer}.lora_A.weight"] = randn(rank, shape[1]) * shape[1] ** -0.5
        adapter[f"diffusion_model.{layer}.lora_B.weight"] = randn(shape[0], rank) * 0.02
    return adapter


def in_turns(
    calls: dict[str, Callable[[int], object]], repeats: int, prepare: Callable[[int], object]
) -> dict[str, float]:
    """Return the median milliseconds of each call, which gets the number of its turn.

    `prepare` gets it before each call, and is not timed.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    ways = list(calls.items())
    for turn in range(repeats + 3):
        first = turn % len(ways)  # each way leaves the device at other clocks for the next
        for name, call in (*ways[first:], *ways[:first]):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            prepare(turn)
            torch.cuda.synchronize()
            begin.record()
            call(turn)
            end.record()
            end.synchronize()
            if turn >= 3:
                times[name].append(begin.elapsed_time(end))
    return {name: statistics.median(each) for name, each in times.items()}


class Turns:
    """Times forwards in one compute mode next to those without an addition."""

    def __init__(self, plain: ZImageTransformer, arguments: argparse.Namespace, report: Report):
        self.plain, self.report = plain, report
        self.sides, self.repeats = arguments.sides, arguments.repeats

    def measure(
        self,
        name: str,
        forward: Callable[[Inputs, int], torch.Tensor],
        prepare: Callable[[int], object] = lambda _: None,
    ) -> None:
        for side in self.sides:
            inputs = random_inputs(side, 1, 128)
            calls = {
                "nothing": lambda _, i=inputs: self.plain(*i, return_dict=False)[0][0],
                name: lambda turn, i=inputs: forward(i, turn),
            }
            ms = in_turns(calls, self.repeats, prepare)
            before, after = (call(0).float() for call in calls.values())
            change = float((after - before).norm() / before.norm())
            for each, figures in (
                ("nothing", {}),
                (name, {"ratio": ms[name] / ms["nothing"], "change": change}),
            ):
                row = {"mode": self.plain.compute, "image": side, "with": each, "ms": ms[each]}
                self.report.add(**row, **figures)


def measure_adapters(turns: Turns, file: Path) -> None:
    model = ZImageTransformer.from_checkpoint(file, "cuda", turns.plain.compute)
    for name, (count, rank) in ADAPTERS.items():
        names = [f"adapter{i}" for i in range(count)]
        for i, each in enumerate(names):
            model.load_lora(random_adapter(rank, i), each)

        def forward(inputs: Inputs, _: int) -> torch.Tensor:
            return model(*inputs, return_dict=False)[0][0]

        def prepare(turn: int, names: list[str] = names) -> None:
            model.set_lora(dict.fromkeys(names, 1 - 0.01 * turn))

        turns.measure(name, forward, prepare)
        for each in names:
            model.unload_lora(each)


def measure_controlnet(turns: Turns, file: Path) -> None:
    net = zm.ZImageControlNet.from_checkpoint(file, "cuda", turns.plain.compute)

    def forward(inputs: Inputs, turn: int) -> torch.Tensor:
        shape = (1, INPAINT_CHANNELS, *inputs[0][0].shape[1:])
        random = torch.Generator("cuda").manual_seed(0)
        hint = torch.randn(shape, generator=random, device="cuda", dtype=torch.bfloat16)
        control = net.control(hint, 0.75 - 0.01 * turn)
        sample = turns.plain(*inputs, controlnet_block_samples=control, return_dict=False)
        return sample[0][0]

    turns.measure("ControlNet 2.1", forward)


def run(arguments: argparse.Namespace, report: Report) -> None:
    arguments.folder.mkdir(parents=True, exist_ok=True)
    file = converted(arguments.folder, "mxfp8-30", zimage_shapes())
    for mode in modes(arguments.modes):
        free()
        turns = Turns(ZImageTransformer.from_checkpoint(file, "cuda", mode), arguments, report)
        if arguments.only != "controlnet":
            measure_adapters(turns, file)
            free()
        if arguments.only != "adapters":
            measure_controlnet(turns, _controlnet(arguments.folder))


def _controlnet(folder: Path) -> Path:
    sizes = {"dim": 3840, "patch": 4 * INPAINT_CHANNELS}
    counts = {"n_layers": _CONTROL_BLOCKS, "n_refiner_layers": _CONTROL_REFINER_BLOCKS}
    return converted(folder, "mxfp8-control", CONTROLNET.shapes(sizes, counts))


def converted(folder: Path, name: str, shapes: dict[str, tuple[int, ...]]) -> Path:
    file = folder / f"{name}.safetensors"
    if not file.exists():
        plain = folder / "plain.safetensors"
        write_synthetic_checkpoint(plain, shapes, overwrite=True)
        zm.convert(plain, file, overwrite=True)
        plain.unlink()
    return file
