"""The weights of an evaluation on the page: the map of the network, its slider, its chart."""

from __future__ import annotations

from collections.abc import Sequence

from ...dtypes import FLOAT_NAMES
from ...zimage.layers import ZIMAGE
from ..compare.run import DEFAULT_BOUND
from ..pages.blocks import Cell, Column, Paragraph, Table
from ..pages.chart import NamedSet, SizeChart
from ..pages.keep import KeepOrder
from ..pages.network import Kinds, Metric, NetworkMap
from ..pages.page import Section
from ..pages.weight_error import weight_error
from .report import EvaluationReport
from .weights import LayerDifference, WeightComparison

_SHADES = {"F32": 0.0, "BF16": 0.1, "F16": 0.2, "INT8 ConvRot": 0.5, "MXFP8": 0.6}
_FAIR_SHARES = 4  # of the difference, from which on the colour is the lightest
_BF16_BYTES = 2
_NOT_COMPARABLE = "not comparable"

_EMPTY = "Empty where a file lacks the layer or has it in another shape."
_HOW_TO_READ = (
    "How far the decoded weights of A are from those of B. Blocks stand in the order of their "
    "computation: noise refiner, context refiner, main blocks. "
)
_SLIDER = (
    "The slider keeps more of A's layers in BF16, those first that are furthest from B's. Size and "
    "error of the weights follow from the files; for images convert and evaluate again."
)
_STORED = "What the file stores the weight in. Empty where it does not have the layer."
_NOTHING_TO_KEEP = (
    "A slider of kept layers is missing: A quantises no layer of a block that differs from B's."
)
_SIZES = (
    "The relative squared error of all weight matrices, if A keeps more layers. What weights lose "
    "does not tell what images lose."
)


def weights_sections(report: EvaluationReport) -> tuple[Section, list[Section]]:
    """Return the section with the map of the network, and those for further down the page."""
    keep = _keep(report.weights)
    words = _HOW_TO_READ + (_SLIDER if keep is not None else _why_without_slider(report))
    network = Section("The network", [Paragraph(words), _network(report.weights, keep)])
    others = [Section("Weights", [_table(report.weights)])]
    if keep is not None:
        chart = SizeChart(keep, [NamedSet("A", keep.nbytes()[0], keep.errors()[0])])
        others.insert(0, Section("Size against error of the weights", [Paragraph(_SIZES), chart]))
    return network, others


def _table(weights: WeightComparison) -> Table:
    """Return the table of all weight matrices."""
    total = _total_error(weights)
    rows: list[list[Cell]] = []
    for layer in weights.layers:
        figures: list[Cell] = [_NOT_COMPARABLE] * 2
        error = layer.relative_squared_error
        if error is not None and layer.squared_error is not None:
            figures = [100 * error, 100 * layer.squared_error / total]
        formats = (layer.a_format or "none", layer.b_format or "none")
        rows.append([layer.name, *layer.shape, *formats, *figures])
    columns = [
        *(Column("weight"), Column("rows", 0), Column("columns", 0)),
        *(Column("stored in A"), Column("stored in B")),
        *(Column("relative squared error (%)", 4), Column("share of the difference (%)", 2)),
    ]
    return Table(columns, rows, "weights")


def _why_without_slider(report: EvaluationReport) -> str:
    if not report.weights.are_equal:
        return _NOTHING_TO_KEEP
    if report.a.path == report.b.path:
        return (
            "A and B are one file, so their weights are equal: what differs between the images "
            f"comes from the compute modes, {report.a.compute} and {report.b.compute}."
        )
    return (
        "All weight matrices of A and B are equal once they are decoded: what differs between the "
        "images comes from compute modes, or from biases and norms."
    )


def _in_block(layer: LayerDifference) -> bool:
    return ZIMAGE.split(layer.name) is not None


def _total_error(weights: WeightComparison) -> float:
    return sum(layer.squared_error or 0.0 for layer in weights.layers) or 1.0


def _keep(weights: WeightComparison) -> KeepOrder | None:
    """Return A's quantised layers by their error; None if keeping them changes nothing."""
    inside = [layer for layer in weights.layers if _in_block(layer)]
    order = sorted(
        (layer for layer in inside if layer.is_quantized_in_a and layer.squared_error is not None),
        key=lambda layer: -(layer.relative_squared_error or 0.0),
    )
    errors = [layer.squared_error or 0.0 for layer in order]
    if not any(errors):
        return None
    signal = weights.squared_signal or sum(errors)  # without a signal, relative to nothing
    parts = [error / signal for error in errors]
    return KeepOrder(
        names=[layer.name for layer in order],
        smallest=weights.a_bytes,
        added=[_BF16_BYTES * layer.shape[0] * layer.shape[1] - layer.a_nbytes for layer in order],
        parts=parts,
        chosen=0,
        error="relative squared error of the weights",
        start="As in A",
        percent=True,
        always=[layer.name for layer in inside if layer.a_format in FLOAT_NAMES],
        rest=max(weights.relative_squared_error - sum(parts), 0.0),
    )


def _network(weights: WeightComparison, keep: KeepOrder | None) -> NetworkMap[LayerDifference]:
    total, count = _total_error(weights), len(weights.layers)
    empty = _EMPTY if any(layer.squared_error is None for layer in weights.layers) else ""
    metrics: Sequence[Metric[LayerDifference] | Kinds[LayerDifference]] = (
        weight_error(
            "Difference",
            lambda layer: layer.relative_squared_error,
            DEFAULT_BOUND,
            f"Signal-to-noise ratio of A's decoded weights against B's. {empty}".rstrip(),
            missing=_NOT_COMPARABLE,
        ),
        Metric(
            "Share of the difference",
            lambda layer: None if layer.squared_error is None else layer.squared_error / total,
            lambda share: f"{100 * share:.2f} %",
            0,
            _FAIR_SHARES / count,
            f"The layer's share of all squared differences; equal shares would be "
            f"{100 / count:.2f} %. {empty}",
            _NOT_COMPARABLE,
        ),
        Kinds("Stored in A", lambda layer: layer.a_format, _SHADES, _STORED),
        Kinds("Stored in B", lambda layer: layer.b_format, _SHADES, _STORED),
    )
    kept = [layer.name for layer in weights.layers if layer.a_format in FLOAT_NAMES]
    return NetworkMap({layer.name: layer for layer in weights.layers}, metrics, keep, kept)
