"""Forwards with adapters and with a ControlNet on a CUDA device, next to those without.

All weights are synthetic, of the full size, which needs 30 GB of disk. Adapters are on every linear
of all blocks; their weights change between the timed forwards, outside the time. `ratio` is the
median of the forward over that of the forward without, measured in turns. `change` is how far the
output is from the one without, relative to it: not 0, so the branch did run. `error` is how far it
is from the output of a model that computes adapters apart from its GEMMs, by torch's operations.
`peak_gb` is the peak of a forward without a CUDA graph, weights and adapters included. The
ControlNet has the tensors of 2.1.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import torch

import zimage_mxfp8 as zm
from zimage_mxfp8.checkpoint.synthetic import write_synthetic_checkpoint
from zimage_mxfp8.transformer.linear import FP8Linear, Int8Linear, WeightOnlyLinear
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
    "error": "of the output, relative to adapters apart",
    "peak_gb": "GB of device memory",
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


def sample_of(model: ZImageTransformer, inputs: Inputs, **options: object) -> torch.Tensor:
    sample: torch.Tensor = model(*inputs, return_dict=False, **options)[0][0]
    return sample


def allocated_by(call: Callable[[], object]) -> int:
    """Return the peak bytes that a call allocates on the device."""
    free()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def relative_difference(output: torch.Tensor, other: torch.Tensor) -> float:
    return float((output.float() - other.float()).norm() / other.float().norm())


class Turns:
    """Times forwards in one compute mode next to those without an addition."""

    def __init__(self, plain: ZImageTransformer, arguments: argparse.Namespace, report: Report):
        self.plain, self.report = plain, report
        self.sides, self.repeats = arguments.sides, arguments.repeats
        self._plain_gb: dict[int, float] = {}

    def measure(
        self,
        name: str,
        added_nbytes: int,
        forward: Callable[[Inputs, int], torch.Tensor],
        prepare: Callable[[int], object] = lambda _: None,
        apart: Callable[[Inputs], torch.Tensor] | None = None,
    ) -> None:
        """Report an addition.

        Args:
            name: of the addition.
            added_nbytes: device memory that it takes between forwards.
            forward: gets inputs and the number of its turn, and has run with none of these inputs.
            prepare: gets the number of the turn before each forward.
            apart: computes what `forward` does in turn 0 in another way.
        """
        for side in self.sides:
            inputs = random_inputs(side, 1, 128)
            calls = {
                "nothing": lambda _, i=inputs: sample_of(self.plain, i),
                name: lambda turn, i=inputs: forward(i, turn),
            }
            prepare(0)
            if side not in self._plain_gb:
                self._plain_gb[side] = self._gb(lambda c=calls: c["nothing"](0))
            peaks = {"nothing": self._plain_gb[side]}
            peaks[name] = self._gb(lambda c=calls: c[name](0)) + added_nbytes / 1e9
            ms = in_turns(calls, self.repeats, prepare)
            prepare(0)
            before, after = (call(0) for call in calls.values())
            change = relative_difference(after, before)
            figures = {"ratio": ms[name] / ms["nothing"], "change": change}
            if apart is not None:
                figures["error"] = relative_difference(after, apart(inputs))
            for each, more in (("nothing", {}), (name, figures)):
                row = {"mode": self.plain.compute, "image": side, "with": each, "ms": ms[each]}
                self.report.add(**row, **more, peak_gb=peaks[each])

    def _gb(self, call: Callable[[], object]) -> float:
        """Return the peak of a forward and of the transformer's weights."""
        return (self.plain.nbytes + allocated_by(call)) / 1e9


@contextmanager
def adapters_apart() -> Iterator[None]:
    """Have layers compute adapters that are loaded meanwhile apart from their GEMMs."""
    with ExitStack() as stack:
        for kind in (FP8Linear, Int8Linear, WeightOnlyLinear):
            stack.enter_context(patch.object(kind, "takes_fused_adapters", False))
        yield


def measure_adapters(turns: Turns, file: Path) -> None:
    model, other = (
        ZImageTransformer.from_checkpoint(file, "cuda", turns.plain.compute) for _ in range(2)
    )
    for name, (count, rank) in ADAPTERS.items():
        adapters = {f"adapter{i}": random_adapter(rank, i) for i in range(count)}
        before = torch.cuda.memory_allocated()
        for each, tensors in adapters.items():
            model.load_lora(tensors, each)
        added = torch.cuda.memory_allocated() - before
        with adapters_apart():
            for each, tensors in adapters.items():
                other.load_lora(tensors, each)

        def prepare(turn: int, names: Collection[str] = adapters.keys()) -> None:
            model.set_lora(dict.fromkeys(names, 1 - 0.01 * turn))

        turns.measure(
            name,
            added,
            lambda inputs, _: sample_of(model, inputs),
            prepare,
            lambda inputs: sample_of(other, inputs),
        )
        for each in adapters:
            model.unload_lora(each)
            other.unload_lora(each)


def measure_controlnet(turns: Turns, file: Path) -> None:
    net = zm.ZImageControlNet.from_checkpoint(file, "cuda", turns.plain.compute)

    def forward(inputs: Inputs, turn: int) -> torch.Tensor:
        shape = (1, INPAINT_CHANNELS, *inputs[0][0].shape[1:])
        random = torch.Generator("cuda").manual_seed(0)
        hint = torch.randn(shape, generator=random, device="cuda", dtype=torch.bfloat16)
        control = net.control(hint, 0.75 - 0.01 * turn)
        return sample_of(turns.plain, inputs, controlnet_block_samples=control)

    turns.measure("ControlNet 2.1", net.nbytes, forward)


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
