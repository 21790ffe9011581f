"""The process of a rank other than 0."""

from __future__ import annotations

import os
import select
import sys
import threading
from multiprocessing.connection import Connection
from typing import Any

import torch

from ...errors import Error
from ..control import ZImageControlNet
from ..loading import load_parts
from ..model import ZImageTransformer
from ..model_file import open_model
from .group import RankGroup
from .messages import (
    ChangeAdapters,
    Done,
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

_SECONDS_BETWEEN_LOOKS = 2


def main(descriptor: int) -> None:
    """Carry out what rank 0 tells, until it ends.

    Args:
        descriptor: file descriptor of the connection with it.
    """
    threading.Thread(target=_end_with_rank_0, args=[os.getppid()], daemon=True).start()
    connection = Connection(descriptor)
    try:
        rank = _Rank(connection, receive(connection))
        while True:
            rank.obey(receive(connection))
    except EOFError:
        pass
    except BaseException as error:
        own = error if isinstance(error, Error) else None
        problem = str(error).partition("\n")[0] or type(error).__name__
        connection.send_bytes(pickled(Failed(own, problem)))
    os._exit(0)  # other threads may wait for other ranks


def _end_with_rank_0(parent: int) -> None:
    """End this process when rank 0's has ended, also in the middle of an exchange."""
    # Rank 0 holds the other end of the input and writes nothing, but a program that it forks may
    # hold it for longer.
    while not select.select([sys.stdin], [], [], _SECONDS_BETWEEN_LOOKS)[0]:
        if os.getppid() != parent:
            break
    os._exit(0)


class _Rank:
    def __init__(self, connection: Connection, order: Load) -> None:
        if order.device.type == "cpu":
            torch.set_num_threads(order.threads)
        else:
            torch.cuda.set_device(order.device)
        file = open_model(order.path)
        file.check_state(order.state)
        parts = load_parts(file, order.device, order.compute, order.dtype, None)
        file.check_state(order.state)
        connection.send_bytes(pickled(Done()))
        joined = receive(connection)
        assert isinstance(joined, Join)
        self._connection = connection
        self._order = order
        self._group = RankGroup.connect(
            order.store,
            order.rank,
            order.size,
            order.device,
            threading.Event(),
            order.multiprocessors,
        )
        self._model = ZImageTransformer(
            file.config, parts, order.compute, order.dtype, order.cuda_graphs, ranks=self._group
        )
        self._nets: dict[int, ZImageControlNet] = {}

    def obey(self, order: Any) -> None:
        if isinstance(order, Forward):
            self._forward(order)
            return
        if isinstance(order, ChangeAdapters):
            getattr(self._model._loras, order.method)(*order.arguments)
        elif isinstance(order, LoadControlNet):
            self._nets[order.number] = ZImageControlNet.from_checkpoint(
                order.path, self._order.device, order.compute, self._order.dtype
            )
        self._connection.send_bytes(pickled(Done()))

    def _forward(self, order: Forward) -> None:
        self._nets = {n: net for n, net in self._nets.items() if n in order.kept_nets}
        device = self._order.device
        buffer = torch.empty(packed_nbytes(order.inputs), dtype=torch.uint8, device=device)
        self._group.broadcast_(buffer)
        inputs = unpack(buffer, order.inputs)
        self._model.run(inputs, [self._nets[number] for number in order.nets], order.scale)
