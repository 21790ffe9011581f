"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.commands import only
from zimage_mxfp8.checkpoint.output import PARTIAL_SUFFIX
from zimage_mxfp8.checkpoint.output_folder import check_target_folder, write_folder
from zimage_mxfp8.errors import OutputError

OWN = ("a.txt", "inner")
FILES = [("a.txt", b"first"), ("inner/b.bin", b"\0\1"), ("inner/c.bin", b"")]


def write(target: Path, *, overwrite: bool = False, files: object = FILES) -> None:
    write_folder(target, files, OWN, overwrite=overwrite)  # type: ignore[arg-type]


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("is_there", [False, True])
def test_all_files_arrive(tmp_path: Path, is_there: bool) -> None:
    if is_there:
        (tmp_path / "out").mkdir()  # an empty folder may be there
    (tmp_path / "plain").mkdir()
    write(tmp_path / "out")
    assert content(tmp_path / "out") == dict(FILES)
    only(tmp_path, "out", "plain")
    modes = {(tmp_path / name).stat().st_mode for name in ("out", "plain")}
    assert len(modes) == 1  # that of the user's other folders


def test_an_own_folder_is_replaced_on_request_only(tmp_path: Path) -> None:
    write(tmp_path / "out")
    with pytest.raises(OutputError, match="out exists; `overwrite=True` replaces it"):
        write(tmp_path / "out", files=[("a.txt", b"second")])
    assert content(tmp_path / "out") == dict(FILES)
    write(tmp_path / "out", files=[("a.txt", b"second")], overwrite=True)
    assert content(tmp_path / "out") == {"a.txt": b"second"}
    only(tmp_path, "out")


def test_a_folder_with_other_content_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match=r"home has other content \(thesis.tex\)"):
        write(tmp_path / "home", overwrite=True)
    assert content(tmp_path / "home") == {"thesis.tex": b"years of work"}


def test_what_a_killed_process_left_is_no_content(tmp_path: Path) -> None:
    write(tmp_path / "out")
    (tmp_path / "out" / f".a.txt{PARTIAL_SUFFIX}").touch()
    write(tmp_path / "out", files=[("a.txt", b"second")], overwrite=True)
    assert content(tmp_path / "out") == {"a.txt": b"second"}


def test_a_failure_leaves_the_old_folder(tmp_path: Path) -> None:
    def failing() -> Iterator[tuple[str, bytes]]:
        yield FILES[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", files=failing())
    only(tmp_path)
    write(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", files=failing(), overwrite=True)
    assert content(tmp_path / "out") == dict(FILES)
    only(tmp_path, "out")


def test_a_failed_renaming_brings_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "out")
    rename, calls = Path.rename, []

    def fail_second(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_second)
    with pytest.raises(OutputError, match="out could not be written: Input/output error"):
        write(tmp_path / "out", files=[("a.txt", b"second")], overwrite=True)
    assert content(tmp_path / "out") == dict(FILES)
    only(tmp_path, "out")


def test_what_a_crash_left_is_deleted_and_what_lives_is_not(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    dead, living = (tmp_path / f".{name}{PARTIAL_SUFFIX}" for name in ("dead", "living"))
    for folder in (dead, living):
        folder.mkdir()
        (folder / "a.txt").touch()
    lock = os.open(living, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        write(tmp_path / "out")
    finally:
        os.close(lock)
    only(tmp_path, "out", living.name)


def test_bad_targets(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for target, problem in (
        (tmp_path / "none" / "out", "does not exist; create it first"),
        (tmp_path / "file" / "out", "for .* is a file; choose another"),
        (tmp_path / "file" / "a" / "out", f"does not exist, and {tmp_path / 'file'} is a file"),
        (tmp_path / "file", "is a file; move it away, or name another folder"),
    ):
        with pytest.raises(OutputError, match=problem):
            check_target_folder(target, OWN, overwrite=True)


def test_long_names(tmp_path: Path) -> None:
    write(tmp_path / ("n" * 250))
    only(tmp_path, "n" * 250)
