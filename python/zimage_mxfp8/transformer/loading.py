"""Loading of the transformer's layers from a checkpoint, block by block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..checkpoint.int8_storage import Int8Layer
from ..checkpoint.quantized_layers import damaged
from ..checkpoint.source import SourceTensor
from ..errors import CheckpointError, CudaError, InvalidArgumentError, UnsupportedError
from ..layout import SCALE_TILE_ROWS
from ..ops.codec import MXFP8Array
from ..streaming.jobs import ProgressCallback
from ..system.devices import is_out_of_host_memory
from ..zimage.layers import ZIMAGE
from ..zimage.rows import Stack
from ..zimage.table import LayerTable
from . import arithmetic
from .block import Block
from .compute import Compute
from .linear import Linear, PlainLinear, convrot_linear, quantized_linear
from .model_file import ModelFile
from .weights import TensorStream

_SCALES = " scales"  # behind the key of the codes that they belong to
_HEADROOM = 1 << 30  # bytes for a forward and for temporaries while a block is built


Sources = dict[str, list[SourceTensor]]  # of a file, to be stacked, by key
Raw = dict[str, torch.Tensor]  # the loaded tensors by key


@dataclass(frozen=True)
class LoadedWeights:
    """The parts of a transformer.

    Attributes:
        blocks: by the name of the stack.
        modulation: weight and bias of all modulated blocks' modulations, stacked in the order of
            the table's stacks.
        others: embedders, pad tokens, the final layer and projections, by tensor name.
        max_fold_error: the largest relative error that folding added to a layer.
    """

    blocks: dict[str, list[Block]]
    modulation: tuple[torch.Tensor, torch.Tensor]
    others: dict[str, torch.Tensor]
    max_fold_error: float


def load_parts(
    file: ModelFile[Any],
    device: torch.device,
    compute: Compute,
    dtype: torch.dtype,
    progress: ProgressCallback | None,
    table: LayerTable = ZIMAGE,
) -> LoadedWeights:
    """Read all weights to a device.

    Args:
        file: the opened checkpoint.
        device: where the weights go.
        compute: the compute mode of quantised layers.
        dtype: dtype of the tensors that are not quantised.
        progress: called with a `Progress` when a part has been read.
        table: the model's layers.

    Raises:
        CheckpointError: a file cannot be read, a layer to fold has NaN, one in INT8 such scales, or
            a tensor a number beyond float16's largest.
        CudaError, UnsupportedError: the device has too little memory; nothing is left on it.
    """
    if device.type == "cuda":
        _check_memory(file, device, dtype, table)
    total = sum(tensor.nbytes for tensor in file.tensors.values())
    total += sum(layer.scale.nbytes for layer in file.layers.values())
    try:
        # Other threads, which are in no such mode, write to the tensors.
        with torch.inference_mode(False), TensorStream(device, total, progress) as stream:
            return PartsLoader(file, stream, compute, dtype, table).load()
    except RuntimeError as error:
        if not is_out_of_host_memory(error):
            raise
        needed = file.nbytes(dtype.itemsize) / 2**30
        raise UnsupportedError(
            f"the {table.title} needs {needed:.1f} GiB of memory, which this "
            "machine does not have free; convert the checkpoint to MXFP8 if it is not"
        ) from None


def _check_memory(
    file: ModelFile[Any], device: torch.device, dtype: torch.dtype, table: LayerTable
) -> None:
    free = torch.cuda.mem_get_info(device)[0]
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    needed = file.nbytes(dtype.itemsize) + _HEADROOM
    if needed > free:
        raise CudaError(
            f"the {table.title} needs {needed / 2**30:.1f} GiB on {device} with what a forward "
            f"takes, and {free / 2**30:.1f} GiB are free; close other programs, run it with "
            'device="cpu", or convert the checkpoint to MXFP8 if it is not'
        )


class PartsLoader:
    """A builder of blocks from a stream of tensors, while the stream loads the next ones.

    The file and the stream may stand for tensors in memory, see `adoption.py`.
    """

    def __init__(
        self,
        file: Any,
        stream: Any,
        compute: Compute,
        dtype: torch.dtype,
        table: LayerTable,
    ) -> None:
        self._file = file
        self._stream = stream
        self._compute = compute
        self._dtype = dtype
        self._table = table
        self._worst = 0.0

    def load(self) -> LoadedWeights:
        """Build all parts."""
        counts = self._table.count_blocks(self._file.tensors)
        stacks = self._table.stacks
        names = [(s, i) for s in stacks for i in range(counts[s.count])]
        outside = [tensor for layer in self._table.outside for tensor in layer.tensors]
        groups = [self._plain_sources(outside), *(self._block_sources(*name) for name in names)]
        blocks: dict[str, list[Block]] = {stack.name: [] for stack in stacks}
        modulations: list[tuple[torch.Tensor, torch.Tensor]] = []
        loading = self._stream.start(groups[0])
        for i in range(len(groups)):
            following = self._stream.start(groups[i + 1]) if i + 1 < len(groups) else loading
            raw, loading = self._stream.finish(loading), following
            if i == 0:
                others = self._plain(raw, outside)
                continue
            stack, number = names[i - 1]
            name = f"{stack.name}.{number}."
            blocks[stack.name].append(self._block(raw, name))
            others |= self._plain(raw, self._projections(stack, number))
            if stack.modulated:
                modulations.append(self._modulation(raw, name))
        return LoadedWeights(blocks, self._stacked(modulations, others), others, self._worst)

    # ---- Tensors to read

    def _block_sources(self, stack: Stack, number: int) -> Sources:
        name, layers = f"{stack.name}.{number}.", self._table.layers_of(stack, number)
        sources = self._plain_sources(
            [name + tensor for x in layers if x.kind != "linear" for tensor in x.tensors]
        )
        for key, names in self._linears(name).items():
            sources[key] = [self._file.tensors[layer + ".weight"] for layer in names]
            if names[0] in self._file.layers:
                sources[key + _SCALES] = [self._file.layers[layer].scale for layer in names]
        return sources

    def _projections(self, stack: Stack, number: int) -> list[str]:
        return [
            f"{stack.name}.{number}.{tensor}"
            for layer in self._table.layers_of(stack, number)
            if layer.kind == "projection"
            for tensor in layer.tensors
        ]

    def _plain_sources(self, names: Sequence[str]) -> Sources:
        sources = {name: [self._file.tensors[name]] for name in names}
        for name in names:
            layer = self._file.layers.get(name.removesuffix(".weight"))
            if layer is not None:
                sources[name + _SCALES] = [layer.scale]
        return sources

    def _linears(self, name: str) -> dict[str, list[str]]:
        """Return key -> names of the layers of one `Linear` of a block; several if stacked.

        The key is the slot and the number of the `Linear` there.
        """
        linears: dict[str, list[str]] = {}
        for slot, layers in self._table.linears().items():
            names = [name + layer.name for layer in layers]
            groups = [names] if self._can_stack(names) else [[layer] for layer in names]
            linears |= {f"{slot}.{i}": group for i, group in enumerate(groups)}
        return linears

    def _can_stack(self, names: Sequence[str]) -> bool:
        """Return whether layers of the same shape can be stacked."""
        quantized = [name in self._file.layers for name in names]
        if not any(quantized):
            dtypes = {self._file.tensors[name + ".weight"].dtype for name in names}
            return len(dtypes) == 1
        if not all(quantized):
            return False
        first, *others = (self._file.layers[name] for name in names)
        same = all(layer.full_precision == first.full_precision for layer in others)
        if isinstance(first, Int8Layer):
            return same and all(layer.group == first.group for layer in others)
        return same and first.shape[0] % SCALE_TILE_ROWS == 0

    # ---- Layers from the tensors

    def _block(self, raw: Raw, name: str) -> Block:
        norms = self._table.norms()
        plain = self._plain(raw, [name + layer.weight for layer in norms])
        linears: dict[str, list[Linear]] = {slot: [] for slot in self._table.linears()}
        for key, layers in self._linears(name).items():
            of_slot = linears[key.rpartition(".")[0]]
            if key + _SCALES in raw:
                codes, scales = raw.pop(key), raw.pop(key + _SCALES)
                of_slot.append(self._quantized(codes, scales, layers))
            else:
                of_slot.append(PlainLinear(self._cast(raw.pop(key), f"{layers[0]}.weight")))
        (qkv,), (out,), (ffn_out,) = (linears[slot] for slot in ("qkv", "out", "ffn_out"))
        return Block(
            qkv,
            out,
            linears["ffn_in"],
            ffn_out,
            {layer.slot: plain[name + layer.weight] for layer in norms},
            self._file.config.n_heads,
        )

    def _modulation(self, raw: Raw, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        (layer,) = self._table.modulations()
        names = [name + tensor for tensor in layer.tensors]
        plain = self._plain(raw, names)
        weight, bias = (plain[tensor] for tensor in names)
        return weight, bias

    def _stacked(
        self, modulations: Sequence[tuple[torch.Tensor, torch.Tensor]], others: Raw
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stack all modulations along the rows; there are no rows in a model without blocks."""
        if not modulations:
            weight = others[self._table.time_embedding()[-1].weight]
            return weight.new_empty(0, weight.shape[0]), weight.new_empty(0)
        weights, biases = zip(*modulations, strict=True)
        return torch.cat(weights), torch.cat(biases)

    def _quantized(
        self, codes: torch.Tensor, scales: torch.Tensor, layers: Sequence[str]
    ) -> Linear:
        rows = sum(self._file.layers[layer].shape[0] for layer in layers)
        first = self._file.layers[layers[0]]
        compute: Compute = "weight-only" if first.full_precision else self._compute
        if isinstance(first, Int8Layer):
            self._check_scales(scales, layers)
            return convrot_linear(codes, scales, first.group, compute, self._dtype)
        try:
            linear, stats = quantized_linear(codes, scales, rows, compute, self._dtype)
        except InvalidArgumentError as error:  # NaN among the codes or scales
            raise damaged(self._file.path, layers, error) from None
        if stats is not None:
            self._worst = max(self._worst, stats.relative_error)
        return linear

    def _check_scales(self, scales: torch.Tensor, layers: Sequence[str]) -> None:
        if not (scales.isfinite() & (scales > 0)).all():
            raise damaged(self._file.path, layers, "it has scales that are not finite and positive")

    def _plain(self, raw: Raw, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return tensors by name, decoded if they are quantised."""
        plain = {}
        for name in names:
            tensor = raw[name]
            if name + _SCALES in raw:
                tensor = self._decode(tensor, raw[name + _SCALES], name.removesuffix(".weight"))
            plain[name] = self._cast(tensor, name)
        return plain

    def _cast(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """Return a plain tensor in the model's dtype."""
        cast = tensor.to(self._dtype)
        if self._dtype == torch.float16 and (cast.isinf() & tensor.isfinite()).any():
            raise CheckpointError(
                f'{self._file.path}: tensor "{name}" has {float(tensor.abs().max()):g}, and the '
                "largest number of float16 is 65504",
                'use `dtype="bfloat16"`',
            )
        return cast

    def _decode(self, codes: torch.Tensor, scales: torch.Tensor, name: str) -> torch.Tensor:
        """Return the weights of a layer in float32."""
        layer = self._file.layers[name]
        if isinstance(layer, Int8Layer):
            self._check_scales(scales, [name])
            return convrot_linear(codes, scales, layer.group, "weight-only", self._dtype).decode()
        encoded = MXFP8Array(codes, scales, layer.shape)
        return arithmetic.on(codes.device).dequantize(encoded, torch.float32)
