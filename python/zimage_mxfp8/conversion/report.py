"""The report of a conversion, as text and as JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..streaming.error_stats import ErrorStats, total
from ..streaming.formats import FORMATS, FormatName
from ..text import plural


@dataclass(repr=False)
class ConversionReport:
    """The result of a conversion.

    Attributes:
        input: path that was read.
        output: path that was written.
        format: the format of the quantised layers, as `ConversionOptions.format` names it.
        recipe: name of the recipe.
        bias_correction: the mode.
        quantized: number of layers quantised.
        kept: number of tensors kept unchanged (or cast), by reason.
        corrected_biases: number of biases corrected.
        input_bytes: bytes of all input tensors.
        output_bytes: bytes of all output tensors.
        file_bytes: bytes of the output file.
        seconds: wall time of `run_conversion`.
        warnings: sentences that the user should see.
        notes: facts about the input and its parts, such as tensors copied unchanged.
        loras: the merged adapters: path, weight, SHA-256, number of layers, kinds, and names of
            tensors that fit nothing.
        errors: per quantised weight, if error statistics were requested.
    """

    input: str
    output: str
    format: FormatName
    recipe: str
    bias_correction: str
    quantized: int
    kept: dict[str, int]
    corrected_biases: int
    input_bytes: int
    output_bytes: int
    file_bytes: int
    seconds: float
    warnings: list[str]
    notes: list[str]
    loras: list[dict[str, Any]] = field(default_factory=list)
    errors: dict[str, ErrorStats] | None = None

    def __repr__(self) -> str:
        layers = plural(self.quantized, "layer")
        title = FORMATS[self.format].title
        return f"ConversionReport({self.output!r}, {layers} in {title}, {self.file_bytes:,} bytes)"

    def __str__(self) -> str:
        from ..printing.conversion import print_conversion
        from ..printing.screen import as_text

        return as_text(lambda screen: print_conversion(self, screen))

    @property
    def ratio(self) -> float:
        """Bytes of the output over bytes of the input."""
        return self.output_bytes / self.input_bytes if self.input_bytes else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Return the values for JSON."""
        document = {key: value for key, value in vars(self).items() if key != "errors"} | {
            "ratio": self.ratio
        }
        if self.errors is not None:
            document["total"] = total(self.errors.values()).to_dict()
            document["tensors"] = {name: stats.to_dict() for name, stats in self.errors.items()}
        return document
