"""The options of a server."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UsageError

API_KEY_VARIABLE = "ZIMAGE_MXFP8_API_KEY"  # of the environment
DEFAULT_QUEUE = 16
DEFAULT_TIMEOUT = 300.0
DEFAULT_MAX_IMAGE_PIXELS = 2048 * 2048
DEFAULT_MAX_REQUEST_PIXELS = 10 * 1024 * 1024  # ten images of the default size
DEFAULT_MAX_BODY_BYTES = 64 << 20


@dataclass(frozen=True)
class ServerOptions:
    """Limits and secrets of a server.

    Attributes:
        api_key: what clients must send; None: nothing, and only programs of this machine may ask.
        queue: requests that may wait behind those that are drawn.
        timeout: seconds for waiting and drawing, of each request.
        max_image_pixels: most pixels of an image that is drawn; images that are sent may have four
            times as many.
        max_request_pixels: most pixels of all images of a request together.
        max_body_bytes: most bytes of a request.
        transfer_timeout: seconds for a request to arrive, and for each piece of a response to
            leave.
        lora_dir: folder of the adapters that clients may name; None: there are none.

    Raises:
        UsageError: the key cannot be sent in a header.
    """

    api_key: str | None = field(default=None, repr=False)
    queue: int = DEFAULT_QUEUE
    timeout: float = DEFAULT_TIMEOUT
    max_image_pixels: int = DEFAULT_MAX_IMAGE_PIXELS
    max_request_pixels: int = DEFAULT_MAX_REQUEST_PIXELS
    max_body_bytes: int = DEFAULT_MAX_BODY_BYTES
    transfer_timeout: float = 60.0
    lora_dir: Path | None = None

    def __post_init__(self) -> None:
        key = self.api_key
        if key is not None and not (
            key.isascii() and key.isprintable() and key.strip(" ") == key != ""
        ):
            raise UsageError(
                "api_key",
                f"(or {API_KEY_VARIABLE}) must be printable ASCII characters, without spaces "
                "around them",
            )

    @property
    def max_sent_pixels(self) -> int:
        """Most pixels of an image that a client sends."""
        return 4 * self.max_image_pixels


def is_loopback(host: str) -> bool:
    """Return whether a host's name or address is that of this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
