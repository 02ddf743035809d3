"""The process of the server: connections with time limits, and an end that lets running requests finish."""

import asyncio
import logging
import signal
import socket
import time

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from idavlm.inference.server.gate import Gate

logger = logging.getLogger("idavlm.serve")

_KEEP_ALIVE = 75
"""Seconds that an idle connection stays open: longer than clients keep theirs (httpx: 5). Otherwise a client would
sometimes send a request into a connection that is being closed."""

_MORE_CONNECTIONS = 64
"""Connections above the largest number of requests, which get a status instead of no answer."""


def serve(gate: Gate, *, listener: socket.socket) -> None:
    """Serve until SIGTERM or Ctrl-C, in the main thread.

    After the signal, running requests are completed within ``stop_timeout`` of the settings, and new ones get status
    503. A second signal ends the server at once.

    Args:
        gate: from :func:`idavlm.inference.server.create_app`.
        listener: from :func:`listen`.
    """
    GracefulServer(gate).run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """Bind a port; 0 for a free one.

    Raises:
        OSError: the port is in use, or the host is none of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)  # a client that comes while the model is loaded waits
    except OSError as error:
        raise OSError(f"--host {host} --port {port} cannot be used ({error}); pass another port or host.") from error
    listener.setblocking(False)
    return listener


class GracefulServer(uvicorn.Server):
    """uvicorn's server, which answers with status 503 while running requests end.

    uvicorn closes its listening socket at once, so that new clients would find no server.
    """

    def __init__(self, gate: Gate) -> None:
        settings = gate.settings
        super().__init__(
            uvicorn.Config(
                gate,
                http=_timed_protocol(settings.body_timeout, settings.stall_timeout),
                ws="none",
                timeout_keep_alive=_KEEP_ALIVE,
                lifespan="on",
                log_config=None,
                timeout_graceful_shutdown=5,
                limit_concurrency=4 * settings.max_requests + _MORE_CONNECTIONS,
                server_header=False,
            )
        )
        self.gate = gate
        self._end = float("inf")

    def handle_exit(self, sig: int, frame) -> None:
        """The first signal stops the intake; a second one ends the server."""
        if self.gate.is_stopping:
            self.should_exit = self.force_exit = True
            return
        logger.info("%s: running requests end, new ones are refused", signal.Signals(sig).name)
        self._end = time.monotonic() + self.gate.settings.stop_timeout
        self.gate.is_stopping = True

    async def on_tick(self, counter: int) -> bool:
        """Called ten times per second; True ends the server."""
        if self.gate.is_stopping and (self.gate.num_requests == 0 or time.monotonic() > self._end):
            self.should_exit = True
        return await super().on_tick(counter)


def _timed_protocol(header_timeout: float, stall_timeout: float) -> type[H11Protocol]:
    """uvicorn's connection, closed if headers do not arrive in time, and if the client does not read its response."""

    class TimedProtocol(H11Protocol):
        _timers: dict[str, asyncio.TimerHandle]

        def connection_made(self, transport) -> None:
            super().connection_made(transport)
            self.access_log = False  # whatever the logging is set to: paths hold the names of banks
            self._timers = {}
            self._start("headers", header_timeout)

        def connection_lost(self, exc) -> None:
            for name in list(self._timers):
                self._stop(name)
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._has_request():
                self._stop("headers")
            elif not self.transport.is_closing():
                self._start("headers", header_timeout)

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._stop("headers")  # from here on, uvicorn's limit on idle connections applies
            if not self._has_request() and self.conn.trailing_data[0]:  # the next request has begun to arrive
                self._start("headers", header_timeout)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._start("reading", stall_timeout)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._stop("reading")

        def _has_request(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

        def _start(self, name: str, seconds: float) -> None:
            if name not in self._timers:
                self._timers[name] = self.loop.call_later(seconds, self.transport.abort)

        def _stop(self, name: str) -> None:
            timer = self._timers.pop(name, None)
            if timer is not None:
                timer.cancel()

    return TimedProtocol
