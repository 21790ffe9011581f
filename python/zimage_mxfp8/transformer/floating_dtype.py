"""The dtype of everything in a model that is not 8 bits wide: bfloat16 or float32."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import UsageError


def check_dtype(dtype: Any) -> None:
    """Check the argument `dtype` of a model that is loaded.

    Raises:
        UsageError: neither bfloat16 nor float32.
    """
    if dtype is not torch.bfloat16 and dtype is not torch.float32:
        raise UsageError(
            "dtype", f"must be torch.bfloat16 or torch.float32, not {repr(dtype)[:80]}"
        )


def dtype_after(fn: Any, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return what `dtype` becomes in a call such as `.to()`.

    Args:
        fn: what torch's `Module._apply` applies to each tensor.
        dtype: before the call.
        device: of the model, before the call.

    Raises:
        UsageError: it becomes neither bfloat16 nor float32, or 8-bit weights change theirs.
    """
    changed: torch.dtype = fn(torch.empty(0, dtype=dtype, device=device)).dtype
    if changed not in (torch.bfloat16, torch.float32):
        raise UsageError("dtype", f"must be bfloat16 or float32, not {changed}")
    if fn(torch.empty(0, dtype=torch.uint8, device=device)).dtype != torch.uint8:
        raise UsageError("dtype", "cannot change for 8-bit weights", "use .to(dtype)")
    return changed
