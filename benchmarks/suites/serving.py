"""Images per second and latency of `zimage-mxfp8 serve` with several replicas, seen by clients.

First two clients per replica ask for one image after another, which gives the capacity. Then
requests come at random times (`random_times`), at shares of that capacity: `p50` and `p99` are
seconds until the image is there, of those that were not refused because the queue was full. 0
replicas is the server without Ray. Needs the extra `ray`; all runs on one machine.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from ..report import Report

COLUMNS = {
    "replicas": "0: without Ray",
    "load": "share of the capacity",
    "rate": "images/s",
    "offered": "requests/s",
    "per_replica": "of the rate of one replica",
    "p50": "s",
    "p99": "s",
    "refused": "share of the requests",
    "requests": "",
    "gpu_mib": "MiB used, of each GPU",
}
_MAX_CLIENTS = 256


@dataclass(frozen=True)
class Answer:
    """When a request was sent and answered, in seconds, and its status."""

    begin: float
    end: float
    status: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--replicas", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--side", type=int, default=1024, help="pixels of the images' sides")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--loads", type=float, nargs="*", default=[0.5, 0.8, 1.2])
    parser.add_argument("--seconds", type=float, default=60, help="of each load")
    parser.add_argument(
        "--options", default="", help="of the server: '--model-dir DIR --transformer FILE ...'"
    )


@contextmanager
def served(replicas: int, options: list[str]) -> Iterator[str]:
    """Start a server; yield its address."""
    ray = ["--ray", "--replicas", str(replicas)] if replicas else []
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "zimage_mxfp8.cli.main", "serve", "--port", "0", *ray, *options],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if " is served at " not in line:
                log.seek(0)
                sys.exit(f"the server did not start:\n{log.read()}")
            yield line.rpartition(" ")[2].strip()
        finally:
            process.terminate()
            process.wait()


class Clients:
    """Sends requests, each with a seed of its own."""

    def __init__(self, address: str, side: int, steps: int) -> None:
        self._url = f"{address}/v1/images/generations"
        self._body = {"prompt": "a red fox in snow", "size": f"{side}x{side}", "steps": steps}
        self._seeds = iter(range(1 << 30))
        self._lock = threading.Lock()

    def ask(self) -> Answer:
        with self._lock:
            seed = next(self._seeds)
        body = json.dumps({**self._body, "seed": seed}).encode()
        request = urllib.request.Request(self._url, body, {"Content-Type": "application/json"})
        begin = time.monotonic()
        try:
            with urllib.request.urlopen(request, timeout=600) as response:
                response.read()
                status = response.status
        except urllib.error.HTTPError as error:
            status = error.code
        if status not in (200, 429):
            raise RuntimeError(f"a request was answered with status {status}")
        return Answer(begin, time.monotonic(), status)

    def in_turns(self, count: int, seconds: float) -> list[Answer]:
        """Have clients ask again and again for a while."""
        end = time.monotonic() + seconds

        def one(_: int) -> list[Answer]:
            answers = [self.ask()]
            while time.monotonic() < end:
                answers.append(self.ask())
            return answers

        with ThreadPoolExecutor(count) as pool:
            return [answer for answers in pool.map(one, range(count)) for answer in answers]

    def at_random(self, rate: float, seconds: float) -> list[Answer]:
        """Send requests at `random_times`, whether or not earlier ones are answered."""
        begin = time.monotonic()
        asked = []
        with ThreadPoolExecutor(_MAX_CLIENTS) as pool:
            for coming in random_times(rate, seconds):
                time.sleep(max(0.0, begin + coming - time.monotonic()))
                asked.append(pool.submit(self.ask))
        return [each.result() for each in asked]


def random_times(rate: float, seconds: float) -> list[float]:
    """Return when requests come, in seconds from the beginning, the same in every run.

    Their number is exactly that of the rate, so that the load is the one that was asked for. The
    times are independent and uniform, which is a Poisson process given its number of events.
    """
    draws = random.Random(0)
    return sorted(draws.uniform(0, seconds) for _ in range(round(rate * seconds)))


def rate_of(answers: list[Answer], warm_up: int) -> float:
    """Return images per second, from the end of a number of first images on."""
    ends = sorted(answer.end for answer in answers if answer.status == 200)[warm_up:]
    if len(ends) < 2:
        sys.exit("too few images in the time: raise --seconds")
    return (len(ends) - 1) / (ends[-1] - ends[0])


def latencies(answers: list[Answer]) -> dict[str, float]:
    times = [answer.end - answer.begin for answer in answers if answer.status == 200]
    if len(times) < 2:
        sys.exit("too few images in the time: raise --seconds")
    percent = statistics.quantiles(times, n=100, method="inclusive")
    return {
        "p50": percent[49],
        "p99": percent[98],
        "refused": 1 - len(times) / len(answers),
        "requests": len(answers),
    }


def gpu_memory() -> dict[str, str]:
    """Return the used memory of each GPU, if there are any."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"gpu_mib": " ".join(result.stdout.split())}


def run(arguments: argparse.Namespace, report: Report) -> None:
    of_one: float | None = None
    for replicas in arguments.replicas:
        places = max(1, replicas)
        with served(replicas, arguments.options.split()) as address:
            clients = Clients(address, arguments.side, arguments.steps)
            answers = clients.in_turns(2 * places, arguments.seconds)
            capacity = rate_of(answers, places)
            of_one = capacity if places == 1 else of_one
            share = {} if of_one is None else {"per_replica": capacity / places / of_one}
            report.add(
                replicas=replicas,
                load="two clients per replica",
                rate=capacity,
                **share,
                **latencies(answers),
                **gpu_memory(),
            )
            for load in arguments.loads:
                answers = clients.at_random(load * capacity, arguments.seconds)
                offered = len(answers) / arguments.seconds
                report.add(replicas=replicas, load=load, offered=offered, **latencies(answers))
