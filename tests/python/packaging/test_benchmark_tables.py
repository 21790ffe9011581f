"""The tables of the documentation: made from benchmarks/results/, and nothing else."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from benchmarks import tables
from benchmarks.report import ROOT, Report
from benchmarks.tables import columns


@pytest.mark.parametrize("name", tables.DOCUMENTS)
def test_document_equals_the_results(name: str) -> None:
    text, made = (ROOT / name).read_text("utf-8"), tables.DOCUMENTS[name]
    assert tables.with_tables(text, made) == text
    assert re.findall(r"<!-- table: (\S+) -->", text) == list(made)


def test_every_table_of_the_performance_is_generated() -> None:
    text = (ROOT / "docs" / "performance.md").read_text("utf-8")
    assert "| ---" not in tables.MARKED.sub("", text)


def test_other_results_give_another_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = shutil.copytree(columns.RESULTS, tmp_path / "results")
    content = json.loads((results / "codec.json").read_text())
    (row,) = (row for row in content["rows"] if row.get("us") == 404.5)
    row["us"] = 17.25
    (results / "codec.json").write_text(json.dumps(content))
    monkeypatch.setattr(columns, "RESULTS", results)
    assert tables.update(check=True) == 1
    changed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("+|")]
    assert changed == [
        "+| bfloat16 | 11520x3840 | 47.0 us, 94 % | 50.3 us, 88 % | 49.4 us, 90 % | 17.2 us, 11 % |"
    ]


@pytest.mark.parametrize("file", sorted(columns.RESULTS.glob("*.json")), ids=lambda f: f.stem)
def test_result_files_tell_their_origin(file: Path) -> None:
    content = json.loads(file.read_text("utf-8"))
    assert re.fullmatch(
        r"measured|transcribed from docs/performance\.md at [0-9a-f]{7,}", content["source"]
    )
    assert content["commit"] and "gpu" in content["machine"] and content["rows"]
    for row in content["rows"]:
        assert row.keys() <= content["columns"].keys()


def test_a_run_keeps_its_rows_and_the_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "o.json"
    report = Report("codec", {"what": "", "us": "us"}, path)
    report.add(what="a", us=1.23456789)
    with pytest.raises(KeyError, match="milliseconds"):
        report.add(what="b", milliseconds=1)
    report.note(seeds=[3, 5])
    report.add(what="c", us=2.0)
    content = json.loads(path.read_text())
    assert content["rows"] == [{"what": "a", "us": 1.23456789}, {"what": "c", "us": 2.0}]
    assert content["columns"] == {"what": "", "us": "us"} and content["seeds"] == [3, 5]
    assert (content["suite"], content["source"]) == ("codec", "measured")
    wanted = {"gpu", "driver", "cuda", "torch", "cpu", "cores", "memory_gib", "python"}
    assert content["machine"].keys() == wanted
    shown = capsys.readouterr().out
    assert "| what | us (us) |\n| --- | --- |\n| a | 1.235 |\n| c | 2 |\n" in shown
