"""Models around weights that another program has loaded, without copying the 8-bit ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ..errors import CheckpointError
from ..layout import MXFP8_BLOCK
from ..ops.codec import MXFP8Array, to_blocked
from ..ops.gemm import RowScaledArray
from ..zimage.config import ZImageConfig
from ..zimage.control import REFINER, ControlConfig, control_table
from ..zimage.layers import ZIMAGE
from ..zimage.table import LayerTable
from . import arithmetic
from .compute import Compute
from .control import ZImageControlNet
from .linear import FP8Linear, Linear
from .loading import LoadedWeights, PartsLoader
from .model import ZImageTransformer

_BIAS_OF_E8M0 = 127


@dataclass(frozen=True)
class AdoptedLayer:
    """An MXFP8 layer in memory.

    Attributes:
        codes: float8_e4m3fn or bytes [roundup(N, 32), roundup(K, 32)], contiguous.
        scale: E8M0 bytes in the 128x4 blocked layout, contiguous.
        shape: [N, K] before padding.
        full_precision: whether its input must not be quantised.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    shape: tuple[int, int]
    full_precision: bool = False


def adopt(
    plain: Mapping[str, torch.Tensor],
    layers: Mapping[str, AdoptedLayer],
    compute: Compute,
    dtype: torch.dtype,
    *,
    cuda_graphs: bool = True,
) -> ZImageTransformer:
    """Return a transformer that computes with the given tensors.

    It shares the memory of the 8-bit weights. w1 and w3 of a block are stacked without a copy if
    one follows the other in memory, codes and scales. In mode "fp8" weights that are shared are
    folded in place: codes and scales stay valid MXFP8, of the folded weights from then on.

    Args:
        plain: tensors that are not quantised, by name in ComfyUI's layout, on one device.
        layers: MXFP8 layers by name, on that device.
        compute: one of `IN_PLACE_MODES`, which the device has.
        dtype: bfloat16, float16 or float32, of everything that is not 8 bits wide.
        cuda_graphs: see `ZImageTransformer.from_checkpoint`.

    Raises:
        CheckpointError: a tensor of Z-Image's is missing, or a layer to fold has NaN.
    """
    config, parts = adopt_parts(plain, layers, compute, dtype)
    return ZImageTransformer(config, parts, compute, dtype, cuda_graphs)


def adopt_parts(
    plain: Mapping[str, torch.Tensor],
    layers: Mapping[str, AdoptedLayer],
    compute: Compute,
    dtype: torch.dtype,
) -> tuple[ZImageConfig, LoadedWeights]:
    """Return the sizes and parts of the transformer that `adopt` makes.

    Args:
        plain: see `adopt`.
        layers: likewise.
        compute: a mode that the device has; those not in `IN_PLACE_MODES` make weights of their
            own.
        dtype: see `adopt`.

    Raises:
        CheckpointError: as for `adopt`.
    """
    config = ZImageConfig.of_shapes(_shapes(plain, layers))
    model = _Model(plain, layers, config, ZIMAGE)
    shared = {x.data_ptr() for layer in layers.values() for x in (layer.codes, layer.scale)}
    return config, _Loader(model, compute, dtype, shared).load()


def adopt_control(
    plain: Mapping[str, torch.Tensor], dtype: torch.dtype, *, trained_refiner: bool
) -> ZImageControlNet:
    """Return a ControlNet that computes with the given tensors, none of them quantised.

    It shares the memory of weights that are in `dtype`, as `adopt` does, but for modulations.

    Args:
        plain: tensors by name in ComfyUI's layout, on one device.
        dtype: bfloat16, float16 or float32.
        trained_refiner: see `ControlConfig.of_shapes`.

    Raises:
        CheckpointError: a tensor of the ControlNet is missing.
    """
    config = ControlConfig.of_shapes(
        _shapes(plain, {}), control_table(plain), trained_refiner=trained_refiner
    )
    unused = () if config.n_refiner_layers else (f"{REFINER}.",)
    used = {name: x for name, x in plain.items() if not name.startswith(unused)}
    model = _Model(used, {}, config, config.table)
    parts = _Loader(model, "weight-only", dtype, set()).load()
    return ZImageControlNet(config, parts, "weight-only", dtype)


def _shapes(
    plain: Mapping[str, torch.Tensor], layers: Mapping[str, AdoptedLayer]
) -> dict[str, tuple[int, ...]]:
    shapes = {name: tuple(tensor.shape) for name, tensor in plain.items()}
    return shapes | {f"{name}.weight": layer.shape for name, layer in layers.items()}


class _Model:
    """The tensors, as a `PartsLoader` sees those of a file."""

    path = "the loaded model"

    def __init__(
        self,
        plain: Mapping[str, torch.Tensor],
        layers: Mapping[str, AdoptedLayer],
        config: ZImageConfig | ControlConfig,
        table: LayerTable,
    ) -> None:
        self.config, self.table = config, table
        self.layers = {
            name: replace(x, codes=x.codes.view(torch.uint8), scale=x.scale.view(torch.uint8))
            for name, x in layers.items()
        }
        present = {**plain, **{f"{name}.weight": x.codes for name, x in self.layers.items()}}
        wanted = table.expected_shapes(_shapes(plain, layers))
        if lacking := [name for name in wanted if name not in present]:
            raise CheckpointError(f'{self.path} has no "{lacking[0]}"')
        self.tensors = {name: present[name] for name in wanted}


class _Adopted:
    """A stream of tensors that are there already."""

    def start(self, stacks: Mapping[str, Sequence[torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {key: _joined([x.detach() for x in parts]) for key, parts in stacks.items()}

    def finish(self, loading: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return loading


class _Loader(PartsLoader):
    def __init__(
        self,
        model: _Model,
        compute: Compute,
        dtype: torch.dtype,
        shared: set[int],
    ) -> None:
        super().__init__(model, _Adopted(), compute, dtype, model.table)
        self._shared = shared  # addresses of codes and scales

    def _quantized(
        self, codes: torch.Tensor, scales: torch.Tensor, layers: Sequence[str]
    ) -> Linear:
        linear = super()._quantized(codes, scales, layers)
        in_place = {codes.data_ptr(), scales.data_ptr()} <= self._shared
        if not isinstance(linear, FP8Linear) or not in_place:
            return linear
        folded = _store_folded(linear.weights, codes, scales)
        return FP8Linear(folded, linear.out_features, linear.dtype)


def fold_in_place(codes: torch.Tensor, scales: torch.Tensor) -> RowScaledArray:
    """Fold weights into the memory that they are in, which then holds valid MXFP8 of the result.

    Args:
        codes: E4M3 bytes [roundup(N, 32), roundup(K, 32)], contiguous.
        scales: E8M0 bytes in the blocked layout, contiguous.

    Returns:
        The same codes, with the scales per row.

    Raises:
        PrecisionLossError: the change is above the bound of `ops.gemm.fold`; nothing is written.
        InvalidArgumentError: there is NaN among the codes or scales.
    """
    rows, columns = codes.shape
    folded, _ = arithmetic.on(codes.device).fold(MXFP8Array(codes, scales, (rows, columns)))
    return _store_folded(folded, codes, scales)


def _store_folded(
    folded: RowScaledArray, codes: torch.Tensor, scales: torch.Tensor
) -> RowScaledArray:
    codes.copy_(folded.codes.view(torch.uint8))
    exponents = torch.log2(folded.scales).to(torch.int32) + _BIAS_OF_E8M0
    blocks = exponents.to(torch.uint8)[:, None].expand(-1, codes.shape[1] // MXFP8_BLOCK)
    scales.copy_(to_blocked(blocks.cpu().contiguous()).view(scales.shape))
    return RowScaledArray(codes, folded.scales)


def follow(tensors: Sequence[torch.Tensor]) -> bool:
    """Return whether each tensor follows the one before in the same piece of memory."""
    first = tensors[0].untyped_storage().data_ptr()
    ends = [tensor.data_ptr() + tensor.nbytes for tensor in tensors[:-1]]
    return ends == [tensor.data_ptr() for tensor in tensors[1:]] and all(
        tensor.is_contiguous() and tensor.untyped_storage().data_ptr() == first
        for tensor in tensors
    )


def _joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Stack along axis 0; a view if each follows the one before in memory."""
    if not follow(tensors):
        return torch.cat(list(tensors))
    first, rows = tensors[0], sum(len(tensor) for tensor in tensors)
    return first.as_strided((rows, *first.shape[1:]), first.stride())
