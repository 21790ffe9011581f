"""Linear layers, one class per way to multiply."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import InvalidArgumentError, PrecisionLossError
from ..ops import gemm_epilogues
from ..ops.codec import MXFP8Array
from ..ops.fused import ActivationFormat
from ..ops.gemm import FoldStats, Int8Array, RowScaledArray
from ..ops.low_rank import LowRankAddend
from ..system import devices
from . import arithmetic, fused_kernels, ops
from .adapter import Adapter, FusedAdapter
from .arithmetic import float16, int8
from .compute import Compute
from .epilogue import Epilogue
from .floating_dtype import sums_dtype
from .ops import PLAIN, Activation, pad_columns


class Linear(nn.Module):
    """Base class of linear layers.

    Forward hooks see the result of `forward`, which is after the epilogue if there is one.

    Attributes:
        out_features: N.
        dtype: dtype of the model.
        weight_format: how the weights are stored, for tables.
        adapter: a branch that is added to the result, or None.
        is_in_range: whether all results fit in float16. Those of other layers are in float32 in a
            model of float16.
    """

    weight_format: str
    adapter: Adapter | None
    _input_format: ActivationFormat = PLAIN

    def __init__(self, out_features: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features = out_features
        self.dtype = dtype
        self.adapter = None
        self.is_in_range = False

    @property
    def result_dtype(self) -> torch.dtype:
        """Dtype of the result."""
        return self.dtype if self.is_in_range else sums_dtype(self.dtype)

    @property
    def input_formats(self) -> frozenset[ActivationFormat]:
        """All formats in which `forward` needs its input."""
        own = frozenset({self._input_format})
        return own if self.adapter is None else own | self.adapter.input_formats

    def encode(self, *parts: torch.Tensor) -> Activation:
        """Encode a matrix [M, K], in one part or two side by side, as `forward` takes it."""
        return ops.encode_joined(parts, self.input_formats)

    def forward(self, activation: Activation, epilogue: Epilogue | None = None) -> Any:
        """Multiply, and apply an epilogue.

        Args:
            activation: [M, K] in all `input_formats`.
            epilogue: the operation that follows.

        Returns:
            [M, N] in `result_dtype`, or the result of the epilogue.
        """
        x = activation[self._input_format]
        fused = self._fused_adapter
        addend = None if fused is None else fused.addend(x)
        if epilogue is not None and self.takes_epilogues:
            return self._gemm_with(epilogue, x, addend)
        result = self._gemm(x) if addend is None else self._gemm_low_rank(x, addend)
        if self.adapter is not None and addend is None:
            result = self.adapter(activation, result)
        return result if epilogue is None else epilogue.apply(result)

    def part(self, rows: slice) -> Linear | None:
        """Return a layer that computes some columns of the result, from the same weights.

        It is for one forward: it does not follow changes of this layer.

        Args:
            rows: of the weights, [begin, end), both multiples of 128.

        Returns:
            None if there is an adapter, hooks expect the whole result, or such weights have no
            parts.
        """
        has_hooks = self._forward_hooks or self._forward_pre_hooks or "forward" in self.__dict__
        if self.adapter is not None or has_hooks:
            return None
        part = self._part(rows)
        if part is not None:
            part.is_in_range = self.is_in_range
        return part

    @property
    def takes_epilogues(self) -> bool:
        """Whether `forward` computes GEMM and epilogue in one call of the core."""
        return self.adapter is self._fused_adapter and self._core_takes_epilogues

    @property
    def takes_fused_adapters(self) -> bool:
        """Whether the layer's GEMM can add a low-rank addend."""
        return False

    def workspace_nbytes(self, tokens: int, epilogue: Epilogue | None = None) -> int:
        """Return the bytes that `forward` takes on CUDA in addition to its input and result.

        With an epilogue the result is the epilogue's if `takes_epilogues`, else the GEMM's.
        """
        if epilogue is not None and self.takes_epilogues:
            return self._epilogue_workspace_nbytes(tokens, epilogue)
        nbytes = self._gemm_workspace_nbytes(tokens)
        if self.adapter is None:
            return nbytes
        of_adapter = self.adapter.workspace_nbytes(tokens)
        return max(nbytes, of_adapter) if self._fused_adapter is None else nbytes + of_adapter

    def decode(self) -> torch.Tensor:
        """Return the weights as float32 [N, K], where K may be padded with zeros."""
        raise NotImplementedError

    def _part(self, rows: slice) -> Linear | None:  # noqa: ARG002 - for subclasses
        """Return a layer of some rows of the weights, see `part`."""
        return None

    def _gemm(self, x: Any) -> torch.Tensor:
        """Multiply [M, K] in the layer's own format: [M, N]."""
        raise NotImplementedError

    def _gemm_low_rank(self, x: Any, addend: LowRankAddend) -> torch.Tensor:
        """Multiply and add a low-rank addend, if `takes_fused_adapters`."""
        raise NotImplementedError

    def _gemm_with(self, epilogue: Epilogue, x: Any, addend: LowRankAddend | None) -> Any:
        """Multiply and apply an epilogue, if `_core_takes_epilogues`."""
        raise NotImplementedError

    @property
    def _fused_adapter(self) -> FusedAdapter | None:
        """The adapter, if the layer's GEMM adds it."""
        return self.adapter if isinstance(self.adapter, FusedAdapter) else None

    @property
    def _core_takes_epilogues(self) -> bool:
        return False

    def _epilogue_workspace_nbytes(self, tokens: int, epilogue: Epilogue) -> int:
        raise NotImplementedError

    def _gemm_workspace_nbytes(self, tokens: int) -> int:  # noqa: ARG002 - for subclasses
        return 0

    def _multiply_plain(
        self, x: torch.Tensor, gemm: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Multiply activations that are not quantised [M, K]; in float16 within its range."""
        if self.dtype != torch.float16:
            return gemm(x)
        return float16.multiply(x, gemm, self.result_dtype)

    def _plain_workspace_nbytes(self, tokens: int, shape: tuple[int, int]) -> int:
        """Return the bytes that `_multiply_plain` takes on CUDA, without those of `gemm`."""
        if self.dtype != torch.float16:
            return 0
        return float16.workspace(tokens, shape, self.result_dtype)


class PlainLinear(Linear):
    """A layer with weights that are not quantised."""

    weight_format = "plain"
    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """Take weights [N, K] and a bias [N]."""
        super().__init__(weight.shape[0], weight.dtype)
        # A parameter, because offloading reads the device of the model's first one.
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("bias", bias)

    def decode(self) -> torch.Tensor:
        """Return the weights as float32 [N, K]."""
        return self.weight.detach().float()

    def _part(self, rows: slice) -> PlainLinear:
        bias = None if self.bias is None else self.bias[rows]
        return PlainLinear(self.weight[rows], bias)

    def _gemm(self, x: torch.Tensor) -> torch.Tensor:
        if self.dtype != torch.float16:
            return F.linear(x, self.weight, self.bias)
        multiply = partial(F.linear, weight=self.weight)
        return float16.multiply(x, multiply, self.result_dtype, self.bias)

    def _gemm_workspace_nbytes(self, tokens: int) -> int:
        rows, columns = self.weight.shape
        return self._plain_workspace_nbytes(tokens, (rows, columns))


class _MXFP8Linear(Linear):
    """A layer with weights in MXFP8, including their padding of zeros to multiples of 32."""

    codes: torch.Tensor
    scales: torch.Tensor

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor, n: int, dtype: torch.dtype):
        super().__init__(n, dtype)
        # As bytes, which nn.Module.to(dtype) leaves alone.
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    def decode(self) -> torch.Tensor:
        """Return the weights as float32 [N, K], with K padded to a multiple of 32."""
        return ops.decode(self.weights, "mxfp8")[: self.out_features]

    @property
    def _shape(self) -> tuple[int, int]:
        """Rows and columns of the weights, with padding."""
        rows, columns = self.codes.shape
        return rows, columns

    @property
    def weights(self) -> MXFP8Array:
        """[N, K], with padding to multiples of 32 of both."""
        return MXFP8Array(self.codes, self.scales, self._shape)

    def _rows(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Return codes and scales of multiples of 128 rows, a row of tiles of scales each."""
        return self.codes[rows], self.scales[rows]


class WeightOnlyLinear(_MXFP8Linear):
    """A layer that decodes its weights exactly, with activations that are not quantised."""

    weight_format = "mxfp8 (weight-only)"

    @property
    def takes_fused_adapters(self) -> bool:
        """Whether the layer's GEMM can add a low-rank addend: on Hopper, in bfloat16."""
        device = self.codes.device
        return (
            self.dtype == torch.bfloat16
            and self._shape[0] == self.out_features
            and devices.has_fused_kernels(device)
            and arithmetic.by_core.takes_addends(device.index, "bfloat16", "mxfp8")
        )

    def _part(self, rows: slice) -> WeightOnlyLinear:
        codes, scales = self._rows(rows)
        return WeightOnlyLinear(codes, scales, len(codes), self.dtype)

    def _gemm_low_rank(self, x: torch.Tensor, addend: LowRankAddend) -> torch.Tensor:
        return fused_kernels.gemm_low_rank(pad_columns(x, self._shape[1]), self.weights, addend)

    def _gemm(self, x: torch.Tensor) -> torch.Tensor:
        multiply = partial(arithmetic.on(x.device).multiply_weight_only, weights=self.weights)
        out = self._multiply_plain(pad_columns(x, self._shape[1]), multiply)
        return out[:, : self.out_features]

    def _gemm_workspace_nbytes(self, tokens: int) -> int:
        decoded = arithmetic.on(self.codes.device).weight_only_workspace(self._shape, self.dtype)
        return decoded + self._plain_workspace_nbytes(tokens, self._shape)


class BlockScaledLinear(_MXFP8Linear):
    """A layer that multiplies MXFP8 weights with MXFP8 activations."""

    weight_format = "mxfp8"
    _input_format: ActivationFormat = "mxfp8"

    def __init__(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        n: int,
        dtype: torch.dtype,
        emulated: bool,
    ) -> None:
        super().__init__(codes, scales, n, dtype)
        self._emulated = emulated

    def _part(self, rows: slice) -> BlockScaledLinear:
        codes, scales = self._rows(rows)
        return BlockScaledLinear(codes, scales, len(codes), self.dtype, self._emulated)

    def _gemm(self, x: MXFP8Array) -> torch.Tensor:
        a = MXFP8Array(x.codes, x.scales, (x.shape[0], self._shape[1]))
        of_device = arithmetic.on(self.codes.device)
        multiply = of_device.multiply_decoded if self._emulated else of_device.multiply_mxfp8
        return multiply(a, self.weights, self.result_dtype)[:, : self.out_features]

    def _gemm_workspace_nbytes(self, tokens: int) -> int:
        if not self._emulated:
            return 0
        device = self.codes.device
        of_device = arithmetic.on(device)
        return of_device.decoded_workspace(tokens, self._shape, self.result_dtype, device)


class _RowScaledLinear(Linear):
    """A layer with 8-bit codes and one scale per row; activations have one per token.

    With kernels the core computes epilogues after the GEMM in the same call (see `gemm_epilogues`).
    """

    codes: torch.Tensor
    scale_bits: torch.Tensor
    _operands: ActivationFormat  # of the GEMM

    def __init__(
        self, codes: torch.Tensor, scales: torch.Tensor, n: int, dtype: torch.dtype
    ) -> None:
        super().__init__(n, dtype)
        self._planned_shape: tuple[int, int] | None = None
        self.register_buffer("codes", codes)
        # As integers, which nn.Module.to(dtype) leaves alone.
        self.register_buffer("scale_bits", scales.view(torch.int32))

    @property
    def weights(self) -> Any:
        """[N, K], with the padding that it was given."""
        raise NotImplementedError

    @property
    def _shape(self) -> tuple[int, int]:
        """Rows and columns of the weights, with padding."""
        rows, columns = self.codes.shape
        return rows, columns

    def _gemm(self, x: Any) -> torch.Tensor:
        multiply = arithmetic.on(self.codes.device).multiply_row_scaled
        return multiply(x, self.weights, self.result_dtype)[:, : self.out_features]

    def _gemm_workspace_nbytes(self, tokens: int) -> int:
        if self._fused_adapter is not None:
            return 0
        device = self.codes.device
        of_device = arithmetic.on(device)
        return of_device.row_scaled_workspace(
            self._operands, tokens, self._shape, self.result_dtype, device
        )

    def _gemm_with(self, epilogue: Epilogue, x: Any, addend: LowRankAddend | None) -> Any:
        kernel = None
        if self._planned_shape is not None:
            kernel, _ = self._plan(len(x.codes), epilogue, self._planned_shape)
        return epilogue.gemm(x, self.weights, addend, kernel)

    def _gemm_low_rank(self, x: Any, addend: LowRankAddend) -> torch.Tensor:
        return fused_kernels.gemm_low_rank(x, self.weights, addend)

    @property
    def takes_fused_adapters(self) -> bool:
        """Whether the layer's GEMM can add a low-rank addend: on Hopper, in bfloat16."""
        operands = self._operands
        return self._core_takes_epilogues and arithmetic.by_core.takes_addends(
            self.codes.device.index, operands, operands
        )

    @property
    def _core_takes_epilogues(self) -> bool:
        codes = self.codes
        return (
            self.dtype == torch.bfloat16
            and len(codes) == self.out_features
            and codes.is_cuda
            and arithmetic.by_core.takes_epilogues(codes.get_device(), self._operands)
        )

    def _epilogue_workspace_nbytes(self, tokens: int, epilogue: Epilogue) -> int:
        fused = self._fused_adapter
        nbytes = 0 if fused is None else fused.workspace_nbytes(tokens)
        return nbytes + self._plan(tokens, epilogue, self._shape)[1]

    def _plan(self, tokens: int, epilogue: Epilogue, shape: tuple[int, int]) -> tuple[str, int]:
        """Return the kernel for weights of a shape, and the bytes of its workspace."""
        fused, index = self._fused_adapter, self.codes.device.index
        rank = 0 if fused is None else fused.rank
        written = epilogue.written_format
        return gemm_epilogues.plan(
            epilogue.name, self._operands, tokens, shape, written, index, rank
        )

    def _part(self, rows: slice) -> Linear | None:
        part = self._with_rows(rows)
        if part is not None:
            # Another kernel may round in other places than that of the whole.
            part._planned_shape = self._shape
        return part

    def _with_rows(self, rows: slice) -> _RowScaledLinear | None:  # noqa: ARG002 - for subclasses
        """Return a layer of some rows of the weights, None if there is none."""
        return None


class FP8Linear(_RowScaledLinear):
    """A layer with weights in E4M3 and one power of two per row; activations are scaled per token.

    On Hopper its kernel has the epilogues and low-rank addends inside.
    """

    weight_format = "fp8"
    _input_format: ActivationFormat = "row-scaled"
    _operands: ActivationFormat = "row-scaled"

    def __init__(self, weights: RowScaledArray, n: int, dtype: torch.dtype) -> None:
        super().__init__(weights.codes.view(torch.uint8), weights.scales, n, dtype)

    @property
    def weights(self) -> RowScaledArray:
        """[N, K], with padding to multiples of 32 of both."""
        return RowScaledArray(self.codes, self.scale_bits.view(torch.float32))

    def _with_rows(self, rows: slice) -> FP8Linear:
        whole = self.weights
        part = RowScaledArray(whole.codes[rows], whole.scales[rows])
        return FP8Linear(part, len(part.codes), self.dtype)

    def decode(self) -> torch.Tensor:
        """Return the folded weights as float32 [N, K], with K padded to a multiple of 32."""
        return ops.decode(self.weights, "row-scaled")[: self.out_features]


class _Int8Linear(_RowScaledLinear):
    """A layer with weights in INT8 and one scale per row, see `arithmetic.int8`."""

    _operands: ActivationFormat = "int8"

    @property
    def weights(self) -> Int8Array:
        """[N, K], with the padding that it was given."""
        return Int8Array(self.codes, self.scale_bits.view(torch.float32))


class Int8Linear(_Int8Linear):
    """A layer in INT8 whose activations are rotated and rounded too, with one scale per token."""

    weight_format = "int8 (rotated)"
    _input_format: ActivationFormat = "int8"

    @classmethod
    def from_mxfp8(cls, weights: MXFP8Array, n: int, dtype: torch.dtype) -> Int8Linear:
        """Encode weights in MXFP8 [N, K], with padding to multiples of 32 of both.

        Raises:
            InvalidArgumentError: NaN among them.
        """
        of_device = arithmetic.on(weights.codes.device)
        encoded = int8.encode_weights(weights, of_device.dequantize, of_device.quantize_int8)
        if not encoded.scales.isfinite().all():
            raise InvalidArgumentError("the matrix has NaN among its codes or scales")
        return cls(encoded.codes, encoded.scales, n, dtype)

    def _with_rows(self, rows: slice) -> Int8Linear:
        codes, scales = self.codes[rows], self.weights.scales[rows]
        return Int8Linear(codes, scales, len(codes), self.dtype)

    def decode(self) -> torch.Tensor:
        """Return the weights as float32 [N, K], rotated back, with K as it is stored."""
        return ops.decode(self.weights, "int8")[: self.out_features]


class _ConvrotLinear(_Int8Linear):
    """A layer of an INT8 ConvRot file, which may be rotated in another way than activations are."""

    rotation: torch.Tensor

    def __init__(self, weights: Int8Array, rotation: torch.Tensor, dtype: torch.dtype) -> None:
        """Take weights [N, K], and the signs of the matrix that rotated them."""
        super().__init__(weights.codes, weights.scales, len(weights.codes), dtype)
        self.register_buffer("rotation", rotation)

    def decode(self) -> torch.Tensor:
        """Return the weights as float32 [N, K], rotated back."""
        return int8.decode(self.weights, self.rotation)

    @property
    def _core_takes_epilogues(self) -> bool:
        return False  # it would have to encode the input in a way of its own


class ConvrotLinear(_ConvrotLinear):
    """A layer in INT8 whose activations are rotated as the file's weights and rounded."""

    weight_format = "int8 (rotated)"

    def _gemm(self, x: torch.Tensor) -> torch.Tensor:
        return super()._gemm(int8.encode(x, self.rotation))

    def _gemm_workspace_nbytes(self, tokens: int) -> int:
        encoding = int8.encoding_workspace(tokens, self._shape[1])
        return encoding + super()._gemm_workspace_nbytes(tokens)


class ConvrotWeightOnlyLinear(_ConvrotLinear):
    """A layer in INT8 that decodes its weights, with activations that are not quantised."""

    weight_format = "int8 (weight-only)"

    def _gemm(self, x: torch.Tensor) -> torch.Tensor:
        multiply = partial(int8.multiply_weight_only, weights=self.weights, signs=self.rotation)
        return self._multiply_plain(x, multiply)

    def _gemm_workspace_nbytes(self, tokens: int) -> int:
        decoded = int8.weight_only_workspace(tokens, self._shape)
        return decoded + self._plain_workspace_nbytes(tokens, self._shape)


def convrot_linear(
    codes: torch.Tensor, scales: torch.Tensor, group: int, compute: Compute, dtype: torch.dtype
) -> Linear:
    """Return the layer for weights that a file stores in INT8.

    Args:
        codes: int8 [N, K].
        scales: float32 [N, 1].
        group: columns that were rotated together; 1 if they were not.
        compute: "int8" or "weight-only".
        dtype: dtype of the activations and results that are not encoded.
    """
    weights = Int8Array(codes, scales.flatten())
    signs = int8.regular_hadamard(group).to(codes.device)
    layer = ConvrotLinear if compute == "int8" else ConvrotWeightOnlyLinear
    return layer(weights, signs, dtype)


def quantized_linear(
    codes: torch.Tensor, scales: torch.Tensor, n: int, compute: Compute, dtype: torch.dtype
) -> tuple[Linear, FoldStats | None]:
    """Return the layer for a compute mode, and the change by folding.

    A layer with scales that cannot be folded within the bound of `fold` is weight-only.

    Args:
        codes: E4M3 bytes [roundup(N, 32), roundup(K, 32)].
        scales: E8M0 bytes in the blocked layout.
        n: N.
        compute: the mode.
        dtype: dtype of the activations and results that are not encoded.
    """
    if compute == "weight-only":
        return WeightOnlyLinear(codes, scales, n, dtype), None
    if compute == "int8":
        rows, columns = codes.shape
        return Int8Linear.from_mxfp8(MXFP8Array(codes, scales, (rows, columns)), n, dtype), None
    if compute != "fp8":
        return BlockScaledLinear(codes, scales, n, dtype, compute == "mxfp8-emulated"), None
    rows, columns = codes.shape
    try:
        folded, stats = arithmetic.on(codes.device).fold(MXFP8Array(codes, scales, (rows, columns)))
    except PrecisionLossError:
        return WeightOnlyLinear(codes, scales, n, dtype), None
    return FP8Linear(folded, n, dtype), stats
