"""The HTML pages in a real browser."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import save_file

import zimage_mxfp8 as zm
from browser import Seen, look_at
from conftest import Run, random_tensors, small_shapes
from zimage_mxfp8.analysis.compare_page import compare_page
from zimage_mxfp8.analysis.page import Column, Copyable, Paragraph, Section, Table, render_page
from zimage_mxfp8.analysis.probe_page import probe_page


@pytest.fixture(scope="module")
def probe_report(tmp_path_factory: pytest.TempPathFactory) -> zm.ProbeReport:
    path = tmp_path_factory.mktemp("pages") / "<b>&.safetensors"
    save_file(random_tensors(small_shapes()), path)
    return zm.probe(path)


@pytest.fixture(scope="module")
def page(probe_report: zm.ProbeReport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pages") / "probe.html"
    path.write_text(probe_page(probe_report), "utf-8")
    return path


# Every plot's place, and what its marks are made of.
PLOTS = """
return [...document.querySelectorAll('.plot')].map((plot) => {
  const box = plot.getBoundingClientRect();
  const cells = plot.querySelectorAll('.heatmaplayer image, .scatterlayer .point').length;
  return { x: box.x, y: box.y + scrollY, width: box.width, height: box.height, cells,
           texts: [...plot.querySelectorAll('text')].map((text) => text.textContent) };
});
"""


def brightness(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    return pixels.astype(np.float64) @ [0.2126, 0.7152, 0.0722]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_plots_are_drawn(page: Path, tmp_path: Path, dark: bool) -> None:
    seen = look_at(page, tmp_path, PLOTS, dark=dark, height=4200)
    assert seen.console == []
    assert len(seen.result) == 8
    ground = brightness(seen.picture[2:3, 2:3]).item()
    assert ground < 40 if dark else ground > 230
    for plot in seen.result:
        top, left = int(plot["y"]), int(plot["x"])
        area = seen.picture[top : top + int(plot["height"]), left : left + int(plot["width"])]
        assert plot["cells"] >= 1 and area.size > 0
        colors, counts = np.unique(area.reshape(-1, 3), axis=0, return_counts=True)
        inked = 1 - counts.max() / counts.sum()
        assert inked > 0.02 and len(colors) > 20, (top, inked)
        # The names beside the plot can be read.
        names = brightness(area[:, :140])
        assert np.abs(names - ground).max() > 150
        assert {"attention.qkv", "29"} <= set(plot["texts"]), plot["texts"]


def test_colours_can_be_told_apart_without_red_and_green(page: Path) -> None:
    # Cividis goes from dark blue to light yellow: brightness alone orders it.
    assert '"#00224e"' in page.read_text("utf-8")
    from zimage_mxfp8.analysis.figures import Grid, heat_map

    figure = heat_map(Grid(["0", "1"], ["a"]), [[0.0, 1.0]], "x", 2)
    shades = [color for _, color in figure.data[0].colorscale]
    rgb = np.array([[int(shade[i : i + 2], 16) for i in (1, 3, 5)] for shade in shades], np.uint8)
    assert (np.diff(brightness(rgb)) > 0).all()


TABLE = """
const table = document.querySelectorAll('.table')[1];
const column = (name) => [...table.querySelectorAll('th')].findIndex(
  (head) => head.textContent === name);
const texts = (at) => [...table.querySelectorAll('tbody tr')].filter((row) => !row.hidden).map(
  (row) => row.cells[at].textContent);
const click = (name) => table.querySelectorAll('th button')[column(name)].click();
const result = { before: texts(0) };
click('excess kurtosis');
result.ascending = texts(column('excess kurtosis')).map(Number);
click('excess kurtosis');
result.descending = texts(column('excess kurtosis')).map(Number);
result.state = table.querySelectorAll('th')[column('excess kurtosis')].getAttribute('aria-sort');
click('weight');
result.names = texts(0);
const filter = table.querySelector('input');
const search = (words) => { filter.value = words; filter.dispatchEvent(new Event('input')); };
search('REFINER qkv');
result.filtered = texts(0);
result.count = table.querySelector('output').textContent;
search('');
result.all = texts(0).length;
document.querySelector('.copyable button').click();
result.selected = getSelection().toString();
result.loaded = performance.getEntriesByType('resource').map((entry) => entry.name);
return result;
"""


def test_table_sorts_and_filters(page: Path, probe_report: zm.ProbeReport, tmp_path: Path) -> None:
    seen = look_at(page, tmp_path, TABLE)
    assert seen.console == []
    result = seen.result
    names = [tensor.name for tensor in probe_report.tensors]
    assert result["before"] == names
    assert result["ascending"] == sorted(result["ascending"])
    assert result["descending"] == result["ascending"][::-1] != result["ascending"]
    assert result["state"] == "descending"
    assert sorted(result["names"]) == names
    blocks = [int(n.split(".")[1]) for n in result["names"] if n.startswith("layers")]
    assert blocks == sorted(blocks), "numbers in names count as numbers"
    assert result["filtered"] == [n for n in result["names"] if "refiner" in n and "qkv" in n]
    assert result["count"] == "4 of 200 rows" and result["all"] == 200
    assert result["selected"] == probe_report.exclude_layers
    assert [name for name in result["loaded"] if not name.startswith("data:")] == []


def test_the_page_of_measured_sensitivity(tmp_path: Path) -> None:
    from diffusers_reference import make_reference
    from zimage_mxfp8.analysis.sensitivity.page import sensitivity_page

    make_reference(dim=128, layers=1).save_pretrained(tmp_path / "model")
    report = zm.analyse_sensitivity(
        tmp_path / "model", size=(32, 32), timesteps=1, bound=0.02, device="cpu"
    )
    page = tmp_path / "sensitivity.html"
    page.write_text(sensitivity_page(report), "utf-8")
    seen = look_at(page, tmp_path, PLOTS, height=4200)
    assert seen.console == []
    assert len(seen.result) == 4  # error against size, and a map for each band
    assert all(plot["cells"] >= 1 for plot in seen.result)
    assert "feed_forward.w2" in seen.result[1]["texts"]
    # The list on the page keeps what the report keeps.
    shown = re.search(r"<pre>(.*?)</pre>", page.read_text("utf-8"), re.DOTALL)
    assert shown is not None
    pattern = re.compile(unescape(shown[1]))
    kept = [m.name for m in report.layers if pattern.search(f"{m.name}.weight")]
    assert sorted(kept) == list(report.smallest.kept)


def test_the_page_of_formats(cli: Run, small_file: Path, tmp_path: Path) -> None:
    result = cli("compare", small_file, "--html", "c.html", "--bound", "1e-9", "--json")
    assert result.returncode == 0, result.stderr
    page = tmp_path / "c.html"
    seen = look_at(page, tmp_path, PLOTS, height=5000)
    assert seen.console == []
    assert len(seen.result) == 2  # SNR against size, and the map of MXFP8's
    assert all(plot["cells"] >= 1 for plot in seen.result)
    text = page.read_text("utf-8")
    layers = [layer["name"] for layer in json.loads(result.stdout)["layers"]]
    shown = re.search(r"<pre>(.*?)</pre>", text, re.DOTALL)
    assert shown is not None
    pattern = re.compile(unescape(shown[1]))
    assert layers and all(pattern.search(name) for name in layers)
    assert "NVFP4" in text and "16 times finer" in text
    again = cli("compare", small_file, "--html", "c.html")
    assert again.returncode == 1 and "c.html exists; --overwrite" in again.stderr


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
        tmp_path / "a.safetensors", exclude_layers=[unescape(shown[1])], any_model=True
    )
    assert [p.source.name for p in plan.quantized] == ["a.weights.weight", "aa.weight"]


def test_a_map_of_gaps() -> None:
    from zimage_mxfp8.analysis.figures import Grid, heat_map

    figure = heat_map(Grid(["0"], ["a"]), [[None]], "x", 2)
    assert (figure.data[0].zmin, figure.data[0].zmax) == (0, 1)


def test_a_page_that_is_broken_is_noticed(page: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    broken.write_text(page.read_text("utf-8").replace("Plotly.newPlot", "Plotly.oldPlot"), "utf-8")
    seen: Seen = look_at(broken, tmp_path, PLOTS)
    assert any("oldPlot" in line for line in seen.console)
    assert {plot["cells"] for plot in seen.result} == {0}


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


def test_the_page_loads_nothing(page: Path) -> None:
    text = page.read_text("utf-8")
    outside_scripts = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r"(src|href)\s*=\s*\"(?!data:)|@import|url\(", outside_scripts)


def test_html_from_the_command_line(cli: Run, small_file: Path, tmp_path: Path) -> None:
    result = cli("probe", small_file, "--html", "p.html", "--json")
    assert result.returncode == 0, result.stderr
    text = (tmp_path / "p.html").read_text("utf-8")
    assert text.startswith("<!DOCTYPE html>") and "layers.29.attention.qkv.weight" in text
    again = cli("probe", small_file, "--html", "p.html")
    assert again.returncode == 1 and "p.html exists; --overwrite" in again.stderr
    assert cli("probe", small_file, "--html", "p.html", "--overwrite").returncode == 0
    assert (tmp_path / "p.html").read_text("utf-8") == text, "the same input, the same page"
