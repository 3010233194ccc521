"""A small honest engine without a model: same interface and thread as cluster.engine.Engine, tokens from arithmetic.

Token i of a request is a function of all tokens before it, so that a stream is right only if prompt and earlier
output arrived. It keeps books of what it holds, as blocks would be.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from typing import Literal

from cluster.cache_log import CacheLog
from cluster.engine import EngineEvent, Rejected, TicketReady
from cluster.member_service import MemberService
from cluster.plan import KvLayout, KvTicket
from router.errors import MoefleetError
from router.load import CacheEvents, MemberLoad
from router.request import MemberId, Request, RequestId, Role, TokenColumns, TokenEvent, TokenLogprob

LAYOUT = KvLayout(fingerprint="scripted", tp=1, block_size=16, num_blocks=64, num_slots=0, dtype="float32")


@dataclass(slots=True, kw_only=True)
class _Running:
    request: Request
    prefill: bool
    offers: int = 0
    """Partial tickets still to come before the first token."""
    total: int = 0
    length: int = 0

    def __post_init__(self) -> None:
        tokens = (*self.request.prompt_ids, *self.request.output_ids)
        self.total, self.length = sum(tokens), len(tokens)

    @property
    def index(self) -> int:
        return self.length - len(self.request.prompt_ids)

    def advance(self) -> int:
        """The next token: of the sum and the number of all before it."""
        token = (31 * self.total + 7 * self.length) % 1009
        self.total += token
        self.length += 1
        return token


def expected_tokens(request: Request) -> list[int]:
    """What a client must get for a request."""
    running = _Running(request=request, prefill=False)
    return [running.advance() for _ in range(request.sampling.max_tokens - len(request.output_ids))]


class ScriptedEngine:
    """Steps every `step_s`; `refusals` are raised for the next submits, `hold` stops it from stepping."""

    def __init__(self, member_id: MemberId, role: Role, *, step_s: float = 0.002, lease_s: float = 30.0) -> None:
        self.failure: MoefleetError | None = None
        self.refusals: list[MoefleetError] = []
        self.hold = threading.Event()
        self.pinned: dict[str, RequestId] = {}
        self.redeemed: list[str] = []
        self.released: list[str] = []
        self.modes: list[str] = []
        self.skip_index: int | None = None
        self.offers = 0
        """Partial tickets of each prefill."""
        self.expected: list[tuple[RequestId, int, int]] = []
        """Request, blocks and positions of each word of what is prefilled elsewhere."""
        self._awaited: set[RequestId] = set()
        self.num_running = 0
        self.cache_log = CacheLog()
        self._member_id = member_id
        self._role: Role = role
        self._step_s = step_s
        self._lease_s = lease_s
        self._service: MemberService | None = None
        self._running: dict[RequestId, _Running] = {}
        self._commands: SimpleQueue[tuple[str, Request | str, KvTicket | None]] = SimpleQueue()
        self._stopping = threading.Event()
        self._sequence = 0
        self._gathered_ids: list[RequestId] = []
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self, service: MemberService) -> None:
        self._service = service
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(5)

    def fail(self, error: MoefleetError) -> None:
        self.failure = error
        assert self._service is not None
        self._service.on_failure(error)

    def submit(self, request: Request, *, mode: Literal["full", "prefill"] = "full") -> None:
        self._commands.put((mode, request, None))

    def submit_handoff(self, request: Request, ticket: KvTicket) -> None:
        self._commands.put(("decode", request, ticket))

    def expect(self, request_id: RequestId, hashes: Sequence[int], ticket: KvTicket) -> None:
        self.expected.append((request_id, len(hashes), ticket.num_tokens))
        self._awaited.add(request_id)

    def abort(self, request_id: RequestId) -> None:
        self._commands.put(("abort", request_id, None))

    def release_ticket(self, ticket_id: str) -> None:
        self._commands.put(("release", ticket_id, None))

    def load(self) -> MemberLoad:
        self._sequence += 1
        return MemberLoad(
            member_id=self._member_id,
            role=self._role,
            sequence=self._sequence,
            running_requests=self.num_running,
            max_requests=64,
            free_blocks=64,
            total_blocks=64,
            handoff_requests=len(self.pinned),
        )

    def cache_events(self, after: int | None) -> list[CacheEvents]:
        return self.cache_log.since(after)

    def _run(self) -> None:
        while not self._stopping.is_set():
            time.sleep(self._step_s)
            events: list[EngineEvent] = []
            self._take_commands(events)
            if not self.hold.is_set():
                for running in tuple(self._running.values()):
                    events += self._advance(running)
            self.num_running = len(self._running)
            if events and self._service is not None:
                self._service.on_events(self._gathered(events))

    def _gathered(self, events: list[EngineEvent]) -> list[EngineEvent]:
        """As an engine gives them out: tokens that there is nothing else to tell of come together."""
        plain = [event for event in events if isinstance(event, TokenEvent) and _is_plain(event)]
        request_ids = [event.request_id for event in plain]
        if request_ids != self._gathered_ids:
            self._gathered_ids = request_ids
        columns = TokenColumns(
            request_ids=self._gathered_ids,
            indices=[event.index for event in plain],
            token_ids=[event.token_id for event in plain if event.token_id is not None],
        )
        rest = [event for event in events if not (isinstance(event, TokenEvent) and _is_plain(event))]
        return [columns, *rest] if plain else rest

    def _take_commands(self, events: list[EngineEvent]) -> None:
        while True:
            try:
                kind, subject, ticket = self._commands.get_nowait()
            except Empty:
                return
            if isinstance(subject, Request):
                self._take_in(kind, subject, ticket, events)
            elif kind == "abort":
                self._abort(RequestId(subject), events)
            else:
                self.released.append(subject)
                self.pinned.pop(subject, None)

    def _abort(self, request_id: RequestId, events: list[EngineEvent]) -> None:
        running = self._running.pop(request_id, None)
        self.pinned = {key: owner for key, owner in self.pinned.items() if owner != request_id}
        index = 0 if running is None else running.index
        if running is not None or request_id in self._awaited:
            events.append(TokenEvent(request_id=request_id, index=index, token_id=None, finish="abort"))
        self._awaited.discard(request_id)
        if running is not None and running.prefill and running.offers < self.offers:
            # What was offered may be read until it is released.
            self.pinned[self._ticket_id(request_id)] = request_id

    def _ticket_id(self, request_id: RequestId) -> str:
        return f"{self._member_id}/{request_id}"

    def _take_in(self, kind: str, request: Request, ticket: KvTicket | None, events: list[EngineEvent]) -> None:
        self.modes.append(kind)
        self._awaited.discard(request.id)
        if self.refusals:
            events.append(Rejected(request_id=request.id, error=self.refusals.pop(0)))
            return
        if ticket is not None:
            self.redeemed.append(ticket.id)
        offers = self.offers if kind == "prefill" else 0
        self._running[request.id] = _Running(request=request, prefill=kind == "prefill", offers=offers)

    def _advance(self, running: _Running) -> list[EngineEvent]:
        request = running.request
        if running.offers:
            running.offers -= 1
            ticket = self._ticket(running)
            offered = replace(ticket, num_tokens=max(1, ticket.num_tokens - running.offers), partial=True)
            return [TicketReady(request_id=request.id, ticket=offered)]
        index = running.index
        token = running.advance()
        if index == self.skip_index:
            return []
        last = running.index >= request.sampling.max_tokens
        top = request.sampling.logprobs
        logprob = (
            None if top is None else TokenLogprob(logprob=-1.0, rank=1, top_ids=(1,) * top, top_logprobs=(-1.0,) * top)
        )
        event = TokenEvent(
            request_id=request.id,
            index=index,
            token_id=token,
            finish="length" if last else None,
            logprob=logprob,
            cached_tokens=16 if index == len(request.output_ids) else 0,
        )
        if last or running.prefill:
            del self._running[request.id]
        if last or not running.prefill:
            return [event]
        ticket = self._ticket(running)
        self.pinned[ticket.id] = request.id
        return [event, TicketReady(request_id=request.id, ticket=ticket)]

    def _ticket(self, running: _Running) -> KvTicket:
        return KvTicket(
            id=self._ticket_id(running.request.id),
            member_id=self._member_id,
            layout=LAYOUT,
            ranks=(),
            blocks=(0,),
            state_slot=-1,
            num_tokens=running.length - 1,
            expires_unix_s=time.time() + self._lease_s,
        )


def _is_plain(event: TokenEvent) -> bool:
    return event.token_id is not None and event.finish is None and event.logprob is None and not event.cached_tokens
