"""What turns an evaluation into a gate."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ...checks import finite_number
from ...errors import UsageError


@dataclass(frozen=True)
class Thresholds:
    """What the images have to reach, on average over all pairs; None: no threshold.

    Attributes:
        min_psnr: dB, 0 or more.
        min_ssim: 0 to 1.
        max_flip: 0 to 1.

    Raises:
        UsageError: a value that is not a finite number in its range.
    """

    min_psnr: float | None = None
    min_ssim: float | None = None
    max_flip: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None:
                continue
            value = finite_number(field.name, value)
            if value < 0 or (field.name != "min_psnr" and value > 1):
                allowed = "0 or more" if field.name == "min_psnr" else "0 to 1"
                raise UsageError(field.name, f"must be {allowed}, not {value:g}")
            object.__setattr__(self, field.name, value)
