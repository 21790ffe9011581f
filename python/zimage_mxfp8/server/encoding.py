"""Finished images as files of the formats that clients may ask for."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from ..generation.images import plain_png_bytes, png_bytes

if TYPE_CHECKING:
    from PIL.Image import Image

Format = Literal["png", "webp", "jpeg"]


def encode(
    image: Image, file_format: Format, quality: int, metadata: Mapping[str, Any] | None
) -> bytes:
    """Return the file of an image.

    Args:
        image: the image.
        file_format: its format.
        quality: 0 to 100, of JPEG and WebP.
        metadata: settings that a PNG file records, see `Generation.metadata`; None for none.
    """
    if file_format == "png":
        return plain_png_bytes(image) if metadata is None else png_bytes(image, metadata)
    buffer = io.BytesIO()
    image.save(buffer, file_format.upper(), quality=quality)
    return buffer.getvalue()


def base64_text(content: bytes) -> str:
    """Return bytes as base64."""
    return base64.b64encode(content).decode("ascii")


def data_url(content: bytes, file_format: Format) -> str:
    """Return a URL that holds the file itself."""
    return f"data:image/{file_format};base64,{base64_text(content)}"
