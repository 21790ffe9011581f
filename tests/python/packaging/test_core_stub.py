"""The committed types of the compiled module are those that it has."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[3] / ".ci/core_stub.py"


def test_the_stub_is_the_generated_one() -> None:
    checked = subprocess.run(
        [sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stderr
