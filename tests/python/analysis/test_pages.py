"""The HTML pages in a real browser."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import zimage_mxfp8 as zm
from helpers.browser import Browser
from helpers.checkpoints import random_tensors, small_shapes
from helpers.commands import Run, only
from helpers.diffusers_reference import make_reference
from zimage_mxfp8.analysis.compare.page import compare_page
from zimage_mxfp8.analysis.evaluate.folder import save_report
from zimage_mxfp8.analysis.exclusions import merged_pattern
from zimage_mxfp8.analysis.pages import links as links_module
from zimage_mxfp8.analysis.pages.blocks import Column, Copyable, Paragraph, Table
from zimage_mxfp8.analysis.pages.colors import PALETTE, color_range
from zimage_mxfp8.analysis.pages.links import (
    link_from_above,
    link_from_beside,
    links_above,
    links_beside,
)
from zimage_mxfp8.analysis.pages.network import Metric, NetworkMap
from zimage_mxfp8.analysis.pages.page import (
    Origin,
    Page,
    Section,
    Tile,
    render_page,
)
from zimage_mxfp8.analysis.pages.weight_error import weight_error
from zimage_mxfp8.analysis.probe.page import probe_page
from zimage_mxfp8.analysis.sensitivity.page import sensitivity_page
from zimage_mxfp8.conversion.recipes import KeepRule

BOUND = 7e-4  # which keeps some of the layers of `small_file`, but not all
NAMES = ("probe", "compare", "sensitivity", "evaluate")
MIB = 2**20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pages")


@pytest.fixture(scope="module")
def probe_report(folder: Path) -> zm.ProbeReport:
    path = folder / "<b>&.safetensors"
    save_file(random_tensors(small_shapes()), path)
    return zm.probe(path)


@pytest.fixture(scope="module")
def compare_report(small_file: Path) -> zm.CompareReport:
    return zm.compare(small_file, sample=0.01, low_rank="none")


@pytest.fixture(scope="module")
def sensitivity_report(folder: Path) -> zm.SensitivityReport:
    make_reference(dim=128, layers=2).save_pretrained(folder / "model")
    return zm.analyse_sensitivity(
        folder / "model", size=(32, 32), timesteps=8, bound=0.02, device="cpu", seed=3
    )


@pytest.fixture(scope="module")
def evaluation_report(zimage_folder: Path, zimage_quantized: Path) -> zm.EvaluationReport:
    small: dict[str, Any] = {"steps": 1, "size": (32, 32), "device": "cpu", "dtype": "float32"}
    prompts = [f"<i>{name}</i>" for name in "ab"]
    return zm.evaluate(zimage_folder, zimage_quantized, prompts=prompts, seeds=[0], **small)


@pytest.fixture(scope="module")
def pages(
    folder: Path,
    probe_report: zm.ProbeReport,
    compare_report: zm.CompareReport,
    sensitivity_report: zm.SensitivityReport,
    evaluation_report: zm.EvaluationReport,
) -> dict[str, Path]:
    """The page of every command, written in this order."""
    found: dict[str, Path] = {}
    writers: dict[str, Callable[[Origin], str]] = {
        "probe": lambda origin: probe_page(probe_report, origin),
        "compare": lambda origin: compare_page(compare_report, BOUND, origin),
        "sensitivity": lambda origin: sensitivity_page(sensitivity_report, origin),
    }
    for name, write in writers.items():
        found[name] = folder / f"{name}.html"
        origin = Origin(f"zimage-mxfp8 {name} '<i>'", links_beside(found[name]))
        found[name].write_text(write(origin), "utf-8")
        link_from_beside(found[name])
    found["evaluate"] = folder / "evaluation" / "evaluate.html"
    origin = Origin("zimage-mxfp8 evaluate '<i>'", links_above(found["evaluate"].parent))
    save_report(evaluation_report, found["evaluate"].parent, origin, overwrite=False)
    link_from_above(found["evaluate"].parent)
    return found


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    started = Browser(tmp_path_factory.mktemp("browser"))
    yield started
    started.close()


every_page = pytest.mark.parametrize("name", NAMES)

# What is wider than the window, or has text that its own box cuts.
CUT = """
const shown = [...document.querySelectorAll('body *')].filter((e) => e.getClientRects().length);
const width = document.documentElement.clientWidth;
const outside = shown.filter((e) => {
  const box = e.getBoundingClientRect();
  return box.width && (box.right > width + 0.5 || box.left < -0.5);
});
const cut = shown.filter((e) => !(e instanceof SVGElement) && e.scrollWidth > e.clientWidth + 1
  && getComputedStyle(e).display !== 'inline');
const past = [...document.querySelectorAll('svg text')].filter((e) => {
  const [box, svg] = [e.getBoundingClientRect(), e.closest('svg').getBoundingClientRect()];
  return box.width && (box.left < svg.left - 1 || box.right > svg.right + 1
    || box.top < svg.top - 1 || box.bottom > svg.bottom + 1);
});
const words = (list) => list.map(
  (e) => `${e.tagName} ${e.className} ${e.textContent}`.slice(0, 60));
return { scroll: document.documentElement.scrollWidth - width, outside: words(outside),
         cut: words(cut), past: words(past) };
"""

# Places and colours of the visible map's cells.
MAP = """
const map = [...document.querySelectorAll('svg.map')].find((e) => e.getClientRects().length);
return { kind: map.classList.contains('wide') ? 'wide' : 'narrow',
  cells: [...map.querySelectorAll('.cell')].map((cell) => {
    const box = cell.querySelector('rect').getBoundingClientRect();
    return { layer: Number(cell.dataset.i), x: box.x + scrollX, y: box.y + scrollY,
             width: box.width, height: box.height };
  }) };
"""


def brightness(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    return pixels.astype(np.float64) @ [0.2126, 0.7152, 0.0722]


def embedded(page: Path) -> dict[str, Any]:
    """The JSON that the map of a page has."""
    found = re.findall(r'<script type="application/json">(.*?)</script>', page.read_text("utf-8"))
    (only,) = found
    content: dict[str, Any] = json.loads(only)
    return content


@every_page
@pytest.mark.parametrize(("width", "dark"), [(1400, False), (390, False), (1400, True)])
def test_nothing_is_cut(
    browser: Browser, pages: dict[str, Path], name: str, width: int, dark: bool
) -> None:
    with browser.open(pages[name], width=width, dark=dark) as tab:
        seen, found, image = tab.run(CUT), tab.run(MAP), tab.image()
        assert tab.console() == []
        outside = [url for url in tab.requests() if not url.startswith("data:")]
        assert outside == [pages[name].as_uri()]
    assert seen == {"scroll": 0, "outside": [], "cut": [], "past": []}
    ground = brightness(image[2, 2])
    assert ground < 40 if dark else ground > 230
    # The map is drawn: each cell has the colour of its layer, and blocks run along the longer side.
    content = embedded(pages[name])
    levels = content["metrics"][0]["levels"]
    assert sorted(cell["layer"] for cell in found["cells"]) == list(range(len(levels)))
    for cell in found["cells"]:
        color = image[int(cell["y"] + cell["height"] / 2), int(cell["x"] + cell["width"] / 5)]
        wanted = content["palette"][levels[cell["layer"]]]
        assert "#" + bytes(color).hex() == wanted, content["layers"][cell["layer"]]
    assert found["kind"] == ("narrow" if width == 390 else "wide")
    along = "y" if width == 390 else "x"
    places = {content["layers"][cell["layer"]]: cell for cell in found["cells"]}
    blocks = [places[f"layers.{i}.attention.qkv"][along] for i in range(2)]
    assert blocks[0] < blocks[1] and places["noise_refiner.0.attention.qkv"][along] < blocks[0]
    # Aligned: all layers of a block have one place along that side.
    for layer, place in places.items():
        head = layer.rpartition("attention.qkv")[0]
        if head:
            assert places[f"{head}feed_forward.w2"][along] == place[along]


@every_page
def test_a_page_is_small_and_whole(pages: dict[str, Path], name: str) -> None:
    content = pages[name].read_bytes()
    assert len(content) <= 1_000_000
    text = content.decode()
    outside = r"(src|href)\s*=\s*\"(?!data:|(\.\./|\w+/)?\w+\.html)|@import|url\((?!#)"
    assert not re.search(outside, text)
    # Three to five tiles, then the map, and the facts of the run.
    assert 3 <= text.count('<article class="tile') <= 5
    assert text.index("<article") < text.index('<div class="network"') < text.index('class="table"')
    assert f"<dd>{zm.__version__}</dd>" in text
    assert "<dt>command</dt><dd><code>zimage-mxfp8 " in text


def test_facts_of_a_measurement(pages: dict[str, Path]) -> None:
    text = pages["sensitivity"].read_text("utf-8")
    facts = dict(re.findall(r"<dt>([^<]*)</dt><dd>([^<]*)</dd></div>", text))
    assert facts["seed"] == "3" and facts["device"] == "cpu, bfloat16"
    assert (
        facts["image"] == "32 x 32 pixels" and facts["steps"] == "0, 1, 2, 3, 4, 5, 6, 7 of 0 to 7"
    )
    assert facts["bound"] == "0.02" and facts["checkpoint"] == "model"


# Moves the slider and reads what the page shows then.
SLIDE = """
const bar = document.getElementById('keep');
const names = JSON.parse(document.querySelector('.network script').textContent).layers;
const read = () => ({ count: document.querySelector('.count').textContent,
  size: document.querySelector('dd.size').textContent,
  error: document.querySelector('dd.error').textContent,
  how: document.querySelector('.how')?.textContent,
  pattern: document.querySelector('.network pre').textContent,
  kept: [...document.querySelectorAll('svg.map.wide .kept')].map((e) => names[e.dataset.i]),
  marks: [...document.querySelectorAll('svg.map.wide .cell')].filter(
    (e) => getComputedStyle(e.querySelector('circle')).display !== 'none').length,
  cursor: ['cx', 'cy'].map(
    (key) => Number(document.querySelector('.chart svg.wide .cursor').getAttribute(key))) });
const first = read();
const at = COUNTS.map((count) => {
  bar.value = count;
  bar.dispatchEvent(new Event('input'));
  return read();
});
document.querySelector('.reset').click();
return { first, at, last: read() };
"""


class Slid:
    """What a page shows with several numbers of kept layers."""

    def __init__(self, browser: Browser, page: Path, counts: list[int]) -> None:
        with browser.open(page) as tab:
            seen = tab.run(SLIDE.replace("COUNTS", json.dumps(counts)))
            assert tab.console() == []
        self.first, self.last = seen["first"], seen["last"]
        self.at: dict[int, dict[str, Any]] = dict(zip(counts, seen["at"], strict=True))
        assert self.first == self.last, "the button returns to the recommendation"
        for count, shown in self.at.items():
            assert shown["count"] == f"{count:,}" and shown["marks"] == len(shown["kept"]) == count

    def check_chart(self, figures: dict[int, tuple[float, float]]) -> None:
        """The mark on the chart is where the size and the error are, on linear axes."""
        for axis, sign in ((0, 1), (1, -1)):
            places = [self.at[count]["cursor"][axis] for count in figures]
            values = [sign * figure[axis] for figure in figures.values()]
            slope, start = np.polyfit(values, places, 1)
            assert slope > 0 and np.ptp(places) > 100
            assert np.array(values) * slope + start == pytest.approx(places, abs=0.5)


def mib(text: str) -> float:
    number, unit = text.split(" ")
    return float(number) * {"KiB": 1 / 1024, "MiB": 1, "GiB": 1024}[unit]


def kept_by(pattern: str, names: list[str]) -> set[str]:
    return {name for name in names if pattern and re.search(pattern, f"{name}.weight")}


def test_the_slider_of_probe(
    browser: Browser, pages: dict[str, Path], probe_report: zm.ProbeReport
) -> None:
    tensors = probe_report.tensors
    kept = [tensor for tensor in tensors if tensor.effective == "*KEEP*"]
    rest = sorted((t for t in tensors if t.effective != "*KEEP*"), key=lambda t: -t.score)
    order = [*sorted(kept, key=lambda t: -t.score), *rest]
    names = [tensor.name.removesuffix(".weight") for tensor in order]
    counts = [0, 1, len(kept), 150, len(order)]
    slid = Slid(browser, pages["probe"], counts)
    assert slid.first["count"] == str(len(kept))
    assert slid.first["pattern"] == probe_report.exclude_layers

    def nbytes(kept: list[str]) -> int:
        """Of codes, scales and what is kept; not of the header and the markers in it."""
        found = "|".join(re.escape(name) for name in [*kept, "_embedder.", "final_layer."])
        recipe = zm.Recipe("r", "", "", (KeepRule("r", re.compile(found), "r"),))
        places = zm.plan_conversion(probe_report.path, zm.ConversionOptions(recipe=recipe)).places
        return sum(p.nbytes for name, p in places.items() if not name.endswith(".comfy_quant"))

    assert probe_report.recipe_bytes is not None
    header = probe_report.recipe_bytes - nbytes([t.name for t in kept])
    total = sum(tensor.score for tensor in tensors)
    figures = {}
    for count, shown in slid.at.items():
        assert set(shown["kept"]) == set(names[:count])
        assert kept_by(shown["pattern"], names) == set(names[:count])
        size = nbytes([tensor.name for tensor in order[:count]]) + header
        assert mib(shown["size"]) == pytest.approx(size / MIB, abs=0.0501)
        left = 100 * sum(tensor.score for tensor in order[count:]) / total
        assert float(shown["error"].removesuffix(" %")) == pytest.approx(left, rel=6e-3, abs=1e-9)
        figures[count] = size, left
    slid.check_chart(figures)


def test_the_slider_of_compare(
    browser: Browser, pages: dict[str, Path], compare_report: zm.CompareReport
) -> None:
    stacks = ("layers.", "noise_refiner.", "context_refiner.")
    layers = [layer for layer in compare_report.layers if layer.name.startswith(stacks)]
    fixed = [layer.name for layer in compare_report.layers if layer not in layers]
    order = sorted(layers, key=lambda x: -x.formats["mxfp8-e4m3"].relative_squared_error)
    names = [layer.name.removesuffix(".weight") for layer in order]
    above = [x for x in order if x.formats["mxfp8-e4m3"].relative_squared_error > BOUND]
    assert 0 < len(above) < len(order) and len(fixed) == 6
    slid = Slid(browser, pages["compare"], [0, 7, len(above), len(order)])
    assert slid.first["count"] == str(len(above))
    figures = {}
    for count, shown in slid.at.items():
        assert set(shown["kept"]) == set(names[:count])
        assert kept_by(shown["pattern"], names) == set(names[:count])
        mix = compare_report.keeping([*fixed, *(layer.name for layer in order[:count])])
        assert mib(shown["size"]) == pytest.approx(mix.size.model_bytes / MIB, abs=0.0501)
        percent = 100 * mix.error.relative_squared_error
        shown_percent = float(shown["error"].removesuffix(" %"))
        assert shown_percent == pytest.approx(percent, rel=6e-3, abs=1e-12)
        figures[count] = mix.size.model_bytes, percent
    slid.check_chart(figures)


def test_the_slider_of_evaluate(
    browser: Browser, pages: dict[str, Path], evaluation_report: zm.EvaluationReport
) -> None:
    weights = evaluation_report.weights
    stacks = ("layers.", "noise_refiner.", "context_refiner.")
    inside = [layer for layer in weights.layers if layer.name.startswith(stacks)]
    quantized = [layer for layer in inside if layer.a_format == "MXFP8"]
    order = sorted(quantized, key=lambda layer: -(layer.relative_squared_error or 0))
    always = {layer.name.removesuffix(".weight") for layer in inside if layer not in quantized}
    names = [layer.name.removesuffix(".weight") for layer in order]
    least, most = len(always), len(inside)
    assert 0 < least < most < len(weights.layers)
    slid = Slid(browser, pages["evaluate"], [least, least + 1, least + 5, most])
    assert slid.first["count"] == str(least), "as the file is"
    squared = sum(layer.squared_signal for layer in weights.layers)
    figures = {}
    for count, shown in slid.at.items():
        more = order[: count - least]
        assert set(shown["kept"]) == {*always, *names[: count - least]}
        assert kept_by(shown["pattern"], [*always, *names]) == set(shown["kept"])
        grown = sum(2 * math.prod(layer.shape) - layer.a_nbytes for layer in more)
        size = Path(evaluation_report.a.path).stat().st_size + grown
        assert mib(shown["size"]) == pytest.approx(size / MIB, abs=0.0501)
        left = [layer.squared_error or 0 for layer in weights.layers if layer not in more]
        percent = 100 * sum(left) / squared
        assert float(shown["error"].removesuffix(" %")) == pytest.approx(percent, rel=6e-3)
        figures[count] = size, percent
    slid.check_chart(figures)


def test_the_slider_of_sensitivity(
    browser: Browser, pages: dict[str, Path], sensitivity_report: zm.SensitivityReport
) -> None:
    report = sensitivity_report
    names = [layer.name for layer in report.layers]
    measured = {len(choice.kept): choice for choice in (report.everything, *report.tried)}
    between = next(n for n in range(1, len(names)) if n not in measured)
    slid = Slid(browser, pages["sensitivity"], [*sorted(measured), between, len(names)])
    assert slid.first["count"] == str(len(report.smallest.kept))
    for count, choice in measured.items():
        shown = slid.at[count]
        assert shown["how"] == "this error was measured"
        assert float(shown["error"]) == pytest.approx(choice.error, rel=6e-3)
        assert mib(shown["size"]) == pytest.approx(choice.nbytes / MIB, abs=0.0501)
        assert set(shown["kept"]) == set(choice.kept) == kept_by(shown["pattern"], names)
    slid.check_chart({count: (choice.nbytes, choice.error) for count, choice in measured.items()})
    assert float(slid.at[len(names)]["error"]) == 0
    # Between two sets the squared error falls in proportion to what layers cost alone.
    shown = slid.at[between]
    assert shown["how"] == "this error is estimated"
    begin = max(n for n in measured if n < between)
    end = min([n for n in measured if n > between] + [len(names)])
    squares = [measured[n].error ** 2 if n in measured else 0.0 for n in (begin, end)]
    alone = [layer.error.total for layer in report.layers]
    share = sum(alone[begin:between]) / sum(alone[begin:end])
    estimate = math.sqrt(squares[0] + share * (squares[1] - squares[0]))
    assert float(shown["error"]) == pytest.approx(estimate, rel=6e-3)


def test_the_bound_is_a_line(browser: Browser, pages: dict[str, Path]) -> None:
    places = """
    const chart = document.querySelector('.chart svg.wide');
    const y = (e) => e.getBoundingClientRect().y + e.getBoundingClientRect().height / 2;
    const names = [...chart.querySelectorAll('.kind')];
    return { bound: y(chart.querySelector('.bound')),
             name: chart.querySelector('.bound-name').textContent,
             axis: names.map((e) => [Number(e.textContent), y(e)]) };
    """
    with browser.open(pages["sensitivity"]) as tab:
        seen = tab.run(places)
    assert seen["name"] == "bound 0.02"
    values, heights = zip(*seen["axis"], strict=True)
    slope, start = np.polyfit(values, heights, 1)
    assert seen["bound"] == pytest.approx(start + slope * 0.02, abs=1.5)


# Chooses each metric and reads the map's colours and ends.
METRICS = """
return [...document.querySelectorAll('[name=metric]')].map((radio) => {
  radio.click();
  return { title: radio.parentElement.textContent,
    fills: [...document.querySelectorAll('svg.map.wide .cell')].map(
      (cell) => [Number(cell.dataset.i), cell.querySelector('rect').getAttribute('fill')]),
    legend: [...document.querySelectorAll('svg.map.wide .colors text')].filter(
      (words) => words.getClientRects().length).map((words) => words.textContent),
    note: document.querySelector('.note:not(.tile .note)').textContent };
});
"""


KINDS = ("Recommendation", "Stored in A", "Stored in B")


def shades(seen: dict[str, Any], names: list[str]) -> dict[str, float | None]:
    """Brightness of the colour of each layer; None where there is none."""
    return {
        names[i]: None
        if fill == "none"
        else float(brightness(np.frombuffer(bytes.fromhex(fill[1:]), np.uint8)))
        for i, fill in seen["fills"]
    }


def test_dark_is_harmless_on_every_page(
    browser: Browser,
    pages: dict[str, Path],
    probe_report: zm.ProbeReport,
    compare_report: zm.CompareReport,
    sensitivity_report: zm.SensitivityReport,
    evaluation_report: zm.EvaluationReport,
) -> None:
    harm = {
        "probe": ("Score", {t.name: t.score for t in probe_report.tensors}),
        "compare": (
            "INT8 per row",
            {x.name: x.formats["int8-row"].relative_squared_error for x in compare_report.layers},
        ),
        "sensitivity": ("Content", {x.name: x.error.low for x in sensitivity_report.layers}),
        "evaluate": (
            "Difference",
            {x.name: x.relative_squared_error or 0 for x in evaluation_report.weights.layers},
        ),
    }
    for name, (title, values) in harm.items():
        with browser.open(pages[name]) as tab:
            metrics = {seen["title"]: seen for seen in tab.run(METRICS)}
        assert len(metrics) > 3
        for seen in metrics.values():
            if seen["title"] not in KINDS:
                low, high = seen["legend"]
                assert low.endswith("· harmless") and high.endswith("· harmful")
        colors = shades(metrics[title], embedded(pages[name])["layers"])
        layers = sorted(
            (value, colors[layer])
            for full, value in values.items()
            if (layer := full.removesuffix(".weight")) in colors
        )
        ordered = [color for _, color in layers]
        assert ordered == sorted(ordered, key=lambda color: color or 0), name
    # What was not measured has no colour, and the page says why.
    with browser.open(pages["sensitivity"]) as tab:
        peak = next(seen for seen in tab.run(METRICS) if seen["title"] == "Activation peak")
    colors = shades(peak, embedded(pages["sensitivity"])["layers"])
    assert (
        {layer for layer, color in colors.items() if color is None}
        == {layer for layer in colors if "adaLN" in layer}
        != set()
    )
    assert "Empty for modulations" in peak["note"]


def test_the_legend_of_words_has_their_colours(
    browser: Browser, pages: dict[str, Path], evaluation_report: zm.EvaluationReport
) -> None:
    with browser.open(pages["evaluate"]) as tab:
        metrics = {seen["title"]: seen for seen in tab.run(METRICS)}
        swatches = tab.run(
            "document.querySelector('[name=metric][value=\"2\"]').click();"
            "return [...document.querySelectorAll('svg.map.wide .colors rect')].filter("
            "(e) => e.getClientRects().length).map((e) => e.getAttribute('fill'));"
        )
    stored = {layer.name: layer.a_format for layer in evaluation_report.weights.layers}
    seen = metrics["Stored in A"]
    assert seen["legend"] == ["F32", "MXFP8"], "those that occur, the harmless first"
    names = embedded(pages["evaluate"])["layers"]
    of = dict(zip(seen["legend"], swatches, strict=True))
    assert {names[i]: fill for i, fill in seen["fills"]} == {
        name: of[stored[f"{name}.weight"]] for name in names
    }
    dark, light = shades({"fills": enumerate(swatches)}, ["F32", "MXFP8"]).values()
    assert dark is not None and light is not None and dark < light
    assert metrics["Stored in B"]["legend"] == ["F32"]


def test_formats_share_the_range_of_colours(browser: Browser, pages: dict[str, Path]) -> None:
    with browser.open(pages["compare"]) as tab:
        metrics = {seen["title"]: seen for seen in tab.run(METRICS)}
    names = embedded(pages["compare"])["layers"]
    mean = {
        title: np.mean([color for color in shades(seen, names).values() if color is not None])
        for title, seen in metrics.items()
    }
    assert mean["MXFP8 E4M3"] < mean["MXFP8 E5M2"] < mean["NVFP4"] < mean["MXFP4"]


def test_ends_of_colours_in_decibels() -> None:
    """More decibels are less harm, so the darkest colour is "at least"."""
    metric = weight_error("n", lambda error: error, 1e-3, "")
    shown = metric.shown([1e-5, 1e-3, 0.0, None])
    assert shown.texts == ["50.0 dB", "30.0 dB", "no error", "not measured"]
    assert (shown.legend.svg(0, 0, 9).count("≥ 33.0 dB"), shown.levels[2:]) == (1, [0, None])


def test_noise_is_not_blown_up() -> None:
    """Values that hardly differ have one colour; few extreme ones do not hide the others."""
    near = [0.30 + 1e-4 * i for i in range(20)]
    assert len({color_range(near, 0, 8).level(value) for value in near}) == 1
    wide = [*range(20), 1000.0]
    levels = [color_range(wide, 0, 0).level(value) for value in wide]
    assert len(set(levels[:20])) > 10 and levels[-1] == len(PALETTE) - 1
    assert color_range([], 0, 1) == color_range([0.5], 0, 1)


def test_colours_can_be_told_apart_without_red_and_green() -> None:
    rgb = np.array([[int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in PALETTE], np.uint8)
    assert (np.diff(brightness(rgb)) > 0).all(), "brightness alone orders them"


# Every table by each column up and down, and filtered by its last row's first cell.
TABLES = """
return [...document.querySelectorAll('.table')].map((table) => {
  const exact = (cell) => cell.dataset.v ?? cell.textContent.replaceAll(',', '');
  const rows = () => [...table.querySelectorAll('tbody tr')].filter((row) => !row.hidden).map(
    (row) => [...row.cells].map(
      (cell) => cell.classList.contains('number') ? exact(cell) : cell.textContent));
  const heads = [...table.querySelectorAll('thead th')];
  const result = { heads: heads.map((head) => head.textContent), name: table.dataset.name,
                   numbers: heads.map((head) => head.className === 'number'), before: rows() };
  result.sorted = heads.map((head) => [0, 1].map(() => {
    head.querySelector('button').click();
    return { order: head.getAttribute('aria-sort'), rows: rows() };
  }));
  const filter = table.querySelector('input');
  if (!filter) return result;
  const search = (words) => { filter.value = words; filter.dispatchEvent(new Event('input')); };
  result.word = result.before.at(-1)[0];
  search(result.word.toUpperCase());
  result.filtered = rows();
  result.count = table.querySelector('output').textContent;
  search('no such row');
  result.none = rows();
  search('');
  result.after = rows();
  return result;
});
"""


@every_page
def test_tables_sort_and_filter(browser: Browser, pages: dict[str, Path], name: str) -> None:
    with browser.open(pages[name]) as tab:
        tables = tab.run(TABLES)
    assert tables and any("word" in table for table in tables[:-1] + tables[-1:])
    for table in tables:
        before = table["before"]
        assert len({len(row) for row in before}) == 1
        for column, (up, down) in enumerate(table["sorted"]):
            assert (up["order"], down["order"]) == ("ascending", "descending")
            values = [row[column] for row in up["rows"]]
            assert sorted(map(tuple, up["rows"])) == sorted(map(tuple, before))
            if table["numbers"][column]:
                numbers = [float(value) for value in values if value]
                assert numbers == sorted(numbers), table["heads"][column]
                down_numbers = [float(row[column]) for row in down["rows"] if row[column]]
                assert down_numbers == numbers[::-1]
        if "word" not in table:
            assert len(before) <= 15
            continue
        matching = [r for r in table["after"] if any(table["word"] in text for text in r)]
        assert table["filtered"] == matching != []
        assert table["count"] == f"{len(matching):,} of {len(before):,} rows"
        assert table["none"] == []
        assert len(table["after"]) == len(before)


def test_names_are_in_natural_order(browser: Browser, pages: dict[str, Path]) -> None:
    for name in NAMES:
        with browser.open(pages[name]) as tab:
            rows = tab.run(TABLES.replace("result.sorted", "return result; result.sorted"))[-1]
        blocks = [int(row[0].split(".")[1]) for row in rows["before"] if row[0][:7] == "layers."]
        assert blocks == sorted(blocks) and len(set(blocks)) > 1, name


def download(browser: Browser, page: Path, folder: Path, selector: str, count: int) -> list[Path]:
    """The files that a click on each button of a page saves."""
    folder.mkdir()
    with browser.open(page) as tab:
        tab.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
        for i in range(count):
            tab.run(f"document.querySelectorAll('{selector}')[{i}].click();")
        for _ in range(200):
            files = [path for path in folder.iterdir() if path.suffix != ".crdownload"]
            if len(files) == count:
                break
            time.sleep(0.05)
        assert tab.console() == []
    return sorted(files)


def test_tables_are_saved_as_csv(
    browser: Browser, pages: dict[str, Path], tmp_path: Path, compare_report: zm.CompareReport
) -> None:
    files = download(browser, pages["compare"], tmp_path / "csv", ".csv", 4)
    assert [path.name for path in files] == [
        f"{name}.csv" for name in ("claims", "formats", "groups", "layers")
    ]
    layers = list(csv.DictReader(io.StringIO(files[-1].read_bytes().decode())))
    wanted = {layer.tensor: layer for layer in compare_report.layers}
    assert len(layers) == len(wanted)
    for row in layers:
        layer = wanted[row["tensor"]]
        assert (int(row["rows"]), int(row["columns"])) == layer.shape
        assert float(row["NVFP4 (dB)"]) == layer.formats["nvfp4"].snr_db, "all digits"
        assert float(row["error in MXFP8 (%)"]) == (
            100 * layer.formats["mxfp8-e4m3"].relative_squared_error
        )
    claims = list(csv.reader(io.StringIO(files[0].read_bytes().decode())))
    assert [row[2] for row in claims[1:]] == [answer.finding for answer in compare_report.answers]


def test_formats_are_sorted_by_error_with_their_size(
    browser: Browser, pages: dict[str, Path], compare_report: zm.CompareReport
) -> None:
    with browser.open(pages["compare"]) as tab:
        tables = tab.run(TABLES.replace("result.sorted", "return result; result.sorted"))
    (table,) = (table for table in tables if table["name"] == "formats")
    assert table["heads"][-1] == "size (MiB)", "a unit that fits a small model"
    rows = [(float(row[1]), float(row[-1]) * MIB) for row in table["before"]]
    wanted = sorted(
        (100 * error.relative_squared_error, compare_report.sizes[name].model_bytes)
        for name, error in compare_report.total.formats.items()
    )
    assert rows == [pytest.approx(row) for row in wanted]


def test_drawings_are_saved_as_png(
    browser: Browser, pages: dict[str, Path], tmp_path: Path
) -> None:
    files = download(browser, pages["probe"], tmp_path / "png", "button.png", 2)
    assert [path.name for path in files] == ["network.png", "size-and-error.png"]
    for path in files:
        image = np.array(Image.open(path).convert("RGB"))
        assert image.shape[1] > 1600, "twice the size on the page"
        assert (image[0, 0] == 255).all()
    network = np.array(Image.open(files[0]).convert("RGB")).reshape(-1, 3)
    found = {"#" + bytes(color).hex() for color in np.unique(network, axis=0)}
    content = embedded(pages["probe"])
    used = {content["palette"][level] for level in content["metrics"][0]["levels"]}
    assert used <= found


def test_links_lead_to_pages_that_are_there(
    browser: Browser, pages: dict[str, Path], tmp_path: Path
) -> None:
    links = "return [...document.querySelectorAll('nav a')].map((a) => [a.textContent, a.href]);"
    for name in NAMES:  # also those that were written first
        with browser.open(pages[name]) as tab:
            others = [other for other in NAMES if other != name]
            assert tab.run(links) == [[other, pages[other].as_uri()] for other in others]
            here = tab.run("return document.querySelector('nav [aria-current]').textContent;")
            assert here == name
    assert links_beside(tmp_path / "probe.html") == {}
    (tmp_path / "evaluate.html").touch()
    (tmp_path / "probe.html").touch()
    assert links_beside(tmp_path / "probe.html") == {"evaluate": "evaluate.html"}
    (tmp_path / "evaluate.html").unlink()
    (tmp_path / "images of b").mkdir()
    (tmp_path / "images of b" / "evaluate.html").touch()
    assert links_beside(tmp_path / "p.html") == {
        "probe": "probe.html",
        "evaluate": "images of b/evaluate.html",
    }
    assert links_above(tmp_path / "images of b") == {"probe": "../probe.html"}


def plain_page(report: str, title: str = "t") -> str:
    return render_page(Page(report, title, "", [], [], []))


def links_of(page: Path) -> dict[str, str]:
    navigation = re.search("<nav.*?</nav>", page.read_text("utf-8"))
    assert navigation
    return {name: href for href, name in re.findall('<a href="(.*?)">(.*?)</a>', navigation[0])}


def test_pages_beside_a_new_one_link_to_it(tmp_path: Path) -> None:
    """Only where its name stands without a link; a link that is there stays."""
    first, second = tmp_path / "first of #2", tmp_path / "second"
    probe = tmp_path / "probe.html"
    evaluation = first / "evaluate.html"
    for folder in (first, second):
        folder.mkdir()
        (folder / "evaluate.html").write_text(plain_page("evaluate"))
    probe.write_text(plain_page("probe", "<span>compare</span>"))
    probe.chmod(0o640)
    before = probe.read_text("utf-8")
    link_from_beside(probe)
    assert [links_of(folder / "evaluate.html") for folder in (first, second)] == [
        {"probe": "../probe.html"}
    ] * 2
    link_from_above(first)
    link_from_above(second)
    assert links_of(probe) == {"evaluate": "first%20of%20%232/evaluate.html"}
    (tmp_path / "compare.html").write_text(plain_page("compare"))
    link_from_beside(tmp_path / "compare.html")
    assert links_of(probe) == {
        "compare": "compare.html",
        "evaluate": "first%20of%20%232/evaluate.html",
    }
    assert links_of(evaluation) == {"probe": "../probe.html", "compare": "../compare.html"}
    after = probe.read_text("utf-8")  # the rest is the same
    assert re.sub("<nav.*?</nav>", "", after) == re.sub("<nav.*?</nav>", "", before)
    assert probe.stat().st_mode & 0o777 == 0o640
    only(tmp_path, "probe.html", "compare.html", first.name, second.name)
    shutil.rmtree(first)  # a link to nothing is replaced
    link_from_above(second)
    assert links_of(probe)["evaluate"] == "second/evaluate.html"
    newest = tmp_path / "a newer one"
    newest.mkdir()
    (newest / "evaluate.html").write_text(plain_page("evaluate"))
    os.utime(second / "evaluate.html", (0, 0))
    assert links_beside(probe)["evaluate"] == "a newer one/evaluate.html"


def test_other_files_beside_a_new_page_stay_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = plain_page("probe")
    navigation = page[page.index("<nav") : page.index("</nav>")]
    foreign = {
        "probe.html": page.replace('class="brand">zimage-mxfp8', 'class="brand">other').encode(),
        "sensitivity.html": navigation.encode() * 10_000,  # cut off
        "evaluate.html": b"\xff",
    }
    for name, content in foreign.items():
        (tmp_path / name).write_bytes(content)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "e.html").write_text(plain_page("evaluate"))
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "evaluate.html").symlink_to(elsewhere / "e.html")
    (tmp_path / "folder" / "evaluate.html").mkdir(parents=True)
    (tmp_path / "compare.html").write_text(plain_page("compare"))
    link_from_beside(tmp_path / "compare.html")
    for name, content in foreign.items():
        assert (tmp_path / name).read_bytes() == content
    assert (elsewhere / "e.html").read_text() == plain_page("evaluate")

    (tmp_path / "probe.html").write_text(page)
    with monkeypatch.context() as patch:

        def fail(*_: object, **__: object) -> None:
            raise zm.OutputError("the disk is full")

        patch.setattr(links_module, "write_file", fail)
        link_from_beside(tmp_path / "compare.html")
    assert (tmp_path / "probe.html").read_text("utf-8") == page
    link_from_beside(tmp_path / "compare.html")
    assert links_of(tmp_path / "probe.html") == {"compare": "compare.html"}


def test_commands_link_the_pages_that_were_there(
    in_process: Run, small_file: Path, tmp_path: Path
) -> None:
    for command, name in (("probe", "probe"), ("compare", "compare"), ("probe", "other")):
        options = ("--sample", 0.01, "--low-rank", "none") if command == "compare" else ()
        result = in_process(command, small_file, "--html", f"{name}.html", *options)
        assert result.returncode == 0, result.stderr
    assert links_of(tmp_path / "probe.html") == {"compare": "compare.html"}
    assert links_of(tmp_path / "compare.html") == {"probe": "probe.html"}


def test_a_layer_shows_its_figures(browser: Browser, pages: dict[str, Path]) -> None:
    point = """
    const cell = document.querySelector('svg.map.wide .cell[data-i="3"] rect');
    cell.dispatchEvent(new PointerEvent('pointerover', { bubbles: true }));
    return document.querySelector('.reading').textContent;
    """
    with browser.open(pages["probe"]) as tab:
        text = tab.run(point)
    content = embedded(pages["probe"])
    assert text.startswith(f"{content['layers'][3]}, number ")
    for metric in content["metrics"]:
        assert f"{metric['title']}: {metric['texts'][3]}" in text


def test_the_pattern_is_copied(browser: Browser, pages: dict[str, Path]) -> None:
    with browser.open(pages["probe"]) as tab:
        copied = tab.run(
            "document.querySelector('.copyable button').click();"
            "const text = document.querySelector('.copyable pre').textContent;"
            "return [getSelection().toString(), text];"
        )
    assert copied[0] == copied[1] != ""


def test_reasons_are_explained(pages: dict[str, Path], probe_report: zm.ProbeReport) -> None:
    text = unescape(pages["probe"].read_text("utf-8"))
    for reason in {tensor.reason for tensor in probe_report.tensors}:
        count = sum(tensor.reason == reason for tensor in probe_report.tensors)
        noun = "weight" if count == 1 else "weights"
        assert re.search(rf"<dt>{reason} \({count} {noun}\)</dt><dd>\w.{{20,}}?</dd>", text), reason


def test_merged_patterns() -> None:
    names = ["layers.10.a.weight", "layers.2.a.weight", "b.weight", "layers.2.adaLN.0.weight"]
    assert merged_pattern(names) == (
        r"b\.weight|layers\.(2|10)\.a\.weight|layers\.(2)\.adaLN\.0\.weight"
    )
    assert merged_pattern([]) is None
    assert merged_pattern(["a.weight"], whole=True) == r"^(a\.weight)$"


def test_the_list_of_formats_finds_its_layers_only(tmp_path: Path) -> None:
    half_way = torch.full((32, 32), 1.0625)  # between two E4M3 numbers
    tensors = {
        "a.weight": half_way,
        "aa.weight": half_way * 0 + 1,
        "a.weights.weight": half_way * 0,
    }
    save_file(tensors, tmp_path / "a.safetensors")
    report = zm.compare(tmp_path / "a.safetensors", any_model=True, low_rank="none")
    text = compare_page(report, 1e-3)
    shown = re.search(r"<pre>(.*?)</pre>", text, re.DOTALL)
    assert shown is not None and "No map: these layers are in none" in text
    plan = zm.plan_conversion(
        tmp_path / "a.safetensors",
        zm.ConversionOptions(exclude_layers=[unescape(shown[1])], any_model=True),
    )
    assert [p.source.name for p in plan.quantized] == ["a.weights.weight", "aa.weight"]


def test_pages_of_little(sensitivity_report: zm.SensitivityReport) -> None:
    """One timestep of blocks that none comes before, and a bound that everything holds."""
    report = replace(
        sensitivity_report,
        layers=tuple(replace(m, by_step=m.by_step[:1]) for m in sensitivity_report.layers),
        salience={n: replace(s, depth_drift=0.0) for n, s in sensitivity_report.salience.items()},
        bound=10.0,
        smallest=sensitivity_report.everything,
    )
    text = sensitivity_page(report)
    assert "Activation peak" in text
    assert "Drift in time" not in text and "Drift in depth" not in text
    assert '<output class="count">0</output>' in text and "<pre></pre>" in text


def test_cells_without_a_layer_say_why() -> None:
    """A block of one stack does not have the layer; that of the other one was not looked at."""
    layers = {
        f"{stack}.attention.qkv": 1.0
        for stack in ("layers.0", "noise_refiner.0", "context_refiner.0")
    } | {"layers.0.adaLN_modulation.0": 1.0}
    metrics = [Metric[float]("n", lambda value: value, lambda value: f"{value:.0f}", 0, 1)]
    text = NetworkMap(layers, metrics).html()
    keys = 2  # in the legends of both drawings
    assert text.count('class="blank"') == 2 + keys, "the context refiner has no modulation"
    assert text.count('class="omitted"') == 2 + keys, "the noise refiner has one"
    assert text.count("not part of this report") == keys
    layers["noise_refiner.0.adaLN_modulation.0"] = 1.0
    assert "not part of this report" not in NetworkMap(layers, metrics).html()


def test_a_map_without_a_slider() -> None:
    """As of a file whose layers were kept by a recipe."""
    layers = {f"layers.{i}.attention.qkv": float(i) for i in range(12)}
    metrics = [Metric[float]("n", lambda value: value, lambda value: f"{value:.0f}", 0, 11)]
    text = NetworkMap(layers, metrics, kept=["layers.2.attention.qkv.weight"]).html()
    assert text.count('class="cell kept" data-i="2"') == text.count("cell kept") == 2  # drawings
    assert 'type="range"' not in text and "<legend>" not in text


class _Elements(HTMLParser):
    """Names of the elements of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.found.add(tag)


def test_names_of_layers_do_not_command_the_page(browser: Browser, tmp_path: Path) -> None:
    hostile = [
        '<a href="http://x">&amp;</a>',
        "</script><script>window.owned = 1</script>",
        "\" onpointerover='window.owned = 1' x=\"",
        "<img src=x onerror=window.owned=1>",
        "a\n\x1b[31m`${window.owned = 1}`",
    ]
    tensors = {f"layers.{i}.{kind}.weight": torch.ones(2, 2) for kind in hostile for i in (0, 1)}
    save_file(tensors, tmp_path / "a")
    report = zm.compare(tmp_path / "a", any_model=True, low_rank="none")
    page = tmp_path / "c.html"
    page.write_text(compare_page(report, 1e-3, Origin("<script>window.owned=1</script>")), "utf-8")
    elements = _Elements()
    elements.feed(page.read_text("utf-8"))
    assert not {"img"} & elements.found
    with browser.open(page) as tab:
        tab.run(SLIDE.replace("COUNTS", "[1, 5]"))
        cells = "document.querySelectorAll('.cell rect')"
        tab.run(
            f"for (const cell of {cells}) cell.dispatchEvent("
            "new PointerEvent('pointerover', { bubbles: true }));"
        )
        assert tab.run("return window.owned ?? 0;") == 0
        assert tab.console() == []
        assert tab.run("return document.querySelectorAll('a, img').length;") == 0
        names = tab.run(
            "return [...document.querySelectorAll('tbody th')].map((e) => e.textContent);"
        )
        assert len(tab.requests()) == 1
        assert tab.run(CUT)["scroll"] == 0
    assert f"layers.0.{hostile[0]}.weight" in names
    assert "layers.1.a\\n\\x1b[31m`${window.owned = 1}`.weight" in names


def test_a_request_and_an_error_are_noticed(
    browser: Browser, pages: dict[str, Path], tmp_path: Path
) -> None:
    asking = tmp_path / "asking.html"
    more = '<img src="http://example.invalid/x.png"><script>broken()</script></main>'
    asking.write_text(pages["probe"].read_text("utf-8").replace("</main>", more), "utf-8")
    with browser.open(asking) as tab:
        assert "http://example.invalid/x.png" in tab.requests()
        assert any("broken" in message for message in tab.console())


def test_a_cut_column_is_noticed(browser: Browser, pages: dict[str, Path], tmp_path: Path) -> None:
    wide = tmp_path / "wide.html"
    text = pages["probe"].read_text("utf-8")
    wide.write_text(text.replace("</style>", "td { min-width: 300px }</style>"), "utf-8")
    with browser.open(wide) as tab:
        seen = tab.run(CUT)
    assert any("rows" in element for element in seen["cut"])


def test_names_are_shown_as_they_are(pages: dict[str, Path]) -> None:
    text = pages["probe"].read_text("utf-8")
    assert "<title>Weights of &lt;b&gt;&amp;.safetensors that stand out</title>" in text
    assert "&#x27;&lt;i&gt;&#x27;" in text
    table = Table([Column("name"), Column("n", 1)], [["</script><i>", 2], ["\n", 1234.25]], "t")
    blocks = [Paragraph("a < b"), Copyable("<", ">"), table]
    page = Page("probe", "<t>", "?", [], [Tile("<", ">", "&", "good")], [Section("&", blocks)])
    rendered = render_page(page, styles="/* own */", scripts="// own")
    for shown in ("a &lt; b", "&lt;/script&gt;&lt;i&gt;", ">\\n</th>", ">2.0<", ">1,234.2<"):
        assert shown in rendered
    assert "<i>" not in rendered.partition("<script>")[0]
    assert "/* own */</style>" in rendered and "// own</script>" in rendered


@pytest.mark.parametrize(
    ("command", "options"),
    [("probe", []), ("compare", ["--low-rank", "none", "--sample", "0.002"])],
)
def test_html_from_the_command_line(
    in_process: Run, small_file: Path, tmp_path: Path, command: str, options: list[str]
) -> None:
    arguments = (command, small_file, "--html", "p.html", *options)
    result = in_process(*arguments)
    assert result.returncode == 0, result.stderr
    text = (tmp_path / "p.html").read_text("utf-8")
    assert text.startswith("<!DOCTYPE html>") and "layers.29.attention.qkv.weight" in text
    assert f"<code>zimage-mxfp8 {command} " in text and "--html p.html" in text
    again = in_process(*arguments)
    assert again.returncode == 1 and "p.html exists; --overwrite" in again.stderr
    (tmp_path / "p.html").unlink()
    assert in_process(*arguments).returncode == 0
    assert (tmp_path / "p.html").read_text("utf-8") == text, "the same input, the same page"
