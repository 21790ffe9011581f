"""Error of the output after a change, for content and detail separately.

Low and high spatial frequencies are separated, because an error in low ones changes the content of
an image and an error in high ones its detail. (ViDiT-Q decouples its metrics for the same reason:
Zhao et al., "ViDiT-Q: Efficient and Accurate Quantization of Diffusion Transformers", 2024.)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from ...transformer.compute import Compute
from ...transformer.model import ZImageTransformer
from .cases import Case
from .rounding import quantized
from .targets import Target

# Cycles per latent pixel up to which a frequency counts as low: a quarter of the highest.
LOW_FREQUENCY = 0.125


@dataclass(frozen=True)
class OutputError:
    """Squared error of an output relative to the output's own energy.

    Attributes:
        total: error of all frequencies.
        low: error of low frequencies, relative to their energy.
        high: error of high frequencies, likewise.
    """

    total: float
    low: float
    high: float


def output_error(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> OutputError:
    """Compare outputs, float32 [16, F, H, W] each."""
    sums = torch.zeros(2, 2, dtype=torch.float64, device=wanted[0].device)
    for a, b in zip(found, wanted, strict=True):
        low = _low_frequencies(b)
        # Energies of the transforms are the latents' own (Parseval), band by band.
        for row, image in enumerate((a - b, b)):
            energy = torch.fft.fft2(image.double(), norm="ortho").abs().square()
            sums[row, 0] += energy[..., low].sum()
            sums[row, 1] += energy[..., ~low].sum()
    (error_low, error_high), (low_energy, high_energy) = sums.tolist()

    def ratio(error: float, energy: float) -> float:
        return error / energy if energy > 0 else 0.0

    return OutputError(
        ratio(error_low + error_high, low_energy + high_energy),
        ratio(error_low, low_energy),
        ratio(error_high, high_energy),
    )


def _low_frequencies(image: torch.Tensor) -> torch.Tensor:
    """Return the mask [H, W] of an image's transform."""
    rows, columns = (torch.fft.fftfreq(n, device=image.device) for n in image.shape[-2:])
    radius: torch.Tensor = (rows[:, None].square() + columns[None, :].square()).sqrt()
    return radius <= LOW_FREQUENCY


def measure(
    model: ZImageTransformer, targets: Iterable[Target], cases: Sequence[Case], compute: Compute
) -> list[OutputError]:
    """Return the error in each case with only these layers quantised, in a compute mode."""
    with torch.no_grad(), quantized(model, targets, compute):
        return [output_error(case.run(model), case.velocities) for case in cases]


def mean_error(errors: Sequence[OutputError]) -> OutputError:
    """Return the mean over cases."""

    def mean(values: Iterable[float]) -> float:
        return sum(values) / len(errors)

    return OutputError(
        mean(e.total for e in errors), mean(e.low for e in errors), mean(e.high for e in errors)
    )
