"""What the pipelines of other servers share: a generator, and drawing for clients."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, UsageError
from ..generation.settings import GenerationSettings
from ..server.request_errors import FIELDS, request_error
from ..system.optional_packages import import_part

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..generation.generator import ZImageGenerator

_LOG = logging.getLogger(__name__)
_OPTIONS = ("transformer", "compute", "download")


class ClientError(Exception):
    """A request that cannot be drawn as it is; `str` gives a sentence for the client."""


def load_generator(model_dir: str, dtype: str, options: Mapping[str, Any]) -> ZImageGenerator:
    """Return a generator with all of its parts in memory.

    Args:
        model_dir: the folder or name that the server was given.
        dtype: see `ZImageGenerator`.
        options: its arguments `transformer`, `compute` and `download`.

    Raises:
        UsageError: there is no such option, or as for `ZImageGenerator`.
        MissingExtraError: a package of the extra `generate` is missing.
        CheckpointError, UnsupportedError, CudaError: see `ZImageGenerator`.
    """
    unknown = [name for name in options if name not in _OPTIONS]
    if unknown:
        raise UsageError(unknown[0], "is no option here", f"there are {', '.join(_OPTIONS)}")
    generator = import_part("generation.generator", "drawing with an MXFP8 file")
    made: ZImageGenerator = generator.ZImageGenerator(model_dir, dtype=dtype, **options)
    return made


def checked(values: Mapping[str, Any]) -> GenerationSettings:
    """Return the settings of a request.

    Args:
        values: arguments of `GenerationSettings`.

    Raises:
        ClientError: a value cannot be used.
    """
    try:
        return GenerationSettings(**values)
    except UsageError as error:
        raise _for_client(error) from None


def draw(
    generator: ZImageGenerator,
    values: Mapping[str, Any],
    check: Callable[[], object] = lambda: None,
) -> tuple[Image, ...]:
    """Return the images of a request.

    Args:
        generator: draws them.
        values: arguments of `GenerationSettings`.
        check: called after each step at least; what it raises stops the drawing.

    Raises:
        ClientError: a value of the request, its image or its adapter cannot be used.
        GenerationError, CudaError, UnsupportedError: see `ZImageGenerator.generate`.
    """
    settings = checked(values)
    try:
        made = generator.generate(settings, lambda _: check())
    except UsageError as error:  # of an image
        raise _for_client(error) from None
    except CheckpointError as error:  # not of the model: all of it is in memory
        raise ClientError(str(error)) from None
    for warning in made.warnings:
        _LOG.warning("%s", warning)
    return made.images


def _for_client(error: UsageError) -> ClientError:
    return ClientError(request_error(error, FIELDS).message)
