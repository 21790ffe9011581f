"""Transformers of full depth with random weights that few blocks have and all share.

Time depends on the sizes of the weights and hardly on their values. Two main blocks take turns, so
that more than any cache holds is read before a weight is read again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import cycle, islice
from typing import TYPE_CHECKING, TypeVar

import torch

from ..checkpoint.diffusers_config import model_config
from ..system.optional_packages import needed
from ..transformer import arithmetic
from ..transformer.adoption import AdoptedLayer, adopt_parts
from ..transformer.compute import Compute, Weights
from ..transformer.loading import LoadedWeights
from ..zimage.config import ZImageConfig
from ..zimage.layers import ZIMAGE

if TYPE_CHECKING:
    from diffusers import ZImageTransformer2DModel

_MAIN_BLOCKS, _REFINER_BLOCKS = 2, 1  # with weights of their own, of each refiner
DISTINCT_BLOCKS = _MAIN_BLOCKS + 2 * _REFINER_BLOCKS
_SPREAD = 0.02  # of the weights
_Block = TypeVar("_Block")


def random_weights(shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return a random matrix of weights; ones in place of norms and biases."""
    if len(shape) < 2:
        return torch.ones(shape, dtype=dtype, device=device)
    return torch.randn(shape, dtype=dtype, device=device).mul_(_SPREAD)


def random_tensors(
    config: ZImageConfig, weights: Weights, device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], dict[str, AdoptedLayer]]:
    """Return the tensors of the distinct blocks and of the layers outside the blocks.

    Args:
        config: sizes of the transformer.
        weights: what the linear layers of the blocks are stored in, "plain" or "mxfp8".
        device: where the tensors are.
        dtype: of plain tensors.

    Returns:
        Plain tensors and MXFP8 layers, by name.
    """
    ends = tuple(f".{x.name}.weight" for group in ZIMAGE.linears().values() for x in group)
    plain, layers = {}, {}
    for name, shape in _few_blocks(config).shapes().items():
        tensor = random_weights(shape, device, dtype)
        if weights == "mxfp8" and name.endswith(ends):
            encoded = arithmetic.on(device).quantize(tensor)
            layer = AdoptedLayer(encoded.codes, encoded.scales, encoded.shape)
            layers[name.removesuffix(".weight")] = layer
        else:
            plain[name] = tensor
    return plain, layers


def deep_parts(
    config: ZImageConfig,
    plain: Mapping[str, torch.Tensor],
    layers: Mapping[str, AdoptedLayer],
    mode: Compute,
    dtype: torch.dtype,
) -> LoadedWeights:
    """Return the parts of a transformer whose blocks share the tensors of `random_tensors`.

    Args:
        config: sizes of the transformer.
        plain: plain tensors by name.
        layers: MXFP8 layers by name.
        mode: a compute mode that the device has.
        dtype: of everything that is not 8 bits wide.
    """
    few, parts = adopt_parts(plain, layers, mode, dtype)
    blocks = {
        stack.name: _repeated(parts.blocks[stack.name], getattr(config, stack.count))
        for stack in ZIMAGE.stacks
    }

    def stacked(distinct: torch.Tensor) -> torch.Tensor:
        """Repeat the rows of modulated blocks, which are in the order of the stacks."""
        rows = iter(distinct.split(4 * config.dim))
        repeated: list[torch.Tensor] = []
        for stack in ZIMAGE.stacks:
            if stack.modulated:
                own = list(islice(rows, getattr(few, stack.count)))
                repeated += _repeated(own, getattr(config, stack.count))
        return torch.cat(repeated)

    weight, bias = parts.modulation
    return replace(parts, blocks=blocks, modulation=(stacked(weight), stacked(bias)))


def diffusers_model(
    config: ZImageConfig, device: torch.device, dtype: torch.dtype
) -> ZImageTransformer2DModel:
    """Return diffusers' transformer in a dtype, whose blocks share random weights too.

    Raises:
        MissingExtraError: diffusers is not installed, or cannot be imported.
    """
    with needed("generate", "diffusers' transformer"):
        from diffusers import ZImageTransformer2DModel

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = ZImageTransformer2DModel.from_config(model_config(_few_blocks(config)))
    finally:
        torch.set_default_dtype(before)
    for parameter in model.parameters():  # some are not initialised
        parameter.requires_grad_(False).copy_(random_weights(parameter.shape, device, dtype))
    for stack in ZIMAGE.stacks:
        blocks = _repeated(list(getattr(model, stack.name)), getattr(config, stack.count))
        setattr(model, stack.name, torch.nn.ModuleList(blocks))
    return model.eval()


def _few_blocks(config: ZImageConfig) -> ZImageConfig:
    return replace(config, n_layers=_MAIN_BLOCKS, n_refiner_layers=_REFINER_BLOCKS)


def _repeated(blocks: Sequence[_Block], count: int) -> list[_Block]:
    """Return so many blocks, which take turns."""
    return list(islice(cycle(blocks), count))
