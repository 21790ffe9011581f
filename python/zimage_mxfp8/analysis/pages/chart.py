"""Error against size: the line of kept layers, and choices beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .keep import KeepOrder
from .markup import element, text
from .units import fitting_unit

_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 28, 24, 34  # margins


@dataclass(frozen=True)
class NamedSet:
    """A set of kept layers with a name.

    Attributes:
        name: its name.
        nbytes: size of the file.
        error: its error.
    """

    name: str
    nbytes: int
    error: float


@dataclass(frozen=True)
class SizeChart:
    """A chart of the error against the size, for each number of kept layers.

    Attributes:
        keep: the order of the layers; the page's slider moves a mark on its line.
        choices: sets that are compared with it. At most four.
        bound: an error that is drawn as a line; None for none.
    """

    keep: KeepOrder
    choices: Sequence[NamedSet] = ()
    bound: float | None = None

    def html(self) -> str:
        """Return the block as HTML."""
        charts = self._svg("wide", 1220, 340) + self._svg("narrow", 350, 320)
        title = f"{self.keep.error[:1].upper()}{self.keep.error[1:]} against the size of the file"
        button = element("p", element("button", "Download PNG", type="button", class_="png"))
        return element(
            "figure", element("figcaption", text(title)) + charts + button, class_="chart"
        )

    def _svg(self, kind: str, width: int, height: int) -> str:
        keep, axes = self.keep, self._axes(width, height)
        places = (axes.at(*point) for point in zip(keep.nbytes(), keep.errors(), strict=True))
        points = [(round(x, 1), round(y, 1)) for x, y in places]
        path = "M" + "L".join(f"{x} {y}" for x, y in points)
        x, y = points[keep.chosen]
        parts = [
            self._grid(axes, 6 if kind == "wide" else 3),
            element("path", d=path, class_="line"),
            *(
                element("circle", cx=points[count][0], cy=points[count][1], r=3, class_="measured")
                for count in keep.measured or ()
            ),
            "" if self.bound is None else self._bound(axes, self.bound),
            *(_named(axes, choice) for choice in self.choices),
            element("circle", cx=x, cy=y, r=8, class_="cursor"),
        ]
        return element(
            "svg",
            "".join(parts),
            class_=kind,
            viewBox=f"0 0 {width} {height}",
            width=width,
            height=height,
            role="img",
            aria_label=f"{keep.error} against size, for each number of kept layers",
            data_points=" ".join(f"{x},{y}" for x, y in points),
        )

    def _axes(self, width: int, height: int) -> _Axes:
        sizes = [*self.keep.nbytes(), *(choice.nbytes for choice in self.choices)]
        errors = [*self.keep.errors(), *(choice.error for choice in self.choices)]
        highest = max([*errors, self.bound or 0.0]) or 1.0
        return _Axes(width, height, min(sizes), max(sizes), _ticks(0.0, highest, 5)[-1])

    def _grid(self, axes: _Axes, columns: int) -> str:
        parts = []
        for error in _ticks(0.0, axes.highest, 5):
            _, y = axes.at(axes.least, error)
            parts.append(element("line", x1=_LEFT, x2=axes.end, y1=y, y2=y, class_="grid"))
            label = self.keep.error_text(error)
            parts.append(element("text", label, x=_LEFT - 8, y=y, class_="kind"))
        unit, name = fitting_unit(axes.most)
        for size in _ticks(axes.least / unit, axes.most / unit, columns):
            x, y = axes.at(size * unit, 0.0)
            if _LEFT - 1 <= x <= axes.end + 1:
                label = f"{size:,.4g} {name}"
                parts.append(element("line", x1=x, x2=x, y1=y, y2=y + 5, class_="grid"))
                parts.append(element("text", label, x=x, y=y + 20, text_anchor="middle"))
        return "".join(parts)

    def _bound(self, axes: _Axes, bound: float) -> str:
        _, y = axes.at(axes.least, bound)
        line = element("line", x1=_LEFT, x2=axes.end, y1=y, y2=y, class_="bound")
        words = f"bound {self.keep.error_text(bound)}"
        below = y + 15 if y < axes.height - _BOTTOM - 30 else y - 7
        return line + element("text", words, x=axes.end, y=below, class_="bound-name")


@dataclass(frozen=True)
class _Axes:
    """The place of sizes and errors in a drawing."""

    width: int
    height: int
    least: int
    most: int
    highest: float

    @property
    def end(self) -> int:
        return self.width - _RIGHT

    def at(self, nbytes: float, error: float) -> tuple[float, float]:
        span = self.most - self.least
        share = (nbytes - self.least) / span if span else 0.0
        inside = self.height - _TOP - _BOTTOM
        return _LEFT + share * (self.end - _LEFT), _TOP + (1 - error / self.highest) * inside


def _named(axes: _Axes, choice: NamedSet) -> str:
    x, y = axes.at(choice.nbytes, choice.error)
    end = x > axes.width * 0.55
    name = element(
        "text",
        text(choice.name),
        x=x - 12 if end else x + 12,
        y=y - (30 if end else 11),  # the line is higher on the left
        text_anchor="end" if end else "start",
        class_="name",
    )
    return element("path", d=f"M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6 -6z", class_="choice") + name


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Return round numbers from `low` or below to `high` or above, about `count` of them."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power * count >= span * 0.999)
    return [i * step for i in range(math.floor(low / step), math.ceil(high / step - 1e-9) + 1)]
