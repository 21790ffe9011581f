"""Check what a wheel holds: everything it needs and nothing else.

python .ci/check_wheel.py [--cuda] WHEEL
"""

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

wheel, fat = Path(sys.argv[-1]), "--cuda" in sys.argv
archive = zipfile.ZipFile(wheel)
names = archive.namelist()
required = [
    r"zimage_mxfp8/_core\..*\.(so|pyd)",
    r"zimage_mxfp8/_core\.pyi",
    r"zimage_mxfp8/py\.typed",
    r"zimage_mxfp8/recipes/uniform\.toml",
    r"zimage_mxfp8/analysis/page\.css",
    r"zimage_mxfp8/analysis/page\.js",
    r"zimage_mxfp8/include/zimage_mxfp8/gemm\.h",
    r"zimage_mxfp8/lib/libzimage_mxfp8\.a",
    r"zimage_mxfp8/lib/cmake/zimage_mxfp8/zimage_mxfp8Config\.cmake",
    r".*\.dist-info/licenses/LICENSE",
    r".*\.dist-info/entry_points\.txt",
]
allowed = (
    r"zimage_mxfp8/([a-z_]+/)*[^/]*\.(py|pyi|typed|toml|css|js|so|pyd)|"
    r"zimage_mxfp8/(include|lib)/.*\.(h|a|lib|cmake)|[^/]*\.dist-info/.*"
)
for pattern in required:
    if not any(re.fullmatch(pattern, name) for name in names):
        sys.exit(f"{wheel.name} lacks {pattern}")
for name in names:
    if not re.fullmatch(allowed, name) or "__pycache__" in name:
        sys.exit(f"{wheel.name} should not have {name}")

# The module may need the system's libraries only: CUDA's runtime is inside, the rest of CUDA is
# looked for when it is used.
module = next(name for name in names if re.fullmatch(required[0], name))
with tempfile.TemporaryDirectory() as folder:
    path = archive.extract(module, folder)
    dynamic = subprocess.check_output(["readelf", "-d", path], text=True)
    symbols = subprocess.check_output(["nm", "-D", "--defined-only", path], text=True)
    needed = re.findall(r"NEEDED\).*\[(.*)\]", dynamic)
    system = r"lib(stdc\+\+|m|gcc_s|c|pthread|dl|rt)\.so\.\d+|ld-linux-.*"
    foreign = [library for library in needed if not re.fullmatch(system, library)]
    exported = [line.split()[-1] for line in symbols.splitlines()]
    strangers = [name for name in exported if name != "PyInit__core"]
    if foreign or "PyInit__core" not in exported or strangers:
        sys.exit(f"{module} needs {foreign} and exports {strangers[:5]}")
    text = Path(path).read_bytes()
    if fat != (b"block_scaled" in text):
        sys.exit(f"{module} {'lacks' if fat else 'should not have'} the CUDA kernels")
    if str(Path.cwd()).encode() in text:
        sys.exit(f"{module} names the folder that it was built in")

    # A shared library that links ours shall not export it: all that the archive defines in our
    # namespace is hidden. (Templates of the standard library over our types are visible anyway.)
    library = "zimage_mxfp8/lib/libzimage_mxfp8.a"
    table = subprocess.check_output(["readelf", "-sW", archive.extract(library, folder)], text=True)
    defined = r" (?:GLOBAL|WEAK|UNIQUE) +(\w+) +\d+ (_Z[A-Z]*?N[KVRO]*12zimage_mxfp8\w+)$"
    ours = re.findall(defined, table, re.MULTILINE)
    visible = sorted({name for visibility, name in ours if visibility != "HIDDEN"})
    if not ours or visible:
        sys.exit(f"{library} has {len(ours)} symbols of ours; visible are {visible[:5]}")
size = wheel.stat().st_size / 1024
print(f"{wheel.name}: {len(names)} files, {size:.0f} KiB, {module} needs {', '.join(needed)}")
