"""What turns an evaluation into a gate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from ...checks import finite_number
from ...errors import UsageError

# Rounding to E4M3 without saturation changes no normal number by more than 1/17, whose square is
# 0.0035. Subnormal numbers hardly count in the sum.
DEFAULT_MAX_WEIGHT_ERROR: Final = 0.005
_LARGEST = {"min_psnr": math.inf, "min_ssim": 1, "max_flip": 1, "max_weight_error": math.inf}


@dataclass(frozen=True)
class Thresholds:
    """What images and weights have to reach; None: no threshold.

    Attributes:
        min_psnr: dB of the mean over all pairs, 0 or more.
        min_ssim: of the mean, 0 to 1.
        max_flip: of the mean, 0 to 1.
        max_weight_error: relative squared error of every weight matrix, 0 or more.

    Raises:
        UsageError: a value that is not a finite number in its range.
    """

    min_psnr: float | None = None
    min_ssim: float | None = None
    max_flip: float | None = None
    max_weight_error: float | None = DEFAULT_MAX_WEIGHT_ERROR

    def __post_init__(self) -> None:
        for name, largest in _LARGEST.items():
            value = getattr(self, name)
            if value is None:
                continue
            value = finite_number(name, value)
            if not 0 <= value <= largest:
                allowed = "0 or more" if largest == math.inf else f"0 to {largest}"
                raise UsageError(name, f"must be {allowed}, not {value:g}")
            object.__setattr__(self, name, value)

    @property
    def are_given(self) -> bool:
        """Whether there is any."""
        return any(getattr(self, name) is not None for name in _LARGEST)
