"""LiteLLM's client and its proxy in front of a real server.

They need the packages of tests/litellm.txt.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image

import zimage_mxfp8 as zm
from helpers.documents import GUIDE, block_with, run_in_python
from helpers.serving import Log, StubEngine, decoded, image_file, serving, wait_until

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else importing it asks a host for prices
litellm = pytest.importorskip("litellm", reason="litellm is not installed")

pytestmark = [
    pytest.mark.peer,
    pytest.mark.filterwarnings("ignore"),  # it warns of its own code
]

KEY = "s3cret"
FRONT_KEY = "sk-front"
FIELDS = {
    "n": 2,
    "seed": 3,
    "num_inference_steps": 4,
    "guidance_scale": 2.5,
    "negative_prompt": "a hound",
}


@pytest.fixture(params=["blocking", "async"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def address(engine: StubEngine, log: Log) -> Iterator[str]:
    with serving(engine, log, queue=0, api_key=KEY) as address:
        yield address
        engine.gate.set()


def ask(address: str, kind: str = "blocking", **fields: Any) -> Any:
    """Ask for images, or for changed ones if there is an image among the fields."""
    given = {
        "model": "openai/stub",
        "prompt": "a fox",
        "api_base": f"{address}/v1",
        "api_key": KEY,
        **fields,
    }
    what = "image_edit" if "image" in given else "image_generation"
    if kind == "blocking":
        return getattr(litellm, what)(**given)
    return asyncio.run(getattr(litellm, f"a{what}")(**given))


def colours(made: Any, size: tuple[int, int]) -> list[Any]:
    images = [decoded(each.b64_json) for each in made.data]
    assert [image.size for image in images] == [size] * len(images)
    return [image.getpixel((0, 0))[0] for image in images]


def check_fields(settings: zm.GenerationSettings) -> None:
    assert (settings.steps, settings.guidance, settings.negative_prompt) == (4, 2.5, "a hound")


def test_generate(address: str, kind: str, engine: StubEngine) -> None:
    made = ask(address, kind, size="96x32", **FIELDS)
    assert colours(made, (96, 32)) == [3, 4]
    assert (made.size, made.output_format) == ("96x32", "png")
    check_fields(engine.drawn[0].settings)


def test_formats(address: str) -> None:
    made = ask(address, output_format="jpeg", output_compression=50)
    assert decoded(made.data[0].b64_json).format == "JPEG"
    assert made.output_format == "jpeg"


def test_edit(address: str, kind: str, engine: StubEngine) -> None:
    made = ask(
        address,
        kind,
        image=image_file(),
        mask=image_file(mode="RGBA"),
        strength=0.5,
        size="64x48",
        **FIELDS,
    )
    assert colours(made, (64, 48)) == [3, 4]
    settings = engine.drawn[0].settings
    assert settings.init_image is not None and settings.mask_image is not None
    assert settings.strength == 0.5
    check_fields(settings)


def test_the_guide(engine: StubEngine, tmp_path: Path) -> None:
    example = block_with(GUIDE / "serving.md", "python", "import litellm")
    with serving(engine) as server:
        for shown, given in (("Z-Image-Turbo", "stub"), ("http://127.0.0.1:8000", server)):
            assert shown in example
            example = example.replace(shown, given)
        run_in_python(example, tmp_path)
    first, second = (request.settings for request in engine.drawn)
    assert (first.seed, second.strength) == (1, 0.7)
    assert second.init_image is not None
    assert Image.open(tmp_path / "night.png").size == (64, 48)


def test_adapters(engine: StubEngine, tmp_path: Path) -> None:
    ink, oil = tmp_path / "ink.safetensors", tmp_path / "oil.safetensors"
    ink.touch()
    oil.touch()
    with serving(engine, api_key=KEY, lora_dir=tmp_path) as address:
        for more in ({}, {"image": image_file()}):
            ask(address, lora=["oil", "ink"], **more)
            assert engine.drawn[-1].settings.loras == ((oil, 1.0), (ink, 1.0))
            ask(address, lora={"name": "ink", "scale": 0.5}, **more)
            assert engine.drawn[-1].settings.loras == ((ink, 0.5),)
        two = [{"name": "ink", "scale": 0.5}, {"name": "oil", "scale": 0.25}]
        ask(address, lora=two)
        assert engine.drawn[-1].settings.loras == ((ink, 0.5), (oil, 0.25))
        with pytest.raises(litellm.BadRequestError, match="as one text of JSON"):
            ask(address, lora=two, image=image_file())


def test_response_format(address: str) -> None:
    """It refuses the field for a model that it does not know."""
    with pytest.raises(litellm.UnsupportedParamsError, match="response_format"):
        ask(address, response_format="b64_json")
    assert ask(address, response_format="b64_json", drop_params=True).data[0].b64_json


def test_models(address: str) -> None:
    assert litellm.get_valid_models(
        check_provider_endpoint=True,
        custom_llm_provider="openai",
        api_base=f"{address}/v1",
        api_key=KEY,
    ) == ["stub"]


@pytest.mark.parametrize("more", [{}, {"image": image_file()}], ids=["generate", "edit"])
def test_exceptions(address: str, kind: str, engine: StubEngine, more: dict[str, Any]) -> None:
    with pytest.raises(litellm.BadRequestError, match="size must be a multiple of 16"):
        ask(address, kind, size="65x64", **more)
    with pytest.raises(litellm.NotFoundError, match="this server has stub"):
        ask(address, kind, model="openai/none", **more)
    with pytest.raises(litellm.AuthenticationError, match="the API key is missing or wrong"):
        ask(address, kind, api_key="other", **more)
    assert not engine.drawn
    engine.failure = zm.GenerationError("the image became NaN", 1)
    with pytest.raises(litellm.InternalServerError, match="became NaN"):
        ask(address, kind, **more)
    assert len(engine.drawn) == 1  # it would fail again


def test_stream(address: str, engine: StubEngine) -> None:
    """As the guide says: it fails after the image was drawn."""
    with pytest.raises(litellm.InternalServerError, match="model_dump"):
        ask(address, stream=True)
    assert engine.drawn


def test_the_seed_is_in_the_file(address: str) -> None:
    made = ask(address)
    image = decoded(made.data[0].b64_json)
    assert isinstance(json.loads(image.text["zimage-mxfp8"])["seed"], int)
    assert "seed" not in made.model_dump_json()


def test_refusals_of_a_full_queue(address: str, kind: str, engine: StubEngine, log: Log) -> None:
    engine.gate.clear()

    def refusals() -> int:
        return sum(line["status"] == 429 for line in log.lines())

    with ThreadPoolExecutor(1) as others:
        running = others.submit(ask, address)
        wait_until(lambda: engine.drawn)
        with pytest.raises(litellm.RateLimitError, match="too many requests wait"):
            ask(address, kind)
        wait_until(lambda: refusals() == 3)  # it tries again twice
        with pytest.raises(litellm.RateLimitError, match="too many requests wait"):
            ask(address, kind, image=image_file())
        wait_until(lambda: refusals() == 4)
        engine.gate.set()
        assert running.result(30).data


def test_a_deadline(engine: StubEngine, kind: str) -> None:
    engine.gate.clear()
    with serving(engine, api_key=KEY, timeout=0.2) as address:
        with pytest.raises(litellm.Timeout, match="the drawing was not finished"):
            ask(address, kind)
        engine.gate.set()


def test_a_cancelled_call_stops_its_drawing(address: str, engine: StubEngine, log: Log) -> None:
    engine.pause_at = 5

    async def cancelled() -> None:
        call = asyncio.create_task(
            litellm.aimage_generation(
                model="openai/stub",
                prompt="a",
                api_base=f"{address}/v1",
                api_key=KEY,
                num_inference_steps=1000,
            )
        )
        while engine.steps < 4:
            await asyncio.sleep(0.01)
        call.cancel()
        with suppress(asyncio.CancelledError):
            await call

    asyncio.run(cancelled())
    wait_until(lambda: [line for line in log.lines() if line["status"] == 499])
    engine.pause_at = None
    engine.gate.set()
    assert ask(address, num_inference_steps=1).data
    assert engine.steps == 4 + 1 + 1  # the step that had begun, and the other's


# ---- the proxy, asked by openai-python


@dataclass(frozen=True)
class Front:
    """The proxy in front of a server.

    Attributes:
        address: of the proxy.
        client: for the proxy.
        engine: of the server.
        loras: the server's folder of adapters.
    """

    address: str
    client: openai.OpenAI
    engine: StubEngine
    loras: Path


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    folder, engine = tmp_path_factory.mktemp("proxy"), StubEngine()
    with serving(engine, api_key=KEY, lora_dir=folder) as server:
        config = block_with(GUIDE / "serving.md", "yaml", "model_list")
        for shown, given in (
            ("openai/Z-Image-Turbo", "openai/stub"),
            ("http://127.0.0.1:8000", server),
            ("api_key: none", f"api_key: {KEY}"),
        ):
            assert shown in config
            config = config.replace(shown, given)
        with running_proxy(config, folder) as proxy:
            client = openai.OpenAI(base_url=f"{proxy}/v1", api_key=FRONT_KEY, max_retries=0)
            with client:
                yield Front(proxy, client, engine, folder)


@contextmanager
def running_proxy(config: str, folder: Path) -> Iterator[str]:
    """Run the proxy; yields its address when it answers."""
    (folder / "config.yaml").write_text(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    program = "from litellm_cli.main import proxy_server; proxy_server()"
    options = ["--config", "config.yaml", "--host", "127.0.0.1", "--port", str(port)]
    log = folder / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", program, *options],
            cwd=folder,
            env={**os.environ, "LITELLM_MASTER_KEY": FRONT_KEY},
            stdout=file,
            stderr=file,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 90
        while not answers(f"{address}/health/liveliness"):
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < end, log.read_text()[-4000:]
            time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait(30)


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5):
            return True
    except OSError:
        return False


def test_proxy_generate(front: Front) -> None:
    assert [model.id for model in front.client.models.list()] == ["z-image"]
    made = front.client.images.generate(
        model="z-image",
        prompt="a fox",
        n=2,
        size="96x32",  # type: ignore[call-overload]
        extra_body={"seed": 3, "num_inference_steps": 4},
    )
    assert colours(made, (96, 32)) == [3, 4]
    assert front.engine.drawn[-1].settings.steps == 4


def test_proxy_generate_as_open_webui_asks(front: Front) -> None:
    made = front.client.images.generate(
        model="z-image",
        prompt="a fox",
        n=1,
        size="64x64",  # type: ignore[call-overload]
        response_format="b64_json",
    )
    assert decoded(made.data[0].b64_json).size == (64, 64)


def test_proxy_edit(front: Front) -> None:
    ink = front.loras / "ink.safetensors"
    ink.touch()
    made = front.client.images.edit(
        model="z-image",
        image=("a.png", image_file()),
        mask=("m.png", image_file(mode="RGBA")),
        prompt="a",
        n=2,
        extra_body={"seed": 3, "strength": 0.5, "lora": {"name": "ink", "scale": 0.5}},
    )
    assert colours(made, (64, 48)) == [3, 4]
    settings = front.engine.drawn[-1].settings
    assert settings.init_image is not None and settings.mask_image is not None
    assert (settings.strength, settings.loras) == (0.5, ((ink, 0.5),))


def test_proxy_health(front: Front) -> None:
    drawn = len(front.engine.drawn)
    headers = {"Authorization": f"Bearer {FRONT_KEY}"}
    request = urllib.request.Request(f"{front.address}/health", headers=headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        found = json.load(answer)
    assert (found["healthy_count"], found["unhealthy_count"]) == (1, 0)
    assert len(front.engine.drawn) == drawn + 1  # as the guide warns


def test_proxy_exceptions(front: Front) -> None:
    drawn = len(front.engine.drawn)
    with pytest.raises(openai.BadRequestError, match="size must be a multiple of 16"):
        front.client.images.generate(model="z-image", prompt="a", size="65x64")  # type: ignore[call-overload]
    with pytest.raises(openai.BadRequestError, match="image must be one image"):
        front.client.images.edit(model="z-image", image=[image_file()] * 2, prompt="a")
    assert len(front.engine.drawn) == drawn
