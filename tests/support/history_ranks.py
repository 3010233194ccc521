"""Single ranks for random histories, and what each request is answered alone."""

from dataclasses import replace
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from cluster.plan import StepOutput
from cluster.scheduler import Scheduler
from cluster.scheduler_config import SchedulerConfig
from router.request import Request, RequestId, TokenEvent
from shards.comm import Comms
from shards.families import load_model_config
from shards.mesh import Layout, Place
from shards.rank import Rank, RankConfig
from tests.support.events import one_by_one
from tests.support.history_plan import GREEDY, LEASE_S, LONGEST_ANSWER, SAMPLED

BLOCK: Final = 8
MOST_BLOCKS: Final = 40
MOST_SLOTS: Final = 10
MOST_ROWS: Final = 4
MOST_DRAFTS: Final = 3
MAX_LEN: Final = 96


class Answers:
    """What each prompt is answered alone, by a rank without drafts or anything cached; each is computed once."""

    def __init__(self, model: Path) -> None:
        self.vocab_size = load_model_config(model).vocab_size
        self._rank = open_rank(model, drafts=0)
        self._known: dict[tuple[tuple[int, ...], bool], tuple[int, ...]] = {}

    def of(self, request: Request) -> tuple[int, ...]:
        """The tokens of a request."""
        key = request.prompt_ids, request.sampling.temperature > 0
        if key not in self._known:
            self._known[key] = self._compute(*key)
        return self._known[key][: request.sampling.max_tokens]

    def _compute(self, prompt: tuple[int, ...], sampled: bool) -> tuple[int, ...]:
        scheduler = Scheduler(limits(self.vocab_size))
        length = min(LONGEST_ANSWER, MAX_LEN - len(prompt))
        sampling = replace(SAMPLED if sampled else GREEDY, max_tokens=length)
        scheduler.add(Request(id=RequestId("alone"), prompt_ids=prompt, sampling=sampling), mode="full", now=0.0)
        tokens: list[int] = []
        while (plan := scheduler.schedule(0.0)) is not None:
            lane = self._rank.step(plan.lanes[0])
            assert lane is not None
            events = one_by_one(scheduler.commit(StepOutput(step=plan.step, lanes=(lane,)), 0.0))
            tokens += [
                event.token_id for event in events if isinstance(event, TokenEvent) and event.token_id is not None
            ]
        return tuple(tokens)

    def close(self) -> None:
        """Let go of the rank."""
        self._rank.close()


def limits(vocab_size: int, lanes: int = 1) -> SchedulerConfig:
    """All the room that ranks of `open_rank` have, nothing reused."""
    return SchedulerConfig(
        lanes=lanes,
        num_blocks=MOST_BLOCKS,
        num_slots=MOST_SLOTS,
        block_size=BLOCK,
        max_rows=MOST_ROWS,
        max_step_tokens=MAX_LEN,
        chunk_tokens=MAX_LEN,
        max_model_len=MAX_LEN,
        vocab_size=vocab_size,
        prefix_cache=False,
        lease_s=LEASE_S,
        lease_grace_s=1.0,
        max_waiting=8,
    )


def open_rank(model: Path, *, drafts: int, place: Place | None = None, comms: Comms | None = None) -> Rank:
    """A loaded rank, float32 and the native kernels, that drafts up to this many tokens; alone unless placed."""
    config = RankConfig(
        model=model,
        place=place or Place(layout=Layout(), rank=0),
        kernels="native",
        block_size=BLOCK,
        num_blocks=MOST_BLOCKS,
        num_slots=MOST_SLOTS,
        max_rows=MOST_ROWS,
        max_model_len=MAX_LEN,
        draft_tokens=drafts,
        threads=1,
    )
    rank = Rank(config, comms or Comms.local())
    rank.load()
    return rank


def fill(rank: Rank, blocks: tuple[int, ...], slot: int | None) -> None:
    """Leave numbers in blocks and a state slot (None: in all; -1: in none) that nothing good can come of."""
    generator = torch.Generator().manual_seed(5)
    slots = slice(None) if slot is None else slot
    pools, states = _pools(rank)
    for pool in pools:
        shape = (len(blocks), *pool.shape[1:])
        pool[list(blocks)] = 9 * torch.randn(shape, generator=generator)
    for pool in states if slot is None or slot >= 0 else ():
        pool[slots] = 9 * torch.randn(pool[slots].shape, generator=generator)


def read_room(rank: Rank, blocks: list[int], slot: int) -> list[Tensor]:
    """The content of blocks and a state slot, pool by pool."""
    pools, states = _pools(rank)
    return [*(pool[blocks] for pool in pools), *(pool[slot] for pool in states)]


def write_room(rank: Rank, blocks: list[int], slot: int, content: list[Tensor]) -> None:
    """Put into blocks and a state slot what `read_room` gave."""
    pools, states = _pools(rank)
    for pool, piece in zip(pools, content[: len(pools)], strict=True):
        pool[blocks] = piece
    for pool, piece in zip(states, content[len(pools) :], strict=True) if slot >= 0 else ():
        pool[slot] = piece


def _pools(rank: Rank) -> tuple[list[Tensor], list[Tensor]]:
    """Pools by block, and by state slot."""
    cache = rank.cache
    return [*cache.k_pools, *cache.v_pools], [*cache.conv_states, *cache.delta_states]
