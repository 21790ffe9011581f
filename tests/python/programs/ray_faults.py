"""Kill processes of a cluster under load, and check every answer of the server in front of it.

    python tests/python/programs/ray_faults.py

The cluster is two raylets of Ray on this machine, with one CPU each. The server draws with the
small trained model. Every request must end within a minute, with the image of its seed or with an
error that tells the client to come again. Takes some four minutes on two cores.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import hashlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import ray
from ray import serve
from ray.cluster_utils import Cluster

from zimage_mxfp8.generation.small_model import FOLDER, TRANSFORMER
from zimage_mxfp8.server.ray import BuildArguments, build

KEY = "a-key"
STORE = 100 << 20  # bytes of each node's shared memory


class Answers:
    """Clients of a server, and what they got.

    Attributes:
        counts: number of answers by status; 0 for a lost connection.
        images: hash of the image of each seed.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.counts: Counter[int] = Counter()
        self.images: dict[int, str] = {}

    async def ask(self, client: openai.AsyncOpenAI, seed: int) -> None:
        try:
            made = await client.images.generate(prompt="a red circle", extra_body={"seed": seed})
        except openai.APIStatusError as error:
            self.counts[error.status_code] += 1
            return
        except openai.APITimeoutError:
            raise AssertionError(f"the request with seed {seed} hangs") from None
        except openai.APIConnectionError:
            self.counts[0] += 1
            return
        self.counts[200] += 1
        digest = hashlib.sha256(base64.b64decode(made.data[0].b64_json)).hexdigest()
        assert self.images.setdefault(seed, digest) == digest, f"seed {seed} has two images"

    def together(self, count: int, meanwhile: Callable[[], object] = lambda: None) -> Counter[int]:
        """Have so many clients ask at once; return the counts of their answers."""

        async def work() -> None:
            async with openai.AsyncOpenAI(
                base_url=f"{self.address}/v1", api_key=KEY, max_retries=0, timeout=60
            ) as client:
                asked = [asyncio.create_task(self.ask(client, seed)) for seed in range(count)]
                await asyncio.to_thread(meanwhile)
                await asyncio.gather(*asked)

        self.counts.clear()
        asyncio.run(work())
        return self.counts


def replicas(cluster: Cluster, deployment: str) -> dict[int, int]:
    """Return the processes of a deployment, with the raylet that each belongs to."""
    raylets = {raylet(node) for node in cluster.list_all_nodes()}
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        title, parent = title_of(folder), parent_of(folder)
        is_replica = title.startswith("ray::ServeReplica:") and f":{deployment}" in title
        if is_replica and parent in raylets:
            found[int(folder.name)] = parent
    return found


def title_of(process: Path) -> str:
    """Return the command line of a process by its folder in /proc; "" if it has ended."""
    try:
        return (process / "cmdline").read_bytes().decode().rstrip("\0 ")
    except OSError:
        return ""


def parent_of(process: Path) -> int:
    """Return the parent of a process by its folder in /proc; 0 if it has ended."""
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def raylet(node: object) -> int:
    return node.all_processes["raylet"][0].process.pid  # type: ignore[attr-defined, no-any-return]


def wait_for(what: str, condition: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.2)


def start(address: str, *options: object, **more: int) -> subprocess.Popen[str]:
    """Start the command in a cluster."""
    words = ["serve", "--ray", "--device", "cpu", "--dtype", "float32", "--queue", "8"]
    return subprocess.Popen(
        [sys.executable, "-m", "zimage_mxfp8.cli.main", *words, *map(str, options)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "RAY_ADDRESS": address, "ZIMAGE_MXFP8_API_KEY": KEY},
        **more,
    )


@contextmanager
def served(address: str, *options: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command in a cluster; yields its process and the address that it serves."""
    process = start(address, *options)
    try:
        line = process.stdout.readline()  # type: ignore[union-attr]
        found = re.fullmatch(r"small_model is served at (http://127\.0\.0\.1:\d+)\n", line)
        assert found, f"the server does not start: {line!r}"
        yield process, found[1]
    finally:
        process.kill()
        process.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def check(what: str, counts: Counter[int], allowed: set[int], least: int = 1) -> None:
    print(f"{what}: {dict(counts)}", flush=True)
    assert set(counts) <= allowed and counts[200] >= least, what


def check_a_damaged_model(cluster: Cluster) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        shutil.copytree(FOLDER, model)
        (file,) = (model / "vae").glob("*.safetensors")  # which the server itself does not read
        file.write_bytes(file.read_bytes()[:-1])
        options = ("--model-dir", model, "--transformer", TRANSFORMER, "--replicas", 1)
        process = start(cluster.address, *options, "--port", 0, stderr=subprocess.PIPE)
        out, err = process.communicate(timeout=120)
    print(f"a damaged model: {err.splitlines()[-1]}", flush=True)
    assert (process.returncode, out) == (1, "")
    assert "no replica can start" in err and str(file) in err.splitlines()[-1]


def check_command(cluster: Cluster) -> None:
    second = cluster.add_node(num_cpus=1, object_store_memory=STORE)
    port = free_port()
    with served(cluster.address, "--replicas", 2, "--port", port) as (process, address):
        answers = Answers(address)
        check("50 clients at once", answers.together(50), {200, 429}, 10)

        def kill_replica() -> None:
            time.sleep(0.5)
            os.kill(next(iter(replicas(cluster, "Replica"))), signal.SIGKILL)

        check("kill -9 of a replica", answers.together(10, kill_replica), {200, 429}, 10)
        both = {raylet(node) for node in cluster.list_all_nodes()}
        wait_for("another replica", lambda: set(replicas(cluster, "Replica").values()) == both)

        def kill_raylet() -> None:
            time.sleep(0.5)
            os.kill(raylet(second), signal.SIGKILL)

        check("kill -9 of a raylet", answers.together(10, kill_raylet), {200, 429, 503}, 8)
        check("on the other raylet", answers.together(3), {200}, 3)
        cluster.remove_node(second, allow_graceful=False)
        cluster.add_node(num_cpus=1, object_store_memory=STORE)
        process.kill()  # it leaves its replicas behind
        process.wait()
    with served(cluster.address, "--replicas", 2, "--port", port) as (process, address):
        answers.address = address
        check("kill -9 of the server, and a new one", answers.together(4), {200}, 4)

        def stop() -> None:
            time.sleep(0.5)
            process.send_signal(signal.SIGTERM)

        check("SIGTERM", answers.together(6, stop), {200, 503})
        assert process.wait(60) == 0
    wait_for("the end of the replicas", lambda: not replicas(cluster, "Replica"))


def check_own_raylet() -> None:
    """The raylet that the server itself is connected to: without it, it can only end."""
    with served("local", "--replicas", "auto", "--port", 0) as (process, address):
        check("--replicas auto", Answers(address).together(1), {200})
        (own,) = (
            int(folder.name)
            for folder in Path("/proc").glob("[0-9]*")
            if parent_of(folder) == process.pid and "raylet/raylet" in title_of(folder)
        )

        def kill() -> None:
            time.sleep(0.5)
            os.kill(own, signal.SIGKILL)

        check("kill -9 of the server's own raylet", Answers(address).together(4, kill), {0, 200}, 0)
        assert process.wait(60) == 1


def check_application(cluster: Cluster) -> None:
    port = free_port()
    os.environ["ZIMAGE_MXFP8_API_KEY"] = KEY
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(build(BuildArguments(device="cpu", dtype="float32", replicas=1, max_replicas=2)))
    answers = Answers(f"http://127.0.0.1:{port}")
    check("an application of Ray Serve", answers.together(4), {200}, 4)

    def kill_front() -> None:
        time.sleep(0.5)
        os.kill(next(iter(replicas(cluster, "Front"))), signal.SIGKILL)

    check("kill -9 of the front", answers.together(4, kill_front), {200, 500}, 0)
    wait_for("another front", lambda: answers.together(1)[200] == 1)

    def is_larger() -> bool:
        answers.together(4)
        return len(replicas(cluster, "Replica")) == 2

    wait_for("a second replica under load", is_larger)

    def delete() -> None:
        time.sleep(0.5)
        serve.delete("default", _blocking=False)

    counts = answers.together(10, delete)
    check("an application that is deleted", counts, {200, 503})
    assert counts[503], "nothing waited when the application was deleted"
    wait_for("the end of the front", lambda: not replicas(cluster, "Front"))
    serve.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    check_own_raylet()
    head = {"num_cpus": 1, "object_store_memory": STORE, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        check_a_damaged_model(cluster)
        check_command(cluster)
        ray.init(address=cluster.address, log_to_driver=False)
        check_application(cluster)
    finally:
        ray.shutdown()
        cluster.shutdown()
    print("every request was answered")


if __name__ == "__main__":
    main()
