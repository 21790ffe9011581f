"""Ctrl-C in `zimage-mxfp8` as a process: one sentence and 130, whenever and however often."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.interruption import SENTENCE, interrupted, run
from zimage_mxfp8.checkpoint import output
from zimage_mxfp8.cli import interrupts
from zimage_mxfp8.cli.main import main


@pytest.fixture
def installed() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupts.install()
    yield
    signal.signal(signal.SIGINT, before)


def press() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.mark.usefixtures("installed")
def test_cleaning_up_is_not_disturbed() -> None:
    cleaned = False
    with pytest.raises(KeyboardInterrupt):
        try:
            press()
        finally:
            press()
            cleaned = True
    assert cleaned
    with pytest.raises(RuntimeError, match="made of it"):
        try:
            press()
        except KeyboardInterrupt:
            try:
                raise RuntimeError("made of it") from None
            finally:
                press()


@pytest.mark.usefixtures("installed")
def test_while_a_file_holds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`AtomicFile` puts a handler of its own in its place for a moment."""
    handler, real = signal.getsignal(signal.SIGINT), output.try_lock

    def lock(fd: int) -> bool | None:
        press()
        press()
        return real(fd)

    monkeypatch.setattr(output, "try_lock", lock)
    with pytest.raises(KeyboardInterrupt):
        output.write_file(tmp_path / "file", b"content", overwrite=False)
    assert signal.getsignal(signal.SIGINT) is handler
    assert not list(tmp_path.iterdir())


def test_the_next_one_after_one_that_was_swallowed(tmp_path: Path) -> None:
    program = """
class Swallowing:
    def __del__(self):
        press()
def act():
    Swallowing()
    print("it goes on", file=sys.stderr)
    press()
on_import("zimage_mxfp8.cli.display", act)
start("recipes")
"""
    result = run(program, tmp_path)
    assert result.stderr.startswith("Exception ignored in: <function Swallowing.__del__ ")
    assert result.stderr.endswith(f"it goes on\n{SENTENCE}") and result.returncode == 130


@pytest.mark.parametrize("there", [signal.SIG_IGN, signal.SIG_DFL, lambda *_: None])
def test_other_handlers_stay(there: signal.Handlers) -> None:
    before = signal.signal(signal.SIGINT, there)
    interrupts.install()
    interrupts.finish()
    assert signal.signal(signal.SIGINT, before) is there


def test_a_function_leaves_the_handler_alone(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    assert main(["recipes"]) == 0
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler
    assert capsys.readouterr().out


@pytest.mark.parametrize("presses", [1, 2])
@pytest.mark.parametrize(
    "module",
    [
        "zimage_mxfp8.cli.command_line",
        "zimage_mxfp8.cli.wording",
        "zimage_mxfp8.cli.streams",
        "zimage_mxfp8.cli.recipes",
        "zimage_mxfp8.cli.display",
    ],
)
def test_while_it_starts(tmp_path: Path, module: str, presses: int) -> None:
    program = f"""
def act():
    try:
        press()
    finally:
        for _ in range({presses - 1}):
            press()
on_import("{module}", act)
start("recipes")
"""
    interrupted(run(program, tmp_path))


def test_while_python_makes_a_class(tmp_path: Path) -> None:
    program = """
class Descriptor:
    def __set_name__(self, owner, name):
        press()
def act():
    class Owner:
        descriptor = Descriptor()
on_import("zimage_mxfp8.cli.recipes", act)
start("recipes")
"""
    interrupted(run(program, tmp_path))


def test_in_a_library_that_makes_another_error_of_it(tmp_path: Path, zimage_folder: Path) -> None:
    program = f"""
def act():
    try:
        press()
    except KeyboardInterrupt as error:
        raise ImportError("torch cannot be imported") from error
on_import("torch", act)
start("sensitivity", {str(zimage_folder)!r})
"""
    interrupted(run(program, tmp_path))


def test_again_while_python_ends(tmp_path: Path) -> None:
    program = """
atexit.register(press)
on_import("zimage_mxfp8.cli.display", press)
start("recipes")
"""
    interrupted(run(program, tmp_path))


def test_when_all_is_done(tmp_path: Path) -> None:
    result = run('atexit.register(press)\nstart("--version")', tmp_path)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("twice", [False, True])
def test_while_the_demo_removes_its_files(tmp_path: Path, twice: bool) -> None:
    """At the first removal, which may follow another Ctrl-C."""
    program = f"""
import shutil
import zimage_mxfp8.cli.demo as demo
def fill(folder, overwrite):
    (folder / "partial").write_bytes(b"partial")
    if {twice}:
        press()
    return 0
demo._demo = fill
removals = []
rmtree = shutil.rmtree
def remove(*arguments, **options):
    removals.append(arguments)
    if len(removals) == 1:
        press()
    rmtree(*arguments, **options)
shutil.rmtree = remove
start("demo")
"""
    interrupted(run(program, tmp_path))
    assert not list(tmp_path.iterdir())


def test_the_entry_handles_it() -> None:
    project = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    assert re.search(r'^zimage-mxfp8 = "zimage_mxfp8\.cli\.main:program"$', project, re.M)
