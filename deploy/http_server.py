"""The gateway's HTTP server: an ASGI application on an address of its own, in the gateway's event loop."""

import asyncio
import errno
import math
import resource
import socket
from typing import Final

import uvicorn
from starlette.types import ASGIApp
from typing_extensions import override
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from deploy.http_guard import PUBLIC_PATHS
from router.errors import ConfigError

_KEEP_ALIVE_S: Final = 75
"""Idle connections stay so long: longer than the pools of usual clients and load balancers. A request's head may take
as long to come."""
_MOST_HEAD_BYTES: Final = 1 << 19
"""Of a request's head, or all that was read with it at once."""
_BACKLOG: Final = 2048
_MOST_CONNECTIONS: Final = 8192
_ROOM_PART: Final = 16
"""Of the connections that a server may hold, so small a part is closed at once for new ones."""
_START_S: Final = 0.01


class PortTakenError(ConfigError):
    """Another socket listens at the address."""


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens, and may do so while connections of a server that was there before it still end.

    Raises:
        PortTakenError: another one listens there.
        ConfigError: the address is not one of this machine.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"http address {host}:{port} is none of this machine ({error}); name one that is") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        kind = PortTakenError if error.errno == errno.EADDRINUSE else ConfigError
        raise kind(f"http address {host}:{port} cannot be bound ({error.strerror}); name a free port") from error
    listener.setblocking(False)
    return listener


def most_connections() -> int:
    """That a server may hold: half of the files that this process may open, which members and logs need too."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST_CONNECTIONS if files == resource.RLIM_INFINITY else min(_MOST_CONNECTIONS, files // 2)


class _Connection(HttpToolsProtocol):
    """Closes itself where a request's head is too long or does not come: whoever sends it has shown no key yet.

    Where there are too many connections, those on which nothing is answered are closed for new ones; if there are none,
    uvicorn's `limit_concurrency` refuses requests, but none for health.
    """

    _head_timer: asyncio.TimerHandle
    _head_bytes: int | None = None
    """Of the head that is being read; None: there is none."""
    _idle_since: float

    @override
    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._expect_head()
        self._idle_since = self.loop.time()
        most = self.limit_concurrency
        if most is not None and len(self.connections) >= most:
            self._make_room(most // _ROOM_PART + 1)

    @override
    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_timer.cancel()
        self._expect_head()

    @override
    def on_headers_complete(self) -> None:
        self._head_timer.cancel()
        self._head_bytes = None
        public = self.url.partition(b"?")[0].decode("latin-1") in PUBLIC_PATHS
        self.limit_concurrency = None if public else self.config.limit_concurrency
        super().on_headers_complete()

    @override
    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._head_bytes is not None:
            self._head_bytes += len(data)
            if self._head_bytes > _MOST_HEAD_BYTES:
                self.transport.close()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._head_timer.cancel()
        super().connection_lost(exc)

    @override
    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._idle_since = self.loop.time()
        if self.cycle.response_complete and self.cycle.more_body:
            # Refused before its body was here: uvicorn reads the rest, however long it takes.
            self._head_timer.cancel()
            self._head_timer = self.loop.call_later(_KEEP_ALIVE_S, self._head_is_late)

    def _expect_head(self) -> None:
        self._head_bytes = 0
        self._head_timer = self.loop.call_later(_KEEP_ALIVE_S, self._head_is_late)

    @property
    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _make_room(self, count: int) -> None:
        """Close so many connections on which nothing has been answered for longest."""
        others = [each for each in self.connections if isinstance(each, _Connection) and each is not self]
        idle = sorted((each for each in others if each._is_idle), key=lambda each: each._idle_since)
        for each in idle[:count]:
            each.transport.close()

    def _head_is_late(self) -> None:
        if self._is_idle:
            self.transport.close()
        else:
            # It came behind a request that is still answered.
            self._expect_head()


class HttpServer:
    """Serves an application until it is stopped. Lives on one event loop.

    Args:
        app: what to serve.
        listener: from `listen`; closed with the server.
        drain_s: requests that run when it is stopped may take this long to end.
        max_connections: None: `most_connections()`.
    """

    def __init__(
        self, app: ASGIApp, listener: socket.socket, *, drain_s: float, max_connections: int | None = None
    ) -> None:
        config = uvicorn.Config(
            app,
            http=_Connection,
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=max_connections or most_connections(),
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=math.ceil(drain_s),
        )
        self._server = uvicorn.Server(config)
        self._listener = listener
        self._serving: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._listener.getsockname()[1])

    @property
    def has_ended(self) -> bool:
        """It takes no connections (any more)."""
        return self._serving is None or self._serving.done()

    @property
    def failure(self) -> BaseException | None:
        """What ended it, where it was not told to."""
        task = self._serving
        return None if task is None or not task.done() or task.cancelled() else task.exception()

    async def start(self) -> None:
        """Take connections from now on."""
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._listener]))
        while not self._server.started and not self._serving.done():
            await asyncio.sleep(_START_S)

    async def stop(self) -> None:
        """Take no more connections, let requests end, and close."""
        self._server.should_exit = True
        if self._serving is not None:
            await asyncio.wait([self._serving])
        self._listener.close()
