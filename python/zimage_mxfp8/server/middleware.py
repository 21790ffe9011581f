"""What surrounds every request: its log line and errors, who may ask, and how much."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import time
import traceback
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import request_errors
from .jobs import without_frames
from .metrics import Metrics
from .options import is_loopback
from .request_errors import ClientGoneError, RequestError, is_json, request_error
from .request_log import LogWriter

_OPEN = ("/", "/healthz", "/readyz")  # to everyone: they tell nothing, and draw nothing
_CLIENT_GONE = 499  # in the log, as nginx has it
_RETRY_AFTER_UPLOADS = "5"  # seconds
_MAX_DETAIL = 4000  # characters of a traceback in the log
_MAX_METHOD = 16  # characters in the log
_MAX_BODIES = 16  # of the largest size that are in memory at a time
_SMALL_PART = 64  # of the largest size: smaller bodies are not refused for what others hold
_MAX_VALUES = 100_000  # of JSON: while it is parsed, nothing else is answered
_BEFORE_VALUES = (b",", b"[", b"{")  # an upper bound: strings may have them too


@dataclass
class Notes:
    """What a request's log line says besides the usual.

    Attributes:
        request_id: also in the response's header x-request-id.
        fields: added by those who answer.
    """

    request_id: str = field(default_factory=lambda: uuid.uuid4().hex[:16])
    fields: dict[str, Any] = field(default_factory=dict)


def notes_of(scope: Scope) -> Notes:
    """Return a request's notes."""
    notes: Notes = scope["state"]["notes"]
    return notes


class _Layer:
    """A layer around an application, which passes on what is not HTTP: the server's start and end.

    Args:
        app: the layers inside.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        answer = self._answer if scope["type"] == "http" else self._app
        await answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise NotImplementedError


class Boundary(_Layer):
    """The outermost layer: answers errors of all kinds, and writes the log.

    The rest of a refused request is read, within the limits of requests: if the server closed the
    connection before, the client could lose the answer.

    Args:
        app: the layers inside.
        log: gets a line per request.
        metrics: counts errors.
        max_bytes: of a body.
        seconds: for a body.
    """

    def __init__(
        self, app: ASGIApp, log: LogWriter, metrics: Metrics, max_bytes: int, seconds: float
    ) -> None:
        super().__init__(app)
        self._log = log
        self._metrics = metrics
        self._max_bytes = max_bytes
        self._seconds = seconds

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        notes = Notes()
        scope.setdefault("state", {})["notes"] = notes
        begin, status = time.monotonic(), 0
        body = _Body(receive)

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = notes.request_id
                if status >= 400 and scope["method"] == "POST":
                    headers["connection"] = "close"  # or what is left of the body would be read
            await send(message)

        try:
            await self._app(scope, body.receive, noting)
        except ClientGoneError as error:
            status = _CLIENT_GONE
            without_frames(error)  # or the body stays until garbage is collected
        except Exception as error:
            known = request_error(error)
            if known.code == "internal_error" and known is not error:
                # The queue has logged failed drawings, whose errors are requests' errors by now.
                detail = "".join(traceback.format_exception(error))
                self._metrics.failed(detail[-_MAX_DETAIL:], notes.request_id)
            notes.fields["error"] = known.code
            if not status:
                answer = request_errors.response(known, scope["path"])
                left = begin + self._seconds - time.monotonic()

                async def reading_the_rest(message: Message) -> None:
                    if message["type"] == "http.response.start" or body.is_complete:
                        await noting(message)
                        return
                    await noting({**message, "more_body": True})
                    await body.drain(self._max_bytes, left)
                    await noting({"type": "http.response.body", "body": b""})

                await answer(scope, receive, reading_the_rest)
            without_frames(error)
        if "error" in notes.fields:
            self._metrics.refused(notes.fields["error"])
        self._log.write(
            {
                "id": notes.request_id,
                "method": scope["method"][:_MAX_METHOD],
                "route": _route(scope),
                "status": status,
                "seconds": round(time.monotonic() - begin, 3),
                **notes.fields,
            }
        )


class _Body:
    """The body of a request while it comes in.

    Attributes:
        is_complete: whether nothing more of it can come.
    """

    def __init__(self, receive: Receive) -> None:
        self.is_complete = False
        self._receive = receive
        self._count = 0

    async def receive(self) -> Message:
        """Return the next message."""
        message = await self._receive()
        self._count += len(message.get("body", b""))
        self.is_complete = not message.get("more_body", False)
        return message

    async def drain(self, max_bytes: int, seconds: float) -> None:
        """Read what is left, up to a number of bytes of the whole body and for some seconds."""

        async def read() -> None:
            while not self.is_complete and self._count <= max_bytes:
                await self.receive()

        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(read(), max(0.0, seconds))


class Access(_Layer):
    """Lets a request in: by the API key, or without one only programs and pages of this machine.

    The key comes as `Authorization: Bearer KEY`, or as the password of `Authorization: Basic`.
    Without a key, requests that a web page of another origin makes are refused, and so are those
    whose Host is not this machine's: both are how foreign pages reach a server on loopback.

    Args:
        app: the layers inside.
        api_key: the key; None for none.
    """

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        super().__init__(app)
        self._key = None if api_key is None else api_key.encode()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] not in _OPEN:
            headers = Headers(scope=scope)
            if self._key is None:
                _check_origin(headers)
            elif not self._fits(headers.get("authorization", "")):
                raise RequestError(
                    401,
                    "invalid_api_key",
                    "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        await self._app(scope, receive, send)

    def _fits(self, authorization: str) -> bool:
        assert self._key is not None
        scheme, _, given = authorization.strip().partition(" ")
        secret = given.strip().encode("latin-1", "replace")
        if scheme.lower() == "basic":
            try:
                secret = base64.b64decode(secret, validate=True)
            except binascii.Error:
                return False
            secret = secret.partition(b":")[2]
        elif scheme.lower() != "bearer":
            return False
        return hmac.compare_digest(secret, self._key)


class Limits(_Layer):
    """Bounds a request's body in bytes, values and time, and the time that a client takes to read.

    All bodies together are bounded too: each stays in memory until its request is answered.

    Args:
        app: the layers inside.
        max_bytes: of a body, which are counted while they come in; all may have 16 times as many.
        seconds: for the whole body, and for each piece of the response.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, seconds: float) -> None:
        super().__init__(app)
        self._max_bytes = max_bytes
        self._seconds = seconds
        self._held = 0  # bytes of all bodies

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self._max_bytes:
            raise _too_large("the request", self._max_bytes, "bytes")
        content_type = headers.get("content-type", "")
        has_values = not content_type or is_json(content_type)  # older FastAPI parses it anyway
        deadline = time.monotonic() + self._seconds
        count, values, is_complete = 0, 0, False
        breach: RequestError | ClientGoneError | None = None

        async def bounded_receive() -> Message:
            nonlocal count, values, is_complete, breach
            if is_complete:  # from now on only the end of the connection can come
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, deadline - time.monotonic()))
            except asyncio.TimeoutError:
                breach = RequestError(408, "timeout", "the request did not arrive in time")
                raise breach from None
            if message["type"] == "http.disconnect":
                breach = ClientGoneError()
                raise breach
            body = message.get("body", b"")
            count += len(body)
            self._held += len(body)
            if has_values:
                values += sum(map(body.count, _BEFORE_VALUES))
            is_complete = not message.get("more_body", False)
            if count > self._max_bytes:
                breach = _too_large("the request", self._max_bytes, "bytes")
                raise breach
            if values > _MAX_VALUES:
                breach = _too_large("the JSON", _MAX_VALUES, "commas and brackets")
                raise breach
            is_small = count <= self._max_bytes // _SMALL_PART
            if self._held > _MAX_BODIES * self._max_bytes and not is_small:
                breach = RequestError(
                    503,
                    "too_many_uploads",
                    "too many large requests at a time; try again later",
                    headers={"Retry-After": _RETRY_AFTER_UPLOADS},
                )
                raise breach
            return message

        async def bounded_send(message: Message) -> None:
            try:
                await asyncio.wait_for(send(message), self._seconds)
            except asyncio.TimeoutError:
                raise ClientGoneError from None

        try:
            await self._app(scope, bounded_receive, bounded_send)
        except Exception as error:
            if breach is not None:  # parsers turn it into an error of their own
                without_frames(error)
                raise breach from None
            raise
        finally:
            self._held -= count
            breach = None  # its traceback refers to this frame, and so to the body


def _too_large(what: str, limit: int, units: str) -> RequestError:
    return RequestError(413, "request_too_large", f"{what} has more than {limit:,} {units}")


def _check_origin(headers: Headers) -> None:
    host = _host(f"//{headers.get('host', '')}")
    if not is_loopback(host[0]):
        raise RequestError(
            403,
            "foreign_host",
            "without an API key the server answers to localhost and addresses like 127.0.0.1 only",
        )
    origin = headers.get("origin")
    if origin is not None and _host(origin) != host:
        raise RequestError(
            403, "foreign_origin", "without an API key other web pages may not use the server"
        )


def _host(address: str) -> tuple[str, int | None]:
    """Return the host and the port of an address."""
    try:
        parts = urlsplit(address)
        return (parts.hostname or "").lower(), parts.port
    except ValueError:
        return "", None


def _route(scope: Scope) -> str:
    """Return the path if it is one of the server's: others could hold anything."""
    route = scope.get("route")
    return str(getattr(route, "path", "other"))
