"""Writing: pieces at any position and alignment arrive whole, directly or through the cache."""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zimage_mxfp8.checkpoint import output
from zimage_mxfp8.checkpoint.output import BLOCK, AtomicFile, Writer, check_target, write_file
from zimage_mxfp8.errors import OutputError
from zimage_mxfp8.streaming.jobs import Worker


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("output")


def write_in_pieces(target: Path, content: bytes, cuts: list[int], seed: int) -> None:
    """Write `content` cut at `cuts`, in random order, by two writers in turn."""
    edges = sorted({0, len(content), *(cut for cut in cuts if cut < len(content))})
    pieces = list(itertools.pairwise(edges))
    random.Random(seed).shuffle(pieces)
    with AtomicFile(target, len(content), overwrite=True) as file:
        workers = [Worker(file), Worker(file)]
        for i, (begin, end) in enumerate(pieces):
            worker = workers[i % 2]
            # Sometimes aligned for direct writing, sometimes not.
            data = worker.scratch.take("piece", end - begin, begin if i % 3 else begin + 1)
            data[:] = np.frombuffer(content[begin:end], np.uint8)
            worker.write(begin, data)
        for worker in workers:
            worker.flush()
            worker.close()


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(0, 9 * BLOCK),
    cuts=st.lists(st.integers(1, 9 * BLOCK) | st.integers(1, 9).map(BLOCK.__mul__), max_size=12),
    seed=st.integers(0, 99),
)
def test_pieces_arrive_whole(folder: Path, size: int, cuts: list[int], seed: int) -> None:
    content = random.Random(seed).randbytes(size)
    write_in_pieces(folder / "file", content, cuts, seed)
    assert (folder / "file").read_bytes() == content


@pytest.mark.parametrize("refused", ["open", "write", "part"])
def test_without_direct_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    real_open, real_pwrite = os.open, os.pwrite
    calls = []

    def refuse_open(path: Path, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            calls.append("open")
            raise OSError(errno.EINVAL, "no direct writing here")
        return real_open(path, flags, *rest)

    def refuse_write(*_: object) -> int:
        calls.append("write")
        raise OSError(errno.EINVAL, "blocks of another size")

    def write_part(fd: int, data: memoryview, position: int) -> int:
        calls.append("part")
        return real_pwrite(fd, data[:BLOCK], position)

    if refused == "open":
        monkeypatch.setattr(os, "open", refuse_open)
    else:
        monkeypatch.setattr(os, "pwrite", refuse_write if refused == "write" else write_part)
    content = random.Random(1).randbytes(50 * BLOCK + 77)
    write_in_pieces(tmp_path / "file", content, [3, 20 * BLOCK, 40 * BLOCK + 5], 1)
    assert (tmp_path / "file").read_bytes() == content
    assert refused in calls


def test_direct_writing_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    real = os.pwrite
    monkeypatch.setattr(
        os, "pwrite", lambda fd, d, at: written.append((at, len(d))) or real(fd, d, at)
    )
    (tmp_path / "probe").touch()
    writer = Writer(tmp_path / "probe")
    has_direct = writer._direct is not None
    writer.close()
    if not has_direct:
        pytest.skip("this filesystem has no direct writing")
    cuts = [10, 20 * BLOCK + 10, 60 * BLOCK]
    write_in_pieces(tmp_path / "file", bytes(100 * BLOCK), cuts, 0)
    assert sum(count for _, count in written) >= 18 * BLOCK
    assert all(at % BLOCK == 0 and count % BLOCK == 0 for at, count in written)


def test_failed_write_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError, match="could not be written: No space left on device"):
        write_file(tmp_path / "file", b"content", overwrite=False)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_went_away_is_a_sentence(tmp_path: Path) -> None:
    file = AtomicFile(tmp_path / "gone" / "file", 1000, overwrite=False)
    with pytest.raises(OutputError, match="could not be written: No such file"), file:
        pass


def test_a_target_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "file"
    with (
        pytest.raises(OutputError, match="exists; `overwrite=True` replaces"),
        AtomicFile(target, 3, overwrite=False),
    ):
        target.write_bytes(b"theirs")
    assert target.read_bytes() == b"theirs"
    with AtomicFile(target, 3, overwrite=True):
        pass
    assert target.read_bytes() == bytes(3)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    write_file(tmp_path / "file", b"content", overwrite=False)
    assert (tmp_path / "file").read_bytes() == b"content"
    with pytest.raises(OutputError, match="exists; `overwrite=True` replaces"):
        write_file(tmp_path / "file", b"more", overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("moment", ["truncate", "fsync"])
def test_interrupted_at_any_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    file = AtomicFile(tmp_path / "file", 3, overwrite=False)
    if moment == "fsync":
        monkeypatch.setattr(os, "fsync", interrupt)
    else:
        monkeypatch.setattr(AtomicFile, "_create", lambda _: Interrupted(tmp_path / "x", "w"))
    with pytest.raises(KeyboardInterrupt), file:
        pass
    assert not [path for path in tmp_path.iterdir() if path.name != "x"]


class Interrupted(io.FileIO):
    def truncate(self, size: int | None = None) -> int:
        raise KeyboardInterrupt


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Python's own handler: pytest may have been started with the signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def lock_with_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Ctrl-C be pressed when the hidden file was created and is about to be locked."""
    real = output.try_lock

    def interrupt(fd: int) -> bool | None:
        signal.raise_signal(signal.SIGINT)
        return real(fd)

    monkeypatch.setattr(output, "try_lock", interrupt)


@pytest.mark.usefixtures("ctrl_c")
def test_interrupted_while_created(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock_with_ctrl_c(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        write_file(tmp_path / "file", b"content", overwrite=False)
    assert not list(tmp_path.iterdir())


def test_ctrl_c_with_other_handlers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock_with_ctrl_c(monkeypatch)
    calls: list[tuple[int, bool]] = []

    def handler(number: int, frame: FrameType | None) -> None:
        calls.append((number, (tmp_path / ".file.zimage-mxfp8-partial").exists()))

    before = signal.getsignal(signal.SIGINT)
    try:
        for there in (handler, signal.SIG_IGN):
            signal.signal(signal.SIGINT, there)
            write_file(tmp_path / "file", b"content", overwrite=True)
            assert signal.getsignal(signal.SIGINT) is there
            assert (tmp_path / "file").read_bytes() == b"content"
    finally:
        signal.signal(signal.SIGINT, before)
    assert calls == [(signal.SIGINT, True)]


@pytest.mark.parametrize("handler", [signal.SIG_DFL, None])
def test_without_a_handler_of_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, handler: object
) -> None:
    monkeypatch.setattr(signal, "getsignal", lambda _: handler)  # None: installed from C
    monkeypatch.setattr(signal, "signal", lambda *_: pytest.fail("a handler is installed"))
    write_file(tmp_path / "file", b"content", overwrite=False)
    assert (tmp_path / "file").read_bytes() == b"content"


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_is_for_the_main_thread(tmp_path: Path) -> None:
    thread = threading.Thread(target=lambda: write_file(tmp_path / "f", b"c", overwrite=False))
    thread.start()
    thread.join()
    assert (tmp_path / "f").read_bytes() == b"c"


def interrupted_at(moment: int, work: Callable[[], None]) -> bool:
    """Press Ctrl-C at a moment of `work`; False if it was done before.

    A moment is one at which Python runs handlers: a function of its own begins, or one of C has
    returned.
    """
    moments = itertools.count()

    def interrupt(_frame: FrameType, event: str, _argument: object) -> None:
        if event in ("call", "c_return") and next(moments) == moment:
            signal.raise_signal(signal.SIGINT)

    try:
        sys.setprofile(interrupt)
        work()
    except KeyboardInterrupt:
        return True
    finally:
        sys.setprofile(None)
    assert next(moments) <= moment, "Ctrl-C was lost"
    return False


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # files that Python closes by itself
@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("overwrite", [False, True])
def test_interrupted_at_every_moment(tmp_path: Path, overwrite: bool) -> None:
    target = tmp_path / "file"
    write_file(target, b"old", overwrite=False)  # later runs find the caches filled, as they do
    contents = set()
    for moment in itertools.count():
        target.unlink()
        if overwrite:
            target.write_bytes(b"old")
        if not interrupted_at(moment, lambda: write_file(target, b"new", overwrite=overwrite)):
            break
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        contents.add(target.read_bytes() if target.exists() else b"none")
        target.touch()
        assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert target.read_bytes() == b"new"
    assert contents == {b"old" if overwrite else b"none", b"new"}


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # folders that Python closes by itself
@pytest.mark.usefixtures("ctrl_c")
def test_interrupted_while_it_is_discarded(tmp_path: Path) -> None:
    def discard() -> None:
        with (
            contextlib.suppress(OutputError),
            AtomicFile(tmp_path / "file", 3, overwrite=False),
        ):
            raise OutputError("a failure, or the first Ctrl-C")

    discard()
    for moment in itertools.count():
        if not interrupted_at(moment, discard):
            break
        assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("ctrl_c")
def test_interrupted_after_the_renaming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    others = tmp_path / ".file.zimage-mxfp8-partial"

    def interrupt(_: Path) -> None:
        others.write_bytes(b"begun by another process")
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(output, "_flush_folder", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_file(tmp_path / "file", b"content", overwrite=False)
    assert (tmp_path / "file").read_bytes() == b"content"
    assert others.read_bytes() == b"begun by another process"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("where", ["inside the block", "in another thread"])
def test_a_fork_that_exits_deletes_nothing(tmp_path: Path, where: str) -> None:
    """A child that ends runs the finalizers that it has inherited."""
    script = """
import os, sys, threading
from pathlib import Path
from zimage_mxfp8.checkpoint.output import AtomicFile

entered, forked = threading.Event(), threading.Event()

def fork():
    if os.fork() == 0:
        sys.exit()
    os.wait()

def write():
    with AtomicFile(Path(sys.argv[1]), 3, overwrite=False):
        if sys.argv[2] == "inside the block":
            return fork()
        entered.set()
        forked.wait()

if sys.argv[2] == "inside the block":
    write()
else:
    thread = threading.Thread(target=write)
    thread.start()
    entered.wait()
    fork()
    forked.set()
    thread.join()
"""
    command = [sys.executable, "-W", "ignore", "-c", script, str(tmp_path / "file"), where]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_leftovers_that_were_published_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening and locking the name may have become another writer's."""
    partial, lock = tmp_path / ".file.zimage-mxfp8-partial", output.try_lock
    partial.write_bytes(b"complete")

    def publish(fd: int) -> bool | None:
        partial.replace(tmp_path / "file")
        partial.write_bytes(b"begun by another process")
        return lock(fd)

    monkeypatch.setattr(output, "try_lock", publish)
    output.remove_leftovers(tmp_path)
    assert (tmp_path / "file").read_bytes() == b"complete"
    assert partial.read_bytes() == b"begun by another process"


def test_a_lock_that_is_held_for_a_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a process that looks for leftovers."""
    answers = iter([False, False])
    lock = output.try_lock
    monkeypatch.setattr(output, "try_lock", lambda fd: next(answers, None) is None and lock(fd))
    write_file(tmp_path / "file", b"content", overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_long_names(tmp_path: Path) -> None:
    name = "ö" * 120  # 240 bytes: legal, but not with a suffix
    write_file(tmp_path / name, b"content", overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_file_in_place_of_the_folder_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for target, problem in (
        (file / "out", f"the output folder {file} is a file; choose another"),
        (file / "a" / "out", f"{file / 'a'} does not exist, and {file} is a file; choose another"),
        (tmp_path / "a" / "out", f"{tmp_path / 'a'} does not exist; create it first"),
    ):
        with pytest.raises(OutputError) as caught:
            check_target(target, (), overwrite=False)
        assert str(caught.value).endswith(problem)


def test_an_input_that_does_not_exist_is_another_error(tmp_path: Path) -> None:
    """Which the command tells when it reads the input."""
    target = tmp_path / "out.safetensors"
    target.write_bytes(b"old")
    check_target(target, [tmp_path / "missing.safetensors"], overwrite=True)
    with pytest.raises(OutputError, match="exists"):
        check_target(target, [tmp_path / "missing.safetensors"], overwrite=False)
