"""The HTML pages in a real browser."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from html import unescape
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import save_file

import zimage_mxfp8 as zm
from helpers.browser import Seen, look_at
from helpers.checkpoints import random_tensors, small_shapes
from helpers.commands import Run
from helpers.diffusers_reference import make_reference
from zimage_mxfp8.analysis.compare.page import compare_page
from zimage_mxfp8.analysis.pages.page import (
    Column,
    Copyable,
    Paragraph,
    Section,
    Table,
    render_page,
)
from zimage_mxfp8.analysis.probe.page import probe_page
from zimage_mxfp8.analysis.sensitivity.page import sensitivity_page
from zimage_mxfp8.conversion.recipes import KeepRule


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
    return zm.compare(small_file, sample=0.01)


@pytest.fixture(scope="module")
def sensitivity_report(folder: Path) -> zm.SensitivityReport:
    make_reference(dim=128, layers=2).save_pretrained(folder / "model")
    return zm.analyse_sensitivity(
        folder / "model", size=(32, 32), timesteps=2, bound=0.02, device="cpu"
    )


@pytest.fixture(scope="module")
def pages(
    folder: Path,
    probe_report: zm.ProbeReport,
    compare_report: zm.CompareReport,
    sensitivity_report: zm.SensitivityReport,
) -> dict[str, Path]:
    """The page of every command."""
    texts = {
        "probe": probe_page(probe_report),
        "compare": compare_page(compare_report, BOUND),
        "sensitivity": sensitivity_page(sensitivity_report),
    }
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, "utf-8")
    return {name: folder / f"{name}.html" for name in texts}


@pytest.fixture(scope="module")
def page(pages: dict[str, Path]) -> Path:
    return pages["probe"]


BOUND = 7e-4  # which keeps some of the layers of `small_file`, but not all
MAPS = {"probe": 7, "compare": 7, "sensitivity": 6}  # heat maps of a page
OTHERS = {"probe": 2, "compare": 1, "sensitivity": 1}  # and other plots
HEIGHT = 6000  # of a window that has a whole page's plots

# Every plot's place, the place of its inside, and what its marks are made of.
PLOTS = """
return [...document.querySelectorAll('.plot')].map((plot) => {
  const place = (element) => {
    const box = element.getBoundingClientRect();
    return { x: box.x, y: box.y + scrollY, width: box.width, height: box.height };
  };
  const inside = plot.querySelector('.nsewdrag');
  return { ...place(plot), inside: inside && place(inside),
           cells: plot.querySelectorAll('.heatmaplayer image').length,
           points: plot.querySelectorAll('.scatterlayer .point').length,
           texts: [...plot.querySelectorAll('text')].map((text) => text.textContent) };
});
"""

# Every table as it comes, by each column up and down, and filtered by its last row's first cell.
TABLES = """
return [...document.querySelectorAll('.table')].map((table) => {
  const rows = () => [...table.querySelectorAll('tbody tr')].filter((row) => !row.hidden).map(
    (row) => [...row.cells].map((cell) => cell.dataset.value ?? cell.textContent));
  const heads = [...table.querySelectorAll('th')];
  const result = { heads: heads.map((head) => head.textContent),
                   numbers: heads.map((head) => head.className === 'number'), before: rows() };
  result.sorted = heads.map((head, column) => [0, 1].map(() => {
    head.querySelector('button').click();
    return { order: head.getAttribute('aria-sort'), rows: rows() };
  }));
  const filter = table.querySelector('input');
  const search = (words) => { filter.value = words; filter.dispatchEvent(new Event('input')); };
  result.word = table.querySelector('tbody').rows[result.before.length - 1].cells[0].textContent;
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

REQUESTS = "return performance.getEntriesByType('resource').map((entry) => entry.name);"

EVERYTHING = f"""
const plots = (() => {{ {PLOTS} }})();
const tables = (() => {{ {TABLES} }})();
const requests = (() => {{ {REQUESTS} }})();
return {{ plots, tables, requests }};
"""

Look = Callable[[str, bool], Seen]


@pytest.fixture(scope="module")
def look(pages: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Look:
    """What a browser makes of a page, in light or in dark; each is opened once."""

    @functools.cache
    def seen(name: str, dark: bool) -> Seen:
        place = tmp_path_factory.mktemp("look")
        return look_at(pages[name], place, EVERYTHING, dark=dark, height=HEIGHT)

    return seen


every_page = pytest.mark.parametrize("name", ["probe", "compare", "sensitivity"])
light_and_dark = pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])


def brightness(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    return pixels.astype(np.float64) @ [0.2126, 0.7152, 0.0722]


def pixels_of(seen: Seen, box: dict[str, float]) -> npt.NDArray[np.uint8]:
    top, left = int(box["y"]), int(box["x"])
    height, width = int(box["height"]), int(box["width"])
    area = seen.image[top : top + height, left : left + width]
    assert area.shape == (height, width, 3), "beyond the image"
    return area


@every_page
@light_and_dark
def test_plots_are_drawn(look: Look, name: str, dark: bool) -> None:
    seen = look(name, dark)
    assert seen.console == []
    plots = seen.result["plots"]
    maps = [plot for plot in plots if plot["cells"]]
    assert len(maps) == MAPS[name] and len(plots) - len(maps) == OTHERS[name]
    ground = brightness(seen.image[2:3, 2:3]).item()
    assert ground < 40 if dark else ground > 230
    for plot in plots:
        area = pixels_of(seen, plot)
        colors, counts = np.unique(area.reshape(-1, 3), axis=0, return_counts=True)
        inked = 1 - counts.max() / counts.sum()
        assert inked > 0.01 and len(colors) > 20, (plot["texts"], inked)
        # Lines and letters are grey; the marks are not.
        inside = pixels_of(seen, plot["inside"]).astype(int)
        colored = int((np.ptp(inside, axis=2) > 30).sum())
        assert colored > (inside[..., 0].size / 20 if plot["cells"] else 20), plot["texts"]
        # The names beside the plot can be read.
        names = brightness(area[:, :140])
        assert np.abs(names - ground).max() > 150
    for plot in maps:
        assert {"attention.qkv", "feed_forward.w2"} <= set(plot["texts"]), plot["texts"]


@every_page
@light_and_dark
def test_tables_sort_and_filter(look: Look, name: str, dark: bool) -> None:
    tables = look(name, dark).result["tables"]
    assert tables
    for table in tables:
        before = table["before"]
        assert len({len(row) for row in before}) == 1
        for column, (up, down) in enumerate(table["sorted"]):
            assert (up["order"], down["order"]) == ("ascending", "descending")
            values = [row[column] for row in up["rows"]]
            assert [row[column] for row in down["rows"]] == values[::-1]
            assert sorted(map(tuple, up["rows"])) == sorted(map(tuple, before))
            if table["numbers"][column]:
                numbers = [float(value) for value in values if value]
                assert numbers == sorted(numbers), table["heads"][column]
        matching = [r for r in table["after"] if any(table["word"] in text for text in r)]
        assert table["filtered"] == matching != []
        assert table["count"] == f"{len(matching):,} of {len(before):,} rows"
        assert table["none"] == []
        assert len(table["after"]) == len(before)


@every_page
def test_no_request_leaves_a_page(look: Look, pages: dict[str, Path], name: str) -> None:
    outside = [url for url in look(name, False).result["requests"] if not url.startswith("data:")]
    assert outside == []
    text = pages[name].read_text("utf-8")
    outside_scripts = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r"(src|href)\s*=\s*\"(?!data:)|@import|url\(", outside_scripts)


def test_a_request_is_noticed(page: Path, tmp_path: Path) -> None:
    asking = tmp_path / "asking.html"
    image = '<img src="http://example.invalid/x.png"></main>'
    asking.write_text(page.read_text("utf-8").replace("</main>", image), "utf-8")
    assert "http://example.invalid/x.png" in look_at(asking, tmp_path, REQUESTS).result


def test_colours_can_be_told_apart_without_red_and_green(page: Path) -> None:
    # Cividis goes from dark blue to light yellow: brightness alone orders it.
    assert '"#00224e"' in page.read_text("utf-8")
    from zimage_mxfp8.analysis.pages.figures import Grid, heat_map

    figure = heat_map(Grid(["0", "1"], ["a"]), [[0.0, 1.0]], "x", 2)
    shades = [color for _, color in figure.data[0].colorscale]
    rgb = np.array([[int(shade[i : i + 2], 16) for i in (1, 3, 5)] for shade in shades], np.uint8)
    assert (np.diff(brightness(rgb)) > 0).all()


NAMES = """
const table = document.querySelectorAll('.table')[1];
const names = () => [...table.querySelectorAll('tbody tr')].filter((row) => !row.hidden).map(
  (row) => row.cells[0].textContent);
table.querySelector('th button').click();
const result = { sorted: names() };
const filter = table.querySelector('input');
filter.value = 'REFINER qkv';
filter.dispatchEvent(new Event('input'));
result.filtered = names();
document.querySelector('.copyable button').click();
result.selected = getSelection().toString();
return result;
"""


def test_names_sort_by_number_and_the_list_is_copied(
    page: Path, probe_report: zm.ProbeReport, tmp_path: Path
) -> None:
    seen = look_at(page, tmp_path, NAMES)
    assert seen.console == []
    result = seen.result
    assert sorted(result["sorted"]) == sorted(tensor.name for tensor in probe_report.tensors)
    blocks = [int(n.split(".")[1]) for n in result["sorted"] if n.startswith("layers")]
    assert blocks == sorted(blocks), "numbers in names count as numbers"
    # Every word has to be found.
    assert result["filtered"] == [n for n in result["sorted"] if "refiner" in n and "qkv" in n]
    assert len(result["filtered"]) == 4
    assert result["selected"] == probe_report.exclude_layers


def pattern_on(page: Path) -> re.Pattern[str]:
    """The exclusion list that a page shows."""
    shown = re.search(r"<pre>(.*?)</pre>", page.read_text("utf-8"), re.DOTALL)
    assert shown is not None
    return re.compile(unescape(shown[1]))


def test_sizes_by_score_are_those_that_convert_plans(
    page: Path, probe_report: zm.ProbeReport
) -> None:
    text = page.read_text("utf-8").partition("<figcaption>Size against scores")[2]
    found = re.search(r'application/json">(.*?)</script>', text)
    assert found is not None
    path, chosen = json.loads(found[1])["data"]
    ordered = sorted(probe_report.tensors, key=lambda tensor: -tensor.score)

    def nbytes(kept: list[str]) -> int:
        """Of codes, scales and what is kept; not of the header and the markers in it."""
        names = "|".join(re.escape(name) for name in [*kept, "_embedder.", "final_layer."])
        recipe = zm.Recipe("r", "", "", (KeepRule("r", re.compile(names), "r"),))
        places = zm.plan_conversion(probe_report.path, zm.ConversionOptions(recipe=recipe)).places
        return sum(p.nbytes for name, p in places.items() if not name.endswith(".comfy_quant"))

    kept = [tensor for tensor in ordered if tensor.effective == "*KEEP*"]
    least = nbytes([tensor.name for tensor in kept])
    assert chosen["x"] == [probe_report.recipe_bytes / 2**30]
    for count in (0, 1, 20, 150, len(ordered)):
        size = nbytes([tensor.name for tensor in ordered[:count]])
        assert (path["x"][count] - chosen["x"][0]) * 2**30 == pytest.approx(size - least)
        left = sum(tensor.score for tensor in ordered[count:])
        assert path["y"][count] == pytest.approx(left, abs=1e-9)
    assert chosen["y"][0] == pytest.approx(sum(x.score for x in ordered if x not in kept))


def test_the_list_of_measured_sensitivity_keeps_what_the_report_keeps(
    pages: dict[str, Path], sensitivity_report: zm.SensitivityReport
) -> None:
    pattern = pattern_on(pages["sensitivity"])
    kept = [m.name for m in sensitivity_report.layers if pattern.search(f"{m.name}.weight")]
    assert sorted(kept) == list(sensitivity_report.smallest.kept) != []


def test_the_list_of_formats_keeps_what_is_above_the_bound(
    pages: dict[str, Path], compare_report: zm.CompareReport
) -> None:
    pattern = pattern_on(pages["compare"])
    kept = [layer.name for layer in compare_report.layers if pattern.search(layer.name)]
    errors = {x.name: x.formats["mxfp8-e4m3"].relative_squared_error for x in compare_report.layers}
    assert kept == [name for name, error in errors.items() if error > BOUND]
    assert 0 < len(kept) < len(errors)
    text = pages["compare"].read_text("utf-8")
    assert "NVFP4" in text and "16 times finer" in text


def test_pages_of_little(tmp_path: Path) -> None:
    """A model without Z-Image's blocks, and one timestep of blocks that none comes before."""
    save_file(random_tensors({"a.weight": (64, 64), "b.weight": (32, 64)}), tmp_path / "other")
    other = zm.compare(tmp_path / "other", any_model=True)
    text = compare_page(other, 1.0)
    assert (
        text.count("<figcaption>") == 1 and "No layer has a relative squared error above 1" in text
    )
    make_reference(dim=128, layers=1).save_pretrained(tmp_path / "model")
    report = zm.analyse_sensitivity(
        tmp_path / "model", size=(32, 32), timesteps=1, bound=10, device="cpu"
    )
    text = sensitivity_page(report)
    assert "Activation peak" in text
    assert "Drift in time" not in text and "Drift in depth" not in text


def test_tags_in_names_of_layers(tmp_path: Path) -> None:
    """Plotly knows some tags, links among them."""
    kind = '<a href="http://x">&amp;</a>'
    save_file({f"layers.{i}.{kind}.weight": torch.ones(2, 2) for i in (0, 1)}, tmp_path / "a")
    report = zm.compare(tmp_path / "a", any_model=True, low_rank="none")
    (tmp_path / "c.html").write_text(compare_page(report, 1e-3), "utf-8")
    seen = look_at(tmp_path / "c.html", tmp_path, PLOTS)
    assert seen.console == []
    assert kind in seen.result[1]["texts"]


def test_the_list_of_formats_finds_its_layers_only(tmp_path: Path) -> None:
    half_way = torch.full((32, 32), 1.0625)  # between two E4M3 numbers
    tensors = {
        "a.weight": half_way,
        "aa.weight": half_way * 0 + 1,
        "a.weights.weight": half_way * 0,
    }
    save_file(tensors, tmp_path / "a.safetensors")
    report = zm.compare(tmp_path / "a.safetensors", any_model=True, low_rank="none")
    shown = re.search(r"<pre>(.*?)</pre>", compare_page(report, 1e-3), re.DOTALL)
    assert shown is not None
    plan = zm.plan_conversion(
        tmp_path / "a.safetensors",
        zm.ConversionOptions(exclude_layers=[unescape(shown[1])], any_model=True),
    )
    assert [p.source.name for p in plan.quantized] == ["a.weights.weight", "aa.weight"]


def test_a_map_of_gaps() -> None:
    from zimage_mxfp8.analysis.pages.figures import Grid, heat_map

    figure = heat_map(Grid(["0"], ["a"]), [[None]], "x", 2)
    assert (figure.data[0].zmin, figure.data[0].zmax) == (0, 1)


def test_a_page_that_is_broken_is_noticed(page: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    broken.write_text(page.read_text("utf-8").replace("Plotly.newPlot", "Plotly.oldPlot"), "utf-8")
    seen: Seen = look_at(broken, tmp_path, PLOTS)
    assert any("oldPlot" in line for line in seen.console)
    assert {plot["cells"] + plot["points"] for plot in seen.result} == {0}


def test_names_are_shown_as_they_are(page: Path, probe_report: zm.ProbeReport) -> None:
    text = page.read_text("utf-8")
    assert "<h1>Sensitivity of &lt;b&gt;&amp;.safetensors</h1>" in text
    assert probe_report.exclude_layers in unescape(text)
    table = Table([Column("name"), Column("n", 1)], [["</script><i>", 2], ["\n", 0.25]])
    blocks = [Paragraph("a < b"), Copyable("<", ">"), table]
    rendered = render_page("<t>", [Section("&", blocks)])
    for shown in ("a &lt; b", "&lt;/script&gt;&lt;i&gt;", "<td>\\n</td>", ">2.0<", ">0.2<"):
        assert shown in rendered
    assert "<i>" not in rendered.partition("<script>")[0]


@pytest.mark.parametrize(
    ("command", "options"), [("probe", []), ("compare", ["--low-rank", "none", "--sample", "0.01"])]
)
def test_html_from_the_command_line(
    in_process: Run, small_file: Path, tmp_path: Path, command: str, options: list[str]
) -> None:
    arguments = (command, small_file, "--html", "p.html", *options)
    result = in_process(*arguments, "--json")
    assert result.returncode == 0, result.stderr
    text = (tmp_path / "p.html").read_text("utf-8")
    assert text.startswith("<!DOCTYPE html>") and "layers.29.attention.qkv.weight" in text
    again = in_process(*arguments)
    assert again.returncode == 1 and "p.html exists; --overwrite" in again.stderr
    assert in_process(*arguments, "--overwrite").returncode == 0
    assert (tmp_path / "p.html").read_text("utf-8") == text, "the same input, the same page"
