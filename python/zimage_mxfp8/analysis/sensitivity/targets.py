"""The layers that a recipe may quantise, in a model whose weights are plain, and their rounding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ...layout import padded_shape, scale_shape
from ...transformer import arithmetic
from ...transformer.block import Block
from ...transformer.linear import PlainLinear
from ...transformer.model import ZImageTransformer

# Layer name within a block -> the module that has it, and its place among stacked ones.
_STACKED = {"w13": ("feed_forward.w1", "feed_forward.w3")}
_PLAIN = {
    "qkv": "attention.qkv",
    "out": "attention.out",
    "w1": "feed_forward.w1",
    "w3": "feed_forward.w3",
    "w2": "feed_forward.w2",
}
_MODULATION = "adaLN_modulation.0"


@dataclass(frozen=True)
class Target:
    """A linear layer.

    Attributes:
        name: of the layer in the ComfyUI layout, such as "layers.0.attention.qkv".
        stack: "layers", "noise_refiner" or "context_refiner".
        block: its number there.
        kind: "attention.qkv", "feed_forward.w1", ... or "adaLN_modulation.0".
        shape: (N, K).
        module: name of the module of the model that computes it; "" for modulations.
        rows: its rows in that module's weight, or in the stacked modulations'.
    """

    name: str
    stack: str
    block: int
    kind: str
    shape: tuple[int, int]
    module: str
    rows: tuple[int, int]

    @property
    def saved(self) -> int:
        """Bytes that MXFP8 saves, against BF16."""
        rows, columns = self.shape
        codes, scales = padded_shape(self.shape), scale_shape(self.shape)
        return 2 * rows * columns - codes[0] * codes[1] - scales[0] * scales[1]


def find_targets(model: ZImageTransformer) -> list[Target]:
    """All linear layers of the blocks, in the order of the forward pass within each stack."""
    targets = []
    modulated = 0
    for stack in ("noise_refiner", "context_refiner", "layers"):
        for number, block in enumerate(getattr(model, stack)):
            prefix = f"{stack}.{number}"
            targets += [
                Target(f"{prefix}.{kind}", stack, number, kind, shape, module, rows)
                for kind, shape, module, rows in _layers_of(block, prefix)
            ]
            if stack != "context_refiner":
                rows = (4 * model.config.dim * modulated, 4 * model.config.dim * (modulated + 1))
                shape = (rows[1] - rows[0], model.modulation.weight.shape[1])
                name = f"{prefix}.{_MODULATION}"
                targets.append(Target(name, stack, number, _MODULATION, shape, "", rows))
                modulated += 1
    return targets


def _layers_of(
    block: Block, prefix: str
) -> Iterator[tuple[str, tuple[int, int], str, tuple[int, int]]]:
    ffn = [f"ffn_in.{i}" for i in range(len(block.ffn_in))]
    keys = ["w13"] if len(ffn) == 1 else ["w1", "w3"]
    modules = {"qkv": "qkv", "out": "out", **dict(zip(keys, ffn, strict=True)), "w2": "ffn_out"}
    for key, module in modules.items():
        weight = block.get_submodule(module).weight
        assert isinstance(weight, torch.Tensor)
        kinds = _STACKED.get(key) or (_PLAIN[key],)
        rows = weight.shape[0] // len(kinds)
        for i, kind in enumerate(kinds):
            place = (i * rows, (i + 1) * rows)
            yield kind, (rows, weight.shape[1]), f"{prefix}.{module}", place


def round_to_mxfp8(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix as MXFP8 holds it, in its own dtype."""
    of_device = arithmetic.on(matrix.device)
    return of_device.dequantize(of_device.quantize(matrix), matrix.dtype)


@contextmanager
def quantized(model: ZImageTransformer, targets: Iterable[Target]) -> Iterator[None]:
    """Let layers compute as block-scaled tensor cores do: weights and activations in MXFP8.

    Of modulations the weights only, as in the compute modes. Weights are rounded when they are
    used, so that no second copy of the model is needed.
    """
    rows: dict[str, list[tuple[int, int]]] = {}
    with ExitStack() as restore:
        for target in targets:
            if target.module:
                rows.setdefault(target.module, []).append(target.rows)
            else:
                weight = model.modulation.weight[slice(*target.rows)]
                before = weight.clone()
                weight.copy_(round_to_mxfp8(weight))
                restore.callback(weight.copy_, before)
        for name, places in rows.items():
            parent, _, attribute = name.rpartition(".")
            module, layer = model.get_submodule(parent), model.get_submodule(name)
            assert isinstance(layer, PlainLinear)
            setattr(module, attribute, _RoundingLinear(layer, places))
            restore.callback(setattr, module, attribute, layer)
        yield


class _RoundingLinear(PlainLinear):
    """A layer that rounds some of its rows, and its input for them, to MXFP8."""

    def __init__(self, layer: PlainLinear, places: list[tuple[int, int]]) -> None:
        super().__init__(layer.weight, layer.bias)
        self._places = places

    def _gemm(self, x: torch.Tensor) -> torch.Tensor:
        result = super()._gemm(x)
        rounded = round_to_mxfp8(x)
        for begin, end in self._places:
            result[:, begin:end] = F.linear(rounded, round_to_mxfp8(self.weight[begin:end]))
        return result
