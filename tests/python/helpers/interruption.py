"""Programs that press Ctrl-C on themselves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SENTENCE = "zimage-mxfp8: error: interrupted; no partial output was left\n"


# Before each program: `press` is Ctrl-C, `on_import` has something done while a module is imported.
PREAMBLE = """
import atexit, runpy, signal, sys

signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests may run in the background

def press():
    signal.raise_signal(signal.SIGINT)

class OnImport:
    def __init__(self, name, act):
        self.name, self.act = name, act
    def find_spec(self, name, path, target=None):
        if name == self.name:
            sys.meta_path.remove(self)
            self.act()

def on_import(name, act):
    sys.modules.pop(name, None)
    sys.meta_path.insert(0, OnImport(name, act))

def start(*arguments):
    sys.argv[1:] = arguments
    runpy.run_module("zimage_mxfp8.cli.main", run_name="__main__")
"""


def run(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PREAMBLE + program],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "TMPDIR": str(folder)},
        timeout=120,
    )


def interrupted(result: subprocess.CompletedProcess[str]) -> None:
    assert (result.returncode, result.stderr) == (130, SENTENCE)
