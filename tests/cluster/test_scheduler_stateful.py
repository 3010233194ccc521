"""Histories that hypothesis makes and shrinks: one member whose requests share beginnings, on ranks that check every
block and state they read. Each request must get the tokens of a cold run alone, whatever else happened."""

from collections import deque
from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from typing_extensions import override

from cluster.plan import HandoffReady, StepOutput
from cluster.scheduler import Scheduler
from cluster.scheduler_config import SchedulerConfig
from router.errors import OverloadedError
from router.request import MemberId, Request, RequestId, SamplingParams, TokenEvent
from tests.support.content_ranks import BLOCK, FakeLane, next_token

BEGINNINGS = [tuple(range(1, 1 + 30)), (*range(1, 14), *range(60, 77)), tuple(range(30, 60))]
"""Two that part after 13 tokens, and one of its own."""
CONFIG = SchedulerConfig(
    lanes=1,
    num_blocks=20,
    num_slots=6,
    block_size=BLOCK,
    max_rows=3,
    max_step_tokens=24,
    chunk_tokens=24,
    max_model_len=64,
    vocab_size=1 << 20,
    prefix_cache=True,
    state_spacing=4,
    lease_s=5.0,
    lease_grace_s=1.0,
    max_waiting=8,
)


def cold(request: Request) -> list[int]:
    """The tokens of a request that runs alone, nothing cached."""
    tokens = list(request.prompt_ids)
    for _ in range(request.sampling.max_tokens):
        tokens.append(next_token(tuple(tokens)))
    return tokens[len(request.prompt_ids) :]


class Histories(RuleBasedStateMachine):
    """Rules are what clients and the engine's loop do; each is followed by a look at every block, slot and row."""

    @initialize(
        slots=st.sampled_from([0, 2, 3, 4, 6, 12]),
        int8=st.sampled_from([0, 0, 1, 2, 7]),
        blocks=st.integers(17, 40),
        chunk=st.sampled_from([1, 5, 24]),
        lanes=st.sampled_from([1, 2]),
        spacing=st.sampled_from([1, 4, 9]),
        prefix_cache=st.sampled_from([True, True, True, False]),
    )
    def begin(
        self, slots: int, int8: int, blocks: int, chunk: int, lanes: int, spacing: int, *, prefix_cache: bool
    ) -> None:
        int8 = int8 if slots and prefix_cache else 0
        self.config = replace(
            CONFIG,
            num_slots=slots,
            num_int8=int8,
            num_blocks=blocks,
            chunk_tokens=chunk,
            lanes=lanes,
            state_spacing=spacing,
            prefix_cache=prefix_cache,
        )
        self.scheduler = Scheduler(self.config)
        self.lanes = [FakeLane(kept={} if int8 else None) for _ in range(lanes)]
        self.outputs: deque[StepOutput] = deque()
        self.requests: dict[RequestId, Request] = {}
        self.streams: dict[RequestId, list[int]] = {}
        self.tickets: list[str] = []
        self.now = 0.0

    @rule(
        beginning=st.sampled_from(BEGINNINGS),
        shared=st.integers(0, 30),
        own=st.integers(1, 9),
        length=st.integers(1, 24),
        prefill=st.sampled_from([False, False, False, True]),
    )
    def submit(self, beginning: tuple[int, ...], shared: int, own: int, length: int, *, prefill: bool) -> None:
        number = len(self.requests)
        self._submit((*beginning[:shared], *range(1000 + number, 1000 + number + own)), length, prefill=prefill)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), own=st.integers(0, 6), length=st.integers(1, 12))
    def go_on_with_a_chat(self, data: st.DataObject, own: int, length: int) -> None:
        """A prompt of an earlier request, its answer so far, and more."""
        request = self.requests[data.draw(st.sampled_from(sorted(self.requests)))]
        said = (*request.prompt_ids, *cold(request))[: self.config.max_model_len - own - length]
        self._submit((*said, *range(2000, 2000 + own)), length, prefill=False)

    def _submit(self, prompt: tuple[int, ...], length: int, *, prefill: bool) -> None:
        request = Request(
            id=RequestId(f"r{len(self.requests):03}"), prompt_ids=prompt, sampling=SamplingParams(max_tokens=length)
        )
        try:
            self.scheduler.add(request, mode="prefill" if prefill else "full", now=self.now)
        except OverloadedError:
            return
        self.requests[request.id] = request
        self.streams[request.id] = []

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            self._step()

    @rule()
    def plan_only(self) -> None:
        """The engine plans ahead by one step, then it stays so until the next step."""
        if not self.outputs:
            self._launch()

    @precondition(lambda self: self.streams)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.streams)))
        event = self.scheduler.abort(name, self.now)
        assert event is None or event.finish == "abort"
        del self.streams[name]

    @precondition(lambda self: self.tickets)
    @rule()
    def fetch_ticket(self) -> None:
        self.scheduler.release_ticket(self.tickets.pop())

    @rule(seconds=st.sampled_from([1.0, 7.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        assert self.scheduler.expire(self.now) == []

    def _launch(self) -> bool:
        plan = self.scheduler.schedule(self.now)
        if plan is None:
            return False
        lanes = tuple(lane.run(batch) for lane, batch in zip(self.lanes, plan.lanes, strict=True))
        self.outputs.append(StepOutput(step=plan.step, lanes=lanes))
        return True

    def _step(self) -> bool:
        """As the engine does: plan the next step, then take the results of the one before."""
        launched = self._launch()
        if len(self.outputs) > 1 or (self.outputs and not launched):
            for event in self.scheduler.commit(self.outputs.popleft(), self.now):
                self._take(event)
            return True
        return launched

    def _take(self, event: TokenEvent | HandoffReady) -> None:
        if isinstance(event, HandoffReady):
            self.tickets.append(event.ticket_id)
            del self.streams[event.request_id]
            return
        request, stream = self.requests[event.request_id], self.streams[event.request_id]
        assert event.token_id is not None
        stream.append(event.token_id)
        assert stream == cold(request)[: len(stream)]
        assert event.cached_tokens < len(request.prompt_ids)
        if event.finish is not None:
            del self.streams[event.request_id]

    @invariant()
    def all_room_is_accounted_for(self) -> None:
        self.scheduler.check_integrity()

    @override
    def teardown(self) -> None:
        """Whatever is left comes to its end, and all room is free again."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(2000):
            self.now += 1.0
            # As an engine that has nothing to do: the room of tickets nobody fetched may be what is missing.
            assert self.scheduler.expire(self.now) == []
            if not self._step() and not self.scheduler.has_work:
                break
        self.scheduler.expire(self.now + 100.0)
        assert not self.streams
        assert self.scheduler.is_idle
        load = self.scheduler.load(self.now, MemberId("m"), "mixed")
        assert load.free_blocks == load.total_blocks
        assert load.free_state_slots == load.total_state_slots


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
