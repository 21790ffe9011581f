"""Errors of requests: their status, their code, and the words for clients.

Clients see no traceback and no path of this machine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..errors import (
    CudaError,
    Error,
    GenerationError,
    UnsupportedError,
    UsageError,
)
from ..text import printable
from .engine import EngineLostError
from .jobs import DeadlineError, QueueFullError, StoppedError, StoppingError

JSON_TYPE = "application/json"

# The fields of requests for arguments of `GenerationSettings`, in OpenAI's API and its like.
FIELDS = {
    "batch": "n",
    "guidance": "guidance_scale",
    "height": "size",
    "init_image": "image",
    "loras": "lora",
    "steps": "num_inference_steps",
    "width": "size",
}
_ARGUMENT = re.compile(r"`(\w+)(?:=([^`]*))?`")  # in hints, see `Error`
# OpenAI's client repeats failed requests by itself, unless it is told not to.
_NO_RETRY = {"x-should-retry": "false"}
_CODES = {401: "invalid_api_key", 404: "not_found", 405: "method_not_allowed"}
_RETRY_AFTER_LOSS = "5"  # seconds until another server or process may have taken over


class RequestError(Exception):
    """A request that is not answered with images.

    Attributes:
        status: of HTTP.
        code: for programs.
        message: a sentence for people.
        param: the field that is at fault; None if it is none in particular.
        headers: more headers of the response.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = printable(message)
        self.param = param
        self.headers = dict(headers or {})


class ClientGoneError(Exception):
    """The client has closed its connection: there is nobody to answer."""


def invalid(param: str, problem: str) -> RequestError:
    """Return the error for a field; the sentence is its name and the problem."""
    return RequestError(400, "invalid_value", f"{param} {problem}", param)


def media_type(content_type: str) -> str:
    """Return the media type of a header Content-Type, without parameters, in lower case."""
    return content_type.partition(";")[0].strip().lower()


def is_json(content_type: str) -> bool:
    """Return whether a header Content-Type names JSON or a type built on it (RFC 6839)."""
    given = media_type(content_type)
    return given == JSON_TYPE or (given.startswith("application/") and given.endswith("+json"))


def check_content_type(http: Request, *accepted: str) -> None:
    """Check what a request says its body is.

    Args:
        http: the request.
        accepted: media types; the first is advised. JSON includes types that are built on it, such
            as application/vnd.api+json.

    Raises:
        RequestError: it says nothing, or something else.
    """
    header = http.headers.get("content-type", "")
    given = media_type(header)
    if given in accepted or (JSON_TYPE in accepted and is_json(header)):
        return
    said = f'is "{given[:80]}"' if given else "is not given"
    raise RequestError(
        415,
        "unsupported_media_type",
        f"the type of the body {said}; send it with the header Content-Type: {accepted[0]}",
    )


def request_error(error: Exception, fields: Mapping[str, str] | None = None) -> RequestError:
    """Return what a client is told of an error.

    Args:
        error: any error.
        fields: the request's field for each argument of `GenerationSettings`, where it differs.
    """
    if isinstance(error, RequestError):
        return error
    if isinstance(error, HTTPException):
        code = _CODES.get(error.status_code, "bad_request")
        return RequestError(error.status_code, code, str(error.detail), headers=error.headers)
    if isinstance(error, UsageError):
        return _of_usage(error, fields or {})
    if isinstance(error, QueueFullError):
        return RequestError(
            429,
            "queue_full",
            "too many requests wait; try again later",
            headers={"Retry-After": str(error.retry_after)},
        )
    if isinstance(error, StoppingError):
        return RequestError(
            503,
            "stopping",
            "the server is stopping; try again later",
            headers={"Retry-After": _RETRY_AFTER_LOSS},
        )
    if isinstance(error, EngineLostError):
        return RequestError(
            503,
            "engine_lost",
            "the machine or process that drew this is gone; try again later",
            headers={"Retry-After": _RETRY_AFTER_LOSS},
        )
    if isinstance(error, StoppedError):
        return RequestError(409, "interrupted", "the drawing was interrupted", headers=_NO_RETRY)
    if isinstance(error, DeadlineError):
        return RequestError(
            504,
            "timeout",
            f"the drawing was not finished within {error.seconds:g} s; ask for fewer steps, "
            "a smaller size or fewer images",
            headers=_NO_RETRY,
        )
    if isinstance(error, GenerationError):
        return RequestError(500, "not_finite", error.problem, headers=_NO_RETRY)
    if isinstance(error, (CudaError, UnsupportedError, MemoryError)):
        return RequestError(
            500,
            "out_of_memory",
            "the server has too little memory for this request; ask for a smaller size or fewer "
            "images",
            headers=_NO_RETRY,
        )
    return RequestError(
        500,
        "internal_error",
        "the server failed; its log has the reason, by the x-request-id of this response",
        headers=_NO_RETRY,
    )


def response(error: RequestError, path: str) -> Response:
    """Return the response to a request of a path, in the shape of its API."""
    if path.startswith("/sdapi/"):
        content: dict[str, Any] = {"error": error.code, "detail": error.message, "errors": ""}
    else:
        content = {"error": body(error)}
    return JSONResponse(content, error.status, error.headers)


def body(error: RequestError) -> dict[str, Any]:
    """Return OpenAI's description of an error."""
    if error.status == 429:
        kind = "rate_limit_error"
    else:
        kind = "invalid_request_error" if error.status < 500 else "server_error"
    return {"message": error.message, "type": kind, "param": error.param, "code": error.code}


def _of_usage(error: UsageError, fields: Mapping[str, str]) -> RequestError:
    param = fields.get(error.argument, error.argument)
    return RequestError(400, "invalid_value", f"{param} {_sentence(error, fields)}", param)


def _sentence(error: Error, fields: Mapping[str, str]) -> str:
    """Word an error with the fields of a request in place of arguments."""

    def named(match: re.Match[str]) -> str:
        name, value = match.groups()
        field = fields.get(name, name)
        return field if value is None else f"{field}={value}"

    hint = f"; {_ARGUMENT.sub(named, error.hint)}" if error.hint else ""
    return f"{error.problem}{hint}"
