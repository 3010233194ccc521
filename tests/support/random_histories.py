"""Random histories of two members on real ranks: prefix cache, drafts, preemption, aborts and hand-offs at once.

Everything runs in this thread, so that a seed repeats a history. Each request must get the tokens that it gets alone on
a rank without drafts, nothing cached, and all room must be accounted for after every step.
"""

import random
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Final

from cluster.plan import HandoffReady, KvLayout, KvTicket, PullDone, PullOrder, StepOutput
from cluster.scheduler import Scheduler
from cluster.scheduler_config import SchedulerConfig
from router.errors import OverloadedError
from router.request import MemberId, Request, RequestId, TokenEvent
from shards.mesh import Layout
from tests.support.history_members import MemberRanks, open_members, spoil
from tests.support.history_ranks import (
    BLOCK,
    GREEDY,
    LEASE_S,
    LONGEST_ANSWER,
    MAX_LEN,
    MOST_BLOCKS,
    MOST_DRAFTS,
    MOST_ROWS,
    MOST_SLOTS,
    SAMPLED,
    Answers,
    limits,
)

_STEPS_TO_END: Final = 3000


@dataclass(slots=True, kw_only=True)
class Counts:
    """What happened, over all histories."""

    histories: int = 0
    actions: int = 0
    steps: int = 0
    requests: int = 0
    tokens: int = 0
    hits: int = 0
    """Requests that found a part of their prompt cached."""
    cached_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    preemptions: int = 0
    evicted_states: int = 0
    aborts: int = 0
    handoffs: int = 0
    """Sequences that went on from another member's KV and state."""
    failed_pulls: int = 0

    def __str__(self) -> str:
        return ", ".join(f"{getattr(self, field.name)} {field.name}" for field in fields(self))


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

    def pull(self, source: "Member", rng: random.Random, now: float) -> bool:
        """End one of the pulls, in any order, now and then in failure -> whether it went well.

        Most release what they read; the rest waits until its lease is over.
        """
        order = self.orders.pop(rng.randrange(len(self.orders)))
        torn = rng.random() < 0.15
        lane, ticket_id = order.ticket.id.split(":", 1)
        self._copy(order, source.ranks, int(lane))
        if rng.random() < 0.7:
            source.scheduler.release_ticket(ticket_id)
        if torn:
            self.ranks.fill(order.lane, order.dst_blocks, order.dst_slot)
        self.scheduler.pull_done(PullDone(pull_id=order.pull_id, error="torn" if torn else ""), now)
        return not torn

    def _copy(self, order: PullOrder, source: MemberRanks, source_lane: int) -> None:
        ticket = order.ticket
        sources = list(ticket.blocks[order.first // BLOCK : -(-ticket.num_tokens // BLOCK)])
        content = source.read(source_lane, sources, ticket.state_slot)
        self.ranks.write(order.lane, list(order.dst_blocks[: len(sources)]), order.dst_slot, content)


class Histories:
    """Makes histories and checks them. `counts` tells what they came to.

    Args:
        ranks: of two members, that draft up to MOST_DRAFTS tokens.
        layout: of each of them.
    """

    def __init__(self, answers: Answers, ranks: tuple[MemberRanks, MemberRanks], layout: Layout) -> None:
        self.counts = Counts()
        self._answers = answers
        self._ranks = ranks
        self._layout = layout

    def run(self, seed: int, actions: int = 40) -> None:
        """One history. Raises AssertionError naming the seed and what was done where something is off."""
        history = _History(seed, self._answers, self._ranks, self._layout, self.counts)
        try:
            history.run(actions)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}\n{history.told()}") from error


class _History:
    def __init__(
        self, seed: int, answers: Answers, ranks: tuple[MemberRanks, MemberRanks], layout: Layout, counts: Counts
    ) -> None:
        self._rng = rng = random.Random(seed)
        self._layout = layout
        self._answers = answers
        self._counts = counts
        for own in ranks:
            spoil(own, layout.dp)
        self._members = [Member(name, own, self._config()) for name, own in zip("ab", ranks, strict=True)]
        self._beginnings = [tuple(random.Random(i).choices(range(answers.vocab_size), k=40)) for i in range(3)]
        self._requests: dict[RequestId, Request] = {}
        self._told: dict[RequestId, int] = {}
        """Tokens that each request has got."""
        self._running: set[RequestId] = set()
        self._tickets: list[tuple[Member, HandoffReady]] = []
        self._now = 0.0
        self._log: list[str] = []
        self._log.append("; ".join(str(member.config) for member in self._members))
        self._vary = rng.choice((2, 6))

    def told(self) -> str:
        """What was done so far, an action a line."""
        return "\n".join(self._log)

    def _config(self) -> SchedulerConfig:
        rng = self._rng
        return replace(
            limits(self._answers.vocab_size, self._layout.dp),
            num_blocks=rng.choice((13, 13, 16, MOST_BLOCKS)),
            num_slots=rng.choice((2, 4, 6, MOST_SLOTS)),
            max_rows=rng.choice((2, 3, MOST_ROWS)),
            chunk_tokens=rng.choice((5, 16, 64)),
            max_step_tokens=rng.choice((12, 24, 64)),
            state_spacing=rng.choice((1, 8, 24)),
            prefix_cache=rng.random() < 0.85,
            draft_tokens=rng.choice((0, 1, 2, MOST_DRAFTS)),
            draft_adaptive=rng.random() < 0.3,
        )

    def run(self, actions: int) -> None:
        """Random actions, then whatever is left comes to its end, and all room is free again."""
        weighted = (
            (self._submit, 9),
            (self._go_on_with_a_chat, 4),
            (self._steps, 12),
            (self._plan_only, 3),
            (self._abort, 2),
            (self._use_ticket, 4),
            (self._pull, 4),
            (self._wait, 1),
        )
        choices, weights = zip(*weighted, strict=True)
        for action in self._rng.choices(choices, weights, k=actions):
            self._log.append(action.__name__)
            action()
            self._check()
        self._finish()
        self._counts.histories += 1
        self._counts.actions += actions

    def _member(self) -> Member:
        return self._rng.choice(self._members)

    def _submit(self) -> None:
        rng = self._rng
        beginning = rng.choice(self._beginnings)[: rng.choice((0, 3, 8, 13, 16, 24, 40))]
        own = random.Random(rng.randrange(self._vary)).choices(range(self._answers.vocab_size), k=9)
        self._add((*beginning, *own[: rng.choice((1, 4, 9))]))

    def _go_on_with_a_chat(self) -> None:
        """A prompt of an earlier request, its answer, and more."""
        if not self._requests:
            return
        request = self._requests[self._rng.choice(sorted(self._requests))]
        said = (*request.prompt_ids, *self._answers.of(request)[: self._rng.choice((4, 12, 24))])
        if len(said) + 3 <= MAX_LEN - LONGEST_ANSWER:
            self._add((*said, 7, 5, 3)[: len(said) + self._rng.choice((0, 3))])

    def _add(self, prompt: tuple[int, ...]) -> None:
        rng, member = self._rng, self._member()
        sampling = rng.choice((GREEDY, SAMPLED))
        sampling = replace(sampling, max_tokens=rng.choice((1, 6, 13, LONGEST_ANSWER, LONGEST_ANSWER)))
        request = Request(
            id=RequestId(f"r{len(self._requests):03}"),
            prompt_ids=prompt,
            sampling=sampling,
            priority=rng.choice((0, 0, 0, 1)),
        )
        mode = "prefill" if rng.random() < 0.3 else "full"
        try:
            member.scheduler.add(request, mode=mode, now=self._now)
        except OverloadedError:
            return
        self._log.append(f"  {request.id} at {member.name}, {mode}, {len(prompt)} + {sampling.max_tokens} tokens")
        self._requests[request.id] = request
        self._told[request.id] = 0
        self._running.add(request.id)
        self._counts.requests += 1

    def _steps(self) -> None:
        member = self._member()
        for _ in range(self._rng.randint(1, 6)):
            self._step(member)

    def _step(self, member: Member) -> bool:
        """As the engine does: plan the next step, then take the results of the one before."""
        self._now += self._rng.choice((0.001, 0.002, 0.004))
        launched = member.launch(self._now)
        self._counts.steps += launched
        if len(member.outputs) > 1 or (member.outputs and not launched):
            for event in member.scheduler.commit(member.outputs.popleft(), self._now):
                self._take(member, event)
            launched = True
        elif not launched:
            # As an engine that has nothing to do.
            assert member.scheduler.expire(self._now) == []
            self._now += 0.05
        member.scheduler.check_integrity()
        return launched

    def _plan_only(self) -> None:
        """A member plans ahead by one step, then it stays so until its next step."""
        member = self._member()
        if not member.outputs:
            self._counts.steps += member.launch(self._now)

    def _abort(self) -> None:
        if not self._running:
            return
        name = self._rng.choice(sorted(self._running))
        self._log.append(f"  {name}")
        for member in self._members:
            member.scheduler.abort(name, self._now)
        self._tickets = [(source, ready) for source, ready in self._tickets if ready.request_id != name]
        self._running.discard(name)
        self._counts.aborts += 1

    def _use_ticket(self) -> None:
        """Go on with a prefilled request at either member; its ticket may have expired."""
        if not self._tickets:
            return
        source, ready = self._tickets.pop(self._rng.randrange(len(self._tickets)))
        request = self._requests[ready.request_id]
        answer = self._answers.of(request)[: self._told[request.id]]
        target = self._members[1 - self._members.index(source)]
        layout = KvLayout(
            fingerprint="",
            tp=self._layout.tp,
            block_size=BLOCK,
            num_blocks=MOST_BLOCKS,
            num_slots=MOST_SLOTS,
            dtype="float32",
        )
        ticket = KvTicket(
            id=f"{ready.lane}:{ready.ticket_id}",
            member_id=source.name,
            layout=layout,
            ranks=(),
            blocks=ready.blocks,
            state_slot=ready.state_slot,
            num_tokens=ready.num_tokens,
            expires_unix_s=ready.expires_unix_s,
        )
        try:
            target.scheduler.add_handoff(replace(request, output_ids=answer), ticket, self._now)
        except OverloadedError:
            self._tickets.append((source, ready))

    def _pull(self) -> None:
        member = self._member()
        if not member.orders:
            return
        source = self._members[1 - self._members.index(member)]
        went_well = member.pull(source, self._rng, self._now)
        self._counts.handoffs += went_well
        self._counts.failed_pulls += not went_well

    def _wait(self) -> None:
        self._now += self._rng.choice((1.0, 1.5 * LEASE_S))
        for member in self._members:
            assert member.scheduler.expire(self._now) == []

    def _take(self, member: Member, event: TokenEvent | HandoffReady) -> None:
        name = event.request_id
        if isinstance(event, HandoffReady):
            self._tickets.append((member, event))
            return
        answer, index = self._answers.of(self._requests[name]), self._told[name]
        assert event.token_id == answer[index], f"{name}: token {index} is {event.token_id} and alone {answer[index]}"
        assert event.index == index, f"{name}: token {index} is told as {event.index}"
        self._told[name] += 1
        self._counts.tokens += 1
        self._counts.hits += event.cached_tokens > 0
        self._counts.cached_tokens += event.cached_tokens
        if event.finish is not None:
            assert self._told[name] == len(answer), f"{name} ends after {index + 1} of {len(answer)} tokens"
            self._running.discard(name)

    def _check(self) -> None:
        for member in self._members:
            member.scheduler.check_integrity()

    def _finish(self) -> None:
        for _ in range(_STEPS_TO_END):
            self._use_ticket()
            self._pull()
            stepped = [self._step(member) for member in self._members]
            busy = any(member.scheduler.has_work for member in self._members)
            if not any(stepped) and not busy and not self._tickets:
                break
        assert not self._running, f"{sorted(self._running)} never end"
        for member in self._members:
            scheduler = member.scheduler
            scheduler.expire(self._now + 10 * LEASE_S)
            assert scheduler.is_idle, scheduler.describe()
            load = scheduler.load(self._now, MemberId(member.name), "mixed")
            assert load.free_blocks == load.total_blocks, scheduler.describe()
            assert load.free_state_slots == load.total_state_slots, scheduler.describe()
            self._counts.drafted += scheduler.num_drafted
            self._counts.accepted += scheduler.num_accepted
            self._counts.preemptions += scheduler.num_preemptions
            self._counts.evicted_states += load.evicted_checkpoints


@contextmanager
def open_histories(model: Path, layout: Layout | None = None) -> Iterator[Histories]:
    """Members of a Qwen3-Next checkpoint with a multi-token prediction head, for any number of histories."""
    answers, layout = Answers(model), layout or Layout()
    with open_members(model, layout) as ranks:
        yield Histories(answers, ranks, layout)
    answers.close()
