"""The report of `validate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ...checkpoint.quantized_layers import Breach
from ...streaming.error_stats import ErrorStats
from ...text import plural


@dataclass(repr=False)
class ValidationReport:
    """Results of `validate`.

    Attributes:
        file: the file that was checked.
        against: the original it was compared with, if any.
        layers: number of quantised layers that are stored according to the contract.
        format: title of their format.
        breaches: broken rules; empty for a sound file.
        notes: remarks that are not breaches.
        errors: per layer's weight, its error against the original; empty without one.
        loras: adapters that were merged into the original before it was compared.
    """

    file: str
    against: str | None
    layers: int
    format: str = "MXFP8"
    breaches: list[Breach] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    errors: dict[str, ErrorStats] = field(default_factory=dict)
    loras: list[dict[str, Any]] = field(default_factory=list)

    def __repr__(self) -> str:
        layers = plural(self.layers, f"{self.format} layer")
        breaches = plural(len(self.breaches), "breach", "breaches")
        return f"ValidationReport({self.file!r}, {layers}, {breaches})"

    def __str__(self) -> str:
        from ...printing.screen import as_text
        from ...printing.validation import print_validation

        return as_text(lambda screen: print_validation(self, screen))

    @property
    def ok(self) -> bool:
        """Whether no rule is broken."""
        return not self.breaches

    def to_dict(self) -> dict[str, Any]:
        """Return the values for JSON."""
        return {
            "file": self.file,
            "against": self.against,
            "loras": self.loras,
            "ok": self.ok,
            "layers": self.layers,
            "format": self.format,
            "breaches": [vars(breach) for breach in self.breaches],
            "notes": self.notes,
            "tensors": {name: stats.to_dict() for name, stats in self.errors.items()},
        }
