"""The colour of the error of weights. It means the same on every page that has it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from ...streaming.error_stats import snr_db
from .network import Metric

_BELOW, _ABOVE = 3.0, 12.0  # dB around the bound that the colours cover
_SILENT = snr_db(0.0)

Layer = TypeVar("Layer")


def weight_error(
    title: str,
    error: Callable[[Layer], float | None],
    bound: float,
    note: str,
    *,
    others: Sequence[float] = (),
    missing: str = "not measured",
) -> Metric[Layer]:
    """Return the metric of a relative squared error, shown as a signal-to-noise ratio in dB.

    The darkest colour is 3 dB better than the bound, the lightest 12 dB worse, or at the largest
    of `others`.

    Args:
        title: name of the metric.
        error: relative squared error of a layer's weights; None where it is not known.
        bound: error in the middle of the colours.
        note: what it means.
        others: errors of other metrics with the same range of colours.
        missing: words for a layer without an error.
    """
    middle = snr_db(bound)
    harmful = min([middle - _ABOVE, *map(snr_db, others)])

    def loss(layer: Layer) -> float | None:
        found = error(layer)
        return None if found is None else -snr_db(found)

    return Metric(
        title,
        loss,
        lambda value: "no error" if -value >= _SILENT else f"{-value:.1f} dB",
        -(middle + _BELOW),
        -harmful,
        f"{note} A relative squared error of {bound:g} is {middle:.1f} dB.",
        missing,
        falling=True,
    )
