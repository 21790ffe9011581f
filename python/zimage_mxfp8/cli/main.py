"""Entry point of `zimage-mxfp8`, as a process and as a function.

Nothing that takes time is imported before Ctrl-C is looked after.
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
        interrupts.finish()  # here, where the exception still keeps others away
        from . import streams

        streams.prepare()  # it may have come before `run`
        streams.flush_stdout()
        is_kept = isinstance(error, interrupts.Interrupted)
        outcome = str(error) if is_kept else "no partial output was left"
        streams.report_line(f"error: interrupted; {outcome}")
        return 130
    return code


def program() -> int:
    """`zimage-mxfp8` as a process of its own, whose Ctrl-C is ours to handle."""
    interrupts.install()
    return main()


if __name__ == "__main__":
    sys.exit(program())
