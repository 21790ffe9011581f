"""The list of the C++ library's public interface, and the check that compares it."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from helpers.documents import ROOT
from zimage_mxfp8.system.diagnosis import cmake_dir

CHECK = ROOT / ".ci" / "check_abi.py"
LIST = ROOT / "csrc" / "public_interface.txt"
LIBRARY = cmake_dir().parents[1] / "libzimage_mxfp8.a"

pytestmark = pytest.mark.skipif(
    not (shutil.which("nm") and LIBRARY.exists()), reason="no nm, or no static library"
)


@pytest.fixture(scope="module")
def check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_abi", CHECK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_interface_is_as_listed() -> None:
    done = subprocess.run(
        [sys.executable, CHECK, LIBRARY], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("header", "old", "new", "line"),
    [
        ("checkpoint.h", "  bool full_precision;", "  int full_precision;", "int full_precision;"),
        ("matrix.h", "  kFloat32,", "  kFloat32, kFloat64,", "kFloat64"),
        ("matrix.h", "kBlockSize = 32", "kBlockSize = 16", "kBlockSize = 16"),
        ("fused.h", "using Items = const", "using Items =", "using Items = std"),
        ("error.h", "class Unsupported : public Error", "class Unsupported", "class Unsupported {"),
    ],
)
def test_a_changed_header_is_seen(
    check: ModuleType, header: str, old: str, new: str, line: str, tmp_path: Path
) -> None:
    headers = shutil.copytree(check.HEADERS, tmp_path / "headers")
    text = (headers / header).read_text("utf-8")
    assert text.count(old) == 1
    (headers / header).write_text(text.replace(old, new), "utf-8")
    listed = LIST.read_text("utf-8").splitlines()
    changed = check.interface(headers, check.functions(LIBRARY)).splitlines()
    assert any(line in one for one in set(changed) - set(listed))


def test_comments_and_layout_are_not_the_interface(check: ModuleType, tmp_path: Path) -> None:
    headers = shutil.copytree(check.HEADERS, tmp_path / "headers")
    for header in headers.glob("*.h"):
        text = re.sub("//.*", "// another comment", header.read_text("utf-8"))
        header.write_text(text.replace("\n  ", "\n      "), "utf-8")
    found = check.interface(headers, check.functions(LIBRARY))
    assert found == LIST.read_text("utf-8")


def test_a_function_that_no_header_declares_is_refused(check: ModuleType) -> None:
    exported = check.functions(LIBRARY) | {"surprise(int)"}
    with pytest.raises(SystemExit, match=r"surprise\(int\)"):
        check.interface(check.HEADERS, exported)


def test_a_removed_function_is_seen(check: ModuleType) -> None:
    exported = {name for name in check.functions(LIBRARY) if not name.startswith("attend(")}
    found = check.interface(check.HEADERS, exported)
    missing = set(LIST.read_text("utf-8").splitlines()) - set(found.splitlines())
    assert len(missing) == 2
    assert all(line.startswith("attend(") for line in missing)
