"""The quantizer itself: which layers it replaces, and when."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from diffusers import ZImageTransformer2DModel
from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from torch import nn

from ..checkpoint import quantization as markers
from ..checkpoint.diffusers_config import QUANT_METHOD
from ..checkpoint.header import read_header
from ..conversion.recipes import DEFAULT, Recipe
from ..errors import CheckpointError, UnsupportedError, UsageError
from ..transformer.compute import Compute
from ..zimage.layers import ZIMAGE
from .config import ZImageMXFP8Config
from .linear import MXFP8Linear, check_finite, plain_linear


def register() -> None:
    """Enter the quantizer in diffusers' tables."""
    AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = ZImageMXFP8Quantizer
    AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = ZImageMXFP8Config


def quantize_(
    transformer: ZImageTransformer2DModel,
    recipe: str | os.PathLike[str] | Recipe = DEFAULT,
    exclude_layers: Iterable[str] = (),
    compute: Compute = "weight-only",
) -> None:
    """Quantise the linear layers of a transformer in place, on the device where they are.

        quantize_(pipe.transformer, recipe="zimage")

    Codes and scales are those of `zimage_mxfp8.convert`; biases are not corrected.

    Args:
        transformer: diffusers' own class, with weights in bfloat16, float16 or float32.
        recipe: see `ZImageMXFP8Config`.
        exclude_layers: see there.
        compute: see there.

    Raises:
        UsageError: an invalid argument, a transformer that is quantised already, or a recipe that
            keeps every layer.
        UnsupportedError: another model, or one with adapters or offloaded weights.
        NonFiniteError: weights have NaN or infinity; the sentence names the layer.

    The transformer is unchanged after an error.
    """
    config = ZImageMXFP8Config(recipe, exclude_layers, compute)
    if getattr(transformer, "is_quantized", False):
        raise UsageError("transformer", "is quantised already", "load it without a quantizer")
    quantizer = ZImageMXFP8Quantizer(config, pre_quantized=False)
    _check_model(transformer)
    if any(parameter.is_meta for parameter in transformer.parameters()):
        raise UnsupportedError(
            "a transformer with offloaded weights cannot be quantised", "quantise it before"
        )
    for name in sorted(layers_to_quantize(transformer, config.rules)):
        check_finite(transformer.get_submodule(name).weight, name)
    quantizer.preprocess_model(transformer)
    for name in sorted(quantizer.layers):
        quantizer.replace(transformer, name, transformer.get_submodule(name).weight)
    quantizer.postprocess_model(transformer)
    transformer.hf_quantizer = quantizer
    transformer.register_to_config(quantization_config=config)


class ZImageMXFP8Quantizer(DiffusersQuantizer):  # type: ignore[misc]
    """The quantizer that diffusers makes for a `ZImageMXFP8Config`.

    Attributes:
        layers: names of the layers in MXFP8, in diffusers' layout.
    """

    layers: frozenset[str]

    def __init__(self, quantization_config: ZImageMXFP8Config, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.layers = frozenset()
        self._full_precision: frozenset[str] = frozenset()
        self._shapes: dict[str, tuple[int, int]] = {}

    # ---- Loading, in the order of the calls

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        """Return the dtype of everything that is not quantised, bfloat16 by default."""
        return torch.bfloat16 if torch_dtype is None else torch_dtype

    def maybe_update_loaded_keys(
        self, loaded_keys: list[str], checkpoint_files: list[str]
    ) -> list[str]:
        """Learn from a quantised folder which layers are."""
        if self.pre_quantized:
            suffix = markers.SCALE_SUFFIX
            self.layers = frozenset(
                key.removesuffix(suffix) for key in loaded_keys if key.endswith(suffix)
            )
            self._full_precision = _full_precision_layers(checkpoint_files)
        return loaded_keys

    @property
    def supports_parallel_loading(self) -> bool:
        """No: a layer is replaced while its weight is loaded, and its bias may be elsewhere."""
        return bool(self.pre_quantized)

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        _check_model(model)
        if not self.pre_quantized:
            self.layers = layers_to_quantize(model, self.quantization_config.rules)
            return
        if not self.layers:
            raise CheckpointError(
                "config.json names the quantizer zimage_mxfp8, but no tensor is called "
                f'"...{markers.SCALE_SUFFIX}": the weights are not quantised',
                "take quantization_config out of config.json, or quantise the model again",
            )
        for name in sorted(self.layers):
            linear = _linear_of(model, name)
            _put(model, name, MXFP8Linear.without_data(linear, name in self._full_precision))

    def adjust_target_dtype(self, torch_dtype: torch.dtype) -> torch.dtype:  # noqa: ARG002
        """Return the dtype by which accelerate estimates memory: one byte per weight."""
        return torch.int8

    def check_if_quantized_param(
        self,
        model: nn.Module,  # noqa: ARG002 - of the interface
        param_value: torch.Tensor,
        param_name: str,
        state_dict: Mapping[str, torch.Tensor],
        **_: Any,
    ) -> bool:
        """Return whether `create_quantized_param` stores a tensor."""
        layer, tensor = _split(param_name)
        stored = state_dict.get(param_name, param_value)
        if layer in self.layers:
            if self.pre_quantized and tensor == "weight" and stored.dtype != torch.float8_e4m3fn:
                raise CheckpointError(
                    f'"{param_name}" is {stored.dtype}, not float8_e4m3fn codes; '
                    "save the model again"
                )
            return tensor == "weight" or (self.pre_quantized and tensor == "weight_scale")
        if stored.dtype.itemsize == 1:
            raise CheckpointError(
                f'"{param_name}" is {stored.dtype} and has no scales',
                "quantise the original model",
            )
        return False

    def check_quantized_param_shape(
        self, param_name: str, current_param: Any, loaded_param: Any
    ) -> bool:
        """Raise for a tensor of another shape than the model's."""
        wanted = getattr(current_param, "shape", current_param)
        found = getattr(loaded_param, "shape", loaded_param)
        raise CheckpointError(
            f'"{param_name}" is {list(found)}, and the model has {list(wanted)} there',
            "use the config.json that belongs to the weights",
        )

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: torch.Tensor,
        param_name: str,
        target_device: torch.device,
        state_dict: Mapping[str, torch.Tensor],
        unexpected_keys: list[str] | None = None,  # noqa: ARG002 - of the interface
        **_: Any,
    ) -> None:
        """Store codes or scales of a quantised folder, or quantise a weight."""
        name, tensor = _split(param_name)
        # Not `param_value`, which is rounded to the dtype of what is not quantised.
        stored = state_dict.get(param_name, param_value).to(target_device)
        if not self.pre_quantized:
            self.replace(model, name, stored)
            return
        layer = model.get_submodule(name)
        data = stored.contiguous().view(torch.uint8)
        if tensor == "weight":
            layer.weight = nn.Parameter(data, requires_grad=False)
        else:
            layer.weight_scale = data

    def replace(self, model: nn.Module, name: str, weight: torch.Tensor) -> None:
        """Put a quantised layer in the place of a plain one, with the given weights."""
        linear, rules = _linear_of(model, name), self.quantization_config.rules
        rounded = weight.bfloat16() if rules.source_rounding else weight
        _put(model, name, MXFP8Linear.quantized(rounded, linear.bias, name))

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for name, layer in _quantized_layers(model).items():
            self._shapes[name] = layer.out_features, layer.in_features
            layer.set_compute(self.quantization_config.compute, name)
        model.fuse_lora = MethodType(_refuse_to_fuse, model)
        return model

    # ---- Afterwards

    def get_state_dict_and_metadata(
        self,
        state_dict: dict[str, Any],
        safe_serialization: bool = False,  # noqa: ARG002 - of the interface
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return tensors and header metadata for `save_pretrained`.

        Raises:
            UnsupportedError: the model has adapters.
        """
        weights = {name + markers.WEIGHT_SUFFIX for name in self.layers}
        if lacking := sorted(weights - state_dict.keys()):
            raise UnsupportedError(
                f'the model has no "{lacking[0]}": adapters are loaded',
                "unload them before you save it (unload_lora_weights)",
            )
        tensors = {
            key: x.view(torch.float8_e4m3fn) if key in weights else x
            for key, x in state_dict.items()
        }
        described = {
            name: markers.layer_marker(
                self._shapes[name], full_precision=name in self._full_precision
            )
            for name in sorted(self.layers)
        }
        return tensors, {markers.HEADER_KEY: markers.header_value(described)}

    def _dequantize(self, model: Any) -> Any:
        for name, layer in _quantized_layers(model).items():
            _put(model, name, plain_linear(layer, model.dtype))
        del model.fuse_lora
        kept = {key: x for key, x in model.config.items() if key != "quantization_config"}
        model._internal_dict = FrozenDict(kept)  # what `config` returns
        return model

    @property
    def is_serializable(self) -> bool:
        """Yes, by `save_pretrained`."""
        return True

    @property
    def is_trainable(self) -> bool:
        """No: operations on 8-bit matrices have no derivatives."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Yes: the operations are registered with torch.library."""
        return True


def layers_to_quantize(model: nn.Module, recipe: Recipe) -> frozenset[str]:
    """Return the linear layers, in diffusers' layout, that a recipe does not keep.

    Its patterns are searched in ComfyUI's names: what it keeps of `attention.qkv` is kept of
    `to_q`, `to_k` and `to_v`.

    Raises:
        UsageError: that is none.
    """
    found = frozenset(
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and not any(
            rule.matches(ZIMAGE.from_diffusers(name + markers.WEIGHT_SUFFIX)[0], "")
            for rule in recipe.keep
        )
    )
    if not found:
        raise UsageError("recipe", "keeps every layer", "choose another `recipe`")
    return found


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, ZImageTransformer2DModel):
        raise UnsupportedError(
            f"{type(model).__name__} cannot be quantised by zimage_mxfp8.diffusers, which is for "
            "ZImageTransformer2DModel",
            "use ZImageMXFP8Config for the transformer only",
        )
    if any(".base_layer" in name for name, _ in model.named_modules()):
        raise UnsupportedError(
            "a transformer with adapters cannot be quantised",
            "unload them first (unload_lora_weights), and load them again afterwards",
        )


def _split(name: str) -> tuple[str, str]:
    """Return the module that a tensor or a module is in, and its name there."""
    above, _, own = name.rpartition(".")
    return above, own


def _quantized_layers(model: nn.Module) -> dict[str, MXFP8Linear]:
    return {name: x for name, x in model.named_modules() if isinstance(x, MXFP8Linear)}


def _put(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Replace a submodule, without `set_submodule`, which torch has from 2.5 on only."""
    above, own = _split(name)
    setattr(model.get_submodule(above), own, layer)


def _linear_of(model: nn.Module, name: str) -> nn.Linear:
    try:
        linear = model.get_submodule(name)
    except AttributeError:
        linear = None
    if not isinstance(linear, nn.Linear):
        raise CheckpointError(
            f'"{name}" is quantised, and the model has no linear layer of that name',
            "use the config.json that belongs to the weights",
        )
    return linear


def _full_precision_layers(files: Iterable[str | os.PathLike[str]]) -> frozenset[str]:
    """Return the layers with inputs that must not be quantised, as the files' headers say."""
    found: set[str] = set()
    for file in map(Path, files):
        if file.suffix != ".safetensors":
            continue
        value = read_header(file).metadata.get(markers.HEADER_KEY, "")
        layers = markers.header_layers(value) or {}
        found |= {
            name
            for name, entry in layers.items()
            if isinstance(entry, dict) and entry.get(markers.FULL_PRECISION_KEY)
        }
    return frozenset(found)


def _refuse_to_fuse(_: nn.Module, *__: Any, **___: Any) -> None:
    """Stand for `fuse_lora`, which would add to the codes."""
    raise UnsupportedError(
        "adapters cannot be fused into MXFP8 weights",
        "leave them loaded, or merge them into the original's weights with zimage_mxfp8.convert",
    )
