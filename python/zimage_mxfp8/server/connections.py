"""Connections of clients: HTTP/1.1 by uvicorn, which waits no longer than needed for requests."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

_SECONDS_TO_GIVE_UP = 1.0  # for `Limits`, which notes that the client is gone
_MAX_RECEIVED = 16_384  # bytes at a time: a chunk of a body may be one byte, and takes 50 us


class _Connection(H11Protocol):
    """Closes itself if a request's headers are not there in time, or its body when servers stop.

    Uvicorn only limits how long a connection may be idle after a response. `Limits` bounds bodies,
    but sees a request only once its headers are complete. A client that reads nothing is cut off:
    what it has not read would keep a closed connection open.
    """

    seconds: float
    _timer: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.max_size = _MAX_RECEIVED  # type: ignore[attr-defined]
        transport.set_write_buffer_limits(0)  # `pause_writing` is to come as soon as data is unread
        self._start_timer()

    def pause_writing(self) -> None:
        super().pause_writing()
        seconds = self.seconds + _SECONDS_TO_GIVE_UP
        self._unread = self.loop.call_later(seconds, self.transport.abort)

    def resume_writing(self) -> None:
        self._forget_unread()
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_timer()
        elif self._timer is None:  # the headers of another request have begun
            self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._forget_unread()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """Close the connection at once, or after its response if its request has come in whole.

        Uvicorn would wait for the rest of other requests. A client that is told of an error while
        it still sends may lose that answer.
        """
        if self.cycle is not None and self.cycle.more_body and not self.cycle.response_complete:
            self.transport.close()
        else:
            super().shutdown()

    def _start_timer(self) -> None:
        self._timer = self.loop.call_later(self.seconds, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _forget_unread(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None


def connections(seconds: float) -> type[asyncio.Protocol]:
    """Return the protocol for uvicorn.

    Args:
        seconds: that the headers of a request may take, and the client to read what is sent.
    """
    return type("Connection", (_Connection,), {"seconds": seconds})
