"""The core's MXFP8 functions as a backend of comfy-kitchen, the library that ComfyUI computes with.

Names and arguments are those of comfy-kitchen's backends (0.2.31 to 0.2.40). Results equal those of
its eager backend bit for bit for finite BF16 and F16 input, but for blocks below 2^-118, which it
divides by zero. In F32 its logarithm may round a maximum just above 448 * 2^n to the scale below.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

from ..errors import MissingExtraError
from ..layout import MXFP8_BLOCK, scale_shape
from ..ops import codec
from ..ops.codec import MXFP8Array
from ..ops.gemm import gemm
from ..system.devices import has_kernels, native_gemm_unsupported

NAME = "zimage_mxfp8"
SWITCH = "ZIMAGE_MXFP8_COMFY_BACKEND"  # environment variable; 0 leaves comfy-kitchen as it is
_MIN_GEMM_CAPABILITY = (10, 0)  # of a device with block-scaled tensor cores


def quantize_mxfp8(x: torch.Tensor, pad_32x: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode a matrix.

    Args:
        x: [M, K] in float32, float16 or bfloat16. K is a multiple of 32.
        pad_32x: append rows of zeros up to a multiple of 32.

    Returns:
        Codes as float8_e4m3fn [M, K] and blocked scales as float8_e8m0fnu.
    """
    encoded = codec.quantize(x, nonfinite="encode")  # its codes are padded in any case
    codes = encoded.codes.view(torch.float8_e4m3fn)
    scales = encoded.scales.view(torch.float8_e8m0fnu).view(scale_shape((x.shape[0], x.shape[1])))
    return codes if pad_32x else codes[: len(x)], scales


def dequantize_mxfp8(
    qx: torch.Tensor, block_scales: torch.Tensor, output_type: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """Decode a matrix: codes [M, K] and blocked scales to [M, K] in `output_type`.

    M and K are multiples of 32.
    """
    decoded: torch.Tensor = codec.dequantize(_array(qx, block_scales), output_type)
    return decoded


def scaled_mm_mxfp8(
    a: torch.Tensor,
    b: torch.Tensor,
    block_scale_a: torch.Tensor,
    block_scale_b: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Multiply encoded matrices on block-scaled tensor cores: a b^T + bias, [M, N].

    Never run on a device that has them.
    """
    first, second = _array(a, block_scale_a), _array(b, block_scale_b)
    result: torch.Tensor = gemm(first, second, bias=bias, dtype=out_dtype or torch.bfloat16)
    return result


def _array(codes: torch.Tensor, scales: torch.Tensor) -> MXFP8Array:
    shape = (codes.shape[0], codes.shape[1])
    return MXFP8Array(codes, scales.view(torch.uint8).view(scale_shape(shape)), shape)


def register_backend() -> bool:
    """Put the core's functions first in comfy-kitchen, for this process.

    Calls that a function is not made for go to comfy-kitchen's own backends, as before: other
    dtypes, widths that are no multiple of 32, GPUs that this build has no kernels for. Calling it
    again changes nothing. The environment variable ZIMAGE_MXFP8_COMFY_BACKEND=0 turns it off.

    Returns:
        Whether the backend is registered.

    Raises:
        MissingExtraError: comfy-kitchen is not installed.
    """
    if os.environ.get(SWITCH) == "0":
        return False
    try:
        from comfy_kitchen.constraints import (
            DivisibleBy,
            ExactDims,
            FunctionConstraints,
            ParamConstraint,
        )
        from comfy_kitchen.registry import registry
    except ImportError:
        raise MissingExtraError(
            "the backend needs comfy-kitchen, which is not installed",
            "it comes with ComfyUI; run pip install comfy-kitchen",
            "comfy_kitchen",
        ) from None
    floats = frozenset({torch.float32, torch.float16, torch.bfloat16})
    blocks = (ExactDims(2), DivisibleBy(1, MXFP8_BLOCK))
    padded = (*blocks, DivisibleBy(0, MXFP8_BLOCK))
    codes = ParamConstraint(dtypes=frozenset({torch.float8_e4m3fn}), shape_rules=padded)
    scales = ParamConstraint(dtypes=frozenset({torch.float8_e8m0fnu}))
    devices = frozenset({"cpu", "cuda"} if _cuda_has_kernels() else {"cpu"})

    def function(**params: ParamConstraint) -> FunctionConstraints:
        return FunctionConstraints(params=params, default_devices=devices)

    functions: dict[str, Any] = {
        "quantize_mxfp8": function(x=ParamConstraint(dtypes=floats, shape_rules=blocks)),
        "dequantize_mxfp8": function(
            qx=codes, block_scales=scales, output_type=ParamConstraint(dtypes=floats)
        ),
    }
    if _cuda_has_block_scaled_gemm():
        bfloat16 = ParamConstraint(dtypes=frozenset({torch.bfloat16, type(None)}))
        functions["scaled_mm_mxfp8"] = FunctionConstraints(
            params={
                **{"a": codes, "b": codes, "block_scale_a": scales, "block_scale_b": scales},
                **{"bias": bfloat16, "out_dtype": ParamConstraint(dtypes=floats)},
            },
            default_devices=frozenset({"cuda"}),
            min_compute_capability=_MIN_GEMM_CAPABILITY,
        )
    registry.register(NAME, sys.modules[__name__], functions)
    others = [name for name in registry._priority if name != NAME]  # it has no public getter
    registry.set_priority([NAME, *others])
    return True


def _cuda_has_kernels() -> bool:
    return torch.cuda.is_available() and all(map(has_kernels, range(torch.cuda.device_count())))


def _cuda_has_block_scaled_gemm() -> bool:
    return _cuda_has_kernels() and not native_gemm_unsupported("mxfp8", torch.cuda.current_device())
