"""Replicas for a server that is a process of its own: on this machine, or in a cluster of Ray."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from types import FrameType

import ray
from ray import serve
from ray.exceptions import RayError

from ...errors import Error, UnsupportedError, UsageError
from ...text import plural
from ..model import ServedModel
from ..request_log import LogStream, LogWriter, log_into
from .application import Replicas, drawing_application
from .engine import RayEngine

_REMEDY = "start Ray there, give this machine its token, or unset RAY_ADDRESS"
_SECONDS_TO_CONNECT = 5.0
_SECONDS_TO_WATCH = 2.0
_OWN_ERRORS = f"{Error.__module__}."  # in a traceback


@contextmanager
def joined(
    log: LogWriter, on_lost: Callable[[], object], cpus: int | None = None
) -> Iterator[None]:
    """Join the cluster that `RAY_ADDRESS` names; without it, start Ray on this machine.

    A Ray that was started ends with the block. In the block, what is printed goes to the log: Ray
    prints there that machines were lost.

    Args:
        log: gets Ray's warnings.
        on_lost: called from a thread when the Ray of this machine has died, after which calls of
            Ray may never return.
        cpus: number of CPUs of a Ray that is started; None: those of this machine.

    Raises:
        UnsupportedError: there is no cluster at the address, or it does not let this process in.
    """
    # Ray's default is the cluster that was last started here, even if it is long dead.
    address = os.environ.get("RAY_ADDRESS", "local")
    _check(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would use the network
    for name in ("ray", "ray.serve"):
        log_into(log, name).setLevel(logging.WARNING)
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address,
            num_cpus=cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_format="%(message)s",
            logging_level=logging.WARNING,
        )
    except (ConnectionError, RuntimeError, RayError) as error:  # RuntimeError: other versions
        reason = str(error).strip().partition("\n")[0]
        raise UnsupportedError(f"Ray cannot be joined: {reason}", _REMEDY) from None
    signal.signal(signal.SIGTERM, _end)  # `ray.init` has one that ends with another code
    ended = threading.Event()
    threading.Thread(target=_watch, args=(on_lost, ended), daemon=True).start()
    try:
        with redirect_stdout(LogStream(log)):
            yield
    finally:
        ended.set()
        ray.shutdown()
        signal.signal(signal.SIGTERM, before)


def _watch(on_lost: Callable[[], object], ended: threading.Event) -> None:
    here = ray.get_runtime_context().get_node_id()
    while not ended.wait(_SECONDS_TO_WATCH):
        try:
            alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        except Exception:  # without a head of the cluster, Ray itself ends the process
            return
        if here not in alive and not ended.is_set():
            on_lost()
            return


def _check(address: str) -> None:
    """Check that there is something at an address: Ray itself would try for minutes."""
    if address in ("auto", "local"):
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), _SECONDS_TO_CONNECT).close()
    except ValueError:
        raise UnsupportedError(
            f'RAY_ADDRESS is "{address}", and must be HOST:PORT of a cluster', _REMEDY
        ) from None
    except OSError as error:
        raise UnsupportedError(f"there is no Ray at {address}: {error}", _REMEDY) from None


def replicas_for(
    wanted: int | None, device: str | None, *, scaling: bool, gpus_per_replica: int = 1
) -> Replicas:
    """Return the replicas for a number of them, or by default as many as the cluster has GPUs for.

    Args:
        wanted: their number.
        device: "cuda", "cpu", or None for GPUs if the cluster has any.
        scaling: have one at first, and up to that number as requests come.
        gpus_per_replica: GPUs of each, unless they are on CPUs.

    Raises:
        UsageError: the cluster is too small.
        UnsupportedError: several GPUs are asked for each replica, and there are none.
    """
    resources = ray.cluster_resources()
    gpus, cpus = (int(resources.get(name, 0)) for name in ("GPU", "CPU"))
    if device == "cuda" and not gpus:
        raise UsageError("device", "cannot be cuda: the cluster has no GPU", "use cpu")
    on_gpu = bool(gpus) and device != "cpu"
    of_machines = [int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]]
    if gpus_per_replica > 1 and not gpus:
        raise UnsupportedError(
            f"{gpus_per_replica} GPUs are asked for each replica, and the cluster has none",
            "leave `gpus` out to draw on CPUs",
        )
    if gpus_per_replica > max([1, *of_machines]):
        raise UsageError(
            "gpus",
            f"must be at most {max(of_machines)}, the GPUs of one machine of the cluster",
            "ask for fewer",
        )
    there_are, kind = sum(n // gpus_per_replica for n in of_machines), "GPU"
    if not on_gpu:
        there_are, kind = cpus, "CPU"
    most = wanted or (there_are if on_gpu else 1)
    if most > there_are:
        each = plural(gpus_per_replica, kind) if gpus_per_replica > 1 else f"a {kind}"
        raise UsageError("replicas", f"must be at most {there_are}: each has {each} of its own")
    return Replicas(1 if scaling else most, most, gpus_per_replica if on_gpu else 0)


@contextmanager
def drawing(
    model: ServedModel, replicas: Replicas, timeout: float, name: str
) -> Iterator[RayEngine]:
    """Start replicas in the cluster, which end with the block.

    Args:
        model: what they draw with.
        replicas: their number.
        timeout: seconds that a drawing may take.
        name: of the application in Ray Serve. If there is one of that name, left over by a process
            that was killed, this one takes its place.

    Raises:
        UnsupportedError: no replica can start; the sentence has the reason.
    """
    head = ray.get_runtime_context().gcs_address
    before = serve.status()
    is_alone = not (before.proxies or before.applications.keys() - {name})
    try:
        serve.start(proxy_location="Disabled")
        application = drawing_application(model, replicas, timeout)
        try:
            handle = serve.run(application, name=name, route_prefix=None)
        except RuntimeError:
            raise UnsupportedError(f"no replica can start: {_reason(name)}") from None
        yield RayEngine(handle, model.name, replicas.most, (model.side, model.side))
    finally:

        def delete() -> None:
            serve.delete(name)
            if is_alone and not serve.status().applications:
                serve.shutdown()  # or later applications of others would have no proxies

        _while_reachable(head, delete)


def _while_reachable(head: str, call: Callable[[], object]) -> None:
    """Call something of Ray, which waits for a minute if the head of the cluster has ended.

    It has if a signal to stop went to Ray's processes too, as a service manager sends it.
    """
    host, _, port = head.rpartition(":")

    def try_to() -> None:
        with suppress(Exception):  # the cluster may be gone
            call()

    calling = threading.Thread(target=try_to, daemon=True)
    calling.start()
    while calling.is_alive():
        try:
            socket.create_connection((host, int(port)), _SECONDS_TO_CONNECT).close()
        except OSError:
            return
        calling.join(_SECONDS_TO_WATCH)


def _reason(application: str) -> str:
    """Return why an application cannot be deployed: the end of a replica's traceback."""
    found = serve.status().applications[application]
    messages = "\n".join([found.message, *(each.message for each in found.deployments.values())])
    last = messages.strip().splitlines()[-1]
    return (
        last.removeprefix(_OWN_ERRORS).partition(": ")[2] if last.startswith(_OWN_ERRORS) else last
    )


def _end(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)
