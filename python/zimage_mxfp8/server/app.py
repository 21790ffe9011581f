"""The app: routes, layers around them, and the life of the queue."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.resources import files

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from . import a1111_api, openai_api
from .body_errors import body_error, unreadable_body
from .engine import Engine
from .jobs import JobQueue
from .loras import LoraFolder
from .metrics import Metrics
from .middleware import Access, Boundary, Limits
from .options import ServerOptions
from .request_errors import JSON_TYPE, check_content_type, request_error
from .request_log import LogWriter
from .service import Service

_READ = ["GET", "HEAD"]
_PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    # The page loads nothing but itself, and no other page may frame it.
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; img-src data: blob:; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


def create_app(
    engine: Engine,
    options: ServerOptions,
    log: LogWriter,
    on_broken: Callable[[Exception], object] = lambda _: None,
) -> FastAPI:
    """Return the app of a server. Its `state.queue` is the queue, which ends with the app.

    Args:
        engine: draws.
        options: limits and secrets.
        log: gets a line per request.
        on_broken: called from a drawing thread if the engine cannot draw any more, see `JobQueue`.
    """
    metrics = Metrics(log)
    queue = JobQueue(engine, options.queue, metrics)
    metrics.watch(queue, engine.device_memory)
    service = Service(engine, queue, LoraFolder(options.lora_dir), options)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        queue.start(on_broken)
        yield
        queue.stop()
        await run_in_threadpool(queue.join)

    # No pages about the API: those of FastAPI load scripts from another host.
    app = FastAPI(
        title="zimage-mxfp8",
        openapi_url=None,
        lifespan=lifespan,
        redirect_slashes=False,  # to an address of the client's headers
    )
    app.state.queue = queue
    app.include_router(openai_api.router(service))
    app.include_router(a1111_api.router(service))
    page = files(__package__).joinpath("page/index.html").read_text("utf-8")

    @app.api_route("/", methods=_READ)
    async def index() -> Response:
        return Response(page, media_type="text/html", headers=_PAGE_HEADERS)

    @app.api_route("/healthz", methods=_READ)
    async def healthz() -> Response:
        return JSONResponse({"status": "ok"})

    @app.api_route("/readyz", methods=_READ)
    async def readyz() -> Response:
        is_ready = queue.is_ready
        return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)

    @app.get("/metrics")
    async def metrics_text() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    # `Boundary` answers all errors; these two would be answered by the framework.
    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> Response:
        if error.status_code == 400 and error.__cause__ is not None:  # of FastAPI's parsing
            raise unreadable_body()
        raise request_error(error)

    @app.exception_handler(RequestValidationError)
    async def invalid_body(http: Request, error: RequestValidationError) -> Response:
        check_content_type(http, JSON_TYPE)  # without it fields cannot be found
        raise body_error(error.errors())

    # The last one is the outermost.
    max_bytes, seconds = options.max_body_bytes, options.transfer_timeout
    app.add_middleware(Limits, max_bytes=max_bytes, seconds=seconds)
    app.add_middleware(Access, api_key=options.api_key)
    app.add_middleware(Boundary, log=log, metrics=metrics, max_bytes=max_bytes, seconds=seconds)
    return app
