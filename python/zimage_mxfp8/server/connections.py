"""Connections of clients: HTTP/1.1 by uvicorn, which waits no longer than needed for requests."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol


class _Connection(H11Protocol):
    """Closes itself if a request's headers are not there in time, or its body when servers stop.

    Uvicorn only limits how long a connection may be idle after a response. `limits` bounds bodies,
    but sees a request only once its headers are complete.
    """

    seconds: float
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_timer()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_timer()
        elif self._timer is None:  # the headers of another request have begun
            self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
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


def connections(seconds: float) -> type[asyncio.Protocol]:
    """Return the protocol for uvicorn.

    Args:
        seconds: that the headers of a request may take.
    """
    return type("Connection", (_Connection,), {"seconds": seconds})
