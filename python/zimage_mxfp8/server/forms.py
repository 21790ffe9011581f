"""Fields and files of forms (multipart/form-data)."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request

from .request_errors import RequestError, invalid

_LORA_PART = re.compile(r"lora\[(\w+)\]")
_CHARSETS = (b"", b"utf-8", b"utf8", b"us-ascii")  # Python's codecs for others can take minutes
_MAX_JSON = 16_384  # characters: while JSON is parsed, nothing else is answered


@asynccontextmanager
async def received_form(http: Request, max_files: int, max_fields: int) -> AsyncIterator[FormData]:
    """Yield the form that a request sends; its files are closed with the block.

    Raises:
        RequestError: it names another charset than UTF-8.
        HTTPException: of starlette, for other forms that cannot be read.
    """
    _, options = parse_options_header(http.headers.get("content-type", ""))
    if options.get(b"charset", b"").lower() not in _CHARSETS:
        raise RequestError(400, "invalid_value", "the form's charset must be UTF-8")
    async with http.form(max_files=max_files, max_fields=max_fields) as form:
        yield form


def text_fields(form: FormData) -> dict[str, Any]:
    """Return the fields of a form that are not files and not empty.

    `lora` becomes a list of names and of objects. Clients write it in several ways: as one text,
    which may be JSON; as a field `lora` or `lora[]` for each name; an object as `lora[name]` and
    `lora[scale]`.

    Raises:
        RequestError: `lora` is too long, or leaves open which scale has which name.
    """
    texts = [(name, text) for name, text in form.multi_items() if isinstance(text, str) and text]
    fields: dict[str, Any] = dict(texts)
    loras: list[Any] = []
    parts: dict[str, str] = {}
    for name, text in texts:
        if name in ("lora", "lora[]"):
            value = _parsed(text)
            loras += value if isinstance(value, list) else [value]
        elif part := _LORA_PART.fullmatch(name):
            parts[part[1]] = text
        elif name.startswith("lora["):
            # A list of objects: openai-python sends all names before all scales, and LiteLLM
            # only one of the names.
            raise invalid(
                "lora",
                f'cannot be a form\'s field "{name[:80]}"; send several adapters with scales as '
                'one text of JSON: [{"name": "ink", "scale": 0.8}, ...]',
            )
    return {**fields, "lora": [*loras, parts] if parts else loras}


async def one_file(form: FormData, *names: str) -> bytes:
    """Return the content of the only file in the fields of these names.

    Raises:
        RequestError: there is none, or there are several.
    """
    sent = [each for name in names for each in form.getlist(name)]
    if not sent or not all(isinstance(each, UploadFile) for each in sent):
        raise invalid(names[0], "must be a file of the form (multipart/form-data)")
    if len(sent) > 1:
        raise invalid(names[0], "must be one image: this model takes no more")
    content: bytes = await sent[0].read()  # type: ignore[union-attr]
    return content


def _parsed(text: str) -> Any:
    """Return the value of a field that holds JSON; other text stays."""
    if text[0] in "{[":
        if len(text) > _MAX_JSON:
            raise invalid("lora", f"must have at most {_MAX_JSON:,} characters of JSON")
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            pass  # a name that begins like that
    return text
