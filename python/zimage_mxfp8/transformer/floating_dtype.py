"""The dtype of everything in a model that is not 8 bits wide."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import UsageError
from ..system import devices
from .compute import default_dtype_of

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


def default_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16; float16 for GPUs whose tensor cores have no bfloat16 (before 8.0)."""
    if device.type != "cuda":
        return DTYPES[default_dtype_of(None)]
    index = torch.cuda.current_device() if device.index is None else device.index
    return DTYPES[default_dtype_of(devices.capability(index))]


def sums_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of tokens between blocks and of what norms read, in a model of `dtype`.

    It is float32 in a model of float16, which ends at 65504.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def as_dtype(dtype: Any) -> torch.dtype:
    """Return the argument `dtype` of a model, given as torch's or by its name, as torch's.

    Raises:
        UsageError: neither bfloat16, float16 nor float32.
    """
    for name, each in DTYPES.items():
        if dtype is each or (isinstance(dtype, str) and dtype == name):
            return each
    *names, last = DTYPES
    listed = f"{', '.join(names)} or {last}"
    raise UsageError("dtype", f"must be {listed}, not {repr(dtype)[:80]}")


def name_of(dtype: torch.dtype) -> str:
    """Return the name of a dtype, such as "float16"."""
    return str(dtype).removeprefix("torch.")


def dtype_after(fn: Any, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return what `dtype` becomes in a call such as `.to()`.

    Args:
        fn: what torch's `Module._apply` applies to each tensor.
        dtype: before the call.
        device: of the model, before the call.

    Raises:
        UsageError: it becomes another dtype than a model can have, or 8-bit weights change theirs.
    """
    changed: torch.dtype = fn(torch.empty(0, dtype=dtype, device=device)).dtype
    as_dtype(changed)  # for its error
    if fn(torch.empty(0, dtype=torch.uint8, device=device)).dtype != torch.uint8:
        raise UsageError("dtype", "cannot change for 8-bit weights", "use .to(dtype)")
    return changed
