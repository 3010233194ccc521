"""What the dispatcher knows of one request on its way: where it is, what was emitted, and when."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from cluster.member_stream import MemberStream
from cluster.plan import KvTicket
from router.errors import CorruptDataError, DeadlineExceededError
from router.prompt import prompt_of
from router.request import MemberId, Request, RequestId, TokenEvent
from router.router import Route

T = TypeVar("T")

Moment = Literal[
    "received_s",
    "admitted_s",
    "routed_s",
    "submitted_s",
    "handoff_start_s",
    "first_token_s",
    "first_decode_s",
    "done_s",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTrace:
    """One request's times, unix seconds, None where it did not get."""

    request_id: RequestId
    prefill_member: MemberId | None
    decode_member: MemberId | None
    num_tokens: int
    moments: dict[Moment, float] = field(default_factory=dict)
    """received: `generate` began; submitted: sent to the first member; handoff_start: its first token is here and the
    ticket is asked for; first_decode: first token of the decode member, the hand-off is over; done: left."""

    def between(self, start: Moment, end: Moment) -> float | None:
        """Seconds from one moment to another; None when either was not reached."""
        if start not in self.moments or end not in self.moments:
            return None
        return self.moments[end] - self.moments[start]


class Journey:
    """State with one writer, the dispatcher's task of this request."""

    def __init__(self, request: Request, clock: Callable[[], float]) -> None:
        self.request = request
        self.prompt = prompt_of(request)
        """As the router sees it: hashed once."""
        self.onward = request
        """The request as the decode member gets it: with the tokens emitted before."""
        self.prefill: MemberStream | None = None
        self.early: MemberStream | None = None
        """At the decode member, which fetches what is computed of the prompt so far; `decode` takes it over."""
        self.decode: MemberStream | None = None
        self.prefill_member: MemberId = MemberId("")
        self.decode_member: MemberId = MemberId("")
        self.ticket: KvTicket | None = None
        """Given out by the prefill member and not released."""
        self.is_decoding = False
        self.num_emitted = 0
        self._clock = clock
        self._moments: dict[Moment, float] = {"received_s": clock()}

    @property
    def handed_over(self) -> bool:
        """The decode member goes on with what a prefill member began."""
        return self.prefill is not None

    @property
    def is_late(self) -> bool:
        """Its deadline has passed."""
        deadline = self.request.deadline_unix_s
        return deadline is not None and self._clock() >= deadline

    def mark(self, moment: Moment) -> None:
        """Note the time of a moment; the first time counts."""
        self._moments.setdefault(moment, self._clock())

    def routed(self, route: Route) -> None:
        """Note where it goes."""
        self.mark("routed_s")
        self.prefill_member = route.prefill or MemberId("")
        self.decode_member = route.decode

    def take(self, event: TokenEvent) -> None:
        """Note an event that goes to the client.

        Raises:
            CorruptDataError: tokens are missing or repeated before it.
        """
        if event.token_id is None:
            return
        expected = len(self.request.output_ids) + self.num_emitted
        if event.index != expected:
            raise CorruptDataError(f"{self.request.id}: token {event.index} came where {expected} was due")
        self.num_emitted += 1
        self.mark("first_token_s")

    async def within(self, waiting: Awaitable[T]) -> T:
        """Wait no longer than the deadline.

        Raises:
            DeadlineExceededError: it passed.
        """
        deadline = self.request.deadline_unix_s
        if deadline is None:
            return await waiting
        try:
            async with asyncio.timeout(deadline - self._clock()):
                return await waiting
        except TimeoutError:
            text = f"{self.request.id}: its deadline passed after {self.num_emitted} tokens; allow more time"
            raise DeadlineExceededError(text) from None

    def trace(self) -> RequestTrace:
        """Its times so far."""
        return RequestTrace(
            request_id=self.request.id,
            prefill_member=self.prefill_member or None,
            decode_member=self.decode_member or None,
            num_tokens=self.num_emitted,
            moments=dict(self._moments),
        )
