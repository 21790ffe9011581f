"""The words for bodies of requests that pydantic refuses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..text import plural
from .request_errors import RequestError, invalid

_OBJECT = "must be a JSON object"
# By pydantic's type of error, with its context.
_PROBLEMS = {
    "missing": "is missing",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_parsing_size": "must be a whole number with fewer digits",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be a string",
    "string_unicode": "must be valid Unicode",
    "list_type": "must be a list",
    "dict_type": _OBJECT,
    "model_type": _OBJECT,
    "model_attributes_type": _OBJECT,
    "literal_error": "must be {expected}",
    "greater_than_equal": "must be {ge:g} or more",
    "less_than_equal": "must be {le:g} or less",
}
# Of lengths: the bound, its name in the context, and what is counted.
_LENGTHS = {
    "too_short": ("at least", "min_length", "element"),
    "too_long": ("at most", "max_length", "element"),
    "string_too_short": ("at least", "min_length", "character"),
    "string_too_long": ("at most", "max_length", "character"),
}


def body_error(errors: Sequence[Any]) -> RequestError:
    """Return the error for the most specific of what pydantic found."""
    first = max(errors, key=lambda error: len(error["loc"]))
    where = [part for part in first["loc"] if part != "body"]
    # What cannot be parsed as JSON has the number of a character there.
    if not where or not isinstance(where[0], str) or first["type"] == "json_invalid":
        return RequestError(400, "invalid_value", _about_body(first))
    param, *inside = where
    if not inside:
        return invalid(param, _problem(first))
    # In a field of several types each alternative has an error about the same value, whose place
    # ends with the type.
    others = [error for error in errors if error["loc"][:-1] == first["loc"][:-1]]
    if len(others) > 1 and all(error["input"] is first["input"] for error in others):
        return invalid(param, "has a value of the wrong type")
    part = f"[{inside[-1]}]" if isinstance(inside[-1], int) else f": {inside[-1]}"
    return RequestError(400, "invalid_value", f"{param}{part} {_problem(first)}", param)


def unreadable_body() -> RequestError:
    """Return the error for a body that cannot be decoded as JSON at all."""
    return RequestError(400, "invalid_value", f"the body is not JSON in UTF-8; it {_OBJECT}")


def _problem(error: Any) -> str:
    if length := _LENGTHS.get(error["type"]):
        bound, key, what = length
        return f"must have {bound} {plural(error['ctx'][key], what)}"
    known = _PROBLEMS.get(error["type"])
    if known is None:
        return f"cannot be used: {error['msg']}"
    return known.format(**error.get("ctx", {}))


def _about_body(error: Any) -> str:
    """Return the sentence for a body that cannot be used as a whole."""
    wanted = f"it {_OBJECT}"
    if error["type"] == "json_invalid":
        place = f" at character {error['loc'][-1]}" if isinstance(error["loc"][-1], int) else ""
        return f"the body is not valid JSON{place} ({error['ctx']['error']}); {wanted}"
    if error["type"] == "missing":
        return f"the body is empty; {wanted}"
    if error["type"] in ("dict_type", "model_type", "model_attributes_type"):
        return f"the body cannot be used; {wanted}"
    return f"the body cannot be used: {error['msg']}"
