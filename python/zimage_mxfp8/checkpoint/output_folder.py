"""Output folders that appear whole or not at all.

A folder is written under a hidden name next to its target and renamed. Where folders can be locked
(not on Windows), the hidden one is, as long as its writer lives, so that a later run can delete
what a crash left behind.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path, PurePosixPath

from ..errors import OutputError, remedy
from .output import (
    MAX_NAME_BYTES,
    PARTIAL_SUFFIX,
    final_path,
    interrupts_held,
    target_exists,
    try_lock,
    why_no_folder,
)


def check_target_folder(target: Path, own: Collection[str], *, overwrite: bool) -> None:
    """Check that a folder may be written.

    Args:
        target: the folder; an empty one may exist.
        own: names of the entries that such a folder has. One with others is never replaced.
        overwrite: whether it may be replaced.

    Raises:
        OutputError: the folder above it is missing or not writable, it is no folder, it exists and
            `overwrite` is not given, or it has other entries.
    """
    final = final_path(target)
    above = final.parent
    if not above.is_dir():
        raise OutputError(f"the folder {above} for {target} {why_no_folder(above)}")
    if not os.access(above, os.W_OK | os.X_OK):
        raise OutputError(f"the folder {above} for {target} is not writable; choose another")
    if not final.exists():
        return
    if not final.is_dir():
        raise OutputError(f"the output {target} is a file; move it away, or name another folder")
    try:
        found = sorted(path.name for path in final.iterdir())
    except OSError as error:
        raise _failure(target, error) from None
    found = [name for name in found if not name.endswith(PARTIAL_SUFFIX)]  # of ended processes
    if others := [name for name in found if name not in own]:
        raise OutputError(
            f"the output {target} has other content ({others[0]}), which would be lost; move it "
            "away, or name another folder"
        )
    if found and not overwrite:
        raise target_exists(target)


def write_folder(
    target: Path, files: Iterable[tuple[str, bytes]], own: Collection[str], *, overwrite: bool
) -> None:
    """Write a folder with all of its files, or nothing.

    Args:
        target: the folder.
        files: names with / between folders, and contents.
        own: see `check_target_folder`.
        overwrite: replace a folder that exists.

    Raises:
        OutputError: it cannot be written, or must not be. The old folder is untouched then.
    """
    with new_folder(target, own, overwrite=overwrite) as partial:
        for name, content in files:
            file = partial / PurePosixPath(name)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)


@contextlib.contextmanager
def new_folder(target: Path, own: Collection[str], *, overwrite: bool) -> Iterator[Path]:
    """Yield a folder to fill, which replaces `target` at the end, or vanishes with an exception.

    Args:
        target: the folder.
        own: see `check_target_folder`.
        overwrite: replace a folder that exists.

    Raises:
        OutputError: it cannot be written, or must not be. The old folder is untouched then.
    """
    check_target_folder(target, own, overwrite=overwrite)
    final = final_path(target)
    try:
        with _partial_folder(final) as partial:
            yield partial
            check_target_folder(target, own, overwrite=overwrite)  # it may have appeared meanwhile
            with interrupts_held():
                _replace(partial, final)
    except OSError as error:
        raise _failure(target, error) from None


def _failure(target: Path, error: OSError) -> OutputError:
    cause = error.strerror or str(error)
    return OutputError(f"{target} could not be written: {cause}; {remedy(error)}")


@contextlib.contextmanager
def _partial_folder(final: Path) -> Iterator[Path]:
    """Yield a new hidden folder, locked; what is left of it in the end is deleted."""
    stem = final.name
    if len(os.fsencode(stem)) > MAX_NAME_BYTES:
        stem = hashlib.sha256(os.fsencode(stem)).hexdigest()
    _remove_leftovers(final.parent)
    with contextlib.ExitStack() as undo:
        with interrupts_held():  # a folder of unknown name would stay behind
            partial = final.with_name(f".{stem}.{secrets.token_hex(4)}{PARTIAL_SUFFIX}")
            partial.mkdir()
            undo.callback(shutil.rmtree, partial, ignore_errors=True)
            if os.name != "nt":
                lock = os.open(partial, os.O_RDONLY)
                undo.callback(os.close, lock)
                try_lock(lock)
        yield partial


def _replace(partial: Path, final: Path) -> None:
    """Rename; an old folder is moved away first, and back if the renaming fails."""
    if not final.exists():
        partial.rename(final)
        return
    old = partial.with_name(f"{partial.name.removesuffix(PARTIAL_SUFFIX)}.old{PARTIAL_SUFFIX}")
    final.rename(old)
    try:
        partial.rename(final)
    except OSError:
        old.rename(final)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _remove_leftovers(above: Path) -> None:
    """Delete folders that crashed runs left behind."""
    if os.name == "nt":  # pragma: no cover - folders cannot be locked there
        return
    for path in above.glob(f".*{PARTIAL_SUFFIX}"):
        with contextlib.suppress(OSError):
            if path.is_symlink() or not path.is_dir():
                continue
            fd = os.open(path, os.O_RDONLY)
            try:
                if try_lock(fd):
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(fd)
