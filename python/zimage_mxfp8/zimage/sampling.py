"""The timesteps of Z-Image's samplers, and the model's features of timesteps."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from .constants import TIME_SCALE

Vector = npt.NDArray[np.float64]

# (forward passes, shift) of the flow-match Euler sampler: Z-Image Turbo and the base model.
_SAMPLERS = {"turbo": (8, 3.0), "base": (50, 6.0)}


def sampler_timesteps(sampler: str | int) -> Vector:
    """Return the model's timesteps, 0 (noise) to 1000 (image), of a whole sampling run.

    Args:
        sampler: "turbo" (8 steps, shift 3), "base" (50 steps, shift 6), or a number of steps with
            Turbo's shift.

    Raises:
        UsageError: anything else.
    """
    try:
        steps, shift = (
            _SAMPLERS[sampler] if sampler in _SAMPLERS else (int(sampler), _SAMPLERS["turbo"][1])
        )
    except ValueError:
        steps = 0
    if not 1 <= steps <= 1000:
        raise UsageError("timesteps", f"must be turbo, base or a number up to 1000, not {sampler}")
    sigma = np.linspace(1.0, 0.0, steps + 1)[:-1]
    sigma = shift * sigma / (1.0 + (shift - 1.0) * sigma)
    return TIME_SCALE * (1.0 - sigma)


def timestep_features(timesteps: Vector, dim: int, max_period: float = 10000.0) -> Vector:
    """Return sinusoidal features [steps, dim]: cosines, then sines."""
    half = dim // 2
    frequencies = np.exp(-np.log(max_period) * np.arange(half) / half)
    angles = timesteps[:, None] * frequencies
    features = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    return np.pad(features, ((0, 0), (0, dim % 2)))
