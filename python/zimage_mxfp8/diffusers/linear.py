"""The linear layer that replaces torch's in diffusers' transformer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import (
    InvalidArgumentError,
    NonFiniteError,
    PrecisionLossError,
    UnsupportedError,
    UsageError,
)
from ..layout import padded_shape, scale_shape
from ..ops.codec import MXFP8Array
from ..ops.gemm import RowScaledArray
from ..transformer import arithmetic
from ..transformer.adoption import fold_in_place
from ..transformer.compute import IN_PLACE_MODES, Compute
from ..transformer.ops import pad_columns


class MXFP8Linear(nn.Linear):
    """A linear layer with weights in MXFP8; made by the quantizer and by `quantize_`.

    It derives from torch's class, so that offloading and PEFT find it. Codes and scales are bytes
    in memory, which `to(dtype)` leaves alone; `save_pretrained` writes codes as float8_e4m3fn.

    Attributes:
        weight: codes, uint8 [roundup(N, 32), roundup(K, 32)], a parameter without gradient.
        weight_scale: E8M0 bytes in the 128x4 blocked layout, uint8.
        bias: [N], or None.
        compute: the compute mode.
        full_precision: whether its input must not be quantised, whatever the mode.
    """

    compute: Compute
    weight_scale: torch.Tensor
    row_scale_bits: torch.Tensor  # of folded weights, in mode "fp8" only

    def __init__(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        shape: tuple[int, int],
        bias: nn.Parameter | None,
        *,
        full_precision: bool = False,
    ) -> None:
        """Take codes and scales of a matrix [N, K], as bytes; the mode is "weight-only"."""
        nn.Module.__init__(self)  # torch's class would make weights
        self.out_features, self.in_features = shape
        self.weight = nn.Parameter(codes.view(torch.uint8), requires_grad=False)
        self.register_buffer("weight_scale", scales.view(torch.uint8))
        self.register_parameter("bias", bias)
        self.compute = "weight-only"
        self.full_precision = full_precision

    @classmethod
    def quantized(cls, weight: torch.Tensor, bias: nn.Parameter | None, name: str) -> MXFP8Linear:
        """Encode weights [N, K] of bfloat16, float16 or float32.

        Raises:
            NonFiniteError: they have NaN or infinity; the sentence has the layer's name.
        """
        check_finite(weight, name)
        rows, columns = weight.shape
        padded = pad_columns(weight.detach(), padded_shape((rows, columns))[1])
        array = arithmetic.on(weight.device).quantize(padded)
        return cls(array.codes, array.scales, (rows, columns), bias)

    @classmethod
    def without_data(cls, linear: nn.Linear, full_precision: bool) -> MXFP8Linear:
        """Return the quantised layer of a plain one's size, on the meta device."""
        shape = linear.out_features, linear.in_features
        codes, scales = (
            torch.empty(size, dtype=torch.uint8, device="meta")
            for size in (padded_shape(shape), scale_shape(shape))
        )
        return cls(codes, scales, shape, linear.bias, full_precision=full_precision)

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """The dtype of its input, which diffusers' embedder of the timestep asks for."""
        return None if self.bias is None else self.bias.dtype

    def set_compute(self, compute: Compute, name: str) -> None:
        """Change the compute mode; see the function of this name."""
        foldable = compute == "fp8" and not self.full_precision and self._fold(name)
        weight_only = self.full_precision or (compute == "fp8" and not foldable)
        self.compute = "weight-only" if weight_only else compute

    def decode(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weights [N, K]."""
        decoded = arithmetic.on(self.weight.device).dequantize(self._weights, dtype)
        return decoded[: self.out_features, : self.in_features]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply [..., K] with the weights, in the compute mode: [..., N]."""
        rows = pad_columns(x.reshape(-1, self.in_features), self.weight.shape[1])
        result = self._multiply(rows)[:, : self.out_features]
        if self.bias is not None:
            result = result + self.bias
        return result.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Describe the layer."""
        return f"{super().extra_repr()}, compute={self.compute}"

    @property
    def _weights(self) -> MXFP8Array:
        rows, columns = self.weight.shape
        return MXFP8Array(self.weight.detach(), self.weight_scale, (rows, columns))

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        of_device = arithmetic.on(x.device)
        if self.compute == "weight-only":
            return of_device.multiply_weight_only(x, self._weights)
        if self.compute == "fp8":
            scales = self.row_scale_bits.view(torch.float32)
            weights = RowScaledArray(self.weight.detach(), scales)
            return of_device.multiply_row_scaled(of_device.quantize_rows(x), weights, x.dtype)
        emulated = self.compute == "mxfp8-emulated"
        multiply = of_device.multiply_decoded if emulated else of_device.multiply_mxfp8
        return multiply(of_device.quantize(x), self._weights, x.dtype)

    def _fold(self, name: str) -> bool:
        """Fold the weights in place; False if that would change them too much."""
        if self.weight.is_meta:
            raise UnsupportedError(
                f'the weights of "{name}" are offloaded and cannot be folded for mode fp8',
                "call set_compute before offloading",
            )
        try:
            folded = fold_in_place(self.weight.data, self.weight_scale)
        except PrecisionLossError:
            return False
        except InvalidArgumentError as error:  # NaN among the codes or scales
            raise InvalidArgumentError(
                f'layer "{name}" is damaged: {error}; quantise the model again'
            ) from None
        # As integers, which `to(dtype)` leaves alone.
        bits = folded.scales.view(torch.int32)
        self.register_buffer("row_scale_bits", bits, persistent=False)
        return True

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.compute == "fp8":
            self.set_compute("fp8", prefix.removesuffix("."))


def check_finite(weight: torch.Tensor, name: str) -> None:
    """Check the weights [N, K] of a layer of this name.

    Raises:
        NonFiniteError: they have NaN or infinity.
    """
    finite = weight.detach().isfinite()
    if not finite.all():
        row, column = (~finite).nonzero()[0].tolist()
        value = "NaN" if weight[row, column].isnan() else "infinity"
        raise NonFiniteError(f'"{name}.weight" has {value} at [{row}, {column}]', row, column)


def check_compute(compute: str) -> Compute:
    """Return a compute mode.

    Raises:
        UsageError: it is none.
    """
    modes = {str(mode): mode for mode in IN_PLACE_MODES}
    if not isinstance(compute, str) or compute not in modes:
        raise UsageError("compute", f"must be {', '.join(modes)}, not {repr(compute)[:80]}")
    return modes[compute]


def set_compute(model: nn.Module, compute: Compute) -> None:
    """Change the compute mode of a quantised transformer's layers.

        set_compute(pipe.transformer, "fp8")

    In mode "fp8" the weights are folded in place: codes and scales stay valid MXFP8, of the folded
    weights from then on, also in other modes and in files. A layer that cannot be folded within the
    bound of `fold` stays weight-only. Whether the device has the mode shows when the model runs.

    Args:
        model: a transformer in memory, from the quantizer or `quantize_`.
        compute: "weight-only", "fp8", "mxfp8" or "mxfp8-emulated".

    Raises:
        UsageError: no such mode, or the model has no quantised layers.
        UnsupportedError: weights to fold are offloaded.
    """
    mode = check_compute(compute)
    layers = {name: x for name, x in model.named_modules() if isinstance(x, MXFP8Linear)}
    if not layers:
        raise UsageError("model", "has no layers in MXFP8", "call quantize_ first")
    for name, layer in layers.items():
        layer.set_compute(mode, name)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.quantization_config.compute = mode


def plain_linear(layer: MXFP8Linear, dtype: torch.dtype) -> nn.Linear:
    """Return a layer of torch's with the decoded weights."""
    linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(layer.decode(dtype), requires_grad=False)
    linear.bias = layer.bias
    return linear
