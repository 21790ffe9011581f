"""Plots of the pages, made with plotly. Colours follow the page, light or dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import plotly.graph_objects as go

from ...text import printable

# Perceptually uniform, and the same to readers with any colour vision deficiency.
COLOR_MAP = "Cividis"
# Okabe and Ito's colours, those that show on white and on black; symbols differ too.
_LINES = (
    ("#0072B2", "circle"),
    ("#E69F00", "square"),
    ("#009E73", "diamond"),
    ("#CC79A7", "triangle-up"),
    ("#56B4E9", "x"),
    ("#D55E00", "star"),
)
_ROW_HEIGHT = 30  # pixels
_MARGINS = {"l": 150, "r": 20, "t": 10, "b": 70}

Cells = Sequence[Sequence[float | None]]
SizePoint = tuple[float, float, str]  # size in GiB, what is lost, name


@dataclass(frozen=True)
class Grid:
    """Names along a heat map.

    Attributes:
        columns: below it.
        rows: beside it, from the top.
    """

    columns: Sequence[str]
    rows: Sequence[str]


def heat_map(grid: Grid, values: Cells, title: str, digits: int) -> go.Figure:
    """Return a heat map of numbers.

    Args:
        grid: names of columns and rows.
        values: a number for each row and column; None leaves a gap.
        title: of the colours.
        digits: decimals that pointing at a cell shows.
    """
    low, high = _color_range([v for row in values for v in row if v is not None])
    figure = go.Figure(
        go.Heatmap(
            x=_labels(grid.columns),
            y=_labels(grid.rows),
            z=values,
            zmin=low,
            zmax=high,
            colorscale=COLOR_MAP,
            colorbar={"title": {"text": title, "side": "right"}, "thickness": 14},
            xgap=1,
            ygap=1,
            hoverongaps=False,
            hovertemplate=f"%{{y}}, block %{{x}}<br>{title} %{{z:.{digits}f}}<extra></extra>",
        )
    )
    return _laid_out(figure, grid)


def category_map(
    grid: Grid, values: Cells, names: Sequence[str], marks: Sequence[str]
) -> go.Figure:
    """Return a heat map of categories, each with a mark in its cells so that colour is not all.

    Args:
        grid: names of columns and rows.
        values: the number of the category for each row and column; None leaves a gap.
        names: of the categories.
        marks: one or two letters for each.
    """
    count = len(names)
    shades = go.Figure(go.Heatmap(colorscale=COLOR_MAP)).data[0].colorscale
    colors = [shades[round(i * (len(shades) - 1) / max(count - 1, 1))][1] for i in range(count)]
    steps = [(edge / count, color) for i, color in enumerate(colors) for edge in (i, i + 1)]
    labels = [[("" if v is None else marks[int(v)]) for v in row] for row in values]
    hover = [[("" if v is None else names[int(v)]) for v in row] for row in values]
    figure = go.Figure(
        go.Heatmap(
            x=_labels(grid.columns),
            y=_labels(grid.rows),
            z=values,
            zmin=-0.5,
            zmax=count - 0.5,
            colorscale=steps,
            colorbar={
                "tickvals": list(range(count)),
                "ticktext": list(names),
                "thickness": 14,
            },
            text=labels,
            texttemplate="%{text}",
            customdata=hover,
            xgap=1,
            ygap=1,
            hoverongaps=False,
            hovertemplate="%{y}, block %{x}<br>%{customdata}<extra></extra>",
        )
    )
    return _laid_out(figure, grid)


def line_plot(
    columns: Sequence[str],
    lines: Mapping[str, Sequence[float | None]],
    levels: Mapping[str, float],
    title: str,
) -> go.Figure:
    """Lines over named columns, and horizontal levels with their names.

    Args:
        columns: names along the horizontal axis.
        lines: a number for each column, by the line's name; None leaves a gap. At most six.
        levels: heights, by name.
        title: of the vertical axis.
    """
    figure = go.Figure()
    for (name, values), (color, symbol) in zip(lines.items(), _LINES, strict=False):
        figure.add_scatter(
            x=columns,
            y=values,
            name=name,
            mode="lines+markers",
            line={"color": color, "width": 1},
            marker={"color": color, "symbol": symbol, "size": 8},
            hovertemplate=f"{name}, block %{{x}}<br>{title} %{{y:.4f}}<extra></extra>",
        )
    for name, level in levels.items():
        figure.add_hline(level, line={"dash": "dash", "width": 1}, annotation_text=name)
    figure.update_layout(
        height=420,
        margin=_MARGINS | {"l": 60},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
        xaxis={"type": "category", "tickangle": -90},
        yaxis={"title": {"text": title}},
    )
    return figure


def size_plot(
    points: Mapping[str, Sequence[SizePoint]], title: str, *, chosen: str, path: str | None = None
) -> go.Figure:
    """Error against size: one series of points each.

    Args:
        points: of each series, by its name. At most six.
        title: of the vertical axis.
        chosen: the series that has a ring, so that no other point hides it.
        path: a series of many points, small and on a line.
    """
    figure = go.Figure()
    for (name, series), (color, symbol) in zip(points.items(), _LINES, strict=False):
        marker = {"color": color, "symbol": symbol, "size": 11}
        if name == chosen:
            marker |= {"symbol": "circle-open", "size": 20, "line": {"width": 3}}
        elif name == path:
            marker |= {"size": 5}
        figure.add_scatter(
            x=[size for size, _, _ in series],
            y=[value for _, value, _ in series],
            customdata=[point for _, _, point in series],
            name=name,
            mode="lines+markers" if name == path else "markers",
            line={"color": color, "width": 1},
            marker=marker,
            hovertemplate=f"%{{customdata}}<br>%{{x:.3f}} GiB, {title} %{{y:.4f}}<extra></extra>",
        )
    figure.update_layout(
        height=420,
        margin=_MARGINS | {"l": 60},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
        xaxis={"title": {"text": "size (GiB)"}},
        yaxis={"title": {"text": title}, "rangemode": "tozero"},
    )
    return figure


def _labels(names: Sequence[str]) -> list[str]:
    """Names as plotly takes them, which reads some tags in them."""
    return [escape(printable(name), quote=False) for name in names]


def _color_range(values: Sequence[float]) -> tuple[float, float]:
    """Least and most value that colours tell apart: a few extreme ones would hide the rest."""
    if not values:  # a map of nothing but gaps
        return 0.0, 1.0
    q25, q75 = np.quantile(values, [0.25, 0.75])
    reach = 3 * (q75 - q25)
    return max(min(values), float(q25 - reach)), min(max(values), float(q75 + reach))


def _laid_out(figure: go.Figure, grid: Grid) -> go.Figure:
    figure.update_layout(
        height=_ROW_HEIGHT * len(grid.rows) + _MARGINS["t"] + _MARGINS["b"],
        margin=_MARGINS,
        xaxis={"type": "category", "tickangle": -90, "showgrid": False},
        yaxis={"type": "category", "autorange": "reversed", "showgrid": False},
    )
    return figure
