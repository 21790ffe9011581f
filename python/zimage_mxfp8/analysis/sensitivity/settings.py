"""The settings of `analyse_sensitivity`, checked without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...checks import number, whole_number
from ...errors import UsageError
from ...generation.limits import MAX_PIXELS, PIXELS_PER_TOKEN, SEEDS
from ...transformer.compute import COMPUTE_MODES, Compute

# Without `mxfp8-emulated`, which rounds as `mxfp8` does.
MEASURED_MODES: tuple[Compute, ...] = tuple(m for m in COMPUTE_MODES if m != "mxfp8-emulated")


@dataclass(frozen=True)
class Settings:
    """Arguments of `analyse_sensitivity` that have been checked, under their names there."""

    bound: float
    size: tuple[int, int]
    timesteps: int
    seed: int
    compute: Compute


def check_settings(
    bound: float, size: tuple[int, int], timesteps: int, seed: int, compute: str
) -> Settings:
    """Check arguments of `analyse_sensitivity`, and return numbers as Python's own.

    Raises:
        UsageError: if an argument is invalid.
    """
    bound = number("bound", bound)
    if not (bound > 0 and math.isfinite(bound)):
        raise UsageError("bound", f"must be a number above 0, not {bound}")
    if not isinstance(size, (list, tuple)) or len(size) != 2:
        raise UsageError("size", f"must be (height, width), not {repr(size)[:80]}")
    height, width = (whole_number("size", side) for side in size)
    if any(n % PIXELS_PER_TOKEN or not 0 < n <= MAX_PIXELS for n in (height, width)):
        raise UsageError(
            "size",
            f"must be multiples of {PIXELS_PER_TOKEN} up to {MAX_PIXELS}, not {height} and {width}",
        )
    timesteps, seed = whole_number("timesteps", timesteps), whole_number("seed", seed)
    chosen_steps(timesteps)  # for its check
    if not 0 <= seed < SEEDS:
        raise UsageError("seed", "must be 0 or more, and below 2^63")
    return Settings(bound, (height, width), timesteps, seed, _mode(compute))


def _mode(compute: str) -> Compute:
    modes = {str(mode): mode for mode in MEASURED_MODES}
    if not isinstance(compute, str) or compute not in modes:
        raise UsageError("compute", f"must be {', '.join(modes)}, not {repr(compute)[:80]}")
    return modes[compute]


def chosen_steps(timesteps: int, steps: int = 8) -> list[int]:
    """Return some steps of a sampling run, the first and the last among them if there are two.

    Raises:
        UsageError: if `timesteps` is more than the run's steps, or less than 1.
    """
    if not 1 <= timesteps <= steps:
        raise UsageError("timesteps", f"must be 1 to {steps}, not {timesteps}")
    if timesteps == 1:
        return [steps // 2]
    return [round(i * (steps - 1) / (timesteps - 1)) for i in range(timesteps)]
