"""States kept behind the middle of a row cut the step for delta layers; the bits stay those of one piece."""

from pathlib import Path

import pytest
import torch

from shards.batch import RowSampling, RowStart, StepBatch
from shards.comm import Comms
from shards.mesh import Layout, Place
from shards.rank import KernelsName, Rank, RankConfig
from shards.segments import cut
from tests.support.stepping import needs_native

CPU = torch.device("cpu")


def make_rank(model: Path, kernels: KernelsName) -> Rank:
    config = RankConfig(
        model=model,
        place=Place(layout=Layout(), rank=0),
        kernels=kernels,
        num_blocks=8,
        num_slots=4,
        max_rows=2,
        max_model_len=64,
    )
    rank = Rank(config, Comms.local())
    rank.load()
    return rank


def test_a_step_whose_states_are_kept_behind_rows_is_in_one_piece() -> None:
    batch = StepBatch(
        rows_S=[3, 1], first_S=[4, 0], counts_S=[1, 8], samples_S=[1, 0], save_rows=[1], save_ends=[8], save_to=[5]
    )
    assert cut(batch, [0, 2], CPU) == ()


def test_a_step_is_cut_where_states_are_kept_and_copies_follow_their_segment() -> None:
    batch = StepBatch(
        rows_S=[3, 1, 0],
        first_S=[4, 0, 6],
        counts_S=[1, 10, 4],
        samples_S=[1, 0, 0],
        save_rows=[1, 1, 0],
        save_ends=[4, 10, 8],
        save_to=[5, 6, 7],
        verifies_S=[1, 0, 0],
    )
    first, second, third = cut(batch, [0, 2, 4], CPU)
    assert [(part.first_token, part.end_token) for part in (first, second, third)] == [(0, 5), (5, 13), (13, 15)]
    assert first.state_slots_S.tolist() == [0, 2]
    assert first.query_start_S1.tolist() == [0, 1, 5]
    assert first.fresh_S.tolist() == [False, True]
    assert first.advance_S is not None
    assert first.advance_S.tolist() == [False, True]
    assert (first.sources_K.tolist(), first.targets_K.tolist()) == ([2], [5])
    assert second.state_slots_S.tolist() == [2, 4]
    assert second.query_start_S1.tolist() == [0, 6, 8]
    assert second.fresh_S.tolist() == [False, False]
    assert (second.sources_K.tolist(), second.targets_K.tolist()) == ([4], [7])
    assert third.targets_K.tolist() == []


@pytest.mark.parametrize("kernels", ["torch", pytest.param("native", marks=needs_native)])
def test_a_sequence_goes_on_from_a_state_kept_behind_the_middle_of_a_chunk(
    next_checkpoint: Path, kernels: KernelsName
) -> None:
    rank = make_rank(next_checkpoint, kernels)
    prompt = tuple(range(5, 45))
    starts = [
        RowStart(row=row, token_ids=prompt, prompt_len=40, blocks=blocks, state_slot=row, sampling=RowSampling())
        for row, blocks in enumerate([(0, 1, 2), (0, 1, 3)])
    ]
    saves = StepBatch(
        starts=(starts[0],),
        rows_S=[0],
        first_S=[0],
        counts_S=[40],
        samples_S=[1],
        save_rows=[0, 0, 0],
        save_ends=[16, 32, 40],
        save_to=[3, 2, 1],
    )
    rank.step(saves)
    whole = [pool[0].clone() for pool in rank.cache.delta_states]
    for pool, state in zip(rank.cache.delta_states, whole, strict=True):
        assert torch.equal(pool[1], state)
    for slot, first in ((3, 16), (2, 32)):
        again = StepBatch(
            starts=(starts[1],),
            restore_from=[slot],
            restore_to=[1],
            rows_S=[1],
            first_S=[first],
            counts_S=[40 - first],
            samples_S=[1],
        )
        rank.step(again)
        for pool, state in zip(rank.cache.delta_states, whole, strict=True):
            torch.testing.assert_close(pool[1], state, rtol=0 if kernels == "native" else 1e-4, atol=1e-6)
    rank.close()
