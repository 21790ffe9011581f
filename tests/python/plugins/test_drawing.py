"""What the pipelines of other servers share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import zimage_mxfp8 as zm
from zimage_mxfp8.plugins.drawing import ClientError, draw, load_generator


class Generator:
    """Reports one step, and then fails or gives its images."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.failure = failure

    def generate(self, settings: zm.GenerationSettings, progress: Callable[[Any], object]) -> Any:
        progress(None)
        if self.failure is not None:
            raise self.failure
        return SimpleNamespace(images=(settings.seed,), warnings=("a note",))


def test_images_and_their_warnings(caplog: pytest.LogCaptureFixture) -> None:
    assert draw(Generator(), {"prompt": "a", "seed": 3}) == (3,)
    assert caplog.messages == ["a note"]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"steps": 0}, "num_inference_steps must be 1 to 1000, not 0"),
        ({"width": 72}, "size must be a multiple of 16 up to 8192, not 72"),
        (
            {"negative_prompt": "b"},
            "negative_prompt has no effect without guidance; add guidance_scale or drop it",
        ),
    ],
)
def test_values_are_named_as_in_requests(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ClientError, match=f"^{sentence}$"):
        draw(Generator(), {"prompt": "a", **values})


@pytest.mark.parametrize(
    "failure",
    [zm.CheckpointError("the file is no adapter"), zm.UsageError("mask_image", "is too small")],
)
def test_images_and_adapters_are_of_the_client(failure: zm.Error) -> None:
    with pytest.raises(ClientError) as caught:
        draw(Generator(failure), {"prompt": "a"})
    assert str(caught.value) == str(failure)


def test_other_failures_are_not() -> None:
    with pytest.raises(zm.GenerationError):
        draw(Generator(zm.GenerationError("NaN", 1)), {"prompt": "a"})


def test_the_check_stops_a_drawing() -> None:
    def check() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(Generator(), {"prompt": "a"}, check)


def test_unknown_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(zm.UsageError, match="offload is no option here"):
        load_generator(str(tmp_path), "float32", {"offload": True})
