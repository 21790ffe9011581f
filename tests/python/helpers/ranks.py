"""For the tests of transformers on several devices."""

from __future__ import annotations

import zimage_mxfp8 as zm


def pids(model: zm.ZImageTransformer) -> list[int]:
    """The processes of all ranks but the first."""
    assert model._other_ranks is not None
    return [process.program.pid for process in model._other_ranks._parts.processes]
