"""Building the transformer's layers from a checkpoint, block by block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..checkpoint.source import SourceTensor
from ..errors import CheckpointError, CudaError, InvalidArgumentError, UnsupportedError
from ..ops.codec import MXFP8Array
from ..streaming.jobs import ProgressCallback
from ..system.devices import is_out_of_host_memory
from . import arithmetic
from .block import Block
from .compute import Compute
from .linear import Linear, PlainLinear, quantized_linear
from .weights import ModelFile, TensorStream

_SCALE_ROWS = 128  # rows of a tile of scales: stacked matrices have a multiple of it
_NORMS = {
    "q_norm": "attention.q_norm.weight",
    "k_norm": "attention.k_norm.weight",
    "attention_norm1": "attention_norm1.weight",
    "attention_norm2": "attention_norm2.weight",
    "ffn_norm1": "ffn_norm1.weight",
    "ffn_norm2": "ffn_norm2.weight",
}
_MODULATION = "adaLN_modulation.0"
_OTHERS = (
    "x_embedder.weight",
    "x_embedder.bias",
    "cap_embedder.0.weight",
    "cap_embedder.1.weight",
    "cap_embedder.1.bias",
    "t_embedder.mlp.0.weight",
    "t_embedder.mlp.0.bias",
    "t_embedder.mlp.2.weight",
    "t_embedder.mlp.2.bias",
    "x_pad_token",
    "cap_pad_token",
    "final_layer.linear.weight",
    "final_layer.linear.bias",
    "final_layer.adaLN_modulation.1.weight",
    "final_layer.adaLN_modulation.1.bias",
)
_SCALES = " scales"  # behind the key of the codes that they belong to
_HEADROOM = 1 << 30  # bytes for a forward and for what a block needs while it is made


Sources = dict[str, list[SourceTensor]]  # of a file, to be stacked, by key
Raw = dict[str, torch.Tensor]  # the same as they came


@dataclass(frozen=True)
class LoadedWeights:
    """What a transformer consists of.

    Attributes:
        blocks: by stack ("noise_refiner", "context_refiner", "layers").
        modulation: weight and bias of all modulated blocks' modulations, stacked in the order of
            "noise_refiner", then "layers".
        others: embedders, pad tokens and the final layer, by tensor name.
        max_fold_error: the largest relative error that folding added to a layer.
    """

    blocks: dict[str, list[Block]]
    modulation: tuple[torch.Tensor, torch.Tensor]
    others: dict[str, torch.Tensor]
    max_fold_error: float


def load_parts(
    file: ModelFile,
    device: torch.device,
    compute: Compute,
    dtype: torch.dtype,
    progress: ProgressCallback | None,
) -> LoadedWeights:
    """Read all weights to a device.

    Raises:
        CheckpointError: a file cannot be read, or a layer that is to be folded has NaN.
        CudaError, UnsupportedError: the device has too little memory; nothing is left on it.
    """
    if device.type == "cuda":
        _check_memory(file, device, dtype)
    total = sum(tensor.nbytes for tensor in file.tensors.values())
    total += sum(layer.scale.nbytes for layer in file.layers.values())
    try:
        with TensorStream(device, total, progress) as stream:
            return _Loader(file, stream, compute, dtype).load()
    except RuntimeError as error:
        if not is_out_of_host_memory(error):
            raise
        raise UnsupportedError(
            f"the transformer needs {file.nbytes(dtype) / 2**30:.1f} GiB of memory, which this "
            "machine does not have free; convert the checkpoint to MXFP8 if it is not"
        ) from None


def _check_memory(file: ModelFile, device: torch.device, dtype: torch.dtype) -> None:
    free = torch.cuda.mem_get_info(device)[0]
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    needed = file.nbytes(dtype) + _HEADROOM
    if needed > free:
        raise CudaError(
            f"the transformer needs {needed / 2**30:.1f} GiB on {device} with what a forward "
            f"takes, and {free / 2**30:.1f} GiB are free; close other programs, run it with "
            'device="cpu", or convert the checkpoint to MXFP8 if it is not'
        )


class _Loader:
    """Makes blocks of what a stream brings, while it brings the next ones."""

    def __init__(
        self, file: ModelFile, stream: TensorStream, compute: Compute, dtype: torch.dtype
    ) -> None:
        self._file = file
        self._stream = stream
        self._compute = compute
        self._dtype = dtype
        self._worst = 0.0

    def load(self) -> LoadedWeights:
        config = self._file.config
        counts = {
            "noise_refiner": config.n_refiner_layers,
            "context_refiner": config.n_refiner_layers,
            "layers": config.n_layers,
        }
        names = [(stack, f"{stack}.{i}.") for stack, count in counts.items() for i in range(count)]
        groups = [self._plain_sources(_OTHERS), *(self._block_sources(*name) for name in names)]
        blocks: dict[str, list[Block]] = {stack: [] for stack in counts}
        weights, biases = [], []
        loading = self._stream.start(groups[0])
        for i, group in enumerate(groups):
            following = self._stream.start(groups[i + 1]) if i + 1 < len(groups) else loading
            raw, loading = self._stream.finish(loading), following
            if i == 0:
                others = self._plain(raw, _OTHERS)
                # No rows, for a model without blocks.
                weights.append(others["final_layer.adaLN_modulation.1.weight"][:0])
                biases.append(others["final_layer.adaLN_modulation.1.bias"][:0])
                continue
            stack, name = names[i - 1]
            blocks[stack].append(self._block(raw, name))
            if name + _MODULATION + ".weight" in group:
                modulation = self._plain(raw, _modulation_names(name))
                weights.append(modulation[name + _MODULATION + ".weight"])
                biases.append(modulation[name + _MODULATION + ".bias"])
        return LoadedWeights(blocks, (torch.cat(weights), torch.cat(biases)), others, self._worst)

    # ---- What to read

    def _block_sources(self, stack: str, name: str) -> Sources:
        plain = [name + tensor for tensor in _NORMS.values()]
        if stack != "context_refiner":
            plain += _modulation_names(name)
        sources = self._plain_sources(plain)
        for key, layers in self._stacks(name).items():
            sources[key] = [self._file.tensors[layer + ".weight"] for layer in layers]
            if layers[0] in self._file.layers:
                sources[key + _SCALES] = [self._file.layers[layer].scale for layer in layers]
        return sources

    def _plain_sources(self, names: Sequence[str]) -> Sources:
        sources = {name: [self._file.tensors[name]] for name in names}
        for name in names:
            layer = self._file.layers.get(name.removesuffix(".weight"))
            if layer is not None:
                sources[name + _SCALES] = [layer.scale]
        return sources

    def _stacks(self, name: str) -> dict[str, list[str]]:
        """A block's linear layers, some of which are several of the file side by side."""
        ffn = name + "feed_forward."
        pair = [ffn + "w1", ffn + "w3"]
        return {
            "qkv": [name + "attention.qkv"],
            "out": [name + "attention.out"],
            **({"w13": pair} if self._can_stack(pair) else {"w1": pair[:1], "w3": pair[1:]}),
            "w2": [ffn + "w2"],
        }

    def _can_stack(self, names: Sequence[str]) -> bool:
        """Whether layers of the same shape can be one."""
        quantized = [name in self._file.layers for name in names]
        if not any(quantized):
            dtypes = {self._file.tensors[name + ".weight"].dtype for name in names}
            return len(dtypes) == 1
        if not all(quantized):
            return False
        first, *others = (self._file.layers[name] for name in names)
        same = all(layer.full_precision == first.full_precision for layer in others)
        return same and first.shape[0] % _SCALE_ROWS == 0

    # ---- What becomes of it

    def _block(self, raw: Raw, name: str) -> Block:
        norms = self._plain(raw, [name + tensor for tensor in _NORMS.values()])
        linears: dict[str, Linear] = {}
        for key, layers in self._stacks(name).items():
            if key + _SCALES in raw:
                codes, scales = raw.pop(key), raw.pop(key + _SCALES)
                linears[key] = self._quantized(codes, scales, layers)
            else:
                linears[key] = PlainLinear(raw.pop(key).to(self._dtype))
        return Block(
            linears["qkv"],
            linears["out"],
            [linears[key] for key in ("w13", "w1", "w3") if key in linears],
            linears["w2"],
            {key: norms[name + tensor] for key, tensor in _NORMS.items()},
            self._file.config.n_heads,
        )

    def _quantized(
        self, codes: torch.Tensor, scales: torch.Tensor, layers: Sequence[str]
    ) -> Linear:
        rows = sum(self._file.layers[layer].shape[0] for layer in layers)
        full = self._file.layers[layers[0]].full_precision
        compute: Compute = "weight-only" if full else self._compute
        try:
            linear, stats = quantized_linear(codes, scales, rows, compute, self._dtype)
        except InvalidArgumentError as error:  # NaN among the codes or scales
            raise CheckpointError(
                f'{self._file.checkpoint.path}: layer "{" and ".join(layers)}" is damaged: '
                f"{error}; zimage-mxfp8 validate says more"
            ) from None
        if stats is not None:
            self._worst = max(self._worst, stats.relative_error)
        return linear

    def _plain(self, raw: Raw, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Tensors by name, decoded where they are quantised."""
        plain = {}
        for name in names:
            tensor = raw[name]
            if name + _SCALES in raw:
                shape = self._file.layers[name.removesuffix(".weight")].shape
                encoded = MXFP8Array(tensor, raw[name + _SCALES], shape)
                tensor = arithmetic.on(tensor.device).dequantize(encoded, torch.float32)
            plain[name] = tensor.to(self._dtype)
        return plain


def _modulation_names(block: str) -> list[str]:
    return [f"{block}{_MODULATION}.weight", f"{block}{_MODULATION}.bias"]
