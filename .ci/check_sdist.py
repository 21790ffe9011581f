"""Check that a source distribution holds the files of the repository, and only those.

    python .ci/check_sdist.py SDIST

Run it in a clean clone. Files that only serve the repository itself are left out.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

LEFT_OUT = (".ci/", ".github/")
ADDED = {"PKG-INFO"}


def main(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        entries = [member.name.split("/", 1) for member in archive.getmembers() if member.isfile()]
    (folder,) = {entry[0] for entry in entries}
    if sdist.name != f"{folder}.tar.gz":
        sys.exit(f"{sdist.name} has the folder {folder}")
    found = {entry[1] for entry in entries}
    tracked = subprocess.check_output(["git", "ls-files"], text=True).splitlines()
    wanted = {name for name in tracked if not name.startswith(LEFT_OUT)} | ADDED
    if found != wanted:
        sys.exit(f"{sdist.name} lacks {wanted - found} and should not have {found - wanted}")
    print(f"{sdist.name}: {len(found)} files, {sdist.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
