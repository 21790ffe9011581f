"""The commit of this package's sources, as far as the installation shows it."""

from __future__ import annotations

import json
import subprocess
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

_PACKAGE = "zimage-mxfp8"


def installed_commit() -> str:
    """Return the commit that pip recorded, or that of the source folder it installed from.

    Such a folder may have changed since. "" without a sound record, without Git or outside a clone.
    """
    try:
        record = distribution(_PACKAGE).read_text("direct_url.json")
    except PackageNotFoundError:
        return ""
    try:
        origin: dict[str, Any] = json.loads(record or "{}")
        commit = origin.get("vcs_info", {}).get("commit_id")
        url = urlparse(origin.get("url", ""))
    except (ValueError, AttributeError):  # damaged
        return ""
    if commit:
        return str(commit)
    return _described(Path(url2pathname(url.path))) if url.scheme == "file" else ""


def _described(folder: Path) -> str:
    """Return the commit of a clone, with "-dirty" if tracked files differ from it."""
    if not (folder / ".git").exists():  # a wheel's folder may be in a clone of something else
        return ""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return f"{commit}-dirty" if _git(folder, "status", "-s", "-uno") else commit
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(folder: Path, *words: str) -> str:
    return subprocess.run(
        ["git", *words], cwd=folder, capture_output=True, text=True, check=True
    ).stdout.strip()
