"""A headless Chromium for the tests of pages: one browser, a tab for each look at a page."""

from __future__ import annotations

import base64
import io
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
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


class Browser:
    """Chromium without a network but this machine, driven by its DevTools protocol over two pipes.

    Args:
        folder: for its profile.
    """

    def __init__(self, folder: Path) -> None:
        commands, self._commands = os.pipe()
        self._events, events = os.pipe()
        words = [
            *(find_browser(), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *("--no-first-run", "--disable-dev-shm-usage", "--remote-debugging-pipe"),
            *(
                "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
                f"--user-data-dir={folder / 'profile'}",
            ),
        ]

        # Chromium reads commands from descriptor 3 and writes to 4; a shell moves them there.
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$0" "$@" 3<&{commands} 4>&{events}', *words],
            pass_fds=(commands, events),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(events)
        self._numbers = itertools.count(1)
        self._buffer = b""
        self.messages: list[dict[str, Any]] = []

    def close(self) -> None:
        """End the browser."""
        self.call("Browser.close")
        self._process.wait(30)
        os.close(self._commands)
        os.close(self._events)

    def call(self, method: str, session: str | None = None, **arguments: Any) -> dict[str, Any]:
        """Send a command and return its result; what else arrives meanwhile goes to `messages`."""
        number = next(self._numbers)
        command = {"id": number, "method": method, "params": arguments}
        if session is not None:
            command["sessionId"] = session
        os.write(self._commands, json.dumps(command).encode() + b"\0")
        while True:
            message = self._read()
            if message.get("id") == number:
                assert "error" not in message, message["error"]
                return message["result"]
            self.messages.append(message)

    def wait_for(self, method: str) -> None:
        """Read until an event has arrived since the last look."""
        while not any(message.get("method") == method for message in self.messages):
            self.messages.append(self._read())

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            received = os.read(self._events, 1 << 20)
            assert received, "the browser has ended"
            self._buffer += received
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    @contextmanager
    def open(self, page: Path | str, *, width: int = 1400, dark: bool = False) -> Iterator[Tab]:
        """Open a file or an address in a tab of its own, with a viewport 900 pixels high."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = Tab(self, session)
        try:
            scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
            tab.call("Emulation.setEmulatedMedia", features=[scheme])
            tab.call(
                "Emulation.setDeviceMetricsOverride",
                width=width,
                height=900,
                deviceScaleFactor=1,
                mobile=width < 600,
            )
            for domain in ("Page", "Runtime", "Network", "Log"):
                tab.call(f"{domain}.enable")
            self.messages.clear()
            tab.call("Page.navigate", url=page.as_uri() if isinstance(page, Path) else page)
            self.wait_for("Page.loadEventFired")
            yield tab
        finally:
            self.call("Target.closeTarget", targetId=target)


class Tab:
    """An open page."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser = browser
        self._session = session

    def call(self, method: str, **arguments: Any) -> dict[str, Any]:
        """Send a command to the tab."""
        return self._browser.call(method, self._session, **arguments)

    def run(self, script: str) -> Any:
        """Return what the body of an async function returns, which must be JSON."""
        result = self.call(
            "Runtime.evaluate",
            expression=f"(async () => {{{script}}})()",
            awaitPromise=True,
            returnByValue=True,
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def image(self) -> npt.NDArray[np.uint8]:
        """Return the whole page as RGB, [height, width, 3]."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        data = self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)["data"]
        return np.array(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))

    def console(self) -> list[str]:
        """Return errors and messages of the page's scripts since it was opened."""
        methods = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [json.dumps(m) for m in self._browser.messages if m.get("method") in methods]

    def requests(self) -> list[str]:
        """Return the addresses that were asked for, the page's own among them."""
        return [
            m["params"]["request"]["url"]
            for m in self._browser.messages
            if m.get("method") == "Network.requestWillBeSent"
        ]
