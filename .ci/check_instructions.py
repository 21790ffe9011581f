"""Check that compiled objects hold the block-scaled tensor core instructions.

    python .ci/check_instructions.py BUILD_FOLDER NUMBER_OF_OBJECTS

Reads the machine code (SASS) with cuobjdump and nvdisasm, which `pip install nvidia-cuda-cuobjdump
nvidia-cuda-nvdisasm` brings. A target that CUTLASS does not recognise as Blackwell compiles without
an error into a stub that multiplies nothing; this check finds it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import files
from pathlib import Path

# Object files with the name in their path, and their required instructions.
WANTED = {
    "sm100large": r"UTCQMMA\.2CTA\b",
    "sm100medium": r"UTCQMMA\.2CTA\b",
    "sm100small": r"UTCQMMA\b(?!\.2CTA)",
    "sm120": r"QMMA\.SF\.16832\.F32\.E4M3\.E4M3\.E8\b",
}


def program(package: str, name: str) -> Path:
    found = [f for f in files(package) or () if f.name == name]
    path = Path(str(found[0].locate()))
    path.chmod(0o755)
    return path


def count(instruction: str, path: Path) -> int:
    cuobjdump = program("nvidia-cuda-cuobjdump", "cuobjdump")
    nvdisasm = program("nvidia-cuda-nvdisasm", "nvdisasm")
    search = os.pathsep.join((str(nvdisasm.parent), os.environ["PATH"]))
    code = subprocess.run(
        [cuobjdump, "--dump-sass", path],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": search},
    ).stdout
    return len(re.findall(instruction, code))


def main(folder: Path, expected: int) -> int:
    objects = sorted(folder.rglob("block_scaled.cu.o"))
    failed = len(objects) != expected
    if failed:
        print(f"{folder} has {len(objects)} objects of block_scaled.cu, not {expected}")
    for path in objects:
        target = next(p.stem for p in path.parents if p.suffix == ".dir")
        instruction = next(wanted for name, wanted in WANTED.items() if name in target)
        found = count(instruction, path)
        print(f"{target}: {found} x {instruction}")
        failed |= found == 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
