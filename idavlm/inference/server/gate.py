"""The gate before all routes: who may enter, how many at a time, and how much they may bring."""

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

from idavlm.inference.server.errors import ApiError
from idavlm.inference.server.metrics import Metrics
from idavlm.inference.server.settings import ServerSettings

logger = logging.getLogger("idavlm.serve")

RELEASE_BODY = "idavlm.release_body"
"""Key of the scope: a function that a route calls once it no longer needs the body."""

_LOOPBACK = ("localhost", "127.0.0.1", "::1")

_DISCARDED = 8
"""A client that sends before it reads gets its error only if what it sends is read: up to this many largest bodies."""


class Gate:
    """ASGI middleware: API key, limits on bodies and concurrency, time of arrival, and the end of the server.

    A request that passes has its whole body. ``GET /health`` needs no key and is always answered.

    Args:
        app: the routes.
        settings: the limits.
        metrics: counts the requests.

    Attributes:
        num_requests: requests that have entered and have no complete response.
        is_stopping: whether new requests get status 503.
    """

    def __init__(self, app, settings: ServerSettings, metrics: Metrics) -> None:
        self.app = app
        self.settings = settings
        self.metrics = metrics
        self.num_requests = 0
        self.bytes_in_flight = 0
        self.is_stopping = False

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        response = _Response(send)
        start = time.monotonic()
        self.num_requests += 1
        body = _Body(scope, receive, self)
        try:
            self._check(scope)
            await body.read()
            scope[RELEASE_BODY] = body.release
            await self.app(scope, body.receive, response.send)
        except ApiError as error:
            if not response.is_started:
                await body.discard()
                await _send_error(response.send, error)
        except Exception as error:
            log_failure(error)
            if not response.is_started:
                await _send_error(response.send, ApiError(500, "the server failed; see its log.", code="server_error"))
        finally:
            self.num_requests -= 1
            body.release()
            self._report(scope, response.status, time.monotonic() - start)

    def _check(self, scope) -> None:
        if scope["path"] == "/health":
            return
        headers = dict(scope["headers"])
        keys = self.settings.api_keys
        host = headers.get(b"host", b"").decode("latin-1")
        if not keys and urlsplit(f"//{host}").hostname not in _LOOPBACK:
            # A page of another site, whose name now leads to this machine, can send requests through a browser.
            raise ApiError(403, f"the host {host[:100]!r} is not this machine; set an API key.", code="forbidden")
        if self.is_stopping:
            raise ApiError(503, "the server is stopping.", code="stopping")
        if keys:
            header = headers.get(b"authorization", b"")
            scheme, _, given = header.partition(b" ")
            # All keys are compared, so that the time does not tell which one is nearly right.
            matches = [hmac.compare_digest(given.strip(), key.encode()) for key in keys]
            if scheme.lower() != b"bearer" or not any(matches):
                raise ApiError(401, "the API key is missing or wrong.", code="invalid_api_key")
        if self.num_requests > self.settings.max_requests:
            raise ApiError(
                429, f"{self.settings.max_requests} requests are running; try again later.", code="too_many_requests"
            )

    def _report(self, scope, status: int, seconds: float) -> None:
        """Log and count a request by its route. Paths hold the names of banks, which are not logged."""
        route = getattr(scope.get("route"), "path", "other")
        self.metrics.requests.labels(route, str(status)).inc()
        self.metrics.seconds.labels(route).observe(seconds)
        logger.info("%s %s %s %.0f ms", scope["method"], route, status, 1000 * seconds)


class _Response:
    """Forwards a response and remembers its status; 0 if the client left before there was one."""

    def __init__(self, send) -> None:
        self._send = send
        self.status = 0

    @property
    def is_started(self) -> bool:
        return self.status != 0

    async def send(self, message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)


class _Body:
    """Reads the body of one request within the limits, before the routes see it."""

    def __init__(self, scope, receive, gate: Gate) -> None:
        self._headers = dict(scope["headers"])
        self._receive = receive
        self._gate = gate
        self._content: bytearray | None = bytearray()
        self._counted = 0
        self._is_complete = False
        self._is_left = False

    async def read(self) -> None:
        settings = self._gate.settings
        announced = self._headers.get(b"content-length", b"0")
        if int(announced) > settings.max_body_bytes:
            raise self._too_large()
        try:
            async with asyncio.timeout(settings.body_timeout):
                while not self._is_complete:
                    chunk = await self._next()
                    self._content += chunk
                    self._count(len(chunk))
                    if len(self._content) > settings.max_body_bytes:
                        raise self._too_large()
        except TimeoutError:
            self._is_left = True  # nothing more of it is awaited
            raise ApiError(
                408, f"the request did not arrive within {settings.body_timeout:g} s.", code="request_timeout"
            ) from None

    async def receive(self):
        """ASGI ``receive`` of the routes: the body once, then what the client does."""
        if self._content is not None:
            content, self._content = bytes(self._content), None
            return {"type": "http.request", "body": content, "more_body": False}
        return await self._receive()

    async def discard(self) -> None:
        """Read what the client still sends, up to a limit, so that it gets to its response."""
        self._content = bytearray()
        if self._headers.get(b"expect", b"").lower() == b"100-continue":  # it has not begun to send
            return
        left = _DISCARDED * self._gate.settings.max_body_bytes
        try:
            async with asyncio.timeout(self._gate.settings.body_timeout):
                while not (self._is_complete or self._is_left) and left > 0:
                    left -= len(await self._next())
        except (TimeoutError, ApiError):
            return

    def release(self) -> None:
        """Forget the body, and no longer count it."""
        self._content = None
        self._gate.bytes_in_flight -= self._counted
        self._counted = 0

    async def _next(self) -> bytes:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self._is_left = True
            raise ApiError(400, "the client left before the request was complete.", code="disconnected")
        self._is_complete = not message.get("more_body", False)
        return message.get("body", b"")

    def _count(self, number: int) -> None:
        self._counted += number
        self._gate.bytes_in_flight += number
        if self._gate.bytes_in_flight > self._gate.settings.max_bytes_in_flight:
            raise ApiError(429, "too much data is being received; try again later.", code="too_much_data")

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the request has more than {self._gate.settings.max_body_bytes} bytes; scale the images down.",
            code="request_too_large",
        )


async def _send_error(send, error: ApiError) -> None:
    body = json.dumps(error.content).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **error.headers}
    if error.status in (408, 413):
        headers["Connection"] = "close"  # the rest of the body is not read
    pairs: Sequence = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


def log_failure(error: BaseException) -> None:
    """Log the type of an error and its frames; neither values nor the message, which may quote a request."""
    places, trace = [], error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        places.append(f"{code.co_filename}:{trace.tb_lineno} {code.co_name}")
        trace = trace.tb_next
    logger.error("%s in %s", type(error).__name__, " < ".join(reversed(places)))
