"""AUTOMATIC1111's API, as far as Open WebUI and SillyTavern use it."""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from typing import Any

from fastapi import APIRouter
from PIL import Image, ImageOps
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..generation.images import eight_bits
from ..generation.infotext import write_infotext
from ..generation.limits import MAX_GUIDANCE
from .encoding import base64_text, encode
from .engine import Drawing, DrawRequest
from .jobs import Job
from .loras import MAX_WEIGHT
from .openai_api import MAX_IMAGES, MAX_PROMPT
from .request_errors import ClientGoneError, invalid
from .service import Service

_LORA = re.compile(r"<lora:([^:<>]{1,255})(?::([^:<>]{0,100}))?(?::[^<>]{0,100})?>")
_SAMPLER, _SCHEDULER = "Euler", "Simple"
_WHITE_SPACE = b" \t\r\n\v\f"
_STRENGTH = 0.75  # of image to image, as there
_SECONDS_TO_INTERRUPT = 2.0  # after closing a connection
# Of arguments of `GenerationSettings`.
_FIELDS = {
    "batch": "batch_size",
    "guidance": "cfg_scale",
    "init_image": "init_images",
    "loras": "prompt",
    "mask_image": "mask",
    "strength": "denoising_strength",
}


class TextBody(BaseModel):
    """The fields of text to image that count; others are ignored."""

    prompt: str = Field("", max_length=MAX_PROMPT)
    negative_prompt: str | None = Field(None, max_length=MAX_PROMPT)
    seed: int | None = None
    steps: int | None = None
    width: int | None = None
    height: int | None = None
    cfg_scale: float | None = Field(None, allow_inf_nan=False)
    batch_size: int | None = Field(None, ge=1, le=MAX_IMAGES)
    n_iter: int | None = Field(None, ge=1, le=MAX_IMAGES)


class ImageToImageBody(TextBody):
    """The fields of image to image that count."""

    init_images: list[str] = Field(min_length=1, max_length=1)
    denoising_strength: float | None = None
    mask: str | None = None
    inpainting_mask_invert: int | None = None


class _Jobs:
    """The jobs of this API, and the address that each came from."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._jobs: dict[Job, str] = {}
        self._gone: dict[str, float] = {}  # when a client of an address last closed its connection

    @contextmanager
    def holding(self, job: Job, http: Request) -> Iterator[None]:
        address = _address(http)
        self._jobs[job] = address
        try:
            yield
        except ClientGoneError:
            now = time.monotonic()
            late = [x for x, then in self._gone.items() if now - then > _SECONDS_TO_INTERRUPT]
            for each in late:
                del self._gone[each]
            self._gone[address] = now
            raise
        finally:
            del self._jobs[job]

    @property
    def running(self) -> Job | None:
        """The oldest that is drawn; progress is about it."""
        return next((job for job in self._service.queue.running if job in self._jobs), None)

    def to_interrupt(self, http: Request) -> Job | None:
        """Return the oldest job of a client's address, which is drawn or waits.

        Programs interrupt when a user gives up, some after they have closed the connection of the
        drawing. That has ended the job already, and the next one may be another user's.
        """
        address = _address(http)
        if time.monotonic() - self._gone.pop(address, -math.inf) < _SECONDS_TO_INTERRUPT:
            return None
        return next((job for job, each in self._jobs.items() if each == address), None)

    @property
    def count(self) -> int:
        return len(self._jobs)


def router(service: Service) -> APIRouter:
    """Return the routes under /sdapi/v1."""
    routes = APIRouter(prefix="/sdapi/v1")
    jobs = _Jobs(service)
    name = service.engine.name

    @routes.post("/txt2img")
    async def text_to_image(body: TextBody, http: Request) -> Response:
        job = _submitted(service, http, body, {})
        return await _response(service, jobs, http, body, job)

    @routes.post("/img2img")
    async def image_to_image(body: ImageToImageBody, http: Request) -> Response:
        async with service.room_for_images(http):
            job = _submitted(service, http, body, await _images(service, body))
        return await _response(service, jobs, http, body, job)

    @routes.get("/progress")
    async def progress() -> Response:
        return JSONResponse(_progress(jobs))

    @routes.post("/interrupt")
    async def interrupt(http: Request) -> Response:
        if (job := jobs.to_interrupt(http)) is not None:
            job.stop()
        return JSONResponse({})

    @routes.get("/options")
    async def options() -> Response:
        return JSONResponse({"sd_model_checkpoint": name, "samples_format": "png"})

    @routes.post("/options")
    async def set_options() -> Response:
        return JSONResponse(None)  # there is one model, and nothing else to set

    @routes.get("/sd-models")
    async def models() -> Response:
        model = {"title": name, "model_name": name, "filename": name}
        return JSONResponse([{**model, "hash": None, "sha256": None, "config": None}])

    @routes.get("/samplers")
    async def samplers() -> Response:
        return JSONResponse([{"name": _SAMPLER, "aliases": ["euler"], "options": {}}])

    @routes.get("/schedulers")
    async def schedulers() -> Response:
        scheduler = {"name": _SCHEDULER.lower(), "label": _SCHEDULER, "aliases": None}
        return JSONResponse([{**scheduler, "default_rho": -1, "need_inner_model": False}])

    @routes.get("/loras")
    async def loras() -> Response:
        names = await run_in_threadpool(service.loras.names)
        return JSONResponse(
            [{"name": each, "alias": each, "path": each, "metadata": {}} for each in names]
        )

    async def nothing() -> Response:
        return JSONResponse([])

    for path in ("/upscalers", "/latent-upscale-modes", "/sd-vae"):
        routes.get(path)(nothing)
    return routes


async def _images(service: Service, body: ImageToImageBody) -> dict[str, Any]:
    """Return the arguments of `GenerationSettings` for image to image."""
    content = await run_in_threadpool(_bytes, body.init_images[0], "init_images")
    image = await service.decode(content, "init_images", "init image")
    strength = body.denoising_strength
    images: dict[str, Any] = {
        "init_image": image,
        "strength": _STRENGTH if strength is None else strength,
    }
    if body.mask:
        content = await run_in_threadpool(_bytes, body.mask, "mask")
        mask = await service.decode(content, "mask")
        inverted = bool(body.inpainting_mask_invert)
        images["mask_image"] = await run_in_threadpool(_mask, mask, image.size, inverted)
    return images


def _mask(mask: Image.Image, size: tuple[int, int], inverted: bool) -> Image.Image:
    """Return a mask in shades of grey, of the init image's size."""
    mask = eight_bits(mask).convert("L")
    mask = mask if mask.size == size else mask.resize(size)
    return ImageOps.invert(mask) if inverted else mask


def _submitted(service: Service, http: Request, body: TextBody, images: dict[str, Any]) -> Job:
    """Put a request into the queue."""
    prompt, loras = _without_loras(service, body.prompt)
    cfg = 1.0 if body.cfg_scale is None else body.cfg_scale
    # Here 1 is no guidance, and negative prompts without guidance are usual.
    guidance = float(Decimal(repr(cfg)) - 1) if cfg > 1 else 0.0
    if guidance > MAX_GUIDANCE:
        raise invalid("cfg_scale", f"must be at most {MAX_GUIDANCE + 1}, not {cfg:g}")
    width, height = service.size(body.width, body.height, images.get("init_image"))
    batch = (body.batch_size or 1) * (body.n_iter or 1)
    if batch > MAX_IMAGES:
        raise invalid("batch_size", f"times n_iter must be at most {MAX_IMAGES}, not {batch}")
    settings = service.settings(
        _FIELDS,
        prompt=prompt,
        negative_prompt=(body.negative_prompt or None) if guidance else None,
        steps=8 if body.steps is None else body.steps,
        width=width,
        height=height,
        guidance=guidance,
        seed=None if body.seed == -1 else body.seed,
        batch=batch,
        loras=loras,
        **images,
    )
    return service.submit(http, DrawRequest(settings))


async def _response(
    service: Service, jobs: _Jobs, http: Request, body: TextBody, job: Job
) -> Response:
    with jobs.holding(job, http):
        drawing = await service.drawing(http, job, _FIELDS)
    return await run_in_threadpool(_whole, service.engine.name, body, drawing)


def _whole(model: str, body: TextBody, drawing: Drawing) -> Response:
    first = drawing.metadata[0]
    seeds = [metadata["seed"] for metadata in drawing.metadata]
    prompts = [metadata["prompt"] for metadata in drawing.metadata]
    info = {
        "prompt": first["prompt"],
        "all_prompts": prompts,
        "negative_prompt": first["negative_prompt"] or "",
        "all_negative_prompts": [first["negative_prompt"] or ""] * len(prompts),
        "seed": seeds[0],
        "all_seeds": seeds,
        "width": first["width"],
        "height": first["height"],
        "sampler_name": _SAMPLER,
        "cfg_scale": float(Decimal(repr(first["guidance"])) + 1),
        "steps": first["steps"],
        "batch_size": len(seeds),
        "denoising_strength": first["strength"],
        "sd_model_name": model,
        "infotexts": [write_infotext(metadata) for metadata in drawing.metadata],
        "index_of_first_image": 0,
        "extra_generation_params": {},
        "version": first["version"],
    }
    images = [
        base64_text(encode(image, "png", 100, metadata))
        for image, metadata in zip(drawing.images, drawing.metadata, strict=True)
    ]
    parameters = body.model_dump(exclude={"init_images", "mask"})
    return JSONResponse({"images": images, "parameters": parameters, "info": json.dumps(info)})


def _address(http: Request) -> str:
    return http.client.host if http.client else ""


def _progress(jobs: _Jobs) -> dict[str, Any]:
    job = jobs.running
    latest = None if job is None else job.progress
    is_drawn = latest is not None and latest.stage == "denoising"
    done, total = (latest.done, latest.total) if latest is not None and is_drawn else (0, 0)
    return {
        "progress": done / total if total else 0.0,
        "eta_relative": 0.0,
        "state": {
            "skipped": False,
            "interrupted": job is not None and job.is_stopped,
            "job": "" if job is None else "drawing",
            "job_count": jobs.count,
            "job_no": 0,
            "sampling_step": done,
            "sampling_steps": total,
        },
        "current_image": None,
        "textinfo": None,
    }


def _without_loras(service: Service, prompt: str) -> tuple[str, list[Any]]:
    """Return a prompt without its `<lora:name:weight>`, and those adapters with their weights."""
    loras = []
    for found in _LORA.finditer(prompt):
        name, weight = found.groups()
        try:
            number = float(weight or 1)
        except ValueError:
            number = math.nan
        if not abs(number) <= MAX_WEIGHT:
            raise invalid(
                "prompt",
                f'has the LoRA "{name.strip()}" with the weight "{weight}"; weights are numbers '
                f"from -{MAX_WEIGHT} to {MAX_WEIGHT}",
            )
        loras.append((name.strip(), number))
    return _LORA.sub("", prompt).strip() if loras else prompt, service.loras.find(loras)


def _bytes(text: str, field: str) -> bytes:
    """Return the bytes of base64, or of a data URL."""
    data = text.partition(",")[2] if text.startswith("data:") else text
    try:
        # Lines of 76 characters too.
        return base64.b64decode(data.encode("ascii").translate(None, _WHITE_SPACE), validate=True)
    except (binascii.Error, ValueError):
        raise invalid(field, "must be base64 of an image file") from None
