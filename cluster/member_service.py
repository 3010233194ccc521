"""The member's end of the streams to its gateways: requests go to the engine, its events go back, a message a step.

Runs in any process with a running Engine. The engine's thread hands each step's events to the event loop once; what a
gateway does not read in time costs that gateway its stream, never the step loop.
"""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol

from cluster.engine import EngineEvent, Rejected, TicketReady
from cluster.gateway_connection import GatewayConnection, Routes, StepColumns
from cluster.load_codec import cache_message, load_message
from cluster.member_codec import MemberHello, hello_message, read_submit, read_ticket, rejection_message
from cluster.member_link import LinkLimits, LinkListener, MemberLink
from cluster.plan import KvTicket
from cluster.protos import member_pb2 as pb
from cluster.security import check_token
from router.errors import CorruptDataError, InvalidRequestError, MoefleetError
from router.load import CacheEvents, MemberLoad
from router.request import Request, RequestId, TokenColumns, TokenEvent

logger = logging.getLogger(__name__)


class MemberEngine(Protocol):
    """What the service needs of an engine; every method may be called from any thread and returns at once."""

    @property
    def failure(self) -> MoefleetError | None:
        """Why it ended by itself; None while it is well."""
        ...

    def submit(self, request: Request, *, mode: Literal["full", "prefill"] = "full") -> None:
        """Take a request in; events and refusals come through `MemberService.on_events`."""
        ...

    def submit_handoff(self, request: Request, ticket: KvTicket) -> None:
        """Go on with a request that was prefilled elsewhere."""
        ...

    def expect(self, request_id: RequestId, hashes: Sequence[int], ticket: KvTicket) -> None:
        """Fetch what is prefilled elsewhere so far."""
        ...

    def abort(self, request_id: RequestId) -> None:
        """End a request."""
        ...

    def release_ticket(self, ticket_id: str) -> None:
        """Free the KV of a ticket."""
        ...

    def load(self) -> MemberLoad:
        """The latest load."""
        ...

    def cache_events(self, after: int | None) -> list[CacheEvents]:
        """What brings a gateway up to date that knows the prefix cache up to `after`, or not at all."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceLimits:
    """Bounds of one member's service."""

    link: LinkLimits = field(default_factory=lambda: LinkLimits(silence_s=10.0))
    """A gateway's loop may be held up for longer than a member's."""
    max_queued_messages: int = 1024
    """Messages (steps) a gateway may lag behind before its stream is cut."""
    load_period_s: float = 0.25
    """Between two load reports at rest."""
    min_load_gap_s: float = 0.05
    """Between two load reports that go with steps."""
    orphan_ticket_s: float = 1.0
    """Tickets of a gateway that is gone are released this much later: their readers have ended by then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Live:
    """Whose request it is."""

    connection: GatewayConnection
    handle: int


_NOTHING: Final = StepColumns()


class MemberService:
    """Serves an engine to gateways that hold the cluster token.

    `on_events` and `on_failure` are the engine's outlets and belong to its thread; all else runs on one event loop.

    Args:
        hello: who this member is.
        token: the cluster token.
        limits: bounds.
    """

    def __init__(self, hello: MemberHello, token: str, *, limits: ServiceLimits | None = None) -> None:
        self._hello = hello
        self._token = check_token(token)
        self._limits = limits or ServiceLimits()
        self._engine: MemberEngine | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._listener: LinkListener | None = None
        self._reporter: asyncio.Task[None] | None = None
        self._connections: set[GatewayConnection] = set()
        self._live: dict[RequestId, _Live] = {}
        self._routes: list[Routes] = []
        """Of the latest step's columns, of each lane."""
        self._reported_s = 0.0

    @property
    def num_requests(self) -> int:
        """Requests whose last event has not come."""
        return len(self._live)

    @property
    def num_connections(self) -> int:
        """Gateways connected."""
        return len(self._connections)

    async def start(self, engine: MemberEngine, host: str, port: int = 0) -> str:
        """Listen; returns host:port.

        Args:
            engine: started or about to be; its outlets call this service.
            host: address of the node's interface.
            port: 0 takes a free one.

        Raises:
            OSError: host and port cannot be listened on.
        """
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._listener = LinkListener(self._token, self._welcome, self._limits.link)
        try:
            bound = await self._listener.start(host, port)
        except OSError as error:
            raise OSError(f"member service cannot listen on {host}:{port}: {error}") from error
        self._reporter = asyncio.create_task(self._report_periodically())
        return f"{host}:{bound}"

    async def stop(self) -> None:
        """Stop listening and end all streams; requests that still run are aborted."""
        if self._reporter is not None:
            self._reporter.cancel()
        if self._listener is not None:
            self._listener.close()
        for connection in tuple(self._connections):
            connection.close(f"{self._hello.member_id} is stopping")
            self.forget(connection)

    def on_events(self, events: list[EngineEvent]) -> None:
        """Take a step's events from the engine's thread."""
        self._call(lambda: self._deliver(events))

    def on_failure(self, error: MoefleetError) -> None:
        """The engine has ended by itself: every stream ends, so that gateways see a lost member."""
        self._call(lambda: self._fail(error))

    def _call(self, action: Callable[[], None]) -> None:
        if self._loop is None:
            return
        try:
            self._loop.call_soon_threadsafe(action)
        except RuntimeError:
            # The loop is closed: the process is ending and nobody listens.
            logger.debug("%s: event after the end", self._hello.member_id)

    def _welcome(self, link: MemberLink) -> GatewayConnection:
        """A gateway has proven the token."""
        connection = GatewayConnection(self, link, self._limits.max_queued_messages)
        self._connections.add(connection)
        connection.send([hello_message(self._hello), *self._report(connection, time.monotonic())])
        return connection

    def take(self, message: pb.GatewayMessage, connection: GatewayConnection) -> None:
        """As `ConnectionOwner`."""
        assert self._engine is not None
        match message.WhichOneof("kind"):
            case "submit":
                self._submit(message.submit, connection)
            case "expect":
                self._expect(message.expect, connection)
            case "abort":
                request_id = connection.handles.get(message.abort.handle)
                if request_id is not None:
                    self._engine.abort(request_id)
            case "release_ticket":
                connection.tickets.discard(message.release_ticket.ticket_id)
                self._engine.release_ticket(message.release_ticket.ticket_id)
            case "resync":
                connection.cache_sequence = None
            case _:
                raise CorruptDataError("unknown message from a gateway; run one release everywhere")

    def _submit(self, message: pb.Submit, connection: GatewayConnection) -> None:
        assert self._engine is not None
        request, mode, ticket = read_submit(message)
        if not self._enter(message.handle, request.id, connection):
            return
        connection.expected.discard(message.handle)
        if ticket is not None:
            self._engine.submit_handoff(request, ticket)
        else:
            self._engine.submit(request, mode="prefill" if mode == "prefill" else "full")

    def _expect(self, message: pb.Expect, connection: GatewayConnection) -> None:
        assert self._engine is not None
        request_id = RequestId(message.request_id)
        if self._enter(message.handle, request_id, connection):
            connection.expected.add(message.handle)
            self._engine.expect(request_id, tuple(message.hashes), read_ticket(message.ticket))

    def _enter(self, handle: int, request_id: RequestId, connection: GatewayConnection) -> bool:
        """Let a handle stand for a request; False: it was refused."""
        if handle in connection.handles:
            if handle in connection.expected and connection.handles[handle] == request_id:
                return True
            raise CorruptDataError(f"handle {handle} is in use on this stream")
        if request_id in self._live:
            error = InvalidRequestError(f"request id {request_id} is running here already; use a new one", field="id")
            connection.send([rejection_message(handle, error)])
            return False
        connection.handles[handle] = request_id
        self._live[request_id] = _Live(connection=connection, handle=handle)
        return True

    def _deliver(self, events: Sequence[EngineEvent]) -> None:
        """Give each gateway its part of a step's events."""
        assert self._engine is not None
        if self._engine.failure is not None:
            self._fail(self._engine.failure)
            return
        steps: defaultdict[GatewayConnection, StepColumns] = defaultdict(StepColumns)
        known = self._routes
        self._routes = []
        for event in events:
            if isinstance(event, TokenColumns):
                for connection, part in self._routes_of(event, known).parts(event):
                    if not connection.closed:
                        steps[connection].columns.append(part)
            elif (live := self._live.get(event.request_id)) is not None:
                if _is_last(event):
                    self._end(event.request_id, live)
                if live.connection.closed:
                    self._drop(event, live.connection)
                else:
                    steps[live.connection].add(live.handle, event)
        self._send(steps)

    def _send(self, steps: dict[GatewayConnection, StepColumns]) -> None:
        """Send each gateway its part of a step, and what waits to be reported along with it."""
        now = time.monotonic()
        due = now - self._reported_s >= self._limits.min_load_gap_s
        for connection in tuple(self._connections if due else steps):
            columns = steps.get(connection, _NOTHING)
            connection.tickets.update(ticket.id for _, ticket in columns.tickets)
            connection.send([*columns.messages(), *(self._report(connection, now) if due else ())])
            if connection.closed:
                # Cut for reading too slowly.
                self.forget(connection)

    def _routes_of(self, columns: TokenColumns, known: Sequence[Routes]) -> Routes:
        routes = next((each for each in known if each.request_ids is columns.request_ids), None)
        if routes is None:
            lives = [(i, self._live.get(name)) for i, name in enumerate(columns.request_ids)]
            owners = [(i, live.connection, live.handle) for i, live in lives if live is not None]
            routes = Routes(columns.request_ids, owners)
        self._routes.append(routes)
        return routes

    def _end(self, request_id: RequestId, live: _Live) -> None:
        del self._live[request_id]
        live.connection.handles.pop(live.handle, None)
        live.connection.expected.discard(live.handle)

    def _drop(self, event: EngineEvent, connection: GatewayConnection) -> None:
        """Nobody waits for this event; its KV must not wait for its lease, unless a part of it was offered before."""
        assert self._engine is not None
        if isinstance(event, TicketReady) and event.ticket.id not in connection.tickets:
            self._engine.release_ticket(event.ticket.id)

    def forget(self, connection: GatewayConnection) -> None:
        """The gateway is gone: end what it asked for."""
        assert self._engine is not None
        if connection not in self._connections:
            return
        connection.closed = True
        self._connections.discard(connection)
        for request_id in connection.handles.values():
            self._engine.abort(request_id)
        if connection.tickets:
            asyncio.get_running_loop().call_later(
                self._limits.orphan_ticket_s, self._release, tuple(connection.tickets)
            )

    def _release(self, ticket_ids: tuple[str, ...]) -> None:
        assert self._engine is not None
        for ticket_id in ticket_ids:
            self._engine.release_ticket(ticket_id)

    def _fail(self, error: MoefleetError) -> None:
        for connection in tuple(self._connections):
            connection.close(str(error))
        self._live.clear()

    async def _report_periodically(self) -> None:
        while True:
            await asyncio.sleep(self._limits.load_period_s)
            now = time.monotonic()
            for connection in tuple(self._connections):
                connection.send(self._report(connection, now))

    def _report(self, connection: GatewayConnection, now: float) -> list[pb.MemberMessage]:
        """The load and what has changed in the prefix cache, unless the gateway has enough to read."""
        assert self._engine is not None
        self._reported_s = now
        if connection.num_queued > self._limits.max_queued_messages // 2:
            return []
        messages = [load_message(self._engine.load())]
        for events in self._engine.cache_events(connection.cache_sequence):
            messages.append(cache_message(events))
            connection.cache_sequence = events.sequence
        return messages


def _is_last(event: TokenEvent | TicketReady | Rejected) -> bool:
    match event:
        case TokenEvent():
            return event.finish is not None
        case TicketReady():
            return not event.ticket.partial
        case _:
            return True
