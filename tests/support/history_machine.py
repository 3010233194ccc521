"""Histories of two members that hypothesis makes and shrinks: prefix cache, drafts, chunked prompts, preemption, aborts
and hand-offs at once, on ranks of any kind.

Everything runs in one thread, so that a history repeats. Each request must get the tokens that it gets alone, without
drafts, nothing cached, and all room must be accounted for after every step.
"""

from collections import deque
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

from cluster.plan import HandoffReady, KvLayout, KvTicket, PullDone, PullOrder, StepOutput
from cluster.scheduler import Scheduler
from cluster.scheduler_config import SchedulerConfig
from router.errors import OverloadedError
from router.prefix import block_hashes
from router.request import MemberId, Request, RequestId, TokenEvent
from tests.support.history_counts import Counts
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


class Member:
    """Ranks and their scheduler, which plans a step ahead as an engine does."""

    def __init__(self, name: str, ranks: MemberRanks, config: SchedulerConfig) -> None:
        self.name = name
        self.ranks = ranks
        self.config = config
        self.scheduler = Scheduler(config)
        self.outputs: deque[StepOutput] = deque()
        self.orders: list[PullOrder] = []
        """Pulls that are to be carried out."""

    def launch(self, now: float) -> bool:
        """Plan a step and run it; what it gave is told later."""
        plan = self.scheduler.schedule(now)
        if plan is None:
            return False
        self.orders += plan.pulls
        self.outputs.append(StepOutput(step=plan.step, lanes=self.ranks.step(plan.lanes)))
        return True

    def pull(self, index: int, source: "Member", now: float, *, torn: bool, releases: bool) -> None:
        """End one of the pulls, in any order.

        Args:
            torn: it fails, and what it left is worth nothing.
            releases: or else the source keeps what was read until its lease is over.
        """
        order = self.orders.pop(index)
        ticket, size = order.ticket, self.config.block_size
        lane, ticket_id = ticket.id.split(":", 1)
        blocks = list(ticket.blocks[order.first // size : -(-ticket.num_tokens // size)])
        content = source.ranks.read(int(lane), blocks, ticket.state_slot)
        self.ranks.write(order.lane, list(order.dst_blocks[: len(blocks)]), order.dst_slot, content)
        if releases:
            source.scheduler.release_ticket(ticket_id)
        if torn:
            self.ranks.fill(order.lane, order.dst_blocks, order.dst_slot)
        self.scheduler.pull_done(PullDone(pull_id=order.pull_id, error="torn" if torn else ""), now)


class HistoryMachine(RuleBasedStateMachine):
    """Rules are what clients and the engines' loops do; each is followed by a look at every block, slot and row."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self.members: list[Member] = []
        self.requests: dict[RequestId, Request] = {}
        self.told: dict[RequestId, int] = {}
        """Tokens that each request has got."""
        self.running: set[RequestId] = set()
        self.tickets: list[tuple[Member, HandoffReady]] = []
        self.offers: dict[RequestId, tuple[Member, str]] = {}
        """Tickets of prompts that are still computed, as far as the other member knows of them."""
        self.now = 0.0

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        configs = data.draw(self.world.configs)
        ranks = self.world.make_ranks(*configs)
        self.members = [Member(name, own, config) for name, own, config in zip("ab", ranks, configs, strict=True)]

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

    def _add(self, member: Member, prompt: tuple[int, ...], data: st.DataObject) -> None:
        sampling = data.draw(st.sampled_from((GREEDY, SAMPLED)))
        tokens = data.draw(st.sampled_from((LONGEST_ANSWER, 1, 6, 13)))
        request = Request(
            id=RequestId(f"r{len(self.requests):03}"),
            prompt_ids=prompt,
            sampling=replace(sampling, max_tokens=tokens),
            priority=data.draw(st.sampled_from((0, 0, 0, 1))),
        )
        prefill = data.draw(st.sampled_from((False, False, True)))
        try:
            member.scheduler.add(request, mode="prefill" if prefill else "full", now=self.now)
        except OverloadedError:
            return
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

    @rule(member=_MEMBERS)
    def plan_only(self, member: int) -> None:
        """A member plans ahead by one step, then it stays so until its next step."""
        if not self.members[member].outputs:
            self.world.counts.steps += self.members[member].launch(self.now)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.running)))
        for member in self.members:
            event = member.scheduler.abort(name, self.now)
            assert event is None or event.finish == "abort"
        self.tickets = [(source, ready) for source, ready in self.tickets if ready.request_id != name]
        self._let_go(name)
        self.running.discard(name)
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
        for member in self.members:
            assert member.scheduler.expire(self.now) == []

    def _step(self, member: Member, pace: float) -> bool:
        """As the engine does: plan the next step, then take the results of the one before."""
        self.now += pace
        launched = member.launch(self.now)
        self.world.counts.steps += launched
        if len(member.outputs) > 1 or (member.outputs and not launched):
            for event in member.scheduler.commit(member.outputs.popleft(), self.now):
                self._take(member, event)
            launched = True
        elif not launched:
            # As an engine that has nothing to do.
            assert member.scheduler.expire(self.now) == []
            self.now += 0.05
        member.scheduler.check_integrity()
        return launched

    def _use_ticket(self, index: int) -> None:
        source, ready = self.tickets.pop(index)
        request = self.requests[ready.request_id]
        answer = self.world.answer(request)[: self.told[request.id]]
        self.offers.pop(request.id, None)
        try:
            ticket = self._ticket(source, ready)
            self._other(source).scheduler.add_handoff(replace(request, output_ids=answer), ticket, self.now)
        except OverloadedError:
            self.tickets.append((source, ready))

    def _other(self, member: Member) -> Member:
        return self.members[1 - self.members.index(member)]

    def _expect(self, source: Member, offer: HandoffReady) -> None:
        """Tell the other member what is computed of a prompt so far, if it is of use to anybody."""
        if offer.request_id in self.running:
            prompt, size = self.requests[offer.request_id].prompt_ids, self._other(source).config.block_size
            hashes = block_hashes(prompt[: offer.num_tokens], size)
            self._other(source).scheduler.expect(offer.request_id, hashes, self._ticket(source, offer))
            self.offers[offer.request_id] = source, offer.ticket_id

    def _let_go(self, name: RequestId) -> None:
        """A request ended where its prompt was computed: what was offered is released when the other member knows."""
        if name in self.offers:
            source, ticket_id = self.offers.pop(name)
            self._other(source).scheduler.abort(name, self.now)
            source.scheduler.release_ticket(ticket_id)

    def _ticket(self, source: Member, ready: HandoffReady) -> KvTicket:
        config = source.config
        layout = KvLayout(
            fingerprint="",
            tp=self.world.tp,
            block_size=config.block_size,
            num_blocks=config.num_blocks,
            num_slots=config.num_slots,
            dtype="float32",
        )
        return KvTicket(
            id=f"{ready.lane}:{ready.ticket_id}",
            member_id=source.name,
            layout=layout,
            ranks=(),
            blocks=ready.blocks,
            state_slot=ready.state_slot,
            num_tokens=ready.num_tokens,
            expires_unix_s=ready.expires_unix_s,
            partial=ready.partial,
        )

    def _pull(self, member: int, index: int, *, torn: bool, releases: bool) -> None:
        ticket = self.members[member].orders[index].ticket
        name = RequestId(ticket.id.split(":")[1].split("/")[0])
        early = ticket.num_tokens < len(self.requests[name].prompt_ids)
        releases = releases and not early
        self.members[member].pull(index, self.members[1 - member], self.now, torn=torn, releases=releases)
        self.world.counts.early_pulls += early and not torn
        self.world.counts.handoffs += not (early or torn)
        self.world.counts.failed_pulls += torn

    def _take(self, member: Member, event: TokenEvent | HandoffReady) -> None:
        name, counts = event.request_id, self.world.counts
        if isinstance(event, HandoffReady):
            if event.partial:
                self._expect(member, event)
            else:
                self.tickets.append((member, event))
            return
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
            member.scheduler.check_integrity()

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
            busy = any(member.scheduler.has_work for member in self.members)
            if not any(stepped) and not busy and not self.tickets:
                break
        assert not self.running, f"{sorted(self.running)} never end"
        for member in self.members:
            self._check_end(member)
        self.world.counts.histories += bool(self.members)

    def _check_end(self, member: Member) -> None:
        scheduler, counts = member.scheduler, self.world.counts
        scheduler.expire(self.now + 10 * LEASE_S)
        assert scheduler.is_idle, scheduler.describe()
        load = scheduler.load(self.now, MemberId(member.name), "mixed")
        assert load.free_blocks == load.total_blocks, scheduler.describe()
        assert load.free_state_slots == load.total_state_slots, scheduler.describe()
        counts.drafted += scheduler.num_drafted
        counts.accepted += scheduler.num_accepted
        counts.preemptions += scheduler.num_preemptions
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
