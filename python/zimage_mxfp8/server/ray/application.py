"""The applications of Ray Serve: replicas that draw, and for users' own configs their front."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus

from ...errors import UsageError
from ..app import create_app
from ..model import ServedModel, find_model
from ..options import (
    API_KEY_VARIABLE,
    DEFAULT_MAX_IMAGE_PIXELS,
    DEFAULT_MAX_REQUEST_PIXELS,
    DEFAULT_QUEUE,
    DEFAULT_TIMEOUT,
    ServerOptions,
)
from ..request_log import LogWriter
from .engine import RayEngine
from .replica import Replica

_TRIES = 2  # to start a first replica: the memory of a GPU may not be free yet
_MAX_REQUESTS = 1000  # of the front at a time; its queue refuses what is too much to draw
_SECONDS_BETWEEN_LOOKS = 1.0  # at the state of the application


@dataclass(frozen=True)
class Replicas:
    """How many processes draw.

    Attributes:
        least: of them.
        most: of them; if more than `least`, Ray Serve starts and ends some as requests come.
        gpus: GPUs that each has for itself; 0: each has one CPU.
    """

    least: int
    most: int
    gpus: int


def drawing_application(model: ServedModel, replicas: Replicas, timeout: float) -> Application:
    """Return an application without HTTP: the replicas, for a `RayEngine`.

    Args:
        model: what they draw with; `replicas` decides on its device.
        replicas: their number and their resources.
        timeout: seconds that a drawing may take; a replica that is to end finishes it.
    """
    scaling: dict[str, Any] = {"num_replicas": replicas.least}
    if replicas.most > replicas.least:
        scaling = {
            "autoscaling_config": {
                "min_replicas": replicas.least,
                "max_replicas": replicas.most,
                "target_ongoing_requests": 1,
            }
        }
    deployment = serve.deployment(
        name="Replica",
        ray_actor_options={"num_cpus": 1, "num_gpus": replicas.gpus},
        max_ongoing_requests=1,
        max_constructor_retry_count=_TRIES,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=timeout,
        **scaling,
    )(Replica)
    device = "cuda" if replicas.gpus else "cpu"
    return deployment.bind(replace(model, device=device, gpus=max(1, replicas.gpus)))


class BuildArguments(BaseModel):
    """The arguments of `build`: fields of `args` in a config of Ray Serve.

    Attributes:
        model_dir: diffusers folder, or a name in the Hugging Face cache, under the same path on all
            machines; None: the small trained model of the package.
        transformer: file or folder; None: the folder's own.
        replicas: processes that draw.
        max_replicas: if more, Ray Serve starts and ends processes as requests come.
        device: "cuda" gives each process GPUs of its own, "cpu" one CPU.
        gpus_per_replica: number of GPUs of each process, which share each image.
        compute: see `ZImageGenerator`, as are the next two.
        dtype: its dtype.
        offload: whether parts are loaded in turn.
        lora_dir: folder of the adapters that clients may name, under the same path on all machines.
        queue: see `ServerOptions`, as are the next three.
        timeout: seconds.
        max_image_pixels: of an image.
        max_request_pixels: of all images of a request.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model_dir: str | None = None
    transformer: str | None = None
    replicas: int = Field(1, ge=1)
    max_replicas: int | None = Field(None, ge=1)
    device: str = Field("cuda", pattern="^(cpu|cuda)$")
    gpus_per_replica: int = Field(1, ge=1)
    compute: str = "auto"
    dtype: str | None = None
    offload: bool = False
    lora_dir: Path | None = None
    queue: int = Field(DEFAULT_QUEUE, ge=0)
    timeout: float = Field(DEFAULT_TIMEOUT, gt=0)
    max_image_pixels: int = Field(DEFAULT_MAX_IMAGE_PIXELS, ge=256)
    max_request_pixels: int = Field(DEFAULT_MAX_REQUEST_PIXELS, ge=256)


class Front:
    """The server's app in a process of its own: APIs, page, and the one queue for all replicas.

    Args:
        handle: of the replicas.
        model: the model that they draw with.
        places: most replicas that there may be.
        options: limits and secrets.
    """

    def __init__(
        self, handle: DeploymentHandle[Any], model: ServedModel, places: int, options: ServerOptions
    ) -> None:
        self._engine = RayEngine(handle, model.name, places, (model.side, model.side))
        self._options = options
        self._broken: str | None = None

    def check_health(self) -> None:
        """Raise if the front must be replaced. Ray Serve calls it."""
        if self._broken is not None:
            raise RuntimeError(self._broken)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the app. Ray Serve calls this in the front's process."""
        app = create_app(self._engine, self._options, LogWriter(sys.stderr), self._break)
        # Ray Serve lets the front answer what it has, but the replicas begin nothing more.
        call_when_deleted(app.state.queue.stop)
        return app

    def _break(self, error: Exception) -> None:
        self._broken = f"the replicas cannot draw: {error}"


def call_when_deleted(call: Callable[[], object]) -> None:
    """Call something from a thread once Ray Serve begins to delete this process's application."""
    name = serve.get_replica_context().app_name

    def watch() -> None:
        while not _is_deleted(name):
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        call()

    threading.Thread(target=watch, name="watching the application", daemon=True).start()


def _is_deleted(application: str) -> bool:
    try:
        overview = serve.status().applications.get(application)
    except Exception:  # the controller is being replaced
        return False
    return overview is not None and overview.status == ApplicationStatus.DELETING


def build(args: Mapping[str, Any] | BuildArguments) -> Application:
    """Return the whole server as an application, for `serve run` and configs of Ray Serve.

    Clients must send the key of the environment variable `ZIMAGE_MXFP8_API_KEY`.

    Args:
        args: see `BuildArguments`; Ray Serve gives the `args` of a config.

    Raises:
        ValidationError: of pydantic: a field is unknown, or its value cannot be used.
        CheckpointError: a part of the model is missing.
        UsageError: there is no API key, or arguments contradict each other.
    """
    args = BuildArguments.model_validate(args)
    key = os.environ.get(API_KEY_VARIABLE)
    if key is None:
        raise UsageError(
            "api_key",
            "is missing: Ray's proxies may answer to other machines",
            f"set {API_KEY_VARIABLE} in the environment of the application",
        )
    most = args.replicas if args.max_replicas is None else args.max_replicas
    if most < args.replicas:
        raise UsageError("max_replicas", f"must be at least `replicas`, not {most}")
    model = find_model(
        args.model_dir,
        args.transformer,
        compute=args.compute,
        dtype=args.dtype,
        offload=args.offload,
    )
    if args.lora_dir is not None and not args.lora_dir.is_dir():
        raise UsageError(
            "lora_dir", f"{args.lora_dir} is not a folder", "name the folder of the adapters"
        )
    options = ServerOptions(
        api_key=key,
        queue=args.queue,
        timeout=args.timeout,
        max_image_pixels=args.max_image_pixels,
        max_request_pixels=max(args.max_request_pixels, args.max_image_pixels),
        lora_dir=args.lora_dir,
    )
    gpus = args.gpus_per_replica if args.device == "cuda" else 0
    replicas = Replicas(args.replicas, most, gpus)
    drawing = drawing_application(model, replicas, args.timeout)
    front = serve.deployment(
        name="Front",
        num_replicas=1,  # one queue
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=_MAX_REQUESTS,
        graceful_shutdown_timeout_s=args.timeout,
    )(serve.ingress()(Front))
    return front.bind(drawing, model, most, options)
