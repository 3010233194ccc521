"""Histories that hypothesis makes and shrinks, on ranks that check every block and state they read.

Each request must get the tokens of a cold run alone, whatever happens: shared prefixes, drafts, pulls, aborts.
"""

from dataclasses import replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from cluster.scheduler_config import SchedulerConfig
from router.request import Request
from shards.batch import LaneOutput, StepBatch
from tests.support.content_ranks import BLOCK, FakeLane, next_token
from tests.support.history_machine import World, run_histories
from tests.support.history_members import MemberRanks
from tests.support.history_plan import LEASE_S

LIMITS = SchedulerConfig(
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
    lease_s=LEASE_S,
    lease_grace_s=1.0,
    max_waiting=8,
)
NOTHING = -1
"""Stands where nothing good lies."""


class FakeRanks:
    """The lanes of one member; room is read and written as digests."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._lanes = [FakeLane(kept={} if config.num_int8 else None) for _ in range(config.lanes)]

    def step(self, lanes: tuple[StepBatch, ...]) -> tuple[LaneOutput, ...]:
        return tuple(lane.run(batch) for lane, batch in zip(self._lanes, lanes, strict=True))

    def fill(self, lane: int, blocks: tuple[int, ...], slot: int | None) -> None:
        assert slot is not None
        nothing = torch.full((len(blocks), BLOCK), NOTHING), torch.full((2,), NOTHING)
        self.write(lane, list(blocks), slot, [list(nothing)])

    def read(self, lane: int, blocks: list[int], slot: int) -> list[list[Tensor]]:
        held = self._lanes[lane]
        kv = [[held.kv.get((block, offset), NOTHING) for offset in range(BLOCK)] for block in blocks]
        state = held.states.get(slot, (NOTHING, NOTHING))
        return [[torch.tensor(kv, dtype=torch.int64).view(-1, BLOCK), torch.tensor(state)]]

    def write(self, lane: int, blocks: list[int], slot: int, content: list[list[Tensor]]) -> None:
        held, [[kv, state]] = self._lanes[lane], content
        for block, row in zip(blocks, kv.tolist(), strict=True):
            for offset, value in enumerate(row):
                held.kv[block, offset] = value
        if slot >= 0:
            count, value = state.tolist()
            held.states[slot] = count, value


class Cold:
    """The tokens of requests that run alone, nothing cached."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], list[int]] = {}

    def answer(self, request: Request) -> tuple[int, ...]:
        tokens = self._known.setdefault(request.prompt_ids, list(request.prompt_ids))
        length = len(request.prompt_ids) + request.sampling.max_tokens
        while len(tokens) < length:
            tokens.append(next_token(tuple(tokens)))
        return tuple(tokens[len(request.prompt_ids) : length])


def make_ranks(*configs: SchedulerConfig) -> tuple[MemberRanks, MemberRanks]:
    one, other = (FakeRanks(config) for config in configs)
    return one, other


@st.composite
def configs(draw: st.DrawFn) -> tuple[SchedulerConfig, SchedulerConfig]:
    """Two members that pair: both have recurrent state or neither has, and both may draft or neither does."""
    recurrent, drafting = draw(st.booleans()), draw(st.booleans())

    def member() -> SchedulerConfig:
        prefix_cache = draw(st.sampled_from((True, True, True, False)))
        return replace(
            LIMITS,
            lanes=draw(st.sampled_from((1, 2))),
            num_blocks=draw(st.sampled_from((17, 17, 20, 40))),
            num_slots=draw(st.sampled_from((2, 3, 4, 6, 12))) if recurrent else 0,
            num_int8=draw(st.sampled_from((0, 0, 1, 2, 7))) if recurrent and prefix_cache else 0,
            max_rows=draw(st.integers(1, 4)),
            chunk_tokens=draw(st.sampled_from((1, 5, 24))),
            max_step_tokens=draw(st.sampled_from((4, 12, 24))),
            state_spacing=draw(st.sampled_from((1, 4, 9))),
            prefix_cache=prefix_cache,
            draft_tokens=draw(st.integers(1, 3)) if drafting else 0,
            draft_adaptive=draw(st.sampled_from((False, False, True))),
            early_tokens=draw(st.sampled_from((1, 8, 1000))),
            offers_layers=draw(st.booleans()),
        )

    return member(), member()


def make_world() -> World:
    parting = (*range(1, 14), *range(60, 77))
    return World(
        configs=configs(),
        make_ranks=make_ranks,
        answer=Cold().answer,
        # Two that part after 13 tokens, and one of its own.
        beginnings=(tuple(range(1, 31)), parting, tuple(range(30, 60))),
        own=tuple(tuple(range(1000 + 9 * i, 1009 + 9 * i)) for i in range(6)),
    )


def test_whatever_happens_each_request_gets_the_tokens_of_a_cold_run_and_all_room_is_accounted_for() -> None:
    world = make_world()

    run_histories(world, 60, actions=40)

    assert world.counts.histories >= 60
    counts = world.counts
    assert min(counts.hits, counts.handoffs, counts.early_pulls, counts.drafted, counts.preemptions) > 0, counts
