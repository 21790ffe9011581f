"""Check that a wheel holds everything it needs and nothing else.

    python .ci/check_wheel.py [--cuda] [--manylinux VERSION] WHEEL

For machines with binutils. With --cuda it must have CUDA kernels, without it none. With --manylinux
it must run on every Linux with this glibc (such as 2.34) or a newer one.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path

MODULE = r"zimage_mxfp8/_core\.[^/]*\.(so|pyd)"
LIBRARY = "zimage_mxfp8/lib/libzimage_mxfp8.a"
REQUIRED = (
    MODULE,
    r"zimage_mxfp8/_core\.pyi",
    r"zimage_mxfp8/py\.typed",
    r"zimage_mxfp8/conversion/recipes/uniform\.toml",
    r"zimage_mxfp8/analysis/pages/page\.css",
    r"zimage_mxfp8/analysis/pages/network\.css",
    r"zimage_mxfp8/analysis/pages/downloads\.js",
    r"zimage_mxfp8/analysis/pages/network\.js",
    r"zimage_mxfp8/analysis/pages/tables\.js",
    r"zimage_mxfp8/comfy/node_package/__init__\.py",
    r"zimage_mxfp8/server/page/index\.html",
    r"zimage_mxfp8/small_model/transformer\.safetensors",
    r"zimage_mxfp8/small_model/vae/.*\.safetensors",
    r"zimage_mxfp8/small_model/tokenizer/tokenizer\.json",
    r"zimage_mxfp8/small_model/examples\.json",
    r"zimage_mxfp8/include/zimage_mxfp8/checkpoint\.h",
    r"zimage_mxfp8/include/zimage_mxfp8/gemm\.h",
    re.escape(LIBRARY),
    r"zimage_mxfp8/lib/cmake/zimage_mxfp8/zimage_mxfp8Config\.cmake",
    r".*\.dist-info/licenses/LICENSE",
    r".*\.dist-info/entry_points\.txt",
)
# The module is the only shared library: nothing of CUDA's is in a wheel.
ALLOWED = (
    rf"{MODULE}|zimage_mxfp8/([a-z_]+/)*[^/]*\.(py|pyi|typed|toml|css|html|js)|"
    r"zimage_mxfp8/small_model/.*|"
    r"zimage_mxfp8/(include|lib)/.*\.(h|a|lib|cmake)|[^/]*\.dist-info/.*"
)
# CUDA's runtime is inside the module; the rest of CUDA is loaded on first use.
SYSTEM = r"lib(stdc\+\+|m|gcc_s|c|pthread|dl|rt)\.so\.\d+|ld-linux-.*"
LARGEST = 100e6  # PyPI's limit in bytes
LARGEST_PLAIN = 25e6  # without CUDA kernels, so that the small model stays small


def output(*command: str) -> str:
    return subprocess.check_output(command, text=True)


def check_names(names: list[str]) -> None:
    for pattern in REQUIRED:
        if not any(re.fullmatch(pattern, name) for name in names):
            sys.exit(f"the wheel lacks {pattern}")
    for name in names:
        if not re.fullmatch(ALLOWED, name) or "__pycache__" in name:
            sys.exit(f"the wheel should not have {name}")


def check_metadata(text: str) -> None:
    """Check that links are absolute: a package page has no files of the repository."""
    links = re.findall(r"\]\(([^)]*)\)", HeaderParser().parsestr(text).get_payload())
    relative = [link for link in links if not re.match(r"https://|#", link)]
    if len(links) < 20 or relative:
        sys.exit(f"the description has {len(links)} links, and relative ones: {relative}")


def check_module(path: Path, fat: bool) -> list[str]:
    """Return the libraries that the module needs."""
    needed = re.findall(r"NEEDED\).*\[(.*)\]", output("readelf", "-d", str(path)))
    foreign = [library for library in needed if not re.fullmatch(SYSTEM, library)]
    symbols = output("nm", "-D", "--defined-only", str(path)).splitlines()
    exported = [line.split()[-1] for line in symbols]
    if foreign or exported != ["PyInit__core"]:
        sys.exit(f"{path.name} needs {foreign} and exports {exported[:5]}")
    content = path.read_bytes()
    if fat != (b"block_scaled" in content):
        sys.exit(f"{path.name} {'lacks' if fat else 'should not have'} the CUDA kernels")
    if str(Path.cwd()).encode() in content:
        sys.exit(f"{path.name} names the folder that it was built in")
    return needed


def check_manylinux(wheel: Path, tags: str, path: Path, version: str) -> None:
    """Check that neither the tag nor the module needs a newer glibc than this version."""
    most = [int(number) for number in version.split(".")]
    asked = re.findall(r"Name: GLIBC_([0-9.]+)", output("readelf", "-V", str(path)))
    newer = [one for one in asked if [int(number) for number in one.split(".")] > most]
    if not asked or newer:
        sys.exit(f"{path.name} needs glibc {newer or asked}, newer than {version}")
    found = re.findall(r"^Tag: .*-manylinux_(\d+)_(\d+)_\w+$", tags, re.MULTILINE)
    named = re.findall(r"manylinux_(\d+)_(\d+)_", wheel.name)
    if not found or sorted(found) != sorted(named) or max([*map(int, x)] for x in found) > most:
        sys.exit(f"{wheel.name} is tagged {found}, and not for glibc {version}")


def check_library(path: Path) -> None:
    """Check that a shared library that links ours does not export our namespace's symbols.

    Templates of the standard library over our types are visible in any case.
    """
    table = output("readelf", "-sW", str(path))
    defined = r" (?:GLOBAL|WEAK|UNIQUE) +(\w+) +\d+ (_Z[A-Z]*?N[KVRO]*12zimage_mxfp8\w+)$"
    ours = re.findall(defined, table, re.MULTILINE)
    visible = sorted({name for visibility, name in ours if visibility != "HIDDEN"})
    if not ours or visible:
        sys.exit(f"{path.name} has {len(ours)} symbols of ours; visible are {visible[:5]}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--manylinux")
    parser.add_argument("wheel", type=Path)
    arguments = parser.parse_args()
    wheel: Path = arguments.wheel
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        check_names(names)
        (info,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
        check_metadata(archive.read(f"{info}/METADATA").decode())
        name = next(name for name in names if re.fullmatch(MODULE, name))
        module = Path(archive.extract(name, folder))
        needed = check_module(module, arguments.cuda)
        if arguments.manylinux:
            tags = archive.read(f"{info}/WHEEL").decode()
            check_manylinux(wheel, tags, module, arguments.manylinux)
        check_library(Path(archive.extract(LIBRARY, folder)))
    size = wheel.stat().st_size
    most = LARGEST if arguments.cuda else LARGEST_PLAIN
    if size > most:
        sys.exit(f"{wheel.name} has {size / 1e6:.0f} MB, more than {most / 1e6:.0f}")
    print(f"{wheel.name}: {len(names)} files, {size / 1e6:.1f} MB, needs {', '.join(needed)}")


if __name__ == "__main__":
    main()
