"""`zimage-mxfp8 serve`."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..system.optional_packages import needed
from ..text import plural
from .arguments import converter, count, local_path
from .download import add_download, resolve
from .models import (
    add_compute,
    add_device_and_dtype,
    add_gpus,
    add_model_dir,
    add_offload,
    keep_libraries_quiet,
    settle_devices,
)
from .streams import own_stream, report_line
from .wording import CommandLineError

if TYPE_CHECKING:
    from ..server.engine import Engine
    from ..server.model import ServedModel
    from ..server.options import ServerOptions
    from ..server.request_log import LogWriter

_AUTO = "auto"
_PORT = 8000
_MAX_PORT = 65535


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser], line: str) -> None:
    """Add this command to the parser."""
    from ..server.options import (
        API_KEY_VARIABLE,
        DEFAULT_MAX_IMAGE_PIXELS,
        DEFAULT_MAX_REQUEST_PIXELS,
        DEFAULT_QUEUE,
        DEFAULT_TIMEOUT,
    )

    parser = commands.add_parser(
        "serve",
        help=line,
        description="Serve images over HTTP: OpenAI's and AUTOMATIC1111's APIs, and a page for "
        "browsers. Ctrl-C or SIGTERM finishes the image that is drawn. No network without "
        "--download.",
    )
    parser.set_defaults(run=run)
    add_model_dir(parser, required=False)
    parser.add_argument(
        "--transformer",
        metavar="FILE",
        help="MXFP8, INT8 ConvRot or plain checkpoint, or "
        "OWNER/NAME[@REVISION][/FILE.safetensors] from the Hugging Face cache (default: the "
        "folder's own transformer; without --model-dir the small "
        "trained model of the package)",
    )
    add_download(parser)
    parser.add_argument(
        "--host", type=_host, default="127.0.0.1", help="address to listen on (default: 127.0.0.1)"
    )
    parser.add_argument(
        "--port",
        type=count(0),
        default=_PORT,
        metavar="N",
        help=f"0 takes a free one (default: {_PORT})",
    )
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help="what clients must send; needed for other hosts than this one. "
        f"{API_KEY_VARIABLE} in the environment is safer: command lines are visible to other users",
    )
    parser.add_argument(
        "--queue",
        type=count(0),
        default=DEFAULT_QUEUE,
        metavar="N",
        help=f"requests that may wait; more are refused with status 429 (default: {DEFAULT_QUEUE})",
    )
    parser.add_argument(
        "--timeout",
        type=count(1),
        default=round(DEFAULT_TIMEOUT),
        metavar="SECONDS",
        help=f"for waiting and drawing, of each request (default: {DEFAULT_TIMEOUT:.0f})",
    )
    parser.add_argument(
        "--max-image-pixels",
        type=count(256),
        default=DEFAULT_MAX_IMAGE_PIXELS,
        metavar="N",
        help="most pixels of an image; images that clients send may have four times as many "
        f"(default: {DEFAULT_MAX_IMAGE_PIXELS}, 2048 x 2048)",
    )
    parser.add_argument(
        "--max-request-pixels",
        type=count(256),
        metavar="N",
        help="most pixels of all images of a request together (default: "
        f"{DEFAULT_MAX_REQUEST_PIXELS}, 10 x 1024 x 1024, or one largest image if that is more)",
    )
    parser.add_argument(
        "--lora-dir",
        type=local_path,
        metavar="DIR",
        help="folder of adapters (*.safetensors, not in subfolders) that clients may name",
    )
    parser.add_argument(
        "--ray",
        action="store_true",
        help="draw on many GPUs by Ray Serve (extra ray): on those of the cluster that RAY_ADDRESS "
        "names, else on those of this machine",
    )
    parser.add_argument(
        "--replicas",
        type=converter(_count_or_auto, "auto, or a whole number of at least 1"),
        metavar="N|auto",
        help="with --ray: processes that draw, or as many as requests need (default: one per GPU "
        "of the cluster)",
    )
    add_compute(parser)
    add_device_and_dtype(parser)
    add_gpus(parser, "--gpus-per-replica", of_what="each image, with --ray those of each replica")
    add_offload(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    options = _options(arguments)
    if arguments.transformer and not arguments.model_dir:
        raise CommandLineError("--transformer needs --model-dir with the other parts of the model")
    settle_devices(arguments)
    _check_ray(arguments)
    with needed("serve", "serve"):
        import python_multipart  # noqa: F401 - starlette imports it with the first form

        from ..server.request_log import LogWriter
        from ..server.run import run_server
    output = sys.stdout
    with ExitStack() as stack:
        listener = stack.enter_context(_listener(arguments.host, arguments.port))
        log = LogWriter(own_stream(sys.stderr))  # which lines of progress may drop
        stack.callback(log.close)
        if arguments.ray:
            port = listener.getsockname()[1]
            engine = stack.enter_context(_engine_on_ray(arguments, log, port))
        else:
            engine = _engine(arguments)
        address = _address(arguments.host, listener)
        report_line("warming up ...")
        run_server(
            engine,
            options,
            listener,
            log,
            lambda: print(f"{engine.name} is served at {address}", file=output, flush=True),
        )
    return 0


def _check_ray(arguments: argparse.Namespace) -> None:
    if not arguments.ray and arguments.replicas is not None:
        raise CommandLineError("--replicas needs --ray; add it, or leave out --replicas")
    if arguments.ray and arguments.device not in (None, "cpu", "cuda"):
        raise CommandLineError(
            f"--device {arguments.device} cannot be used with --ray, which gives each replica a "
            "GPU; leave it out, or take cpu"
        )


def _options(arguments: argparse.Namespace) -> ServerOptions:
    from ..server.options import (
        API_KEY_VARIABLE,
        DEFAULT_MAX_REQUEST_PIXELS,
        ServerOptions,
        is_loopback,
    )

    key = os.environ.get(API_KEY_VARIABLE) if arguments.api_key is None else arguments.api_key
    if key is None and not is_loopback(arguments.host):
        raise CommandLineError(
            f"--host {arguments.host} lets other machines in, which needs an API key; set "
            f"{API_KEY_VARIABLE} or --api-key"
        )
    if arguments.lora_dir is not None and not arguments.lora_dir.is_dir():
        raise UsageError(
            "lora_dir", f"{arguments.lora_dir} is not a folder", "name the folder of the adapters"
        )
    return ServerOptions(
        api_key=key,
        queue=arguments.queue,
        timeout=arguments.timeout,
        max_image_pixels=arguments.max_image_pixels,
        max_request_pixels=arguments.max_request_pixels
        or max(DEFAULT_MAX_REQUEST_PIXELS, arguments.max_image_pixels),
        lora_dir=arguments.lora_dir,
    )


def _listener(host: str, port: int) -> socket.socket:
    """Return a socket that listens: a taken port is reported before the model is loaded.

    Binding alone does not take the port: with SO_REUSEADDR another server could bind it, too.
    """
    if port > _MAX_PORT:  # the system would take the rest of it by 65536
        raise CommandLineError(
            f"--port {port} cannot be used: ports end at {_MAX_PORT}; choose another"
        )
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise CommandLineError(
            f"--host {host} --port {port} cannot be used: {error}; choose another"
        ) from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
    except OSError as error:
        listener.close()
        raise CommandLineError(
            f"--port {port} of {host} cannot be used: {error.strerror}; choose another"
        ) from None
    return listener


def _address(host: str, listener: socket.socket) -> str:
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listener.getsockname()[1]}"


def _model(arguments: argparse.Namespace) -> ServedModel:
    """Find the model."""
    from ..server.model import find_model

    if not arguments.download:
        keep_libraries_quiet()
    if arguments.model_dir is None:
        report_line("without --model-dir, serving the small trained model of the package")
    return find_model(
        arguments.model_dir,
        arguments.transformer,
        arguments.device,
        arguments.compute,
        arguments.dtype,
        gpus=arguments.gpus,
        offload=arguments.offload,
        find=partial(resolve, download=arguments.download),
    )


def _engine(arguments: argparse.Namespace) -> Engine:
    """Load the model."""
    from ..printing.progress import stage_bar_or_lines

    model = _model(arguments)
    keep_libraries_quiet()
    report_line("loading torch and diffusers ...")
    with stage_bar_or_lines(report_line) as progress:
        return model.load(progress)


@contextmanager
def _engine_on_ray(arguments: argparse.Namespace, log: LogWriter, port: int) -> Iterator[Engine]:
    """Start replicas."""
    with needed("ray", "serve --ray"):
        from ..server.ray import cluster

    def end() -> None:
        log.write({"event": "failure", "detail": "the Ray of this machine has died"})
        log.close()
        os._exit(1)  # calls of Ray that wait would hold up any other end

    model = _model(arguments)
    is_auto = arguments.replicas == _AUTO
    report_line("starting Ray ...")
    with cluster.joined(log, end):
        wanted = None if is_auto else arguments.replicas
        replicas = cluster.replicas_for(
            wanted, arguments.device, scaling=is_auto, gpus_per_replica=arguments.gpus
        )
        places = plural(replicas.least * replicas.gpus, "GPU")
        if not replicas.gpus:
            places = plural(replicas.least, "CPU")
        report_line(f"loading the model on {places} ...")
        name = f"zimage-mxfp8-{socket.gethostname()}-{port}"  # this server's alone
        with cluster.drawing(model, replicas, arguments.timeout, name) as engine:
            yield engine


def _host(text: str) -> str:
    """Return an address; IPv6 ones have brackets in URLs."""
    return text[1:-1] if text.startswith("[") and text.endswith("]") else text


def _count_or_auto(text: str) -> int | str:
    if text == _AUTO:
        return text
    replicas = int(text)
    if replicas < 1:
        raise ValueError
    return replicas
