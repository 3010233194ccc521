"""Drives ranks step by step without a scheduler: every prompt keeps a row and its blocks from beginning to end."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from shards.batch import LaneOutput, RowSampling, RowStart, StepBatch
from shards.comm import Comms
from shards.int_experts import ExpertChoice
from shards.kernels.library import load_library
from shards.mesh import Layout, Place
from shards.rank import DeterministicMode, KernelsName, Rank, RankConfig
from tests.support.thread_comm import on_every_rank

BLOCK_SIZE = 16
MAX_LEN = 256
BLOCKS_A_ROW = MAX_LEN // BLOCK_SIZE


needs_native = pytest.mark.skipif(load_library() is None, reason="the native kernel library is not built")


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Prompts to continue greedily (or as `samplings` say), all in the batch at once, spread over the lanes."""

    prompts: list[list[int]]
    new_tokens: int = 1
    chunk: int = 1 << 20
    """Most prompt tokens of one row in a step."""
    samplings: list[RowSampling] = field(default_factory=list)

    def sampling(self, index: int) -> RowSampling:
        return self.samplings[index] if self.samplings else RowSampling(temperature=0.0)


def lane_batches(work: Work, lane: int, num_lanes: int) -> list[StepBatch]:
    """Every step of one lane; prompt i runs in lane i % num_lanes, row i // num_lanes."""
    mine = list(range(lane, len(work.prompts), num_lanes))
    done = [0] * len(mine)
    batches: list[StepBatch] = []
    starts = lane_starts(work, lane, num_lanes)
    lengths = [len(work.prompts[index]) for index in mine]
    while any(done[row] < lengths[row] + work.new_tokens - 1 for row in range(len(mine))):
        batch = StepBatch(starts=starts)
        starts = ()
        for row, length in enumerate(lengths):
            if done[row] >= length + work.new_tokens - 1:
                continue
            count = min(work.chunk, length - done[row]) if done[row] < length else 1
            batch.rows_S.append(row)
            batch.first_S.append(done[row])
            batch.counts_S.append(count)
            done[row] += count
            batch.samples_S.append(int(done[row] >= length))
        batches.append(batch)
    return batches


def lane_starts(work: Work, lane: int, num_lanes: int) -> tuple[RowStart, ...]:
    """The rows of one lane."""
    mine = range(lane, len(work.prompts), num_lanes)
    return tuple(_start(work, index, row) for row, index in enumerate(mine))


def _start(work: Work, index: int, row: int) -> RowStart:
    # Blocks in descending order: nothing may depend on a sequence's blocks lying side by side.
    blocks = tuple(range((row + 1) * BLOCKS_A_ROW - 1, row * BLOCKS_A_ROW - 1, -1))
    return RowStart(
        row=row,
        token_ids=tuple(work.prompts[index]),
        prompt_len=len(work.prompts[index]),
        blocks=blocks,
        state_slot=row,
        sampling=work.sampling(index),
    )


def make_rank(
    model: Path,
    place: Place,
    comms: Comms,
    *,
    max_rows: int,
    kernels: KernelsName = "torch",
    deterministic: DeterministicMode = "auto",
    dtype: str = "float32",
    draft_tokens: int = 0,
    expert_weights: ExpertChoice = "checkpoint",
) -> Rank:
    """A loaded rank with room for `max_rows` rows of MAX_LEN tokens."""
    config = RankConfig(
        model=model,
        place=place,
        dtype="float32" if dtype == "float32" else "bfloat16",
        expert_weights=expert_weights,
        kernels=kernels,
        deterministic=deterministic,
        block_size=BLOCK_SIZE,
        num_blocks=max_rows * BLOCKS_A_ROW,
        num_slots=max_rows,
        max_rows=max_rows,
        max_model_len=MAX_LEN,
        draft_tokens=draft_tokens,
    )
    rank = Rank(config, comms)
    rank.load()
    return rank


def run(
    model: Path,
    work: Work,
    layout: Layout | None = None,
    *,
    kernels: KernelsName = "torch",
    deterministic: DeterministicMode = "auto",
    dtype: str = "float32",
    shared_memory: bool = False,
    expert_weights: ExpertChoice = "checkpoint",
) -> list[list[LaneOutput]]:
    """Carry out `work` with a thread for each rank -> for each lane, its first rank's answers, step by step.

    shared_memory: as in `on_every_rank`.
    """
    layout = layout or Layout()
    lanes = [lane_batches(work, lane, layout.dp) for lane in range(layout.dp)]
    num_steps = max(len(batches) for batches in lanes)

    def work_of(place: Place, comms: Comms) -> list[LaneOutput]:
        rank = make_rank(
            model,
            place,
            comms,
            max_rows=len(work.prompts),
            kernels=kernels,
            deterministic=deterministic,
            dtype=dtype,
            expert_weights=expert_weights,
        )
        batches = lanes[place.dp_rank] + [StepBatch()] * (num_steps - len(lanes[place.dp_rank]))
        outputs = [rank.step(batch) for batch in batches]
        rank.close()
        assert all((output is not None) == place.is_lane_leader for output in outputs)
        return [output for output in outputs if output is not None]

    return [outputs for outputs in on_every_rank(layout, work_of, shared_memory=shared_memory) if outputs]


def tokens_of(lanes: list[list[LaneOutput]], num_prompts: int) -> list[list[int]]:
    """The sampled tokens of every prompt of a `Work`."""
    tokens: list[list[int]] = [[] for _ in range(num_prompts)]
    for lane, outputs in enumerate(lanes):
        for output in outputs:
            for row, token in zip(output.rows_N, output.tokens_N, strict=True):
                tokens[row * len(lanes) + lane].append(token)
    return tokens
