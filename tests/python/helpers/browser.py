"""A headless Chromium for the tests of pages: screenshots, console messages, the DOM."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

_NAMES = ("chromium", "chromium-browser", "google-chrome")


def find_browser() -> str:
    """The browser's program; skips the test where there is none."""
    for name in _NAMES:
        if program := shutil.which(name):
            return program
    pytest.skip(f"no browser here: none of {', '.join(_NAMES)}")


@dataclass
class Seen:
    """What a browser made of a page.

    Attributes:
        result: what the test's script returned.
        console: messages of the page.
        image: RGB, [height, width, 3].
    """

    result: Any
    console: list[str]
    image: npt.NDArray[np.uint8]


def look_at(
    page: Path, folder: Path, script: str, *, dark: bool = False, height: int = 900
) -> Seen:
    """Open a copy of a page, run a script in it when all is drawn, and take an image.

    `script` is the body of an async function; what it returns must be JSON. The browser finds no
    network: every host name leads nowhere.
    """
    copy, image = folder / "looked-at.html", folder / "image.png"
    driver = (
        "<script>addEventListener('load', async () => {"
        f"const result = await (async () => {{{script}}})();"
        "const holder = document.createElement('template');"
        "holder.id = 'test-result';"
        "holder.setAttribute('data-result', JSON.stringify(result));"
        "document.body.append(holder); });</script></body>"
    )
    content = page.read_text("utf-8")
    head, end, tail = content.rpartition("</body>")
    assert end
    copy.write_text(head + driver + tail, "utf-8")
    command = [
        *(find_browser(), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
        *("--no-first-run", "--disable-dev-shm-usage", "--enable-logging=stderr"),
        *("--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=20000"),
        *(f"--user-data-dir={folder / 'profile'}", f"--window-size=1300,{height}"),
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        *(f"--screenshot={image}", "--dump-dom", copy.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r'id="test-result" data-result="([^"]*)"', done.stdout)
    assert found, done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Seen(json.loads(unescape(found[1])), console, np.array(Image.open(image).convert("RGB")))
