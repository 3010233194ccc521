"""One request from admission to its last token: admit, route, prefill, hand off, decode.

Lives on the gateway's event loop. Requests are served by members the directory lists; what a request needs to go on
elsewhere at any token is itself and the tokens emitted so far, and nothing else is kept of it.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace

from cluster.gate import Gate
from cluster.journey import Journey, RequestTrace
from cluster.member_client import ClientLimits, MemberClient
from cluster.member_codec import SubmitMode
from cluster.member_stream import MemberEvent, MemberStream
from cluster.members import MemberInfo
from cluster.plan import KvTicket
from router.admission import Admission, member_priority
from router.errors import (
    DeadlineExceededError,
    HandoffError,
    MemberLostError,
    MoefleetError,
    NoMemberError,
    OverloadedError,
)
from router.load import CacheEvents, MemberLoad
from router.request import MemberId, Request, TokenEvent
from router.router import Router

logger = logging.getLogger(__name__)

# Blocks between two turns of other requests on the event loop: about a millisecond.
_HASHED_AT_ONCE = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatcherConfig:
    """Limits of the hand-off as the gateway sees it, and of its streams."""

    first_retry_s: float = 0.02
    """Pauses of a prefilled request whose decode members all refuse, growing up to max_retry_s. It waits until its
    deadline, and has its prompt computed again where its lease ends first."""
    max_retry_s: float = 0.5
    abort_wait_s: float = 1.0
    """The prefill member's KV is released when the decode member has confirmed an abort, or after its lease."""
    streams: ClientLimits = field(default_factory=ClientLimits)


class Dispatcher:
    """Serves requests on the members of a fleet.

    Args:
        router: chooses members; fed with their load reports.
        admission: says who may enter.
        token: the cluster token.
        config: limits.
        on_trace: told of the times of each request when it ends.
        clock: unix seconds.
    """

    def __init__(
        self,
        router: Router,
        admission: Admission,
        token: str,
        *,
        config: DispatcherConfig | None = None,
        on_trace: Callable[[RequestTrace], None] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._router = router
        self._token = token
        self._config = config or DispatcherConfig()
        self._on_trace = on_trace
        self._clock = clock
        self._gate = Gate(admission, lambda: router.loads, lambda: router.backlog_tokens, clock)
        self._clients: dict[MemberId, MemberClient] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def members(self) -> tuple[MemberInfo, ...]:
        """The members of the last `update_members`."""
        return tuple(client.info for client in self._clients.values())

    @property
    def num_connected(self) -> int:
        """Members whose stream is up."""
        return sum(client.hello is not None for client in self._clients.values())

    def loads(self) -> tuple[MemberLoad, ...]:
        """The latest load of every member."""
        return self._router.loads

    def waiting(self) -> dict[int, int]:
        """Requests that wait here for their turn, by priority class: 1, 0 and -1."""
        return self._gate.waiting()

    def check_room(self, tenant: str, priority: int) -> None:
        """Whether a request would be refused whatever it asks for; free of cost, before it is looked at.

        Raises:
            OverloadedError: all places are taken, and the tenant has most of them.
        """
        self._gate.check_room(tenant, priority)

    async def health(self) -> None:
        """Return if requests can be served.

        Raises:
            NoMemberError: no member can decode.
        """
        able = [load for load in self._router.loads if load.role != "prefill" and not load.draining]
        if not able:
            raise NoMemberError(
                f"no decode or mixed member is up, {self.num_connected} of {len(self._clients)} listed are connected; "
                "wait for the pool to heal"
            )

    def update_members(self, members: Sequence[MemberInfo]) -> None:
        """Connect to members that are new or came back at another address or generation, leave those not listed."""
        listed = {info.member_id: info for info in members}
        for member_id, client in tuple(self._clients.items()):
            info = listed.get(member_id)
            if info is None or (info.address, info.generation) != (client.info.address, client.info.generation):
                del self._clients[member_id]
                self._router.remove(member_id)
                self._spawn(client.close())
        for info in listed.values():
            client = self._clients.get(info.member_id)
            if client is None:
                self._clients[info.member_id] = self._connect(info)
            else:
                # Another role does not touch the stream: the member's loads tell the router.
                client.info = info

    def _connect(self, info: MemberInfo) -> MemberClient:
        def is_current() -> bool:
            return self._clients.get(info.member_id) is client

        def on_load(load: MemberLoad) -> None:
            if is_current():
                self._router.update(load, self._clock())
                self._gate.refresh()

        def on_cache(events: CacheEvents) -> bool:
            # What a client that is being replaced still says is nobody's.
            return self._router.take_events(info.member_id, events) if is_current() else True

        def on_lost(member_id: MemberId) -> None:
            if is_current():
                self._router.remove(member_id)
                self._gate.refresh()

        client = MemberClient(
            info,
            self._token,
            on_load=on_load,
            on_cache=on_cache,
            on_lost=on_lost,
            limits=self._config.streams,
        )
        client.start()
        return client

    async def close(self) -> None:
        """Leave all members; running requests get MemberLostError."""
        self.update_members(())
        await asyncio.gather(*self._tasks)

    async def generate(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        """Serve a request; closing the iterator aborts it on every member within a step.

        Raises:
            OverloadedError: admission or every able member refuses; says when to come back.
            InvalidRequestError: no member can serve it as it is.
            NoMemberError, MemberLostError: nobody serves it (any more); the same request may be sent again.
            DeadlineExceededError: its deadline passed.
        """
        journey = Journey(request, self._clock)
        turn = self._gate.enter(request)
        try:
            saver = await journey.within(turn)
            journey.mark("admitted_s")
            journey.request = replace(request, priority=member_priority(request.priority, saver=saver))
            async for event in self._serve(journey):
                if journey.num_emitted == 0:
                    # Before others have their turn, who may then have its member's time.
                    self._router.started(journey.prefill_member or journey.decode_member, journey.prompt.key)
                    self._gate.started(request.id)
                journey.take(event)
                yield event
        finally:
            self._leave(journey)
            self._gate.leave(request.id)
            journey.mark("done_s")
            if self._on_trace is not None:
                self._on_trace(journey.trace())

    async def _serve(self, journey: Journey) -> AsyncGenerator[TokenEvent, None]:
        for block_size in self._router.block_sizes:
            while not journey.prompt.hash_some(block_size, _HASHED_AT_ONCE):
                await asyncio.sleep(0)
        route = self._router.route(journey.prompt, self._clock())
        journey.routed(route)
        self._gate.routed(journey.request.id)
        if route.prefill is None:
            journey.decode = self._client(route.decode).submit(journey.request, mode="full")
            journey.mark("submitted_s")
        else:
            first = await self._prefill(journey, route.prefill)
            if first.finish is not None:
                yield first
                return
            # The decode member starts before the client takes its first token.
            self._hand_over(journey, route.decode, first)
            yield first
        while True:
            event = await self._next_decoded(journey)
            yield event
            if event.finish is not None:
                return

    async def _prefill(self, journey: Journey, member_id: MemberId) -> TokenEvent:
        """The first token; when the request goes on, its ticket is in the journey."""
        journey.prefill = self._client(member_id).submit(journey.request, mode="prefill")
        journey.mark("submitted_s")
        while isinstance(first := await self._next_event(journey, journey.prefill), KvTicket):
            journey.ticket = first
            self._expect(journey, first)
        if first.finish is not None:
            return first
        journey.mark("handoff_start_s")
        try:
            ticket = await journey.within(anext(journey.prefill))
        except MemberLostError as error:
            # The first token is here; the decode member computes the prompt again.
            logger.warning("%s: no ticket: %s", journey.request.id, error)
            journey.ticket = None
            return first
        assert isinstance(ticket, KvTicket), "an event behind the first token of a prefill"
        journey.ticket = ticket
        return first

    def _expect(self, journey: Journey, ticket: KvTicket) -> None:
        """Let the decode member fetch what is computed so far. If it cannot, it will fetch all of it at the end."""
        client = self._clients.get(journey.decode_member)
        if client is None or client.hello is None or (journey.early is not None and journey.early.lost):
            return
        size = client.hello.layout.block_size
        hashes = journey.prompt.hashes(size)[: ticket.num_tokens // size]
        try:
            journey.early = client.expect(journey.request.id, hashes, ticket, journey.early)
        except MoefleetError as error:
            logger.debug("%s: nothing is fetched early: %s", journey.request.id, error)

    def _hand_over(self, journey: Journey, member_id: MemberId, first: TokenEvent) -> None:
        """Send the request to the decode member with its first token, and the ticket if there is one."""
        assert first.token_id is not None
        sampling = replace(journey.request.sampling, prompt_logprobs=None)
        output = (*journey.request.output_ids, first.token_id)
        journey.onward = replace(journey.request, output_ids=output, sampling=sampling)
        try:
            self._submit_onward(journey, member_id)
        except MemberLostError as error:
            logger.warning("%s: looking for another decode member: %s", journey.request.id, error)
            self._submit_onward(journey, self._another_decoder(journey))

    def _submit_onward(self, journey: Journey, member_id: MemberId) -> None:
        journey.decode_member = member_id
        mode: SubmitMode = "full" if journey.ticket is None else "decode"
        journey.decode = self._client(member_id).submit(
            journey.onward, mode=mode, ticket=journey.ticket, expected=journey.early
        )

    async def _next_decoded(self, journey: Journey) -> TokenEvent:
        """The next token of the decode member; a refusal before its first one is worked around."""
        pause_s = self._config.first_retry_s
        while True:
            assert journey.decode is not None
            try:
                event = await self._next_token(journey, journey.decode)
            except HandoffError as error:
                if journey.ticket is None:
                    raise
                logger.warning("%s: ticket refused, computing its prompt again: %s", journey.request.id, error)
                self._release(journey)
                self._submit_onward(journey, journey.decode_member)
            except OverloadedError:
                if not journey.handed_over or journey.is_decoding:
                    raise
                await journey.within(asyncio.sleep(pause_s))
                if journey.ticket is not None and journey.ticket.expires_unix_s <= self._clock():
                    self._release(journey)
                pause_s = min(2 * pause_s, self._config.max_retry_s)
                self._submit_onward(journey, self._another_decoder(journey))
            else:
                self._decoded(journey)
                # The prompt was counted by whoever prefilled it.
                return replace(event, cached_tokens=0) if journey.handed_over and event.cached_tokens else event

    def _another_decoder(self, journey: Journey) -> MemberId:
        """Where to go after a refusal: any other member that decodes, or the same again."""
        taken = {load.member_id for load in self._router.loads if load.role == "prefill"} | {journey.decode_member}
        try:
            return self._router.route(journey.prompt, self._clock(), exclude=frozenset(taken)).decode
        except NoMemberError:
            return journey.decode_member

    def _decoded(self, journey: Journey) -> None:
        """A token came from the decode member: it has the KV, or has computed it."""
        if not journey.is_decoding:
            journey.is_decoding = True
            journey.mark("first_decode_s")
            self._release(journey)

    async def _next_token(self, journey: Journey, stream: MemberStream) -> TokenEvent:
        event = await self._next_event(journey, stream)
        assert isinstance(event, TokenEvent), "a ticket where a token was due"
        return event

    async def _next_event(self, journey: Journey, stream: MemberStream) -> MemberEvent:
        try:
            event = await journey.within(anext(stream))
        except StopAsyncIteration:
            raise MemberLostError(f"{journey.request.id}: the member ended its stream early; send it again") from None
        if isinstance(event, KvTicket):
            return event
        if event.finish == "abort":
            raise MemberLostError(f"{journey.request.id}: the member ended the request; send it again")
        if event.finish == "error" and journey.is_late:
            raise DeadlineExceededError(f"{journey.request.id}: {event.error}")
        return event

    def _client(self, member_id: MemberId) -> MemberClient:
        client = self._clients.get(member_id)
        if client is None:
            raise MemberLostError(f"member {member_id} has left; send the request again")
        return client

    def _release(self, journey: Journey) -> None:
        """Free the prefill member's KV; where a lost decode member may still read it, leave it to its lease."""
        ticket, journey.ticket = journey.ticket, None
        if journey.early is not None and journey.early.lost:
            return
        if ticket is not None and journey.prefill_member in self._clients:
            self._clients[journey.prefill_member].release_ticket(ticket.id)

    def _leave(self, journey: Journey) -> None:
        """End what still runs of a request on any member, and free what waits for it."""
        if journey.prefill is not None:
            journey.prefill.close()
        decode = journey.decode or journey.early
        if decode is not None:
            decode.close()
        if journey.ticket is None:
            return
        if decode is None:
            self._release(journey)
        else:
            self._spawn(self._release_after(journey, decode))

    async def _release_after(self, journey: Journey, decode: MemberStream) -> None:
        # While the decode member may still pull, freed blocks could be given to others and be read with their
        # contents. A member that does not confirm leaves the ticket to its lease.
        if await decode.ended(self._config.abort_wait_s) and not decode.lost:
            self._release(journey)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
