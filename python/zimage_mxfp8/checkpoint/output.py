"""Output files that appear whole or not at all.

A file is written in its target's folder under a hidden name, flushed to the disk and renamed. The
hidden file is locked while its writer lives, so that a later run can distinguish leftovers of a
crash from files that another process is writing.

If the system allows it, whole blocks go to the disk directly instead of through the page cache: the
data is flushed before the rename anyway, and filling the cache with gigabytes that are not read
again costs more than the encoding.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import mmap
import os
import shutil
import signal
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from ..errors import OutputError, UsageError, remedy

BLOCK = max(4096, mmap.PAGESIZE)  # bytes; the unit of disks and page caches
MAX_NAME_BYTES = 200  # of a target, for its hidden name to stay under the usual 255
_MAX_KEPT = 16 << 20  # bytes of small pieces that a writer keeps
PARTIAL_SUFFIX = ".zimage-mxfp8-partial"
_PATIENCE = 0.25  # seconds: a process that looks for leftovers holds a lock for a moment

if os.name == "nt":  # pragma: no cover - tested on Linux only
    import msvcrt

    def try_lock(fd: int) -> bool | None:
        """Lock an open file, as the function below does."""
        try:
            os.lseek(fd, 1 << 62, os.SEEK_SET)  # a byte that no reader or writer touches
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        except OSError as error:
            return False if error.errno == errno.EACCES else None
        return True
else:
    import fcntl

    def try_lock(fd: int) -> bool | None:
        """Lock an open file; closing it releases the lock.

        Returns:
            Whether this process now holds the lock (False: another does); None if the filesystem
            has no locks, as some network mounts.
        """
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
        return True


def why_no_folder(path: Path) -> str:
    """Return why a path is no folder to write to, with a remedy, as the end of a sentence."""
    if os.path.lexists(path) and not path.is_symlink():
        return "is a file; choose another"
    above = next((place for place in path.parents if os.path.lexists(place)), path)
    if not above.is_dir():
        return f"does not exist, and {above} is a file; choose another"
    return "does not exist; create it first"


def check_target(
    target: Path, sources: Iterable[Path], *, overwrite: bool, argument: str = "output"
) -> None:
    """Check that `target` may be written.

    Args:
        target: a file to write.
        sources: files that are read.
        overwrite: whether it may be replaced.
        argument: the argument that names it, for the error.

    Raises:
        UsageError: it is one of the sources.
        OutputError: its folder is missing or not writable, it is a folder, or it exists and
            `overwrite` is not given.
    """
    final_path(target)
    folder = target.absolute().parent
    try:
        is_folder = folder.is_dir()
    except OSError:
        raise OutputError(f"the output folder {folder} is not writable; choose another") from None
    if not is_folder:
        raise OutputError(f"the output folder {folder} {why_no_folder(folder)}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"the output folder {folder} is not writable; choose another")
    for source in sources:
        both_exist = target.exists() and source.exists()
        if target.absolute() == source.absolute() or (both_exist and target.samefile(source)):
            raise UsageError(argument, f"{target} is the input", "choose another name")
    if target.is_dir():
        raise OutputError(f"the output {target} is a folder; name a file")
    if target.exists() and not target.is_file():
        raise OutputError(f"the output {target} is not a regular file; name a file")
    if target.exists() and not overwrite:
        raise target_exists(target)


def check_distinct(targets: Mapping[str, Path | None]) -> None:
    """Check that no two outputs are the same file.

    Args:
        targets: argument -> the file that it names, if it is given.

    Raises:
        UsageError: two are.
        OutputError: the links of one are a loop.
    """
    seen: set[Path] = set()
    for argument, target in targets.items():
        if target is None:
            continue
        final = final_path(target)
        if final in seen:
            raise UsageError(
                argument,
                f"and another output are the same file, {target}",
                "give each its own name",
            )
        seen.add(final)


def final_path(target: Path) -> Path:
    """Return the file that `target` names, following links.

    Raises:
        OutputError: the links are a loop.
    """
    try:
        return target.resolve()
    except (OSError, RuntimeError):
        raise OutputError(
            f"the output {target} is a link that leads back to itself; name another file"
        ) from None


def target_exists(target: Path) -> OutputError:
    """Return the error for a target that must not be replaced."""
    return OutputError(f"the output {target} exists", "`overwrite=True` replaces it")


def remove_leftovers(folder: Path) -> None:
    """Delete the leftovers of crashed runs in a folder, but not the files of live runs."""
    for path in folder.glob(f".*{PARTIAL_SUFFIX}"):
        with contextlib.suppress(OSError):
            with path.open("r+b") as file:
                # By now the file may be published, and the name another writer's.
                abandoned = try_lock(file.fileno()) and _is_at(path, file)
                if abandoned and os.name != "nt":
                    path.unlink()  # while the lock keeps a new writer away
            if abandoned and os.name == "nt":  # pragma: no cover - no unlinking of open files there
                path.unlink()


def _is_at(path: Path, file: BinaryIO) -> bool:
    """Return whether a path still names an open file; while locked, no process removes it."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Delay Ctrl-C to the end of the block, and call its handler there.

    If Python has no handler for it, or runs the handler in another thread, nothing can be raised in
    the block, and nothing is delayed.
    """
    handler = signal.getsignal(signal.SIGINT)
    held: list[tuple[int, FrameType | None]] = []

    def hold(number: int, frame: FrameType | None) -> None:
        held.append((number, frame))

    try:
        if callable(handler):
            with contextlib.suppress(ValueError):  # not in the thread that runs handlers
                signal.signal(signal.SIGINT, hold)
        yield
    finally:
        if callable(handler) and signal.getsignal(signal.SIGINT) is hold:
            signal.signal(signal.SIGINT, handler)
            if held:
                handler(*held[0])


class Writer:
    """A writer at given positions of a file; `flush` it after the last write, and `close` it.

    Data with the same remainder of address and position modulo `BLOCK` goes to the disk directly,
    all but its first and last partial blocks. Those and other small pieces are kept until `flush`,
    because a write through the cache waits for every direct write in progress.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("r+b", buffering=0)
        self._kept: list[tuple[int, bytes]] = []
        self._kept_bytes = 0
        self._direct: int | None = None
        flag = getattr(os, "O_DIRECT", 0)  # Linux; elsewhere everything goes through the cache
        if flag:
            with contextlib.suppress(OSError):  # a filesystem without direct writes
                self._direct = os.open(path, os.O_WRONLY | flag)

    def write(self, position: int, data: npt.NDArray[np.uint8]) -> None:
        """Write `data` at `position`, now or at the next `flush`.

        Raises:
            OSError: as the system says.
        """
        head = -position % BLOCK
        whole = (data.size - head) // BLOCK * BLOCK
        aligned = (data.ctypes.data - position) % BLOCK == 0
        if self._direct is None or not aligned:
            self._write_cached(position, data.data)
        elif whole <= 0:
            self._keep(position, data)
        else:
            tail = head + whole
            self._keep(position, data[:head])
            self._write_direct(position + head, data[head:tail])
            self._keep(position + tail, data[tail:])

    def _keep(self, position: int, data: npt.NDArray[np.uint8]) -> None:
        if data.size:
            self._kept.append((position, data.tobytes()))
            self._kept_bytes += data.size
            if self._kept_bytes > _MAX_KEPT:
                self.flush()

    def _write_direct(self, position: int, data: npt.NDArray[np.uint8]) -> None:
        assert self._direct is not None
        try:
            written = os.pwrite(self._direct, data.data, position)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            os.close(self._direct)  # opened, but wants blocks of another size
            self._direct = None
            written = 0
        if written < data.size:
            self._write_cached(position + written, data[written:].data)

    def _write_cached(self, position: int, view: memoryview) -> None:
        self._file.seek(position)
        while view:
            view = view[self._file.write(view) :]

    def flush(self) -> None:
        """Write the data that was kept.

        Raises:
            OSError: as the system says.
        """
        for position, piece in sorted(self._kept):
            self._write_cached(position, memoryview(piece))
        self._kept.clear()
        self._kept_bytes = 0

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        if self._direct is not None:
            os.close(self._direct)
            self._direct = None


class AtomicFile:
    """A file of known size that replaces `target` when it is complete.

    Use as a context manager: leaving it normally publishes the file, leaving it with an exception
    deletes the written data. `open()` gives handles for writing, one per thread.

    Args:
        target: the final name.
        size: bytes that the file will have; free space is checked before anything is written.
        overwrite: replace a target that exists or appears in the meantime.
        named: what errors call it, if the target is a part of a folder that has no name yet.

    Raises:
        OutputError: not enough space, another process writes the same target, or any failure to
            write. The old target is untouched then.
    """

    def __init__(
        self, target: Path, size: int, *, overwrite: bool, named: Path | None = None
    ) -> None:
        self.target = target
        self._named = named or target
        self.size = size
        self._overwrite = overwrite
        self._final = final_path(target)  # a link stays a link, and its target is replaced
        name = self._final.name
        if len(os.fsencode(name)) > MAX_NAME_BYTES:
            name = hashlib.sha256(os.fsencode(name)).hexdigest()
        self._partial = self._final.with_name(f".{name}{PARTIAL_SUFFIX}")
        self._file: BinaryIO | None = None
        self._undo: weakref.finalize[[Path, BinaryIO, int], AtomicFile] | None = None

    def __enter__(self) -> AtomicFile:
        folder = self._partial.parent
        remove_leftovers(folder)
        try:
            free = shutil.disk_usage(folder).free
        except OSError as error:
            raise self.failure(error) from None
        if self.size > free:
            place = self._named.parent
            raise OutputError(
                f"{self._named} needs {self.size:,} bytes, but {place} has {free:,} free; "
                "free some space, or choose another disk"
            )
        try:
            with interrupts_held():  # an unknown file would stay behind
                self._file = self._create()
                # Also for Ctrl-C on the way into __exit__, which then does not run.
                self._undo = weakref.finalize(self, _delete, self._partial, self._file, os.getpid())
            self._file.truncate(self.size)
        except BaseException as error:
            self._discard()
            raise (self.failure(error) if isinstance(error, OSError) else error) from None
        return self

    def _create(self) -> BinaryIO:
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                file = os.fdopen(os.open(self._partial, flags, 0o666), "r+b", buffering=0)
            except OSError as error:
                raise self.failure(error) from None
            locked = try_lock(file.fileno())
            if locked is not False and _is_at(self._partial, file):
                file.truncate(0)
                return file
            file.close()  # another process cleans it up, or writes it
            if locked is False:
                if time.monotonic() > deadline:
                    raise OutputError(
                        f"another process is writing {self.target}; wait for it, or choose "
                        "another name"
                    )
                time.sleep(_PATIENCE / 25)

    def open(self) -> Writer:
        """Return a handle for writing, for one thread."""
        try:
            return Writer(self._partial)
        except OSError as error:
            raise self.failure(error) from None

    def failure(self, error: OSError) -> OutputError:
        """Return the error for a failed write."""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return OutputError(
                f"{self._named} could not be written: {error.strerror}; "
                f"{self.size:,} bytes are needed, nothing was kept"
            )
        cause = error.strerror or str(error)
        return OutputError(f"{self._named} could not be written: {cause}; {remedy(error)}")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._discard()
            return
        try:
            self._publish()
        except BaseException as error:  # also Ctrl-C while the disk is slow
            self._discard()
            raise (self.failure(error) if isinstance(error, OSError) else error) from None

    def _publish(self) -> None:
        assert self._file is not None
        assert self._undo is not None
        os.fsync(self._file.fileno())
        with interrupts_held():  # after the renaming the hidden name may be another writer's
            if os.name == "nt":  # pragma: no cover - an open file cannot be renamed there
                self._file.close()
            self._rename()
            self._undo.detach()
            with contextlib.suppress(OSError):  # the file is complete even if this fails
                _flush_folder(self._partial.parent)
            self._file.close()  # with the lock, which kept others from cleaning the file up

    def _rename(self) -> None:
        if self._overwrite:
            self._partial.replace(self._final)
            return
        try:
            if os.name == "nt":  # pragma: no cover - where rename refuses to replace
                self._partial.rename(self._final)
            else:
                self._final.hardlink_to(self._partial)
                self._partial.unlink()
        except FileExistsError:
            raise target_exists(self.target) from None
        except OSError:  # a filesystem without hard links
            if self._final.exists():
                raise target_exists(self.target) from None
            self._partial.replace(self._final)

    def _discard(self) -> None:
        if self._undo is not None:
            with interrupts_held():  # Ctrl-C may be pressed twice
                self._undo()


def _delete(partial: Path, file: BinaryIO, writer: int) -> None:
    """Delete a partial file, unless this is a fork of the process that writes it."""
    if os.getpid() != writer:
        return
    if os.name == "nt":  # pragma: no cover - an open file cannot be deleted there
        file.close()
    with contextlib.suppress(OSError):
        partial.unlink()
    file.close()


def _flush_folder(folder: Path) -> None:
    if os.name == "nt":  # pragma: no cover - folders cannot be opened there
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_file(target: Path, content: bytes, *, overwrite: bool) -> None:
    """Write a whole small file, atomically.

    Raises:
        OutputError: it cannot be written, or exists and `overwrite` is not given.
    """
    with AtomicFile(target, len(content), overwrite=overwrite) as file:
        writer = file.open()
        try:
            writer.write(0, np.frombuffer(content, np.uint8))
            writer.flush()
        except OSError as error:
            raise file.failure(error) from None
        finally:
            writer.close()
