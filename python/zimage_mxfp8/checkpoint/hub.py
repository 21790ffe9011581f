"""Names on the Hugging Face hub: lookup in the local cache, and download on request.

Tested against a server on the same machine, never against the real hub.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..system.optional_packages import needed
from ..text import is_web_address, plural

TRANSFORMER = "transformer"
COMPONENTS = ("tokenizer", "text_encoder", "vae", "scheduler")

_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
_REFERENCE = re.compile(
    rf"(?P<repo>{_NAME}/{_NAME})"
    r"(?:@(?P<revision>refs/pr/\d+|[A-Za-z0-9_][\w.-]*))?"
    r"(?:/(?P<file>.+\.safetensors))?",
    re.ASCII,
)
_MAX_REPO = 96  # characters, as on the hub

_INDEX = "model_index.json"
_DIFFUSERS = "diffusion_pytorch_model"
_WEIGHTS = {"text_encoder": "model", "vae": _DIFFUSERS, TRANSFORMER: _DIFFUSERS}
_NEEDED = {
    "tokenizer": ["tokenizer_config.json"],
    "text_encoder": ["config.json"],
    "vae": ["config.json"],
    "scheduler": ["scheduler_config.json"],
}
# Files of a tokenizer, if they exist: libraries read different ones.
_VOCABULARIES = ("tokenizer.json", "vocab.json")
_OPTIONAL = {
    "tokenizer": (
        *_VOCABULARIES,
        "merges.txt",
        "added_tokens.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "chat_template.json",
    )
}


@dataclass(frozen=True)
class Reference:
    """A name on the hub: `owner/name`, `owner/name@revision`, `owner/name[@revision]/file`.

    Attributes:
        repo: `owner/name`.
        revision: a branch, tag or commit; None for the default branch.
        file: path of a safetensors file in the repository; None for a folder.
    """

    repo: str
    revision: str | None
    file: str | None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return self.repo + revision + (f"/{self.file}" if self.file else "")

    @property
    def stem(self) -> str:
        """A name for files made from this model."""
        return Path(self.file).stem if self.file else self.repo.rpartition("/")[2]


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository: its path there, and its size in bytes."""

    name: str
    nbytes: int


@dataclass(frozen=True)
class Download:
    """Progress of a download, given to callbacks before every file and after the last one.

    Attributes:
        repo: `owner/name`.
        files: all files to download, in this order.
        done: number of complete files.
    """

    repo: str
    files: tuple[RemoteFile, ...]
    done: int


DownloadCallback = Callable[[Download], object]


class _MissingFileError(Exception):
    """A needed file is missing; the message is "its ..."."""


def parse(text: str | os.PathLike[str]) -> Reference | None:
    """Parse a name on the hub; None if `text` is a path, exists as one, or is no such name."""
    if not isinstance(text, str):
        return None
    match = _REFERENCE.fullmatch(text)
    if match is None:
        return None
    repo = match["repo"]
    if ".." in text or "--" in repo or len(repo) > _MAX_REPO or _is_there(text):
        return None
    if repo.endswith(".safetensors"):  # a file in a folder that does not exist
        return None
    if any(part.endswith((".", "-", ".git")) for part in repo.split("/")):  # no names on the hub
        return None
    return Reference(repo, match["revision"], match["file"])


def _is_there(text: str) -> bool:
    try:
        os.lstat(text)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:  # in a folder without permission
        return True
    return True


def resolve(
    text: str | os.PathLike[str],
    parts: Sequence[str],
    *,
    download: bool = False,
    report: DownloadCallback | None = None,
) -> Path:
    """Find a file or folder on this machine.

    Without `download` there is no network access. With it, only files that the cache lacks are
    fetched; if the cache has everything, newer commits are not looked up.

    Args:
        text: a path, or a name on the hub (see `Reference`), which is looked up in the Hugging Face
            cache. Only a str can be a name: a `Path` is always a path.
        parts: folders that are needed from a repository, such as "vae"; of each the safetensors
            weights, settings and tokenizer files, without variants.
        download: fetch files that the cache lacks.
        report: called while files are downloaded.

    Returns:
        A path, unchecked if `text` is one; the folder of a repository holds `parts`.

    Raises:
        CheckpointError: a web address, not in the cache, or the download failed.
        MissingExtraError: huggingface_hub is not installed.
    """
    if isinstance(text, str) and is_web_address(text):
        raise CheckpointError(
            f"{text} is a web address; name a file or folder, or a model on the Hugging Face hub "
            "as OWNER/NAME"
        )
    reference = parse(text)
    if reference is None:
        return Path(text)
    library = _library(reference)
    try:
        return _cached(library, reference, parts)
    except _MissingFileError as missing:
        if not download:
            raise CheckpointError(
                f"{reference} does not exist on this machine: it is not a path, and the "
                f"Hugging Face cache lacks {missing}",
                "check the name, or fetch it from the hub with `download=True`",
            ) from None
    with _downloading(library, reference):
        return _download(library, reference, parts, report or (lambda _: None))


def name_of(folder: Path) -> str:
    """Return the name of a folder; for a snapshot in the hub's cache, that of its repository."""
    folder = folder.resolve()
    kind, *names = folder.parent.parent.name.split("--")
    if folder.parent.name == "snapshots" and kind == "models" and names:
        return "/".join(names)
    return folder.name


def _library(reference: Reference) -> Any:
    what = f"{reference} does not exist here, and looking it up in the Hugging Face cache"
    with needed("hub", what):
        import huggingface_hub.constants
        import huggingface_hub.errors
    return huggingface_hub


def _cached(library: Any, reference: Reference, parts: Sequence[str]) -> Path:
    snapshot = _snapshot(library, reference.repo, reference.revision)
    if snapshot is None:
        raise _MissingFileError("it")
    _select(_files_in(snapshot), reference, parts)
    return snapshot / reference.file if reference.file else snapshot


def _snapshot(library: Any, repo: str, revision: str | None) -> Path | None:
    """Return the folder of a revision in the cache, which may be incomplete."""
    try:
        return Path(
            library.snapshot_download(
                repo,
                revision=revision,
                local_files_only=True,
                allow_patterns=[],  # otherwise newer versions require all of its files
            )
        )
    except library.errors.LocalEntryNotFoundError:
        return None
    except (OSError, ValueError) as error:  # a file of the cache that is a folder, or not text
        raise CheckpointError(
            f"the Hugging Face cache of {repo} cannot be read ({error}); delete "
            f"models--{repo.replace('/', '--')} in it"
        ) from None


def _files_in(folder: Path) -> set[str]:
    # Links without a target are not files.
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def _select(names: Collection[str], reference: Reference, parts: Sequence[str]) -> list[str]:
    """Return the needed files of a repository.

    Raises:
        _MissingFileError: a needed file is missing.
    """
    if reference.file is not None:
        return _require(names, [reference.file])
    chosen = [] if set(parts) <= {TRANSFORMER} else _require(names, [_INDEX])
    for part in parts:
        chosen += _require(names, [f"{part}/{file}" for file in _NEEDED.get(part, [])])
        optional = [f"{part}/{file}" for file in _OPTIONAL.get(part, [])]
        chosen += [name for name in optional if name in names]
        if part == "tokenizer" and not any(f"{part}/{file}" in names for file in _VOCABULARIES):
            raise _MissingFileError(f"its {part}/{_VOCABULARIES[0]}")
        if part != "tokenizer" and part != "scheduler":
            chosen += _select_weights(names, part)
    return chosen


def _require(names: Collection[str], needed: list[str]) -> list[str]:
    for name in needed:
        if name not in names:
            raise _MissingFileError(f"its {name}")
    return needed


def _select_weights(names: Collection[str], part: str) -> list[str]:
    """Return the weights of a part: if it has one file and shards, those that are read later."""
    stem = _WEIGHTS.get(part, _DIFFUSERS)
    # A transformer may be a repository of its own.
    for folder in ("", f"{part}/") if part == TRANSFORMER else (f"{part}/",):
        whole = f"{folder}{stem}.safetensors"
        index = f"{whole}.index.json"
        if whole in names and (stem != _DIFFUSERS or index not in names):
            return [whole]
        if index in names:
            return [index, *_shards(names, folder + stem)]
    raise _MissingFileError(f"its {part}/{stem}.safetensors")


def _shards(names: Collection[str], stem: str) -> list[str]:
    pattern = re.compile(re.escape(stem) + r"-\d{5}-of-(\d{5})\.safetensors")
    shards = sorted(name for name in names if pattern.fullmatch(name))
    totals = {int(name[-17:-12]) for name in shards}
    if totals != {len(shards)}:
        raise _MissingFileError(f"a shard of its {stem}.safetensors")
    return shards


def _download(
    library: Any, reference: Reference, parts: Sequence[str], report: DownloadCallback
) -> Path:
    repo, revision = reference.repo, reference.revision
    info = library.HfApi().model_info(repo, revision=revision, files_metadata=True)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    try:
        chosen = _select(sizes, reference, parts)
    except _MissingFileError as missing:
        raise CheckpointError(
            f"{reference} cannot be used: the hub lacks {missing}; {_files_to_name(repo, sizes)}"
        ) from None
    snapshot = _snapshot(library, repo, info.sha)
    there = _files_in(snapshot) if snapshot else set()
    files = tuple(RemoteFile(name, sizes[name]) for name in chosen if name not in there)
    _check_space(library, reference, sum(file.nbytes for file in files))
    for done, file in enumerate(files):
        report(Download(repo, files, done))
        library.hf_hub_download(repo, file.name, revision=revision)
    if (
        not files
    ):  # the cache has all files under another name of the commit; this records the new name
        library.hf_hub_download(repo, chosen[0], revision=revision)
    else:
        report(Download(repo, files, len(files)))
    try:
        return _cached(library, reference, parts)
    except _MissingFileError:
        raise CheckpointError(
            f"{reference} changed on the hub during the download; start it again"
        ) from None


def _check_space(library: Any, reference: Reference, needed: int) -> None:
    cache = Path(library.constants.HF_HUB_CACHE)
    there = next(folder for folder in (cache, *cache.absolute().parents) if folder.is_dir())
    import shutil

    free = shutil.disk_usage(there).free
    if needed > free:
        raise CheckpointError(
            f"{reference} needs {needed:,} bytes, but the Hugging Face cache {cache} has {free:,} "
            "free; make room, or set HF_HOME to a folder on another disk"
        )


def _files_to_name(repo: str, names: Collection[str]) -> str:
    """Return the end of a sentence: the files of a repository that could be named instead."""
    files = sorted(name for name in names if name.endswith(".safetensors"))
    if not files:
        return "it has no safetensors file at all"
    examples = ", ".join(f"{repo}/{name}" for name in files[:3])
    return f"it has {plural(len(files), 'safetensors file')}, among them {examples}"


@contextmanager
def _downloading(library: Any, reference: Reference) -> Iterator[None]:
    """Turn any error of the library into a sentence."""
    try:
        yield
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:  # those of HTTP clients differ between versions
        raise CheckpointError(f"{reference} {_problem(library.errors, error)}") from None


def _problem(errors: Any, error: Exception) -> str:
    if isinstance(error, errors.GatedRepoError):
        return "is gated: accept its terms on its page, and log in with: hf auth login"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "is not on the hub, or private: check the name, or log in with: hf auth login"
    if isinstance(error, errors.RevisionNotFoundError):
        return "is on the hub, but not in this revision; check the part after @"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "cannot be downloaded: HF_HUB_OFFLINE is set; unset it"
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return (
        f"cannot be downloaded: {reason.rstrip('.')}; check the network, and start it again: "
        "complete files stay in the cache"
    )
