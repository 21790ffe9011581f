"""What the package says of its dependencies."""

from __future__ import annotations

import re
from importlib.metadata import metadata, requires
from pathlib import Path

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"


def requirements(extra: str) -> list[str]:
    """An extra's requirements, without the condition that they are the extra's."""
    lines = [line for line in requires("zimage-mxfp8") or () if f'extra == "{extra}"' in line]
    return [line.partition(";")[0].strip() for line in lines]


def name_of(requirement: str) -> str:
    return re.match(r"[\w-]+", requirement)[0].lower().replace("_", "-")


def test_all_is_every_extra_for_users() -> None:
    extras = set(metadata("zimage-mxfp8").get_all("Provides-Extra"))
    (everything,) = requirements("all")
    included = re.fullmatch(r"zimage-mxfp8\[(.*)\]", everything)[1].split(",")
    assert set(included) == extras - {"all", "dev", "docs", "ray", "test"}  # Ray is large


def test_the_tests_have_pinned_versions() -> None:
    lines = [line for line in CONSTRAINTS.read_text("utf-8").splitlines() if "==" in line]
    pinned = {name_of(line) for line in lines}
    needed = {
        name_of(requirement)
        for extra in metadata("zimage-mxfp8").get_all("Provides-Extra")
        for requirement in requirements(extra)
        if "==" not in requirement
    }
    assert needed - {"zimage-mxfp8"} <= pinned
