"""Check what a wheel holds: everything it needs and nothing else."""

import re
import sys
import zipfile
from pathlib import Path

wheel = Path(sys.argv[1])
names = zipfile.ZipFile(wheel).namelist()
required = [
    r"zimage_mxfp8/_core\..*\.(so|pyd)",
    r"zimage_mxfp8/_core\.pyi",
    r"zimage_mxfp8/py\.typed",
    r"zimage_mxfp8/recipes/uniform\.toml",
    r".*\.dist-info/licenses/LICENSE",
    r".*\.dist-info/entry_points\.txt",
]
allowed = r"zimage_mxfp8/.*\.(py|pyi|typed|toml|so|pyd)|[^/]*\.dist-info/.*"
for pattern in required:
    if not any(re.fullmatch(pattern, name) for name in names):
        sys.exit(f"{wheel.name} lacks {pattern}")
for name in names:
    if not re.fullmatch(allowed, name) or "__pycache__" in name:
        sys.exit(f"{wheel.name} should not have {name}")
print(f"{wheel.name}: {len(names)} files, {wheel.stat().st_size / 1024:.0f} KiB")
