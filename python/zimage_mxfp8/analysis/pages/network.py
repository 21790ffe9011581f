"""The map of the network: blocks by layer types, with the kept layers marked.

It is drawn twice, as static SVG: blocks from the left, and for narrow windows blocks from the top.
The page's script changes colours and marks of both.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Generic, TypeVar

from ...checkpoint.quantization import WEIGHT_SUFFIX
from ...zimage.layers import ZIMAGE
from ...zimage.table import BlockTensor
from .blocks import Copyable
from .colors import ANCHORS, PALETTE, Range, color_range
from .keep import KeepOrder, slider
from .markup import data, element, text

_TITLES = {stack.name: stack.title.strip() or "main blocks" for stack in ZIMAGE.stacks}
_MAX_NAME = 22  # characters of a layer type that are shown
_MAX_PITCH = 56  # pixels from one block to the next
_WIDTH = 1060  # that blocks have room for
_LABELS = 160  # pixels for the names of layer types
_GAP = 14  # between stacks
_ROW = 28
_HEAD = 46
_LEGEND = 64
_NARROW_WIDTH, _NARROW_LABELS, _NARROW_ROW, _NARROW_HEAD = 350, 84, 22, 138

_KEPT = "kept, not quantised"
_EXCLUSIONS = "Exclusion list of these layers for a conversion:"
_READING = element("output", "Point at a layer for its figures.", class_="reading")
_DOWNLOAD = element("button", "Download PNG", type="button", class_="png")

Layer = TypeVar("Layer")


@dataclass(frozen=True)
class Metric(Generic[Layer]):
    """A figure that colours the map. It grows with the harm, so that dark is harmless.

    Attributes:
        title: its name.
        value: of a layer; None where it was not measured.
        text: words for a value.
        low: value of the darkest colour.
        high: value of the lightest colour, if no layer has more; see `color_range`.
        note: what it means, and why cells may be empty.
        missing: words for a layer without a value.
        falling: whether the number in its words falls as the value grows.
    """

    title: str
    value: Callable[[Layer], float | None]
    text: Callable[[float], str]
    low: float
    high: float
    note: str = ""
    missing: str = "not measured"
    falling: bool = False

    def shown(self, layers: Sequence[Layer]) -> _Shown:
        """Return it in words and colours."""
        values = [self.value(layer) for layer in layers]
        found = [value for value in values if value is not None]
        colors = color_range(found, self.low, self.high)
        less, more = ("≥ ", "≤ ") if self.falling else ("≤ ", "≥ ")
        low = (less if found and min(found) < colors.low else "") + self.text(colors.low)
        high = (more if found and max(found) > colors.high else "") + self.text(colors.high)
        return _Shown(
            self.title,
            self.note,
            _Scale(f"{low} · harmless", f"{high} · harmful"),
            [None if value is None else colors.level(value) for value in values],
            [self.missing if value is None else self.text(value) for value in values],
        )


@dataclass(frozen=True)
class Kinds(Generic[Layer]):
    """A choice among a few words that colours the map, each with its colour in the legend.

    Attributes:
        title: its name.
        value: word of a layer; None where it has none.
        shades: place of each word in the palette, from 0 for harmless to 1. The legend has those
            that occur, in this order.
        note: what it means, and why cells may be empty.
        missing: words for a layer without a value.
    """

    title: str
    value: Callable[[Layer], str | None]
    shades: Mapping[str, float]
    note: str = ""
    missing: str = "no such layer"

    def shown(self, layers: Sequence[Layer]) -> _Shown:
        """Return it in words and colours."""
        words = [self.value(layer) for layer in layers]
        levels = {word: Range(0, 1).level(shade) for word, shade in self.shades.items()}
        return _Shown(
            self.title,
            self.note,
            _Swatches({word: PALETTE[level] for word, level in levels.items() if word in words}),
            [None if word is None else levels[word] for word in words],
            [self.missing if word is None else word for word in words],
        )


@dataclass(frozen=True)
class _Shown:
    """What colours the map, in words and colours."""

    title: str
    note: str
    legend: _Scale | _Swatches
    levels: list[int | None]
    texts: list[str]


@dataclass(frozen=True)
class _Scale:
    """The legend of a metric: the palette with words for its ends."""

    low: str
    high: str

    def svg(self, x: float, y: float, width: float) -> str:
        bar = element("rect", x=x, y=y, width=width, height=10, fill=f"url(#{_gradient_id(width)})")
        return (
            bar
            + element("text", text(self.low), x=x, y=y + 26, class_="low")
            + element("text", text(self.high), x=x + width, y=y + 26, class_="high")
        )


@dataclass(frozen=True)
class _Swatches:
    """The legend of words: each with its colour."""

    colors: Mapping[str, str]

    def svg(self, x: float, y: float, width: float) -> str:
        parts = []
        for i, (word, color) in enumerate(self.colors.items()):
            at_x, at_y = x + i % 2 * width / 2, y + i // 2 * 18
            parts.append(element("rect", x=at_x, y=at_y, width=12, height=12, rx=2, fill=color))
            parts.append(element("text", text(word), x=at_x + 18, y=at_y + 6, class_="key"))
        return "".join(parts)


@dataclass(frozen=True)
class _Grid:
    """Where the cells of a map are.

    Attributes:
        blocks: stack and number of each block.
        kinds: layer types.
        cells: number of the layer by block and layer type.
    """

    blocks: Sequence[tuple[str, int]]
    kinds: Sequence[str]
    cells: Mapping[tuple[tuple[str, int], str], int]

    def leaves_out(self, block: tuple[str, int], kind: str) -> bool:
        """Return whether the model has a layer there that is not on the map."""
        return (block, kind) not in self.cells and kind in _layer_types(*block)

    @property
    def leaves_out_any(self) -> bool:
        """Whether there is such a layer."""
        return any(self.leaves_out(block, kind) for block in self.blocks for kind in self.kinds)


@dataclass(frozen=True)
class NetworkMap(Generic[Layer]):
    """The map of the network, with a choice of colours and a slider of kept layers.

    Attributes:
        layers: what is known of each layer, by its name or its weight's, without prefix. Those
            that are in no block have no cell.
        metrics: what colours the cells; the first one is shown first.
        keep: the order in which layers are kept; None for a map without a slider.
        kept: names of kept layers, for a map without a slider.
    """

    layers: Mapping[str, Layer]
    metrics: Sequence[Metric[Layer] | Kinds[Layer]]
    keep: KeepOrder | None = None
    kept: Collection[str] = ()

    def html(self) -> str:
        """Return the block as HTML."""
        control = pattern = ""
        if self.keep is not None:
            control = slider(self.keep)
            pattern = Copyable(_EXCLUSIONS, self.keep.pattern()).html()
        grid, layers = self._grid()
        shown = [metric.shown(layers) for metric in self.metrics]
        names = [_layer_name(name) for name in self.layers if _place(name)]
        content = {
            "layers": names,
            "palette": PALETTE,
            "metrics": [
                {"title": x.title, "note": x.note, "levels": x.levels, "texts": x.texts}
                for x in shown
            ],
            "keep": None if self.keep is None else self.keep.to_dict(),
        }
        if not grid.blocks:
            note = element("p", "No map: these layers are in none of Z-Image's blocks.")
            return element("div", control + note + pattern + data(content), class_="network")
        kept = self._kept()
        marks = {i for i, name in enumerate(names) if name in kept}
        maps = _wide(grid, shown, marks) + _narrow(grid, shown, marks)
        parts = [
            control,
            _choices(shown),
            element("p", text(shown[0].note), class_="note"),
            element("div", maps, class_="maps"),
            element("div", _READING + _DOWNLOAD, class_="below"),
            pattern,
            data(content),
        ]
        return element("div", "\n".join(parts), class_="network")

    def _kept(self) -> set[str]:
        return {_layer_name(name) for name in (self.keep.kept() if self.keep else self.kept)}

    def _grid(self) -> tuple[_Grid, list[Layer]]:
        places: list[BlockTensor] = []
        layers: list[Layer] = []
        for name, layer in self.layers.items():
            if place := _place(name):
                places.append(place)
                layers.append(layer)
        kinds = {place.part for place in places}
        known = [kind for kind in ZIMAGE.main_types() if kind in kinds]
        blocks = [
            (stack, block)
            for stack in _TITLES
            for block in sorted({place.block for place in places if place.stack == stack})
        ]
        cells = {((place.stack, place.block), place.part): i for i, place in enumerate(places)}
        return _Grid(blocks, [*known, *sorted(kinds.difference(known))], cells), layers


@cache
def _layer_types(stack: str, block: int) -> frozenset[str]:
    """Return the names of the layers of one of Z-Image's blocks."""
    (found,) = (each for each in ZIMAGE.stacks if each.name == stack)
    return frozenset(layer.name for layer in ZIMAGE.layers_of(found, block))


def _layer_name(name: str) -> str:
    return name.removesuffix(WEIGHT_SUFFIX)


def _place(name: str) -> BlockTensor | None:
    return ZIMAGE.split(_layer_name(name))


def _choices(metrics: Sequence[_Shown]) -> str:
    if len(metrics) < 2:
        return ""
    radios = "".join(
        element(
            "label",
            element(
                "input",
                type="radio",
                name="metric",
                value=str(i),
                checked=i == 0,
                autocomplete="off",
            )
            + element("span", text(metric.title)),
        )
        for i, metric in enumerate(metrics)
    )
    return element("fieldset", element("legend", "Colour by") + radios, class_="choices")


def _wide(grid: _Grid, metrics: Sequence[_Shown], marks: Collection[int]) -> str:
    """Blocks from the left, layer types from the top."""
    stacks = len({stack for stack, _ in grid.blocks})
    pitch = min(_MAX_PITCH, (_WIDTH - _GAP * (stacks - 1)) / len(grid.blocks))
    parts, x, before = [], float(_LABELS), ""
    for stack, block in grid.blocks:
        if stack != before:
            x += _GAP if before else 0
            parts.append(element("text", text(_TITLES[stack]), x=x, y=14, class_="stack"))
            before = stack
        if pitch > 14 or block % 5 == 0:
            middle = x + pitch / 2
            parts.append(element("text", str(block), x=middle, y=_HEAD - 8, class_="number"))
        for row, kind in enumerate(grid.kinds):
            box = (x, _HEAD + row * _ROW, pitch - 2, _ROW - 2)
            parts.append(_cell(grid, (stack, block), kind, box, metrics[0], marks))
        x += pitch
    for row, kind in enumerate(grid.kinds):
        y = _HEAD + row * _ROW + _ROW / 2
        parts.append(element("text", text(_shortened(kind)), x=_LABELS - 10, y=y, class_="kind"))
    height = _HEAD + _ROW * len(grid.kinds) + 18
    parts.append(_legend(grid, metrics, _LABELS, height, stacked=False))
    return _svg("wide", max(x, 860.0), height + _LEGEND - 18, parts)


def _narrow(grid: _Grid, metrics: Sequence[_Shown], marks: Collection[int]) -> str:
    """Blocks from the top, layer types from the left."""
    pitch = min(44.0, (_NARROW_WIDTH - _NARROW_LABELS) / len(grid.kinds))
    parts, y, before = [], float(_NARROW_HEAD), ""
    for column, kind in enumerate(grid.kinds):
        x = _NARROW_LABELS + column * pitch + pitch / 2
        turned = f"translate({x:.1f} {_NARROW_HEAD - 6}) rotate(-90)"
        parts.append(element("text", text(_shortened(kind)), transform=turned, class_="turned"))
    for stack, block in grid.blocks:
        if stack != before:
            y += _GAP if before else 0
            before = stack
        name = str(block) if ZIMAGE.main.name == stack else f"{_TITLES[stack]} {block}"
        middle = y + _NARROW_ROW / 2
        parts.append(element("text", text(name), x=_NARROW_LABELS - 8, y=middle, class_="kind"))
        for column, kind in enumerate(grid.kinds):
            box = (_NARROW_LABELS + column * pitch, y, pitch - 2, _NARROW_ROW - 2)
            parts.append(_cell(grid, (stack, block), kind, box, metrics[0], marks))
        y += _NARROW_ROW
    parts.append(_legend(grid, metrics, 8, y + 14, stacked=True))
    return _svg("narrow", _NARROW_WIDTH, y + 14 + _LEGEND + 58, parts)


def _shortened(name: str) -> str:
    return name if len(name) <= _MAX_NAME else f"{name[: _MAX_NAME - 1]}…"


def _svg(kind: str, width: float, height: float, parts: Sequence[str]) -> str:
    return element(
        "svg",
        "".join(parts),
        class_=f"map {kind}",
        viewBox=f"0 0 {width:.0f} {height:.0f}",
        width=width,
        height=height,
        role="img",
        aria_label="Map of the network: blocks by layer types; a table below has its figures",
    )


_Box = tuple[float, float, float, float]  # left, top, width, height


def _cell(
    grid: _Grid,
    block: tuple[str, int],
    kind: str,
    box: _Box,
    metric: _Shown,
    marks: Collection[int],
) -> str:
    x, y, width, height = box
    layer = grid.cells.get((block, kind))
    if layer is None:
        return _omitted(box) if grid.leaves_out(block, kind) else _blank(box)
    level = metric.levels[layer]
    fill = "none" if level is None else PALETTE[level]
    square = element("rect", x=x, y=y, width=width, height=height, rx=3, fill=fill)
    dot = element("circle", cx=x + width / 2, cy=y + height / 2, r=min(5, width / 3))
    kept = " kept" if layer in marks else ""
    return element("g", square + dot, class_=f"cell{kept}", data_i=layer)


def _omitted(box: _Box) -> str:
    x, y, width, height = box
    return element(
        "rect", x=x + 1, y=y + 1, width=width - 2, height=height - 2, rx=3, class_="omitted"
    )


def _blank(box: _Box) -> str:
    x, y, width, height = box
    begin = f"M{x + width * 0.3:.1f} {y + height * 0.7:.1f}"
    return element("path", d=f"{begin}l{width * 0.4:.1f} {height * -0.4:.1f}", class_="blank")


def _legend(grid: _Grid, metrics: Sequence[_Shown], x: float, y: float, *, stacked: bool) -> str:
    width = 240 if not stacked else 320
    colors = "".join(
        element("g", metric.legend.svg(x, y, width), class_="colors", hidden=i > 0)
        for i, metric in enumerate(metrics)
    )
    signs = [
        (lambda box: element("circle", cx=box[0] + 8, cy=box[1] + 8, r=5, class_="sample"), _KEPT),
        (_blank, "no such layer in this block"),
        *([(_omitted, "not part of this report")] if grid.leaves_out_any else ()),
    ]
    keys = ""
    for i, (sign, words) in enumerate(signs):
        at_x, at_y = (x, y + 44 + 24 * i) if stacked else (x + width + 60 + 190 * i, y - 3)
        keys += sign((at_x, at_y, 16, 16))
        keys += element("text", words, x=at_x + 22, y=at_y + 8, class_="key")
    return element("g", _gradient(width) + colors + keys, class_="legend")


def _gradient_id(width: float) -> str:
    """Return the name of the palette in a drawing; the page has two, with legends of two widths."""
    return f"palette-{width:.0f}"


def _gradient(width: float) -> str:
    stops = "".join(
        element("stop", offset=i / (len(ANCHORS) - 1), stop_color=color)
        for i, color in enumerate(ANCHORS)
    )
    return element("linearGradient", stops, id=_gradient_id(width))
