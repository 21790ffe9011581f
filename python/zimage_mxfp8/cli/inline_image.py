"""Pictures inside a terminal, where it can show them.

Protocols: Kitty's graphics protocol (kitty, Ghostty) and iTerm2's inline images (iTerm2,
WezTerm).
"""

from __future__ import annotations

import base64
import os
import sys

_CHUNK = 4096  # characters of Kitty's protocol


def show(png: bytes) -> None:
    """Print a PNG file if stdout is a terminal that is known to show it.

    Nothing inside tmux and screen: they pass on the terminal's variables, but not the image.
    """
    if not sys.stdout.isatty() or "TMUX" in os.environ or "STY" in os.environ:
        return
    program, term = os.environ.get("TERM_PROGRAM", ""), os.environ.get("TERM", "")
    text = base64.b64encode(png).decode()
    if "KITTY_WINDOW_ID" in os.environ or program == "ghostty" or "kitty" in term:
        chunks = [text[i : i + _CHUNK] for i in range(0, len(text), _CHUNK)]
        for i, chunk in enumerate(chunks):
            keys = "a=T,f=100," if i == 0 else ""
            sys.stdout.write(f"\x1b_G{keys}m={int(i < len(chunks) - 1)};{chunk}\x1b\\")
        print()
    elif program in ("iTerm.app", "WezTerm"):
        print(f"\x1b]1337;File=inline=1;size={len(png)}:{text}\a")
