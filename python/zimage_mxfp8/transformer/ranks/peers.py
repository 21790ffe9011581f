"""Rank 0's view of the other ranks: their processes, and what it tells them."""

from __future__ import annotations

import itertools
import json
import queue
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from ...errors import RankError, UnsupportedError
from ..compute import Compute
from ..control import ZImageControlNet
from ..inputs import ForwardInputs
from .group import RankGroup
from .messages import (
    ChangeAdapters,
    Failed,
    Forward,
    Join,
    Load,
    LoadControlNet,
    packed_nbytes,
    receive,
    send,
    unpack,
)

_SECONDS_TO_END = 5  # for processes whose input is closed
_SECONDS_TO_NOTICE = 10  # from an error in an exchange to the end of the process that caused it
_RUN = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from zimage_mxfp8.transformer.ranks.worker import main; main(int(sys.argv[2]))"
)


class Peers:
    """The processes of ranks 1 and up, which do what rank 0 does.

    They are started as programs of their own, not by `multiprocessing`, which would run the
    caller's script again. They end with this object, and with its process.
    """

    def __init__(
        self,
        path: Path,
        devices: Sequence[torch.device],
        compute: Compute,
        dtype: torch.dtype,
        *,
        cuda_graphs: bool,
    ) -> None:
        """Start the processes, which load the transformer in the background.

        Args:
            path: the checkpoint.
            devices: of all ranks.
            compute: the compute mode.
            dtype: of everything that is not 8 bits wide.
            cuda_graphs: whether to run shapes through CUDA graphs.
        """
        self._directory = Path(tempfile.mkdtemp(prefix="zimage-mxfp8-ranks-"))
        self._devices = list(devices)
        self._processes = [_Process(rank) for rank in range(1, len(devices))]
        self._watch = _Watch(self._processes, self._devices)
        self._end = weakref.finalize(self, _end, self._watch, self._processes, self._directory)
        self._turn = threading.RLock()
        self._group: RankGroup | None = None
        self._numbers = itertools.count()
        self._nets: weakref.WeakKeyDictionary[ZImageControlNet, tuple[object, int]]
        self._nets = weakref.WeakKeyDictionary()
        for process in self._processes:
            self._send(
                process,
                Load(
                    path=path,
                    device=devices[process.rank],
                    rank=process.rank,
                    size=len(devices),
                    compute=compute,
                    dtype=dtype,
                    cuda_graphs=cuda_graphs,
                    store=self._directory / "store",
                    threads=max(1, torch.get_num_threads() // len(devices)),
                ),
            )
        threading.Thread(target=self._watch.run, daemon=True).start()

    def join(self) -> RankGroup:
        """Wait until all have loaded the transformer, and connect with them.

        Raises:
            Error: a process failed.
        """
        self._wait_for_answers()
        self._tell(Join())
        size, device = len(self._devices), self._devices[0]
        with self._errors_of_ranks():
            self._group = RankGroup.connect(self._directory / "store", 0, size, device)
        self._watch.group = self._group
        return self._group

    def check(self) -> None:
        """Do nothing if all ranks are alive.

        Raises:
            RankError: one has ended.
        """
        if self._watch.failure is not None:
            raise self._watch.failure

    def change_adapters(self, method: str, *arguments: Any) -> None:
        """Call a method of `LoraSet` on all of them.

        Raises:
            Error: a process failed.
        """
        with self._turn:
            self._tell(ChangeAdapters(method, arguments))
            self._wait_for_answers()

    @contextmanager
    def forward(
        self, inputs: ForwardInputs, nets: Sequence[ZImageControlNet], scale: float
    ) -> Iterator[None]:
        """Let them compute their shares of a forward, while the block computes that of rank 0.

        Args:
            inputs: all inputs, on rank 0's device.
            nets: the ControlNets.
            scale: of the adapters' weights.

        Raises:
            RankError: a process has ended.
        """
        assert self._group is not None
        with self._turn:
            self.check()
            numbers = tuple(self._number(net) for net in nets)
            kept = frozenset(number for _, number in self._nets.values())
            like = inputs.map(lambda tensor: torch.empty_like(tensor, device="meta"))
            with self._errors_of_ranks():
                self._tell(Forward(like, numbers, kept, scale))
                nbytes = packed_nbytes(inputs)
                buffer = torch.empty(nbytes, dtype=torch.uint8, device=self._devices[0])
                unpack(buffer, like).copy_(inputs)
                self._group.broadcast_(buffer)
                yield

    def end(self) -> None:
        """End the processes."""
        self._end()

    def _number(self, net: ZImageControlNet) -> int:
        """Return the number of a ControlNet, which the processes load if they have not yet."""
        token, number = self._nets.get(net, (None, -1))
        if token is not net.weights_token:
            if net.path is None:
                raise UnsupportedError(
                    "a ControlNet that was not loaded from a file cannot run on several devices",
                    "load it with `ZImageControlNet.from_checkpoint`",
                )
            number = next(self._numbers)
            self._tell(LoadControlNet(number, net.path, net.compute))
            self._wait_for_answers()
            self._nets[net] = net.weights_token, number
        return number

    def _tell(self, order: Any) -> None:
        self.check()
        for process in self._processes:
            self._send(process, order)

    def _send(self, process: _Process, order: Any) -> None:
        with suppress(OSError):  # it has ended, which the watch tells
            send(process.connection, order)

    def _wait_for_answers(self) -> None:
        for process in self._processes:
            if isinstance(process.answers.get(), Failed):
                raise self._watch.cause()

    @contextmanager
    def _errors_of_ranks(self) -> Iterator[None]:
        """Let an error on rank 0 end the others, which would wait for it; tell their errors."""
        try:
            yield
        except BaseException as error:
            if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
                self._watch.noticed.wait(_SECONDS_TO_NOTICE)  # the other side of an exchange
            if (failure := self._watch.failure) is not None:
                raise failure from None
            self._watch.fail(f"rank 0 had an error ({type(error).__name__})")
            raise


class _Process:
    """A process with the connection to it."""

    def __init__(self, rank: int) -> None:
        ours, theirs = socket.socketpair()
        self.rank = rank
        self.connection = Connection(ours.detach())
        self.answers: queue.Queue[Any] = queue.Queue()
        with theirs:
            self.program = subprocess.Popen(
                [
                    *(sys.executable, "-W", "ignore", "-c", _RUN),
                    *(json.dumps(sys.path), str(theirs.fileno())),
                ],
                stdin=subprocess.PIPE,  # its end tells the process that this one has ended
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for this process, which then ends the others
            )

    def end(self) -> None:
        """Wait for the end of the program, whose input is closed."""
        try:
            self.program.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self.program.kill()
            self.program.wait()


class _Watch:
    """Receives the answers of processes, and notices when one has ended.

    Attributes:
        failure: why the ranks can compute no more; None while they can.
        noticed: set with `failure`.
        group: exchanges to abort then.
    """

    def __init__(self, processes: Sequence[_Process], devices: Sequence[torch.device]) -> None:
        self.failure: RankError | None = None
        self.noticed = threading.Event()
        self.group: RankGroup | None = None
        self._processes = processes
        self._devices = devices
        self._is_ending = False
        self._error: Exception | None = None
        self._lock = threading.Lock()

    def run(self) -> None:
        """Receive until the processes have ended."""
        waiting = {process.connection: process for process in self._processes}
        while waiting:
            for connection in wait(list(waiting)):
                process = waiting[connection]  # type: ignore[index]
                try:
                    answer = receive(process.connection)
                except (EOFError, OSError):
                    del waiting[process.connection]
                    self._ended(process)
                    continue
                if isinstance(answer, Failed):
                    problem = f"{self._name(process)} failed: {answer.problem}"
                    self.fail(problem, answer.error)
                else:
                    process.answers.put(answer)

    def end(self) -> None:
        """Expect that the processes end."""
        with self._lock:
            self._is_ending = True

    def cause(self) -> Exception:
        """Return the error of the rank that failed first, if it is one of this package's."""
        self.noticed.wait()
        assert self.failure is not None
        return self._error or self.failure

    def fail(self, problem: str, error: Exception | None = None) -> None:
        """Remember why the ranks can compute no more, and end all exchanges."""
        with self._lock:
            if self.failure is not None or self._is_ending:
                return
            self.failure = RankError(
                f"the transformer on {len(self._devices)} devices has stopped: {problem}",
                "load it again",
            )
            self._error = error
        self.noticed.set()
        for process in self._processes:
            process.program.kill()
            process.answers.put(Failed(error, problem))
        if self.group is not None and self._devices[0].type == "cuda":
            self.group.abort()

    def _ended(self, process: _Process) -> None:
        code = process.program.wait()
        how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        self.fail(f"{self._name(process)} {how}")

    def _name(self, process: _Process) -> str:
        return f"rank {process.rank} ({self._devices[process.rank]})"


def _end(watch: _Watch, processes: Sequence[_Process], directory: Path) -> None:
    watch.end()
    for process in processes:
        assert process.program.stdin is not None
        process.program.stdin.close()
    for process in processes:
        process.end()
    shutil.rmtree(directory, ignore_errors=True)
