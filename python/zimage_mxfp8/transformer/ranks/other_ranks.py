"""Rank 0's view of the other ranks: their processes, and what it tells them."""

from __future__ import annotations

import copy
import itertools
import json
import os
import queue
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from ...errors import DeviceWarning, Error, RankError, UnsupportedError
from ...system.devices import multiprocessors
from ...zimage.config import ZImageConfig
from ..compute import Compute
from ..control import Control, ZImageControlNet
from ..graphs import GraphCache
from ..inputs import ForwardInputs
from ..model_file import ModelFile
from .group import RankGroup
from .messages import (
    ChangeAdapters,
    Failed,
    Forward,
    Join,
    Load,
    LoadControlNet,
    packed_nbytes,
    pickled,
    receive,
    unpack,
)

_SECONDS_TO_END = 5  # for processes whose input is closed
_SECONDS_TO_FINISH = 60  # for work that rank 0 has given to its device
_SECONDS_BETWEEN_LOOKS = 0.2
_SECONDS_TO_NOTICE = 10  # from an error in an exchange to the end of the process that caused it
_RUN = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from zimage_mxfp8.transformer.ranks.rank_process import main; main(int(sys.argv[2]))"
)


class OtherRanks:
    """The processes of ranks 1 and up, which do what rank 0 does.

    They are started as programs of their own, not by `multiprocessing`, which would run the
    caller's script again. They end with this object, and with its process.
    """

    def __init__(
        self,
        file: ModelFile[ZImageConfig],
        devices: Sequence[torch.device],
        compute: Compute,
        dtype: torch.dtype,
        *,
        cuda_graphs: bool,
    ) -> None:
        """Start the processes, which load the transformer in the background.

        Args:
            file: the checkpoint.
            devices: of all ranks.
            compute: the compute mode.
            dtype: of everything that is not 8 bits wide.
            cuda_graphs: whether to run shapes through CUDA graphs.
        """
        self._devices = list(devices)
        self._multiprocessors = min(multiprocessors(device) for device in devices)
        self._parts = _Parts(Path(tempfile.mkdtemp(prefix="zimage-mxfp8-ranks-")), devices[0])
        self._watch = _Watch(self._parts, self._devices)
        self._end = weakref.finalize(self, _end, self._watch, self._parts)
        self._turn = threading.RLock()
        self._has_turn = False
        self._numbers = itertools.count()
        self._nets: weakref.WeakKeyDictionary[ZImageControlNet, tuple[object, int]]
        self._nets = weakref.WeakKeyDictionary()
        state = file.state()
        for rank in range(1, len(devices)):
            process = _Process(rank)
            self._parts.processes.append(process)
            order = Load(
                path=Path(file.path).absolute(),
                state=state,
                device=devices[rank],
                rank=rank,
                size=len(devices),
                compute=compute,
                dtype=dtype,
                cuda_graphs=cuda_graphs,
                store=self._parts.store,
                threads=max(1, torch.get_num_threads() // len(devices)),
                multiprocessors=self._multiprocessors,
            )
            process.send(pickled(order))
        threading.Thread(target=self._watch.run, daemon=True).start()

    def join(self) -> RankGroup:
        """Wait until all have loaded the transformer, and connect with them.

        Raises:
            Error: a process failed.
        """
        with self._errors_of_ranks():
            self._wait_for_answers()
            self._tell(Join())
            self._parts.group = self._connected()
        if self._devices[0].type == "cuda" and not self._parts.group.reaches_peers:
            warnings.warn(
                "these GPUs cannot write to each other's memory, so NCCL sends keys and values, "
                "which takes longer",
                DeviceWarning,
                stacklevel=3,
            )
        return self._parts.group

    def _connected(self) -> RankGroup:
        """Connect with the others, in a thread, because torch would wait for one that has died."""
        results: queue.SimpleQueue[RankGroup | BaseException] = queue.SimpleQueue()
        aborted = threading.Event()
        arguments = 0, len(self._devices), self._devices[0], aborted, self._multiprocessors

        def connect(store: Path) -> None:
            try:
                results.put(RankGroup.connect(store, *arguments))
            except BaseException as error:
                results.put(error)

        threading.Thread(target=connect, args=[self._parts.store], daemon=True).start()
        while True:
            try:
                result = results.get(timeout=_SECONDS_BETWEEN_LOOKS)
            except queue.Empty:
                try:
                    self.check()
                except RankError:
                    aborted.set()
                    raise
                continue
            if isinstance(result, BaseException):
                raise result
            return result

    def use_graphs(self, graphs: GraphCache) -> None:
        """Take the graphs of rank 0, which are dropped before the exchanges in them end."""
        self._parts.graphs = graphs

    def check(self) -> None:
        """Do nothing if all ranks are alive.

        Raises:
            RankError: one has ended.
        """
        if self._watch.failure:
            raise self._lost()

    @contextmanager
    def change_adapters(self, method: str, *arguments: Any) -> Iterator[None]:
        """Call a method of `LoraSet` on all of them, after the block has done so on rank 0.

        An error in the block changes nothing on the others.

        Raises:
            Error: a process failed.
        """
        order = pickled(ChangeAdapters(method, arguments))
        with self._taking_turn():
            yield
            with self._errors_of_ranks():
                self._tell_pickled(order)
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
        group = self._parts.group
        assert group is not None
        with self._taking_turn(), self._errors_of_ranks():
            numbers = tuple(self._number(net) for net in nets)
            kept = frozenset(number for _, number in self._nets.values())
            like = inputs.map(lambda tensor: torch.empty_like(tensor, device="meta"))
            self._tell(Forward(like, numbers, kept, scale))
            nbytes = packed_nbytes(inputs)
            buffer = torch.empty(nbytes, dtype=torch.uint8, device=self._devices[0])
            unpack(buffer, like).copy_(inputs)
            group.broadcast_(buffer)
            try:
                yield
            finally:
                self._parts.launched.mark()

    def end(self) -> None:
        """End the processes."""
        self._end()

    @contextmanager
    def _taking_turn(self) -> Iterator[None]:
        with self._turn:
            if self._has_turn:
                raise UnsupportedError(
                    "a transformer on several devices cannot be called, or given adapters, within "
                    "one of its own forwards (in a hook)",
                    "do it after the forward",
                )
            self._has_turn = True
            try:
                self.check()
                yield
            finally:
                self._has_turn = False

    def _number(self, net: ZImageControlNet) -> int:
        """Return the number of a ControlNet, which the processes load if they have not yet."""
        token, number = self._nets.get(net, (None, -1))
        if token is not net.weights_token:
            assert net.path is not None  # `check_shared`
            number = next(self._numbers)
            self._tell(LoadControlNet(number, net.path, net.compute))
            self._wait_for_answers()
            self._nets[net] = net.weights_token, number
        return number

    def _tell(self, order: Any) -> None:
        self._tell_pickled(pickled(order))

    def _tell_pickled(self, order: bytes) -> None:
        self.check()
        for process in self._parts.processes:
            process.send(order)

    def _wait_for_answers(self) -> None:
        for process in self._parts.processes:
            if isinstance(process.answers.get(), Failed):
                raise self._watch.cause()

    @contextmanager
    def _errors_of_ranks(self) -> Iterator[None]:
        """Let an error on rank 0 end the others, which would wait for it; tell their errors."""
        try:
            yield
        except BaseException as error:
            is_of_exchange = isinstance(error, RuntimeError) and not isinstance(
                error, (Error, torch.OutOfMemoryError)
            )
            if is_of_exchange:  # by which a rank that has ended is noticed
                self._watch.noticed.wait(_SECONDS_TO_NOTICE)
            self._watch.fail(f"rank 0 had an error ({type(error).__name__})")
            if is_of_exchange and self._watch.failure_of_others:
                raise self._lost() from None
            raise

    def _lost(self) -> RankError:
        self._watch.noticed.wait()
        if self._parts.graphs is not None:
            self._parts.graphs.clear()  # exchanges end when no graph holds them
        return self._watch.rank_error()


def check_shared(controls: Sequence[Control]) -> None:
    """Raise if a ControlNet cannot run on several devices.

    Raises:
        UnsupportedError: it was not loaded from a file, or sees the image alone.
    """
    if any(control.image_only for control in controls):
        raise UnsupportedError(
            "a ControlNet that sees the image alone needs a transformer on one device"
        )
    if any(control.net.path is None for control in controls):
        raise UnsupportedError(
            "a ControlNet that was not loaded from a file cannot run on several devices",
            "load it with `ZImageControlNet.from_checkpoint`",
        )


class _Parts:
    """What ends with `OtherRanks`, without a reference to it.

    Attributes:
        processes: the other ranks.
        group: all ranks; None until they have joined.
        launched: the forwards of rank 0.
        graphs: those of rank 0; None until there is a model.
        directory: with the file in which ranks find each other.
    """

    def __init__(self, directory: Path, device: torch.device) -> None:
        self.processes: list[_Process] = []
        self.group: RankGroup | None = None
        self.launched = _Launched(device)
        self.graphs: GraphCache | None = None
        self.directory = directory
        self.owner = os.getpid()

    @property
    def store(self) -> Path:
        """The file in which ranks find each other."""
        return self.directory / "store"


class _Launched:
    """Work on a device, launched by this process."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event: torch.cuda.Event | None = None

    def mark(self) -> None:
        """Remember what the current stream has been given until now."""
        if self._device.type == "cuda":
            event = torch.cuda.Event()
            with suppress(RuntimeError):  # of a device that has failed, which has been told
                event.record(torch.cuda.current_stream(self._device))
                self._event = event

    def wait(self, seconds: float) -> bool:
        """Wait for what was marked, without a lock and for no longer; return whether it ended."""
        if self._event is None or torch.cuda.is_current_stream_capturing():
            return True  # a finalizer may run in another model's capture, which a query would end
        latest = time.monotonic() + seconds
        with suppress(RuntimeError):  # an error of the device has ended it
            while not self._event.query():
                if time.monotonic() > latest:
                    return False
                time.sleep(0.001)
        return True


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

    def send(self, order: bytes) -> None:
        """Send an order; if the process has ended, nothing happens, and the watch tells it."""
        with suppress(OSError):
            self.connection.send_bytes(order)

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
        failure: why the ranks can compute no more, a sentence; "" while they can.
        failure_of_others: whether that was not rank 0's error.
        noticed: set after `failure`, when exchanges have begun to end.
    """

    def __init__(self, parts: _Parts, devices: Sequence[torch.device]) -> None:
        self.failure = ""
        self.failure_of_others = False
        self.noticed = threading.Event()
        self._parts = parts
        self._devices = devices
        self._is_ending = False
        self._error: Exception | None = None
        self._was_killed = False
        self._lock = threading.RLock()  # `end` may come from a finalizer at any time

    def run(self) -> None:
        """Receive until the processes have ended."""
        waiting = {process.connection: process for process in self._parts.processes}
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
                    self._fail(f"{self._name(process)} failed: {answer.problem}", answer.error)
                else:
                    process.answers.put(answer)

    def end(self) -> None:
        """Expect that the processes end."""
        with self._lock:
            self._is_ending = True

    def cause(self) -> Exception:
        """Return the error of the rank that failed first, if it is one of this package's."""
        self.noticed.wait()
        if self._error is None:
            return self.rank_error()
        return copy.copy(self._error)  # raising one adds frames to it, which hold the model

    def rank_error(self) -> RankError:
        """Return the error that tells of the failure."""
        return RankError(self.failure, "load it again", self._was_killed)

    def fail(self, problem: str) -> None:
        """Remember an error of rank 0, and end the others."""
        self._fail(problem, None, of_others=False)

    def _fail(
        self,
        problem: str,
        error: Exception | None,
        *,
        of_others: bool = True,
        was_killed: bool = False,
    ) -> None:
        with self._lock:
            if self.failure or self._is_ending:
                return
            devices = len(self._devices)
            self.failure = f"the transformer on {devices} devices has stopped: {problem}"
            self.failure_of_others, self._error = of_others, error
            self._was_killed = was_killed
        try:
            for process in self._parts.processes:
                process.program.kill()
                process.answers.put(Failed(error, problem))
            if self._parts.group is not None:
                self._parts.group.abort()
        finally:
            self.noticed.set()

    def _ended(self, process: _Process) -> None:
        code = process.program.wait()
        how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        self._fail(f"{self._name(process)} {how}", None, was_killed=True)

    def _name(self, process: _Process) -> str:
        return f"rank {process.rank} ({self._devices[process.rank]})"


def _end(watch: _Watch, parts: _Parts) -> None:
    if os.getpid() != parts.owner:  # a fork of the program ends
        return
    # Dropping a graph that still runs can wait for it while holding the interpreter's lock. If the
    # graph waits for a rank that has died, nothing could then end it.
    has_ended = parts.launched.wait(_SECONDS_TO_FINISH)
    watch.end()
    if parts.group is not None and not has_ended:
        parts.group.abort()
    if parts.graphs is not None:
        parts.graphs.clear()  # exchanges end when no graph holds them
    if parts.group is not None:
        # A thread of the group that outlives the interpreter would end the program by an error.
        parts.group.abort(_SECONDS_TO_END)
    for process in parts.processes:
        assert process.program.stdin is not None
        process.program.stdin.close()
    for process in parts.processes:
        process.end()
    shutil.rmtree(parts.directory, ignore_errors=True)
