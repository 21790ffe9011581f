"""A stand-in for NVIDIA's driver library, compiled when a test needs it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = r"""
#include <stddef.h>
#include <string.h>
static int ready;
int cuDriverGetVersion(int *version) { *version = 12080; return 0; }
int cuInit(unsigned flags) { ready = 1; return flags ? 1 : INIT; }
int cuDeviceGetCount(int *count) { *count = 2; return ready ? 0 : 3; }
int cuDeviceGet(int *device, int index) { *device = 10 + index; return 0; }
int cuDeviceGetName(char *name, int size, int device) {
  strncpy(name, device == 10 ? "Fake RTX 4090" : "Fake RTX 5090", (size_t)size);
  return 0;
}
int cuDeviceTotalMem_v2(size_t *bytes, int device) {
  *bytes = (size_t)(device == 10 ? 24 : 32) << 30;
  return 0;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  if (attribute == 75) *value = device == 10 ? 8 : 12;
  else if (attribute == 76) *value = device == 10 ? 9 : 0;
  else return 1;
  return 0;
}
"""


def make_driver(folder: Path, source: str = SOURCE, init: int = 0) -> dict[str, str]:
    """Compile the library; the environment in which programs find it."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs Linux and a C compiler")
    (folder / "driver.c").write_text(source)
    command = [compiler, "-shared", "-fPIC", f"-DINIT={init}", "-o", "libcuda.so.1", "driver.c"]
    subprocess.run(command, cwd=folder, check=True)
    return {"LD_LIBRARY_PATH": str(folder)}
