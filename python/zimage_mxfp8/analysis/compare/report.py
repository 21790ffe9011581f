"""Results of `compare`: figures, the answers to claims, and their layout in files."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from ...checkpoint.file_names import base_name
from ...conversion.recipes import KeepRule, Recipe, rules_outside_blocks
from ...streaming.error_stats import snr_db, snr_text
from ...text import plural, printable
from .formats import FORMATS

MXFP8: Final = "mxfp8-e4m3"
_EIGHT_BITS: Final = (MXFP8, "mxfp8-e5m2", "fp8-tensor", "fp8-row", "int8-row")
_CARD_ERROR: Final = 1e-3
_CARD_FINER: Final = 16.0
_CSV_COLUMNS: Final = (
    *("tensor", "group", "rows", "columns", "format", "branch", "rank", "bits_per_weight"),
    *("relative_squared_error", "standard_error", "snr_db"),
)
_LITTLE_DB: Final = 0.5  # the meaning of "little" and "no worse" in the answers


@dataclass(frozen=True)
class FormatError:
    """Error of a format.

    Attributes:
        relative_squared_error: sum of (w - wq)^2 over sum of w^2.
        standard_error: standard error of that figure, from the sampling of rows; 0 if all were
            measured.
    """

    relative_squared_error: float
    standard_error: float

    @property
    def snr_db(self) -> float:
        """Signal-to-noise ratio in dB."""
        return snr_db(self.relative_squared_error)

    def to_dict(self) -> dict[str, float]:
        """Return the values for JSON."""
        return vars(self) | {"snr_db": self.snr_db}


@dataclass(frozen=True)
class LayerComparison:
    """One linear in every format.

    Attributes:
        tensor: name of the weight.
        group: the row of summary tables that it counts in.
        name: the name without the prefix of all-in-one files, which recipes match.
        shape: [N, K].
        squared_signal: sum of w^2.
        sampled_rows: rows that formats other than MXFP8 E4M3 were measured on; that one was
            measured on all.
        formats: format name -> its error.
    """

    tensor: str
    group: str
    name: str
    shape: tuple[int, int]
    squared_signal: float
    sampled_rows: int
    formats: dict[str, FormatError]

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]

    def to_dict(self) -> dict[str, Any]:
        """Return the values for JSON."""
        errors = {name: error.to_dict() for name, error in self.formats.items()}
        return vars(self) | {"shape": list(self.shape), "formats": errors}


@dataclass(frozen=True)
class GroupComparison:
    """The linears of a group together, or all of them.

    Attributes:
        name: the group.
        layers: number of linears.
        parameters: number of weights.
        squared_signal: sum of w^2.
        formats: format name -> its error on all of them.
    """

    name: str
    layers: int
    parameters: int
    squared_signal: float
    formats: dict[str, FormatError]

    def to_dict(self) -> dict[str, Any]:
        """Return the values for JSON."""
        errors = {name: error.to_dict() for name, error in self.formats.items()}
        return vars(self) | {"formats": errors}


@dataclass(frozen=True)
class LowRankError:
    """One linear in one format with a parallel low-rank branch, measured on every row.

    Attributes:
        tensor: name of the weight W.
        group: its group.
        format: name of the format Q.
        rank: rank of the branch; its two factors count 16 bits per number and are not rounded.
        bits_per_weight: bits per weight of the format and the branch together.
        plain: relative squared error without a branch.
        residual: the same with the best branch for the residual W - Q(W).
        svdquant: the same if the branch L is the best of that rank for W, and W - L is quantised,
            as in SVDQuant.
    """

    tensor: str
    group: str
    format: str
    rank: int
    bits_per_weight: float
    plain: float
    residual: float
    svdquant: float


@dataclass(frozen=True)
class LowRankSummary:
    """A format with a low-rank branch, over all layers that were measured with one.

    Every group counts with its share of the model's squared weights, regardless of the number of
    measured layers. The attributes are those of `LowRankError`.
    """

    format: str
    rank: int
    bits_per_weight: float
    plain: float
    residual: float
    svdquant: float

    @property
    def residual_gain_db(self) -> float:
        """SNR that the branch for the residual adds, in dB."""
        return gain_db(self.plain, self.residual)

    @property
    def svdquant_gain_db(self) -> float:
        """SNR that SVDQuant's branch adds, in dB."""
        return gain_db(self.plain, self.svdquant)

    def to_dict(self) -> dict[str, Any]:
        """Return the values for JSON."""
        return vars(self) | {
            "residual_gain_db": self.residual_gain_db,
            "svdquant_gain_db": self.svdquant_gain_db,
        }


@dataclass(frozen=True)
class FormatSize:
    """Size of the weights in a format.

    Attributes:
        bits_per_weight: mean over the compared linears, scales included.
        model_bytes: the transformer with those linears in this format and everything else
            unchanged.
    """

    bits_per_weight: float
    model_bytes: int


@dataclass(frozen=True)
class Mix:
    """MXFP8 E4M3 for all linears but some, which are kept in 16 bits.

    Attributes:
        kept: number of kept linears.
        size: size of all weights.
        error: error of all linears together; kept ones have none.
    """

    kept: int
    size: FormatSize
    error: FormatError


@dataclass(frozen=True)
class Answer:
    """A claim about 8-bit quantisation, and whether it holds for this checkpoint.

    Attributes:
        claim: the claim.
        finding: the figures that decide.
        holds: whether it is true; None if it was not measured.
    """

    claim: str
    finding: str
    holds: bool | None


@dataclass(repr=False)
class CompareReport:
    """Results of `compare`.

    Attributes:
        input: the checkpoint.
        layers: every compared linear, by name.
        total: all of them together.
        groups: by group, the largest first.
        sizes: format name -> size; "bf16" is 16 bits for every weight.
        low_rank: every layer, format and rank that was measured.
        low_rank_summary: the same over layers, by format and rank.
        sample: requested fraction of the rows.
        sampled: fraction of the weights that formats other than MXFP8 E4M3 were measured on.
        answers: the claims of the published MXFP8 model, answered.
        warnings: sentences that the user should see.
        seconds: wall time.
    """

    input: str
    layers: list[LayerComparison]
    total: GroupComparison
    groups: list[GroupComparison]
    sizes: dict[str, FormatSize]
    low_rank: list[LowRankError]
    low_rank_summary: list[LowRankSummary]
    sample: float
    sampled: float
    warnings: list[str]
    seconds: float = 0.0
    answers: list[Answer] = field(init=False)

    def __post_init__(self) -> None:
        self.answers = _answers(self)

    def __repr__(self) -> str:
        return f"CompareReport({self.input!r}, {plural(len(self.layers), 'layer')})"

    def __str__(self) -> str:
        from ...printing.compare import print_compare
        from ...printing.screen import as_text

        return as_text(lambda screen: print_compare(self, screen))

    @property
    def gains_db(self) -> dict[str, float]:
        """Difference of each format's SNR from MXFP8 E4M3's over all layers, in dB."""
        errors = {name: e.relative_squared_error for name, e in self.total.formats.items()}
        return {name: gain_db(errors[MXFP8], error) for name, error in errors.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return the values for JSON."""
        return {
            "input": self.input,
            "sample": self.sample,
            "sampled": self.sampled,
            "seconds": self.seconds,
            "warnings": self.warnings,
            "formats": {name: kind.title for name, kind in FORMATS.items()},
            "sizes": {name: vars(size) for name, size in self.sizes.items()},
            "answers": [vars(answer) for answer in self.answers],
            "total": self.total.to_dict(),
            "gains_db": self.gains_db,
            "groups": [group.to_dict() for group in self.groups],
            "low_rank_summary": [summary.to_dict() for summary in self.low_rank_summary],
            "layers": [layer.to_dict() for layer in self.layers],
            "low_rank": [vars(error) for error in self.low_rank],
        }

    def to_csv(self) -> str:
        """Return one line per layer and format, and per low-rank branch."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(_CSV_COLUMNS)
        layers = {layer.tensor: layer for layer in self.layers}
        for layer in self.layers:
            start = [layer.tensor, layer.group, *layer.shape]
            for name, error in layer.formats.items():
                bits = FORMATS[name].bits(layer.shape) / layer.parameters
                value, deviation = error.relative_squared_error, error.standard_error
                writer.writerow([*start, name, "none", 0, bits, value, deviation, error.snr_db])
        for branch in self.low_rank:
            start = [branch.tensor, branch.group, *layers[branch.tensor].shape, branch.format]
            for kind, value in (("residual", branch.residual), ("svdquant", branch.svdquant)):
                writer.writerow(
                    [*start, kind, branch.rank, branch.bits_per_weight, value, 0.0, snr_db(value)]
                )
        return text.getvalue()

    def recipe(self, bound: float) -> Recipe:
        """Make the recipe that keeps the layers that lose more than a bound in MXFP8.

        Layers outside the blocks stay as in every other recipe, however small their error.

        Args:
            bound: relative squared error, for example 1e-3.
        """
        rules = []
        for layer in self.above(bound):
            error = layer.formats[MXFP8]
            reason = (
                f"relative squared error {error.relative_squared_error:.3e} in MXFP8 "
                f"(SNR {snr_text(error.snr_db, 1, ' dB')}), above {bound:g}"
            )
            rules.append(KeepRule(layer.name, re.compile(f"^{re.escape(layer.name)}$"), reason))
        title = f"MXFP8 where its relative squared error is at most {bound:g}"
        description = f"Written by zimage-mxfp8 compare for {printable(base_name(self.input))}."
        # In a model that is not Z-Image these rules may match nothing, which convert would report.
        outside = (
            rule
            for rule in rules_outside_blocks()
            if any(rule.matches(layer.name, "") for layer in self.layers)
        )
        return Recipe(title, title, description, (*rules, *outside))

    def kept(self, bound: float) -> list[LayerComparison]:
        """Return the layers that `recipe` keeps."""
        rules = self.recipe(bound).keep
        return [
            layer for layer in self.layers if any(rule.matches(layer.name, "") for rule in rules)
        ]

    def keeping(self, kept: Collection[str]) -> Mix:
        """Return size and error if some layers are kept, given by `LayerComparison.name`."""
        size = self.sizes[MXFP8]
        bits, nbytes = size.bits_per_weight * self.total.parameters, size.model_bytes
        squared_error = 0.0
        for layer in self.layers:
            stored = FORMATS[MXFP8].bits(layer.shape)
            if layer.name in kept:
                bits += 16 * layer.parameters - stored
                nbytes += 2 * layer.parameters - -(-stored // 8)
            else:
                error = layer.formats[MXFP8].relative_squared_error
                squared_error += layer.squared_signal * error
        return Mix(
            len(kept),
            FormatSize(bits / self.total.parameters, nbytes),
            FormatError(squared_error / (self.total.squared_signal or 1.0), 0.0),
        )

    def above(self, bound: float) -> list[LayerComparison]:
        """Return the layers with a relative squared error in MXFP8 above a bound."""
        return [
            layer for layer in self.layers if layer.formats[MXFP8].relative_squared_error > bound
        ]


def gain_db(before: float, after: float) -> float:
    """Reduction of a squared error, in dB."""
    return snr_db(after) - snr_db(before)


def combine(name: str, layers: Sequence[LayerComparison]) -> GroupComparison:
    """Combine several layers into one: add squared errors and squared weights."""
    signal = sum(layer.squared_signal for layer in layers)
    formats = {}
    for format_name in FORMATS:
        errors = [(layer.squared_signal, layer.formats[format_name]) for layer in layers]
        weight = signal or 1.0
        formats[format_name] = FormatError(
            sum(s * e.relative_squared_error for s, e in errors) / weight,
            math.sqrt(sum((s * e.standard_error) ** 2 for s, e in errors)) / weight,
        )
    parameters = sum(layer.parameters for layer in layers)
    return GroupComparison(name, len(layers), parameters, signal, formats)


def summarise_low_rank(
    low_rank: Sequence[LowRankError],
    layers: Mapping[str, LayerComparison],
    groups: Iterable[GroupComparison],
) -> list[LowRankSummary]:
    """Sum up low-rank branches by format and rank, groups by their share of squared weights."""
    by_group: dict[str, list[LowRankError]] = {}
    for error in low_rank:
        by_group.setdefault(error.group, []).append(error)
    measured = {
        group.name: sum(
            layers[tensor].squared_signal
            for tensor in {error.tensor for error in by_group[group.name]}
        )
        for group in groups
        if group.name in by_group
    }
    shares = {group.name: group for group in groups if measured.get(group.name)}
    signal = sum(group.squared_signal for group in shares.values())
    parameters = sum(group.parameters for group in shares.values())

    def mean(errors: list[LowRankError], value: Callable[[LowRankError], float]) -> float:
        return sum(
            value(error)
            * layers[error.tensor].squared_signal
            / measured[error.group]
            * shares[error.group].squared_signal
            / signal
            for error in errors
        )

    def mean_bits(errors: list[LowRankError]) -> float:
        sizes: dict[str, list[int]] = {}
        for error in errors:
            sizes.setdefault(error.group, []).append(layers[error.tensor].parameters)
        return sum(
            error.bits_per_weight
            * layers[error.tensor].parameters
            / sum(sizes[error.group])
            * shares[error.group].parameters
            / parameters
            for error in errors
        )

    found: dict[tuple[str, int], list[LowRankError]] = {}
    for error in low_rank:
        if error.group in shares:
            found.setdefault((error.format, error.rank), []).append(error)
    return [
        LowRankSummary(
            name,
            rank,
            mean_bits(errors),
            mean(errors, lambda error: error.plain),
            mean(errors, lambda error: error.residual),
            mean(errors, lambda error: error.svdquant),
        )
        for (name, rank), errors in found.items()
    ]


def _answers(report: CompareReport) -> list[Answer]:
    error = {name: e.relative_squared_error for name, e in report.total.formats.items()}

    def gain(better: str, base: str) -> float:
        return gain_db(error[base], error[better])

    mxfp8, nvfp4 = error[MXFP8], error["nvfp4"]
    worst = max(report.layers, key=lambda layer: layer.formats[MXFP8].relative_squared_error)
    above = len(report.above(_CARD_ERROR))
    ratio = nvfp4 / mxfp8 if mxfp8 else math.inf
    best_bits = f"{FORMATS['mxfp8-best'].bits((1, 1024)) / 1024:.2f} bits per weight"
    best = sum(
        layer.squared_signal * min(layer.formats[n].relative_squared_error for n in _EIGHT_BITS)
        for layer in report.layers
    ) / (report.total.squared_signal or 1.0)
    is_best = sum(
        layer.formats[MXFP8].relative_squared_error
        <= min(layer.formats[name].relative_squared_error for name in _EIGHT_BITS)
        for layer in report.layers
    )
    return [
        Answer(
            "the relative squared error of MXFP8 is below 0.1 %",
            f"{mxfp8:.4%} of the squared weights (SNR {snr_text(snr_db(mxfp8), 1, ' dB')}); "
            f"{plural(above, 'layer')} of {len(report.layers):,} above 0.1 %, the worst "
            f"{worst.formats[MXFP8].relative_squared_error:.4%} ({worst.tensor})",
            mxfp8 < _CARD_ERROR,
        ),
        Answer(
            "MXFP8 is 16 times finer than NVFP4",
            f"NVFP4's RMS error is {math.sqrt(ratio):.2f} times MXFP8's, its squared error "
            f"{ratio:.2f} times",
            math.sqrt(ratio) >= _CARD_FINER,
        ),
        _low_rank_answer(report.low_rank_summary),
        Answer(
            "formats chosen for each block gain little at 8 bits",
            f"the better of E4M3 and E5M2 for each block: {gain('mxfp8-best', MXFP8):+.3f} dB at "
            f"{best_bits}",
            gain("mxfp8-best", MXFP8) < _LITTLE_DB,
        ),
        Answer(
            "a format chosen for each layer gains little at 8 bits",
            f"the best of {len(_EIGHT_BITS)} 8-bit formats for each layer: "
            f"{gain_db(mxfp8, best):+.3f} dB; MXFP8 is the best for {is_best:,} of "
            f"{plural(len(report.layers), 'layer')}",
            gain_db(mxfp8, best) < _LITTLE_DB,
        ),
        Answer(
            "searching scales gains little at 8 bits",
            f"the best scale for each block: {gain('mxfp8-e4m3-search', MXFP8):+.3f} dB "
            f"(MXFP4: {gain('mxfp4-search', 'mxfp4'):+.3f} dB)",
            gain("mxfp8-e4m3-search", MXFP8) < _LITTLE_DB,
        ),
        Answer(
            "round-up scales lose no more than OCP's floor scales",
            f"round-up: {gain(MXFP8, 'mxfp8-e4m3-floor'):+.3f} dB (E5M2: "
            f"{gain('mxfp8-e5m2', 'mxfp8-e5m2-floor'):+.3f} dB, MXFP4: "
            f"{gain('mxfp4', 'mxfp4-floor'):+.3f} dB)",
            mxfp8 <= error["mxfp8-e4m3-floor"],
        ),
    ]


def _low_rank_answer(summaries: Sequence[LowRankSummary]) -> Answer:
    claim = "a low-rank branch gains little at 8 bits"
    found = {(summary.format, summary.rank): summary for summary in summaries}
    ranks = [summary.rank for summary in summaries]
    if not ranks:
        return Answer(claim, "not measured", None)
    mxfp8, nvfp4 = found[MXFP8, max(ranks)], found["nvfp4", max(ranks)]
    gain = max(mxfp8.residual_gain_db, mxfp8.svdquant_gain_db)
    return Answer(
        claim,
        f"rank {mxfp8.rank} on the residual: {mxfp8.residual_gain_db:+.3f} dB, SVDQuant's way: "
        f"{mxfp8.svdquant_gain_db:+.3f} dB, at {mxfp8.bits_per_weight:.2f} bits per weight (NVFP4: "
        f"{nvfp4.residual_gain_db:+.3f} and {nvfp4.svdquant_gain_db:+.3f} dB)",
        gain < _LITTLE_DB,
    )
