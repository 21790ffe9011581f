"""The documentation as a whole: links, the API reference, the navigation, the order of layers."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import zimage_mxfp8 as zm
from helpers.documents import PAGES, ROOT, anchors, text_of

CHECK = ROOT / ".ci/check_imports.py"
ARCHITECTURE = ROOT / "docs/architecture.md"
PACKAGE = ROOT / "python/zimage_mxfp8"


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: str(page.relative_to(ROOT))
)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]*)\)", text_of(page)):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


def test_reference_has_every_public_name_once() -> None:
    pages = (ROOT / "docs/reference").glob("*.md")
    named = re.findall(r"^::: zimage_mxfp8\.(\w+)$", "\n".join(map(text_of, pages)), re.MULTILINE)
    assert sorted(named) == sorted(zm.__all__)
    index = text_of(ROOT / "docs/reference/index.md")
    assert sorted(re.findall(r"\[zimage_mxfp8\.(\w+)\]", index)) == sorted(zm.__all__)


def test_navigation_has_every_page() -> None:
    listed = re.findall(r"^ *- (?:\w+: )?(\S+\.md)$", text_of(ROOT / "mkdocs.yml"), re.MULTILINE)
    docs = ROOT / "docs"
    assert sorted(listed) == sorted(p.relative_to(docs).as_posix() for p in docs.rglob("*.md"))


def test_architecture_names_paths_that_exist() -> None:
    named = re.findall(r"`((?:python|csrc|\.ci|docs|tests)/[\w./-]*)`", text_of(ARCHITECTURE))
    assert len(named) >= 60
    assert [name for name in named if not (ROOT / name).exists()] == []
    files = [path.name for top in ("python", "csrc") for path in (ROOT / top).rglob("*.*")]
    short = re.findall(r"`(\w+\.(?:py|cpp|cuh?|h|cmake|css|js))`", text_of(ARCHITECTURE))
    assert len(short) >= 40
    assert [name for name in short if not any(file.endswith(name) for file in files)] == []


def check_imports(*arguments: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, CHECK, *arguments], capture_output=True, text=True, check=False
    )


def test_imports_follow_the_order_of_layers() -> None:
    result = check_imports()
    assert result.returncode == 0, result.stderr


PAGE = """
## Order of layers

| layer | holds |
| --- | --- |
| `low` | |
| `high` | |
| `top` | |

| module | imports | why |
| --- | --- | --- |
{upwards}
## Next
"""
ELEVEN = "".join(f"| `a{i}` | `b` | x |\n" for i in range(11))


@pytest.mark.parametrize(
    ("module", "line", "upwards", "problem"),
    [
        ("low", "from .high import x", "", "low imports high of a higher layer"),
        ("low", "from . import high", "", "low imports high of a higher layer"),
        ("low", "def f():\n    from .high.inner import x", "", "low imports high.inner of a"),
        ("low", "if TYPE_CHECKING:\n    from . import high", "", "low imports high of a"),
        ("high/inner", "from ..top import x", "", "high.inner imports top of a higher layer"),
        ("new", "from .low import x", "", "new is in no layer"),
        ("top", "", "| `low` | `top` | a reason |\n", "low -> top is listed but does not exist"),
        ("low", "from .top import x", "| `low` | `top` | |\n", "`low` -> `top` has no reason"),
        (
            "top",
            "",
            "".join(f"| `a{i}` | `b` | x |\n" for i in range(11)),
            "11 imports run upwards",
        ),
    ],
)
def test_breaches_of_the_order_are_found(
    module: str, line: str, upwards: str, problem: str, tmp_path: Path
) -> None:
    package = tmp_path / "package"
    (package / "high").mkdir(parents=True)
    (package / "high/__init__.py").write_text("from ..low import x\n")
    for name in ("low", "high/inner", "top"):
        (package / f"{name}.py").touch()
    (package / f"{module}.py").write_text(f"{line}\n")
    page = tmp_path / "page.md"
    page.write_text(PAGE.format(upwards=upwards))
    result = check_imports(package, page)
    assert result.returncode == 1
    assert problem in result.stderr
