"""One gateway's connection as the member sees it, and a step's events sorted into columns."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from cluster.engine import Rejected, TicketReady
from cluster.member_codec import (
    HandleColumns,
    ended_message,
    read_frame,
    rejection_message,
    step_message,
)
from cluster.member_link import MemberLink
from cluster.plan import KvTicket
from cluster.protos import member_pb2 as pb
from router.errors import MoefleetError
from router.request import RequestId, TokenColumns, TokenEvent

logger = logging.getLogger(__name__)


class ConnectionOwner(Protocol):
    """What a connection tells its member's service."""

    def take(self, message: pb.GatewayMessage, connection: "GatewayConnection") -> None:
        """A message came.

        Raises:
            CorruptDataError: it makes no sense; the connection is ended.
        """
        ...

    def forget(self, connection: "GatewayConnection") -> None:
        """The gateway is gone."""
        ...


class GatewayConnection:
    """One gateway's connection. Lives on the event loop.

    Args:
        owner: told of what comes.
        link: to the gateway.
        max_messages: that the gateway may lag behind.
    """

    def __init__(self, owner: ConnectionOwner, link: MemberLink, max_messages: int) -> None:
        self.handles: dict[int, RequestId] = {}
        self.expected: set[int] = set()
        """Of these, the ones whose request is still prefilled elsewhere."""
        self.tickets: set[str] = set()
        """Given out on this stream and not released."""
        self.closed = False
        self.cache_sequence: int | None = None
        """Cache events sent so far; None: the gateway needs a snapshot."""
        self._owner = owner
        self._link = link
        self._max_messages = max_messages

    @property
    def num_queued(self) -> int:
        """Messages the network has not taken yet."""
        return self._link.num_waiting

    def send(self, messages: Sequence[pb.MemberMessage]) -> None:
        """Send messages together; one too many that waits ends the connection."""
        if self.closed or not messages:
            return
        if self._link.num_waiting + len(messages) > self._max_messages:
            self.close(f"the gateway is {self._max_messages} messages behind; it reads too slowly")
            return
        self._link.send([message.SerializeToString() for message in messages])

    def close(self, reason: str) -> None:
        """End the connection, and tell the gateway why."""
        if not self.closed:
            self.closed = True
            self._link.send([ended_message(reason).SerializeToString()])
            self._link.close()

    def take(self, frame: bytes) -> None:
        """As `LinkEnd`."""
        if not self.closed:
            self._owner.take(read_frame(pb.GatewayMessage, frame), self)

    def corrupt(self, text: str) -> None:
        """As `LinkEnd`."""
        logger.warning("a gateway's stream is cut: %s", text)
        self.close(text)

    def lost(self, reason: str) -> None:
        """As `LinkEnd`."""
        logger.debug("a gateway is gone: %s", reason)
        self._owner.forget(self)


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
