"""OpenAI's images API: generations, edits, models, and their streams."""

from __future__ import annotations

import json
import re
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from PIL import Image
from pydantic import AliasChoices, BaseModel, BeforeValidator, Field, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from . import request_errors
from .body_errors import body_error
from .encoding import Format, base64_text, data_url, encode
from .engine import Drawing, DrawRequest, Preview, Progress
from .event_stream import EventStream
from .forms import one_file, received_form, text_fields
from .jobs import Done, Event, Failed, Job, Queued
from .loras import MAX_WEIGHT, check_count
from .middleware import notes_of
from .request_errors import FIELDS, RequestError, check_content_type, invalid
from .service import Service, events_for, may_begin

MAX_PROMPT = 32_000  # characters
MAX_IMAGES = 10
_MAX_PREVIEWS = 3
_MAX_FILES, _MAX_FIELDS = 4, 64  # of a form
_FIELDS = {**FIELDS, "mask_image": "mask"}
_FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")
_SIZE = re.compile(r"([1-9]\d{0,5})x([1-9]\d{0,5})")
_NO_USAGE = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}


class LoraField(BaseModel):
    """An adapter: its name, and what its change is multiplied by."""

    name: str = Field(max_length=255)
    scale: float = Field(
        1.0,
        ge=-MAX_WEIGHT,
        le=MAX_WEIGHT,
        validation_alias=AliasChoices("scale", "weight", "strength"),
    )


def _few_loras(given: Any) -> Any:
    """Refuse a long list before each element is looked at, which could take minutes."""
    if isinstance(given, list):
        check_count(len(given))
    return [] if given is None else given


class ImageBody(BaseModel):
    """The fields of a request that count; others are ignored."""

    prompt: str = Field(min_length=1, max_length=MAX_PROMPT)
    model: str | None = None
    n: int | None = Field(None, ge=1, le=MAX_IMAGES)
    size: str | None = None
    response_format: Literal["url", "b64_json"] | None = None
    output_format: Format | None = None
    output_compression: int | None = Field(None, ge=0, le=100)
    stream: bool | None = None
    partial_images: int | None = Field(None, ge=0, le=_MAX_PREVIEWS)
    # Extensions.
    seed: int | None = None
    num_inference_steps: int | None = Field(
        None, validation_alias=AliasChoices("num_inference_steps", "steps")
    )
    guidance_scale: float | None = None
    negative_prompt: str | None = Field(None, max_length=MAX_PROMPT)
    strength: float | None = None
    lora: Annotated[str | LoraField | list[str | LoraField], BeforeValidator(_few_loras)] = []


@dataclass(frozen=True)
class _Answer:
    """How to answer a request.

    Attributes:
        body: its fields.
        event: begin of the types of its events.
        job: what draws it.
    """

    body: ImageBody
    event: str
    job: Job

    @property
    def file_format(self) -> Format:
        return self.body.output_format or "png"

    @property
    def size(self) -> str:
        settings = self.job.request.settings
        return f"{settings.width}x{settings.height}"

    def common(self) -> dict[str, Any]:
        """Return what a response and the events of a stream have in common."""
        return {
            "background": "opaque",
            "output_format": self.file_format,
            "quality": "high",
            "size": self.size,
        }

    def encode(self, image: Image.Image, metadata: Mapping[str, Any] | None) -> bytes:
        quality = self.body.output_compression
        return encode(image, self.file_format, 100 if quality is None else quality, metadata)


def router(service: Service) -> APIRouter:
    """Return the routes under /v1."""
    routes = APIRouter(prefix="/v1")

    @routes.get("/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [_model(service)]})

    @routes.get("/models/{name:path}")
    async def model(name: str) -> Response:
        _check_model(service, name)
        return JSONResponse(_model(service))

    @routes.post("/images/generations")
    async def generations(body: ImageBody, http: Request) -> Response:
        if body.strength is not None:
            raise invalid("strength", "is for /v1/images/edits; send the image there, or drop it")
        answer = _submitted(service, http, body, "image_generation", None, None)
        return await _response(service, http, answer)

    @routes.post("/images/edits")
    async def edits(http: Request) -> Response:
        service.queue.check_room()
        check_content_type(http, *_FORMS)
        async with received_form(http, _MAX_FILES, _MAX_FIELDS) as form:
            body = _checked(text_fields(form))
            async with service.room_for_images(http):
                image = await service.decode(await one_file(form, "image", "image[]"), "image")
                mask = None
                if "mask" in form:
                    mask = await run_in_threadpool(
                        _white_where_transparent,
                        await service.decode(await one_file(form, "mask"), "mask"),
                    )
                answer = _submitted(service, http, body, "image_edit", image, mask)
        return await _response(service, http, answer)

    return routes


def _submitted(
    service: Service,
    http: Request,
    body: ImageBody,
    event: str,
    image: Image.Image | None,
    mask: Image.Image | None,
) -> _Answer:
    """Put a request into the queue."""
    if body.model is not None:
        _check_model(service, body.model)
    width, height = service.size(*_size(body.size), image)
    settings = service.settings(
        _FIELDS,
        prompt=body.prompt,
        negative_prompt=body.negative_prompt or None,
        steps=8 if body.num_inference_steps is None else body.num_inference_steps,
        width=width,
        height=height,
        guidance=body.guidance_scale or 0.0,
        seed=body.seed,
        batch=body.n or 1,
        init_image=image,
        mask_image=mask,
        strength=body.strength,
        loras=_loras(service, body.lora),
    )
    previews = (body.partial_images or 0) if body.stream else 0
    return _Answer(body, event, service.submit(http, DrawRequest(settings, previews)))


async def _response(service: Service, http: Request, answer: _Answer) -> Response:
    if answer.body.stream:
        return await _stream(service, http, answer)
    drawing = await service.drawing(http, answer.job, _FIELDS)
    return await run_in_threadpool(_whole, answer, drawing)


def _whole(answer: _Answer, drawing: Drawing) -> Response:
    """Return the response that is not a stream; large images take a while to encode."""
    data = []
    for image, metadata in zip(drawing.images, drawing.metadata, strict=True):
        content = answer.encode(image, metadata)
        if answer.body.response_format == "url":
            held = {"url": data_url(content, answer.file_format)}
        else:
            held = {"b64_json": base64_text(content)}
        data.append({**held, "seed": metadata["seed"]})
    document = {"created": int(time.time()), "data": data, "usage": _NO_USAGE, **answer.common()}
    if drawing.warnings:
        document["warnings"] = list(drawing.warnings)
    return JSONResponse(document)


async def _stream(service: Service, http: Request, answer: _Answer) -> Response:
    """Return a stream of server-sent events; an error before the first step keeps its status."""
    async with AsyncExitStack() as stack:
        events = await stack.enter_async_context(events_for(http, answer.job))
        first = await anext(events)
        while not may_begin(first):
            first = await anext(events)
        if isinstance(first, Failed):
            raise service.failure(answer.job, first, _FIELDS)
        return EventStream(_all_lines(service, http, answer, first, events), stack.pop_all())


async def _all_lines(
    service: Service, http: Request, answer: _Answer, first: Event, rest: AsyncIterator[Event]
) -> AsyncIterator[str]:
    for line in await run_in_threadpool(_lines, service, http, answer, first):
        yield line
    async for event in rest:
        for line in await run_in_threadpool(_lines, service, http, answer, event):
            yield line


def _lines(service: Service, http: Request, answer: _Answer, event: Event) -> list[str]:
    """Return the lines for an event of a job."""
    if isinstance(event, Queued):
        return [f": {event.ahead} ahead in the queue\n\n"]
    if isinstance(event, Progress):
        what = "step" if event.stage == "denoising" else event.stage
        return [f": {what} {event.done} of {event.total}\n\n"]
    if isinstance(event, Preview):
        return [
            _event(
                answer,
                "partial_image",
                answer.encode(image, None),
                partial_image_index=event.number,
                image_index=i,
            )
            for i, image in enumerate(event.images)
        ]
    if isinstance(event, Done):
        drawing = event.drawing
        return [
            _event(
                answer,
                "completed",
                answer.encode(image, metadata),
                usage=_NO_USAGE,
                image_index=i,
                seed=metadata["seed"],
                warnings=list(drawing.warnings),
            )
            for i, (image, metadata) in enumerate(
                zip(drawing.images, drawing.metadata, strict=True)
            )
        ]
    error = service.failure(answer.job, event, _FIELDS)
    notes_of(http.scope).fields["error"] = error.code
    document = {"type": "error", "error": request_errors.body(error)}
    return [f"event: error\ndata: {json.dumps(document)}\n\n"]


def _event(answer: _Answer, name: str, content: bytes, **more: Any) -> str:
    document = {
        "type": f"{answer.event}.{name}",
        "b64_json": base64_text(content),
        "created_at": int(time.time()),
        **answer.common(),
        **more,
    }
    return f"event: {document['type']}\ndata: {json.dumps(document)}\n\n"


def _model(service: Service) -> dict[str, Any]:
    width, height = service.engine.default_size
    return {
        "id": service.engine.name,
        "object": "model",
        "created": 0,
        "owned_by": "zimage-mxfp8",
        "default_size": f"{width}x{height}",
    }


def _check_model(service: Service, name: str) -> None:
    if name != service.engine.name:
        raise RequestError(
            404,
            "model_not_found",
            f'there is no model "{name[:80]}"; this server has {service.engine.name}',
            "model",
        )


def _checked(fields: Mapping[str, Any]) -> ImageBody:
    """Return the fields of a form."""
    try:
        return ImageBody.model_validate(fields)
    except ValidationError as error:
        raise body_error(error.errors()) from None


def _size(text: str | None) -> tuple[int | None, int | None]:
    if text in (None, "", "auto"):
        return None, None
    found = _SIZE.fullmatch(text or "")
    if found is None:
        raise invalid("size", 'must be "auto" or WIDTHxHEIGHT, such as 1024x1024')
    return int(found[1]), int(found[2])


def _loras(service: Service, given: str | LoraField | list[str | LoraField]) -> list[Any]:
    loras = given if isinstance(given, list) else [given]
    try:
        named = [
            LoraField.model_validate({"name": each}) if isinstance(each, str) else each
            for each in loras
            if each
        ]
    except ValidationError as error:
        raise invalid(
            "lora", f"has a name that cannot be used: {error.errors()[0]['msg']}"
        ) from None
    return service.loras.find([(each.name, each.scale) for each in named])


def _white_where_transparent(mask: Image.Image) -> Image.Image:
    """Return a mask of `GenerationSettings` for one of OpenAI's: transparent parts are drawn anew.

    Raises:
        RequestError: the mask is opaque by its format.
    """
    if mask.mode not in ("RGBA", "LA", "PA") and "transparency" not in mask.info:
        raise invalid("mask", "must have an alpha channel: transparent where to draw anew")
    return mask.convert("RGBA").getchannel("A").point(lambda alpha: 255 if alpha < 128 else 0)
