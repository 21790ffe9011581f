"""Check which CUDA targets CMake accepts, its messages about others, and which CUTLASS it finds.

    python .ci/check_targets.py

For machines with cmake, ninja and nvcc 12.9 or newer, without a GPU and without CUTLASS. CUTLASS is
replaced by a header with a version; nothing is compiled except CMake's tests of the compilers.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

WAYS = (
    "set ZM_CUTLASS_DIR to its folder",
    "install it where CMake looks",
    "pip install nvidia-cutlass==",
)


def make_cutlass(include: Path, version: str) -> None:
    names = zip(("MAJOR", "MINOR", "PATCH"), version.split("."), strict=True)
    (include / "cutlass").mkdir(parents=True)
    text = "\n".join(f"#define CUTLASS_{name} {number}" for name, number in names)
    (include / "cutlass" / "version.h").write_text(text)


class Checks:
    def __init__(self, folder: Path) -> None:
        self.build = folder / "build"
        self.failed = False

    def configure(
        self, arguments: str, *wanted: str, packages: Path | None = None, fails: bool = False
    ) -> None:
        """Configure with these values, and check that the output has some sentences."""
        options = {"ZM_BUILD_PYTHON": "OFF", "ZM_CUDA": "AUTO"}
        options |= dict.fromkeys(("ZM_CUDA_ARCHS", "ZM_CUTLASS_DIR", "CMAKE_PREFIX_PATH"), "")
        options |= dict(argument.split("=", 1) for argument in arguments.split())
        command = ["cmake", "-S", ".", "-B", str(self.build), "-G", "Ninja"]
        command += [f"-D{name}={value}" for name, value in options.items()]
        environment = os.environ | ({"PYTHONPATH": str(packages)} if packages else {})
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        said = " ".join((result.stdout + result.stderr).split())
        missing = [sentence for sentence in wanted if sentence not in said]
        if missing or (result.returncode != 0) != fails:
            self.failed = True
            print(f"{arguments}: exit code {result.returncode}, not said: {missing}\n{said}")
        else:
            print(f"{arguments}: {wanted[0]}")

    def pretend_version(self, version: str) -> None:
        """Change the nvcc version that CMake has stored."""
        (found,) = self.build.glob("CMakeFiles/*/CMakeCUDACompiler.cmake")
        name = "set(CMAKE_CUDA_COMPILER_VERSION "
        lines = found.read_text().splitlines()
        lines = [f'{name}"{version}")' if line.startswith(name) else line for line in lines]
        found.write_text("\n".join(lines))


def main(folder: Path) -> int:
    checks = Checks(folder)
    named, installed, package = (folder / name for name in ("named", "installed", "package"))
    make_cutlass(named / "include", "4.3.0")
    make_cutlass(installed / "include", "4.4.0")
    make_cutlass(package / "cutlass_library" / "source" / "include", "4.5.0")
    (package / "cutlass_library" / "__init__.py").touch()
    old = folder / "old"
    make_cutlass(old / "include", "4.1.0")

    why = "100f and 120f need CUTLASS 4.2 or newer, and CUTLASS was not found"
    checks.configure("ZM_CUDA_ARCHS=100f", why, *WAYS, fails=True)
    checks.configure("ZM_CUDA=ON", why, *WAYS, fails=True)
    checks.configure(
        f"ZM_CUDA_ARCHS=120f ZM_CUTLASS_DIR={old}", "found is 4.1.0, and 4.2", *WAYS, fails=True
    )
    checks.configure("ZM_CUDA_ARCHS=90a", "for 90a")
    checks.configure("ZM_CUDA_ARCHS=91a", 'ZM_CUDA_ARCHS has "91a": use all, native or', fails=True)
    checks.configure("ZM_CUDA_ARCHS=native", "CUDA: off, because this machine has no GPU")

    blackwell = "ZM_CUDA_ARCHS=100f"
    prefix = f"{blackwell} CMAKE_PREFIX_PATH={installed}"
    checks.configure(blackwell, "CUTLASS: 4.5.0", packages=package)
    checks.configure(prefix, "CUTLASS: 4.4.0", packages=package)
    checks.configure(f"{prefix} ZM_CUTLASS_DIR={named}", "CUTLASS: 4.3.0", packages=package)

    checks.pretend_version("12.8.93")
    why = "the CUDA compiler is 12.8.93, and 100f and 120f need 12.9"
    checks.configure("ZM_CUDA_ARCHS=90a;120f", why, "install a newer CUDA toolkit", fails=True)
    checks.configure("ZM_CUDA=ON", why, "for 80, 86, 89, 90a")
    checks.pretend_version("12.6.20")
    why = "the CUDA compiler is 12.6.20, and 12.8 is needed"
    checks.configure("ZM_CUDA_ARCHS=90a", f"CUDA kernels were requested, but {why}", fails=True)
    return int(checks.failed)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        sys.exit(main(Path(temporary)))
