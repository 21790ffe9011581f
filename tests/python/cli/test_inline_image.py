"""Images in terminals that can show them: the protocols' bytes, and silence elsewhere."""

from __future__ import annotations

import base64
import contextlib
import io
import re

import pytest

from zimage_mxfp8.cli.inline_image import show

PNG = b"\x89PNG" + bytes(range(256)) * 40


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TMUX", "STY", "KITTY_WINDOW_ID", "TERM_PROGRAM", "TERM"):
        monkeypatch.delenv(name, raising=False)


def printed(screen: io.StringIO) -> str:
    with contextlib.redirect_stdout(screen):
        show(PNG)
    return screen.getvalue()


@pytest.mark.parametrize(
    "variable", [("KITTY_WINDOW_ID", "1"), ("TERM_PROGRAM", "ghostty"), ("TERM", "xterm-kitty")]
)
def test_kitty(variable: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(*variable)
    parts = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", printed(Terminal()))
    keys = [dict(key.split("=") for key in part[0].split(",")) for part in parts]
    assert keys[0] == {"a": "T", "f": "100", "m": "1"}
    assert [key["m"] for key in keys] == ["1"] * (len(keys) - 1) + ["0"]
    assert all(len(text) <= 4096 for _, text in parts)
    assert base64.b64decode("".join(text for _, text in parts)) == PNG


@pytest.mark.parametrize("program", ["iTerm.app", "WezTerm"])
def test_iterm(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM_PROGRAM", program)
    pattern = r"\x1b\]1337;File=inline=1;size=(\d+):(.*)\x07\n"
    found = re.fullmatch(pattern, printed(Terminal()))
    assert found and int(found[1]) == len(PNG) and base64.b64decode(found[2]) == PNG


@pytest.mark.parametrize("names", [(), ("TMUX", "KITTY_WINDOW_ID"), ("STY", "KITTY_WINDOW_ID")])
def test_nothing_where_it_would_not_show(
    names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in names:
        monkeypatch.setenv(name, "1")
    assert printed(Terminal()) == ""


def test_nothing_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KITTY_WINDOW_ID", "1")
    assert printed(io.StringIO()) == ""
