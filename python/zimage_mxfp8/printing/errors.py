"""The error statistics of quantised weights."""

from __future__ import annotations

from collections.abc import Mapping

from ..streaming.error_stats import ErrorStats, snr_text, total
from .screen import Screen

_WORST = 10


def print_errors(errors: Mapping[str, ErrorStats], screen: Screen) -> None:
    """Print all layers together, then the layers with the largest relative squared error."""
    order = sorted(errors, key=lambda name: -errors[name].relative_squared_error)[:_WORST]
    rows = {"all layers": total(errors.values()), **{name: errors[name] for name in order}}
    screen.table(
        f"Weights against the original's: all, and the {len(order)} worst layers. The squared "
        "error is relative to the squared weights",
        ["tensor", "squared error>", "SNR (dB)>", "largest difference>"],
        [
            [name, f"{s.relative_squared_error:.3e}", snr_text(s.snr_db, 1), f"{s.max_error:.3e}"]
            for name, s in rows.items()
        ],
        spare=1,
    )
