"""Histories of two members that hypothesis makes and shrinks: prefix cache, drafts, chunked prompts, preemption, aborts
and hand-offs at once, on real engines over ranks of any kind.

Everything runs in one thread, which gives engines their turns, so that a history repeats. Each request must get the
tokens that it gets alone, without drafts, nothing cached, and all room must be accounted for after every step.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from typing_extensions import override

from cluster.engine import EngineEvent, Rejected, TicketReady
from cluster.plan import KvTicket
from cluster.scheduler_config import SchedulerConfig
from router.errors import OverloadedError
from router.prefix import block_hashes
from router.request import Request, RequestId, TokenEvent
from tests.support.events import one_by_one
from tests.support.history_counts import Counts
from tests.support.history_engine import HistoryMember, id_of
from tests.support.history_members import MemberRanks
from tests.support.history_plan import GREEDY, LEASE_S, LONGEST_ANSWER, SAMPLED

_STEPS_TO_END: Final = 3000
_PACES: Final = st.sampled_from((0.001, 0.002, 0.004))
_MEMBERS: Final = st.integers(0, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What histories take place on, and what they came to."""

    configs: st.SearchStrategy[tuple[SchedulerConfig, SchedulerConfig]]
    """Limits of the two members."""
    make_ranks: Callable[[SchedulerConfig, SchedulerConfig], tuple[MemberRanks, MemberRanks]]
    """Their ranks at the beginning of a history; nothing good lies in their caches."""
    answer: Callable[[Request], tuple[int, ...]]
    """The tokens of a request alone."""
    beginnings: tuple[tuple[int, ...], ...]
    """What prompts begin with, or with a part of it."""
    own: tuple[tuple[int, ...], ...]
    """What prompts end with, or with a part of it."""
    tp: int = 1
    counts: Counts = field(default_factory=Counts)


class HistoryMachine(RuleBasedStateMachine):
    """Rules are what clients, gateways and the engines' threads do; each is followed by a look at every block, slot and
    row. Between its turns an engine has a step in flight, as long as there is any to be made."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self.members: list[HistoryMember] = []
        self.requests: dict[RequestId, Request] = {}
        self.told: dict[RequestId, int] = {}
        """Tokens that each request has got."""
        self.running: set[RequestId] = set()
        self.aborted: set[RequestId] = set()
        self.handed: dict[RequestId, tuple[HistoryMember, KvTicket]] = {}
        """Requests that were told to go on at another member, and with what."""
        self.tickets: list[tuple[HistoryMember, RequestId, KvTicket]] = []
        self.offers: dict[RequestId, tuple[HistoryMember, KvTicket]] = {}
        """Tickets of prompts that are still computed, as far as the other member knows of them."""
        self.now = 0.0

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        configs = data.draw(self.world.configs)
        ranks = self.world.make_ranks(*configs)
        self.members = [
            HistoryMember(name, own, config, tp=self.world.tp, clock=lambda: self.now, on_events=self._take_all)
            for name, own, config in zip("ab", ranks, configs, strict=True)
        ]

    @rule(
        member=_MEMBERS,
        beginning=st.integers(0, 2),
        shared=st.sampled_from((0, 3, 8, 13, 16, 24, 40)),
        own=st.integers(0, 5),
        length=st.sampled_from((1, 4, 9)),
        data=st.data(),
    )
    def submit(self, member: int, beginning: int, shared: int, own: int, length: int, data: st.DataObject) -> None:
        prompt = (*self.world.beginnings[beginning][:shared], *self.world.own[own][:length])
        self._add(self.members[member], prompt, data)

    @rule(member=_MEMBERS, beginning=st.integers(0, 2), shared=st.sampled_from((0, 8, 24)), data=st.data())
    def submit_several(self, member: int, beginning: int, shared: int, data: st.DataObject) -> None:
        """More at once than there may be room for."""
        for own in self.world.own[:4]:
            self._add(self.members[member], (*self.world.beginnings[beginning][:shared], *own), data)

    @precondition(lambda self: self.requests)
    @rule(member=_MEMBERS, said=st.sampled_from((4, 12, 24)), more=st.sampled_from((0, 3)), data=st.data())
    def go_on_with_a_chat(self, member: int, said: int, more: int, data: st.DataObject) -> None:
        """A prompt of an earlier request, its answer so far, and more."""
        request = self.requests[data.draw(st.sampled_from(sorted(self.requests)))]
        prompt = (*request.prompt_ids, *self.world.answer(request)[:said], *(7, 5, 3)[:more])
        if len(prompt) + LONGEST_ANSWER <= self.members[member].config.max_model_len:
            self._add(self.members[member], prompt, data)

    def _add(self, member: HistoryMember, prompt: tuple[int, ...], data: st.DataObject) -> None:
        sampling = data.draw(st.sampled_from((GREEDY, SAMPLED)))
        tokens = data.draw(st.sampled_from((LONGEST_ANSWER, 1, 6, 13)))
        request = Request(
            id=RequestId(f"r{len(self.requests):03}"),
            prompt_ids=prompt,
            sampling=replace(sampling, max_tokens=tokens),
            priority=data.draw(st.sampled_from((0, 0, 0, 1))),
        )
        prefill = data.draw(st.sampled_from((False, False, True)))
        member.engine.submit(request, mode="prefill" if prefill else "full")
        self.requests[request.id] = request
        self.told[request.id] = 0
        self.running.add(request.id)
        self.world.counts.requests += 1

    @rule(member=_MEMBERS, count=st.integers(1, 6), pace=_PACES)
    def steps(self, member: int, count: int, pace: float) -> None:
        for _ in range(count):
            self._step(self.members[member], pace)

    @rule(count=st.integers(1, 6), pace=_PACES)
    def steps_of_both(self, count: int, pace: float) -> None:
        for _ in range(count):
            for member in self.members:
                self._step(member, pace)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.running)))
        for member in self.members:
            member.engine.abort(name)
        self.tickets = [each for each in self.tickets if each[1] != name]
        self._let_go(name)
        self.running.discard(name)
        self.aborted.add(name)
        self.world.counts.aborts += 1

    @precondition(lambda self: self.tickets)
    @rule(data=st.data())
    def use_ticket(self, data: st.DataObject) -> None:
        """Go on with a prefilled request at the other member; its ticket may have expired."""
        self._use_ticket(data.draw(st.integers(0, len(self.tickets) - 1)))

    @precondition(lambda self: self.tickets)
    @rule(pace=_PACES, torn=st.booleans(), releases=st.booleans())
    def hand_all_over(self, pace: float, *, torn: bool, releases: bool) -> None:
        """All tickets at once, and the pulls that there is room for."""
        for _ in range(len(self.tickets)):
            self._use_ticket(0)
        for index, member in enumerate(self.members):
            self._step(member, pace)
            while member.orders:
                self._pull(index, 0, torn=torn, releases=releases)

    @precondition(lambda self: any(member.orders for member in self.members))
    @rule(data=st.data(), torn=st.booleans(), releases=st.booleans())
    def pull(self, data: st.DataObject, *, torn: bool, releases: bool) -> None:
        open_orders = [(m, i) for m, member in enumerate(self.members) for i in range(len(member.orders))]
        member, index = data.draw(st.sampled_from(open_orders))
        self._pull(member, index, torn=torn, releases=releases)

    @rule(seconds=st.sampled_from((1.0, 1.5 * LEASE_S)))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    def _step(self, member: HistoryMember, pace: float) -> bool:
        """A turn of the engine's thread, which sleeps for a while when there is nothing to do."""
        self.now += pace
        did = member.turn()
        if not did:
            self.now += 0.05
        return did

    def _use_ticket(self, index: int) -> None:
        source, name, ticket = self.tickets.pop(index)
        request = self.requests[name]
        answer = self.world.answer(request)[: self.told[name]]
        self.offers.pop(name, None)
        self.handed[name] = source, ticket
        self._other(source).engine.submit_handoff(replace(request, output_ids=answer), ticket)

    def _other(self, member: HistoryMember) -> HistoryMember:
        return self.members[1 - self.members.index(member)]

    def _expect(self, source: HistoryMember, name: RequestId, ticket: KvTicket) -> None:
        """Tell the other member what is computed of a prompt so far, if it is of use to anybody."""
        if name in self.running:
            prompt, size = self.requests[name].prompt_ids, self._other(source).config.block_size
            hashes = block_hashes(prompt[: ticket.num_tokens], size)
            self._other(source).engine.expect(name, hashes, ticket)
            self.offers[name] = source, ticket

    def _let_go(self, name: RequestId) -> None:
        """A request ended where its prompt was computed: the other member is told. What was offered is released when
        that has confirmed it."""
        if name in self.offers:
            self._other(self.offers[name][0]).engine.abort(name)
            self.aborted.add(name)

    def _let_go_of(self, member: HistoryMember, name: RequestId) -> None:
        """A member says that it has aborted a request."""
        assert name in self.aborted, f"{name} was not aborted"
        source, ticket = self.offers.get(name, (member, None))
        if ticket is not None and source is not member:
            del self.offers[name]
            source.engine.release_ticket(id_of(ticket))

    def _pull(self, member: int, index: int, *, torn: bool, releases: bool) -> None:
        ticket = self.members[member].orders[index].ticket
        name = RequestId(ticket.id.split(":")[1].split("/")[0])
        early = ticket.step >= 0 or ticket.num_tokens < len(self.requests[name].prompt_ids)
        releases = releases and not early
        self.members[member].pull(index, self.members[1 - member], torn=torn, releases=releases)
        self.world.counts.early_pulls += early and not torn
        self.world.counts.handoffs += not (early or torn)
        self.world.counts.failed_pulls += torn

    def _take_all(self, member: HistoryMember, events: list[EngineEvent]) -> None:
        for event in one_by_one(events):
            match event:
                case TokenEvent(finish="abort"):
                    self._let_go_of(member, event.request_id)
                case TokenEvent():
                    self._take(event)
                case TicketReady():
                    self._take_ticket(member, event.request_id, event.ticket)
                case Rejected():
                    self._take_refusal(event)

    def _take_ticket(self, member: HistoryMember, name: RequestId, ticket: KvTicket) -> None:
        if ticket.partial:
            self._expect(member, name, ticket)
        elif name in self.running:
            self.tickets.append((member, name, ticket))

    def _take_refusal(self, event: Rejected) -> None:
        """Too many wait there: a request is sent again when it was prefilled, or else given up."""
        name = event.request_id
        assert isinstance(event.error, OverloadedError), event.error
        handed = self.handed.pop(name, None)
        if name not in self.running:
            return
        if handed is not None:
            self.tickets.append((handed[0], name, handed[1]))
        else:
            self.running.discard(name)
            self.world.counts.requests -= 1

    def _take(self, event: TokenEvent) -> None:
        name, counts = event.request_id, self.world.counts
        request = self.requests[name]
        answer, index = self.world.answer(request), self.told[name]
        assert event.token_id == answer[index], f"{name}: token {index} is {event.token_id} and alone {answer[index]}"
        assert event.index == index, f"{name}: token {index} is told as {event.index}"
        # The last known token is always computed: that of the prompt, or behind a hand-off the first of the answer.
        assert event.cached_tokens < len(request.prompt_ids) + index
        self.told[name] += 1
        counts.tokens += 1
        counts.hits += event.cached_tokens > 0
        counts.cached_tokens += event.cached_tokens
        if event.finish is not None:
            assert self.told[name] == len(answer), f"{name} ends after {index + 1} of {len(answer)} tokens"
            self._let_go(name)
            self.running.discard(name)

    @invariant()
    def all_room_is_accounted_for(self) -> None:
        self.world.counts.actions += 1
        for member in self.members:
            member.engine.check_integrity()

    @override
    def teardown(self) -> None:
        """Whatever is left comes to its end, and all room is free again."""
        for _ in range(_STEPS_TO_END):
            if self.tickets:
                self._use_ticket(0)
            for index, member in enumerate(self.members):
                if member.orders:
                    pull_id = member.orders[0].pull_id
                    self._pull(index, 0, torn=pull_id % 3 == 1, releases=pull_id % 2 == 0)
            stepped = [self._step(member, 0.001) for member in self.members]
            # Who waits for room that a lease holds has nothing done for it, but time passes.
            if not (any(stepped) or self.running or any(member.orders for member in self.members)):
                break
        assert not self.running, f"{sorted(self.running)} never end"
        for member in self.members:
            self._check_end(member)
        self.world.counts.histories += bool(self.members)

    def _check_end(self, member: HistoryMember) -> None:
        engine, counts = member.engine, self.world.counts
        self.now += 10 * LEASE_S
        assert not member.turn()
        load, stats = engine.load(), engine.stats()
        assert load.waiting_requests == load.running_requests == 0, load
        assert load.free_blocks == load.total_blocks, load
        assert load.free_state_slots == load.total_state_slots, load
        counts.steps += stats.steps
        counts.drafted += stats.drafted_tokens
        counts.accepted += stats.accepted_tokens
        counts.preemptions += stats.preemptions
        counts.evicted_states += load.evicted_checkpoints


def run_histories(world: World, count: int, *, actions: int = 30) -> None:
    """Make histories and check them; one that goes wrong is shrunk and told as a program.

    Args:
        count: how many.
        actions: of each, before it comes to its end.
    """
    asked = settings(
        max_examples=count,
        stateful_step_count=actions,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )

    class Here(HistoryMachine):
        def __init__(self) -> None:
            super().__init__(world)

    run_state_machine_as_test(Here, settings=asked)
