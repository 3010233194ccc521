"""One gateway's stream as the member sees it: a bounded queue of messages, and a step's events sorted into columns."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

import grpc

from cluster.engine import Rejected, TicketReady
from cluster.member_codec import HandleColumns, rejection_message, step_message
from cluster.plan import KvTicket
from cluster.protos import member_pb2 as pb
from router.errors import MoefleetError
from router.request import RequestId, TokenColumns, TokenEvent

_BUNDLED_BYTES: Final = 1 << 16
"""Of a message with what goes along behind it, at most."""


class GatewayConnection:
    """One gateway's stream. Lives on the event loop."""

    def __init__(self, max_messages: int) -> None:
        self.handles: dict[int, RequestId] = {}
        self.expected: set[int] = set()
        """Of these, the ones whose request is still prefilled elsewhere."""
        self.tickets: set[str] = set()
        """Given out on this stream and not released."""
        self.closed = False
        self.error: tuple[grpc.StatusCode, str] | None = None
        self.cache_sequence: int | None = None
        """Cache events sent so far; None: the gateway needs a snapshot."""
        self._max_messages = max_messages
        self._outbox: deque[pb.MemberMessage] = deque()
        self._wake = asyncio.Event()

    @property
    def num_queued(self) -> int:
        """Messages the gateway has not taken yet."""
        return len(self._outbox)

    def send(self, message: pb.MemberMessage) -> None:
        """Queue a message; one too many cuts the stream."""
        if self.closed:
            return
        if len(self._outbox) >= self._max_messages:
            text = f"the gateway is {self._max_messages} messages behind; it reads too slowly"
            self.close(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
            return
        self._outbox.append(message)
        self._wake.set()

    def close(self, code: grpc.StatusCode | None = None, text: str = "") -> None:
        """End the stream, with an error status if a code is given; what is queued is dropped."""
        self.closed = True
        self._outbox.clear()
        if code is not None and self.error is None:
            self.error = (code, text)
        self._wake.set()

    async def messages(self) -> AsyncIterator[pb.MemberMessage]:
        """Messages in order until the stream is closed, each with those that wait behind it."""
        while not self.closed:
            if not self._outbox:
                self._wake.clear()
                await self._wake.wait()
            while self._outbox and not self.closed:
                yield self._next()

    def _next(self) -> pb.MemberMessage:
        """What is queued first, and in the same message what waits behind it, such as a load report, if small."""
        first = self._outbox.popleft()
        size = first.ByteSize() if self._outbox else 0
        while self._outbox and (size := size + self._outbox[0].ByteSize()) <= _BUNDLED_BYTES:
            first.behind.append(self._outbox.popleft())
        return first


class Routes:
    """Which of a step's columns are whose, looked up once for as long as its requests stay the same.

    Args:
        owners: (place in the columns, connection, handle) of each request that somebody waits for.
    """

    def __init__(self, request_ids: list[RequestId], owners: Iterable[tuple[int, GatewayConnection, int]]) -> None:
        self.request_ids = request_ids
        self._places: dict[GatewayConnection, tuple[list[int], list[int]]] = {}
        for place, connection, handle in owners:
            places, handles = self._places.setdefault(connection, ([], []))
            places.append(place)
            handles.append(handle)

    def parts(self, columns: TokenColumns) -> Iterator[tuple[GatewayConnection, HandleColumns]]:
        """Each gateway's part of a step."""
        for connection, (places, handles) in self._places.items():
            indices, token_ids = columns.indices, columns.token_ids
            if len(places) < len(token_ids):
                indices, token_ids = [indices[i] for i in places], [token_ids[i] for i in places]
            yield connection, HandleColumns(handles=handles, indices=indices, token_ids=token_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepColumns:
    """One gateway's part of one step."""

    columns: list[HandleColumns] = field(default_factory=list)
    """One a lane at most."""
    tokens: list[tuple[int, TokenEvent]] = field(default_factory=list)
    tickets: list[tuple[int, KvTicket]] = field(default_factory=list)
    rejected: list[tuple[int, MoefleetError]] = field(default_factory=list)
    """All with the handle of their request."""

    def add(self, handle: int, event: TokenEvent | TicketReady | Rejected) -> None:
        """Sort one event in."""
        match event:
            case TokenEvent():
                self.tokens.append((handle, event))
            case TicketReady():
                self.tickets.append((handle, event.ticket))
            case Rejected():
                self.rejected.append((handle, event.error))

    def messages(self) -> list[pb.MemberMessage]:
        """One message for the tokens and tickets (of several lanes one each), one for each refusal.

        Prompt log probabilities are long: events that carry them go ahead in a message each, so that none exceeds the
        size limit however many come in a step.
        """
        refusals = [rejection_message(handle, error) for handle, error in self.rejected]
        long = [(handle, event) for handle, event in self.tokens if event.prompt_logprobs]
        short = [(handle, event) for handle, event in self.tokens if not event.prompt_logprobs]
        steps = [step_message([each], []) for each in long]
        steps += [step_message([], [], columns) for columns in self.columns[1:]]
        if short or self.tickets or self.columns:
            steps.append(step_message(short, self.tickets, *self.columns[:1]))
        return [*steps, *refusals]
