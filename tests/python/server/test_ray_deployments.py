"""Settings of replicas in Ray Serve, from configs and from the command; no Ray is started."""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from types import SimpleNamespace

import pytest
import yaml
from pydantic import ValidationError
from starlette.testclient import TestClient

import zimage_mxfp8 as zm
from helpers.commands import Run
from helpers.documents import GUIDE, block_with, text_of
from helpers.serving import wait_until
from zimage_mxfp8.server.model import ServedModel, find_model
from zimage_mxfp8.server.options import API_KEY_VARIABLE, ServerOptions

with warnings.catch_warnings():  # Ray uses what its own requirements deprecate
    warnings.simplefilter("ignore")
    from ray.exceptions import RayActorError
    from ray.serve import Application, Deployment
    from ray.serve.schema import ApplicationStatus

    from zimage_mxfp8.server.ray import BuildArguments, application, build, cluster
    from zimage_mxfp8.server.ray.application import Front, Replicas, drawing_application
    from zimage_mxfp8.server.ray.cluster import replicas_for

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # likewise


def test_arguments_of_an_application(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ZIMAGE_MXFP8_API_KEY", raising=False)
    with pytest.raises(zm.UsageError, match="api_key is missing"):
        build(BuildArguments())
    monkeypatch.setenv("ZIMAGE_MXFP8_API_KEY", "")
    with pytest.raises(zm.UsageError, match="must be printable ASCII"):
        build(BuildArguments())
    monkeypatch.setenv("ZIMAGE_MXFP8_API_KEY", "x")
    with pytest.raises(zm.UsageError, match="max_replicas must be at least `replicas`, not 1"):
        build({"replicas": 2, "max_replicas": 1})
    with pytest.raises(zm.CheckpointError, match="no such model"):
        build(BuildArguments(model_dir="/no such model"))
    assert build({"replicas": "1"})  # as `serve run` gives it
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        build({"replica": 2})


def test_the_guide_has_the_arguments_and_a_config(monkeypatch: pytest.MonkeyPatch) -> None:
    table = text_of(GUIDE / "serving.md").partition("| argument |")[2].partition("\n\n")[0]
    named = [name for row in re.findall(r"^\| (`.*?) \|", table, re.M) for name in row.split(", ")]
    assert sorted(named) == sorted(f"`{name}`" for name in BuildArguments.model_fields)
    config = yaml.safe_load(block_with(GUIDE / "serving.md", "yaml", "import_path"))
    (application,) = config["applications"]
    module, _, name = application["import_path"].partition(":")
    assert getattr(importlib.import_module(module), name) is build
    assert list(application["runtime_env"]["env_vars"]) == [API_KEY_VARIABLE]
    assert BuildArguments.model_validate(application["args"]).max_replicas == 8


def test_replicas_are_as_many_as_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: {"GPU": 4.0, "CPU": 32.0})
    machines = [{"Alive": True, "Resources": {"GPU": n}} for n in (3.0, 1.0)]
    monkeypatch.setattr("ray.nodes", lambda: machines)
    assert replicas_for(None, None, scaling=False) == Replicas(4, 4, gpus=1)
    assert replicas_for(None, "cuda", scaling=True) == Replicas(1, 4, gpus=1)
    assert replicas_for(2, "cpu", scaling=False) == Replicas(2, 2, gpus=0)
    assert replicas_for(None, None, scaling=False, gpus_per_replica=2) == Replicas(1, 1, gpus=2)
    with pytest.raises(zm.UsageError, match="must be at most 1: each has 3 GPUs of its own"):
        replicas_for(2, None, scaling=False, gpus_per_replica=3)
    with pytest.raises(zm.UsageError, match="gpus must be at most 3, the GPUs of one machine"):
        replicas_for(None, None, scaling=False, gpus_per_replica=5)
    with pytest.raises(zm.UsageError, match="must be at most 4: each has a GPU of its own"):
        replicas_for(5, None, scaling=False)


def test_a_front_whose_replicas_cannot_draw_asks_to_be_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(application, "call_when_deleted", lambda _: None)  # there is no Ray

    class Handle:
        """Of replicas that died while one was waited for."""

        is_ready = property(lambda self: self)

        def remote(self) -> Handle:
            return self

        def result(self) -> None:
            raise RayActorError

    options = ServerOptions(api_key="x")
    front = Front(Handle(), find_model(None, None), 1, options)  # type: ignore[arg-type]
    front.check_health()
    with TestClient(front.__serve_build_asgi_app__()) as client:
        assert client.get("/readyz").status_code == 503

        def is_unhealthy() -> bool:
            with suppress(RuntimeError):
                front.check_health()
                return False
            return True

        wait_until(is_unhealthy)
    with pytest.raises(RuntimeError, match="the replicas cannot draw"):
        front.check_health()


def test_the_front_is_told_once_its_application_is_deleted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def overview(status: ApplicationStatus | None) -> SimpleNamespace:
        found = {"zimage": SimpleNamespace(status=status)} if status else {}
        return SimpleNamespace(applications=found)

    looks: list[SimpleNamespace | Exception] = [
        overview(ApplicationStatus.RUNNING),
        RuntimeError("no controller"),
        overview(None),  # of a controller that has just started
        overview(ApplicationStatus.DEPLOYING),
        overview(ApplicationStatus.DELETING),
    ]

    def status() -> SimpleNamespace:
        look = looks.pop(0)
        if isinstance(look, Exception):
            raise look
        return look

    context = SimpleNamespace(app_name="zimage")
    monkeypatch.setattr(application.serve, "get_replica_context", lambda: context)
    monkeypatch.setattr(application.serve, "status", status)
    monkeypatch.setattr(application, "_SECONDS_BETWEEN_LOOKS", 0.01)
    calls: list[int] = []
    application.call_when_deleted(lambda: calls.append(len(looks)))
    wait_until(lambda: calls)
    assert calls == [0]


@pytest.fixture
def deployment_of(in_process: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Deployment]:
    """The replicas of `serve --ray` with these options, if a machine had four GPUs."""
    applications: list[Application] = []

    def drawing(model: ServedModel, replicas: Replicas, timeout: float, _name: str) -> None:
        applications.append(drawing_application(model, replicas, timeout))
        raise zm.UnsupportedError("enough is known")

    monkeypatch.setattr(cluster, "joined", lambda *_: nullcontext())
    monkeypatch.setattr(cluster, "drawing", drawing)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"GPU": 4.0, "CPU": 32.0})
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": {"GPU": 4.0}}])

    def run(*options: object) -> Deployment:
        ran = in_process("serve", "--ray", "--port", 0, *options)
        assert "enough is known" in ran.stderr, ran.stderr
        return applications[-1]._bound_deployment

    return run


def test_gpus_of_a_replica_reach_its_model(deployment_of: Callable[..., Deployment]) -> None:
    for options, gpus, count in (((), 1, 4), (("--gpus-per-replica", 2), 2, 2)):
        deployment = deployment_of(*options)
        (model,) = deployment.init_args
        assert (model.device, model.gpus) == ("cuda", gpus)
        assert deployment.ray_actor_options["num_gpus"] == gpus
        assert deployment.num_replicas == count


def test_automatic_replicas_scale_as_the_guide_says(
    deployment_of: Callable[..., Deployment],
) -> None:
    row = next(x for x in text_of(GUIDE / "serving.md").splitlines() if "`--replicas auto`" in x)
    assert "half a minute of load" in row and "ten minutes without" in row
    for options, most in (((), 4), (("--gpus-per-replica", 2), 2)):
        scaling = deployment_of(
            "--replicas", "auto", *options
        )._deployment_config.autoscaling_config
        assert (scaling.min_replicas, scaling.max_replicas) == (1, most)
        assert scaling.initial_replicas in (None, 1)
        assert (scaling.upscale_delay_s, scaling.downscale_delay_s) == (30, 600)
        assert scaling.target_ongoing_requests == 1
    assert deployment_of()._deployment_config.autoscaling_config is None
