"""Random histories of two members that hand requests over, on ranks that check the content of every block."""

import random
from collections import deque
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.plan import HandoffReady, KvLayout, KvTicket, PullDone, PullOrder, StepOutput, StepPlan
from cluster.scheduler import Scheduler
from cluster.scheduler_config import SchedulerConfig
from router.errors import OverloadedError
from router.prefix import block_hashes
from router.request import MemberId, Request, RequestId, SamplingParams, TokenEvent
from tests.support.content_ranks import BLOCK, VOCAB, FakeLane, next_token
from tests.support.events import one_by_one

STOP = 7


def undisturbed(request: Request) -> list[int]:
    """The tokens of the request when nothing else runs."""
    tokens = list(request.prompt_ids)
    while True:
        tokens.append(next_token(tuple(tokens)))
        done = len(tokens) - len(request.prompt_ids)
        sampling = request.sampling
        if (tokens[-1] in sampling.stop_token_ids and done > sampling.min_tokens) or done == sampling.max_tokens:
            return tokens[len(request.prompt_ids) :]


class Member:
    """A scheduler with its fake ranks; results come back one step late."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.scheduler = Scheduler(config)
        self.config = config
        self.lanes = [FakeLane() for _ in range(config.lanes)]
        self.outputs: deque[StepOutput] = deque()
        self.pulls: list[PullOrder] = []

    def launch(self, now: float) -> bool:
        plan: StepPlan | None = self.scheduler.schedule(now)
        if plan is None:
            return False
        lanes = tuple(lane.run(batch) for lane, batch in zip(self.lanes, plan.lanes, strict=True))
        self.outputs.append(StepOutput(step=plan.step, lanes=lanes))
        self.pulls += plan.pulls
        return True

    def commit(self, now: float) -> list[TokenEvent | HandoffReady]:
        return one_by_one(self.scheduler.commit(self.outputs.popleft(), now))


def make_config(rng: random.Random) -> SchedulerConfig:
    recurrent = rng.random() < 0.6
    rows = rng.randint(1, 6)
    return SchedulerConfig(
        lanes=rng.choice([1, 1, 2]),
        num_blocks=rng.randint(13, 22),
        num_slots=max(2, rows + rng.randint(0, 6)) if recurrent else 0,
        block_size=BLOCK,
        max_rows=rows,
        max_step_tokens=rng.randint(rows, 24),
        chunk_tokens=rng.choice([1, 3, 8, 64]),
        max_model_len=64,
        vocab_size=1 << 20,
        prefix_cache=rng.random() < 0.8,
        state_spacing=rng.choice([1, 4, 11]),
        draft_tokens=rng.choice([0, 0, 1, 3]),
        draft_adaptive=False,
        early_tokens=rng.choice([1, 1, 5, 100]),
        lease_s=12.0,
        lease_grace_s=1.0,
        max_waiting=12,
    )


def make_request(rng: random.Random, number: int) -> Request:
    shared = (1, 2, 3, 4, 5, 6, 7, 8, 9)[: rng.choice([0, 0, 4, 9])]
    own = random.Random(rng.randrange(5)).choices(range(VOCAB), k=14)
    prompt = (*shared, *own[: rng.randint(1, 14)])
    sampling = SamplingParams(
        max_tokens=rng.choice([1, 2, 5, 20, 28]),
        min_tokens=rng.randint(0, 2),
        stop_token_ids=(STOP,),
        logprobs=rng.choice([None, 1]),
        prompt_logprobs=rng.choice([None, None, None, 0]),
    )
    return Request(
        id=RequestId(f"r{number}"),
        prompt_ids=prompt,
        sampling=sampling,
        priority=rng.choice([0, 0, 0, 1]),
        cache_salt=rng.choice(["", "x"]),
    )


class Fleet:
    """A prefill and a decode member, and the client side that checks every event."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        prefill = make_config(self.rng)
        decode = replace(
            make_config(self.rng),
            num_slots=0 if prefill.num_slots == 0 else 3,
            prefix_cache=prefill.prefix_cache,
        )
        self.members = [Member(prefill), Member(decode)]
        self.requests: dict[RequestId, Request] = {}
        self.streams: dict[RequestId, list[int]] = {}
        self.pending: list[tuple[Request, KvTicket]] = []
        self.offers: dict[RequestId, str] = {}
        """Tickets of prompts that are still computed, and told to the decode member."""
        self.now = 0.0
        self.finished = 0

    def arrive(self) -> None:
        request = make_request(self.rng, len(self.requests))
        try:
            mode = self.rng.choice(["full", "prefill"])
            member = self.members[0] if mode == "prefill" else self.rng.choice(self.members)
            member.scheduler.add(request, mode="prefill" if mode == "prefill" else "full", now=self.now)
        except OverloadedError:
            return
        self.requests[request.id] = request
        self.streams[request.id] = []

    def abort(self) -> None:
        if not self.streams:
            return
        victim = self.rng.choice(list(self.streams))
        for member in self.members:
            event = member.scheduler.abort(victim, self.now)
            assert event is None or event.finish == "abort"
        self.pending = [entry for entry in self.pending if entry[0].id != victim]
        offer = self.offers.pop(victim, None)
        if offer is not None and self.rng.random() < 0.7:
            # The decode member has let go of it.
            self.members[0].scheduler.release_ticket(offer)
        del self.streams[victim]

    def take(self, event: TokenEvent | HandoffReady) -> None:
        if isinstance(event, HandoffReady) and event.partial:
            # Now and then word of it comes when the request has gone.
            if event.request_id in self.streams and self.rng.random() < 0.9:
                self.expect(event)
            return
        if isinstance(event, HandoffReady):
            self.pending.append((self.handoff_request(event), self.ticket(event)))
            return
        request, stream = self.requests[event.request_id], self.streams[event.request_id]
        assert event.index == len(stream)
        assert event.token_id is not None
        stream.append(event.token_id)
        if request.sampling.logprobs is not None:
            assert event.logprob is not None
            assert event.logprob.logprob == -event.token_id
            assert event.logprob.top_ids == (event.token_id,)
        if event.index == 0 and request.sampling.prompt_logprobs is not None:
            told = [entry and -entry.logprob for entry in event.prompt_logprobs]
            assert told == [None, *request.prompt_ids[1:]]
        else:
            assert event.prompt_logprobs == ()
        if event.finish is not None:
            assert stream == undisturbed(request)
            assert (event.finish == "stop") == (stream[-1] == STOP and len(stream) > request.sampling.min_tokens)
            if request.id in self.offers:
                # It ended with its first token, where it was prefilled.
                self.members[1].scheduler.abort(request.id, self.now)
                self.members[0].scheduler.release_ticket(self.offers.pop(request.id))
            del self.streams[event.request_id]
            self.finished += 1

    def handoff_request(self, event: HandoffReady) -> Request:
        return replace(self.requests[event.request_id], output_ids=tuple(self.streams[event.request_id]))

    def expect(self, event: HandoffReady) -> None:
        request = self.requests[event.request_id]
        hashes = block_hashes(request.prompt_ids[: event.num_tokens], BLOCK, request.cache_salt)
        self.members[1].scheduler.expect(request.id, hashes, self.ticket(event))
        self.offers[request.id] = event.ticket_id

    def ticket(self, event: HandoffReady) -> KvTicket:
        config = self.members[0].config
        layout = KvLayout(
            fingerprint="f", tp=1, block_size=BLOCK, num_blocks=config.num_blocks, num_slots=0, dtype="float32"
        )
        return KvTicket(
            id=f"{event.lane}:{event.ticket_id}",
            member_id=MemberId("p"),
            layout=layout,
            ranks=(),
            blocks=event.blocks,
            state_slot=event.state_slot,
            num_tokens=event.num_tokens,
            expires_unix_s=event.expires_unix_s,
            partial=event.partial,
        )

    def hand_off(self) -> None:
        for entry in tuple(self.pending):
            request, ticket = entry
            try:
                self.members[1].scheduler.add_handoff(request, ticket, self.now)
            except OverloadedError:
                # It begins anew if it comes again.
                self.offers.pop(request.id, None)
                continue
            self.offers.pop(request.id, None)
            self.pending.remove(entry)

    def finish_pull(self) -> None:
        source, target = self.members
        if not target.pulls:
            return
        order = target.pulls.pop(self.rng.randrange(len(target.pulls)))
        lane, ticket_id = order.ticket.id.split(":", 1)
        failed = self.rng.random() < 0.2
        for src, dst in zip(order.ticket.blocks[order.first // BLOCK :], order.dst_blocks, strict=False):
            for offset in range(BLOCK):
                value = source.lanes[int(lane)].kv.get((src, offset), 0)
                target.lanes[order.lane].kv[dst, offset] = -1 if failed else value
        if order.dst_slot >= 0:
            state = source.lanes[int(lane)].states[order.ticket.state_slot]
            target.lanes[order.lane].states[order.dst_slot] = (-1, -1) if failed else state
        if order.ticket.num_tokens == len(self.requests[RequestId(ticket_id.split("/")[0])].prompt_ids):
            source.scheduler.release_ticket(ticket_id)
        target.scheduler.pull_done(PullDone(pull_id=order.pull_id, error="torn" if failed else ""), self.now)

    def step(self, *, calm: bool) -> None:
        self.now += 1.0 if self.rng.random() < 0.9 else 5.0
        roll = self.rng.random()
        if not calm and roll < 0.35:
            self.arrive()
        if not calm and roll > 0.95:
            self.abort()
        self.hand_off()
        if calm or roll < 0.5:
            self.finish_pull()
        for member in self.members:
            launched = member.launch(self.now)
            if len(member.outputs) > 1 or (member.outputs and not launched):
                for event in member.commit(self.now):
                    self.take(event)
            for event in member.scheduler.expire(self.now):
                self.take(event)
            member.scheduler.check_integrity()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_outputs_equal_the_undisturbed_run_and_all_room_is_free_in_the_end(seed: int) -> None:
    fleet = Fleet(seed)
    for _ in range(150):
        fleet.step(calm=False)
    for _ in range(3000):
        fleet.step(calm=True)
        if not fleet.streams and all(member.scheduler.is_idle for member in fleet.members):
            break
    assert not fleet.streams, f"never finished: {sorted(fleet.streams)}"
    for member in fleet.members:
        assert member.scheduler.is_idle
        load = member.scheduler.load(fleet.now, MemberId("m"), "mixed")
        assert load.free_blocks == load.total_blocks
        assert load.free_state_slots == load.total_state_slots
        assert load.running_requests == load.waiting_requests == load.waiting_tokens == 0
