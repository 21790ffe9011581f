"""Entry point of `zimage-mxfp8`, as a process and as a function.

Slow imports come after the handling of Ctrl-C is installed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from . import interrupts


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    try:
        from .command_line import run

        code = run(argv)
        interrupts.finish()
    except BaseException as error:
        if not interrupts.is_interrupt(error):
            raise
        interrupts.finish()  # here, because the exception still blocks others
        from . import streams

        streams.prepare()  # it may have come before `run`
        streams.flush_stdout()
        is_kept = isinstance(error, interrupts.Interrupted)
        outcome = str(error) if is_kept else "no partial output was left"
        streams.report_line(f"error: interrupted; {outcome}")
        return 130
    return code


def program() -> int:
    """Run `zimage-mxfp8` as a process of its own, with its own handling of Ctrl-C."""
    interrupts.install()
    return main()


if __name__ == "__main__":
    sys.exit(program())
