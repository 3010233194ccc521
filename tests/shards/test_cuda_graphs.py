"""What a captured decode step is given; captures themselves need a GPU and are not tested."""

import dataclasses

import torch

from shards.cuda_graphs import can_replay, fill, padded_blocks, padded_rows, padding_step
from shards.rows import StepTensors


def make_step(rows: int, blocks: int) -> StepTensors:
    """Rows of one token each, every number of them other than padding has."""
    return StepTensors(
        tokens_T=torch.arange(rows) + 5,
        rows_T=torch.arange(rows),
        positions_T=torch.arange(rows) + 40,
        cos_TR=torch.full((rows, 4), 0.5),
        sin_TR=torch.full((rows, 4), 0.25),
        slots_T=torch.arange(rows) + 100,
        tables_SB=torch.arange(rows * blocks, dtype=torch.int32).view(rows, blocks) + 1,
        query_start_S1=torch.arange(rows + 1),
        context_lens_S=torch.arange(rows) + 41,
        state_slots_S=torch.arange(rows) + 3,
        fresh_S=torch.zeros(rows, dtype=torch.bool),
        lane_tokens=(rows,),
    )


def test_few_sizes_serve_all_steps() -> None:
    assert [padded_rows(n) for n in (1, 2, 3, 5, 8, 9, 16, 17, 63)] == [1, 2, 4, 8, 8, 16, 16, 24, 64]
    assert [padded_blocks(n) for n in (1, 16, 17, 64, 65)] == [16, 16, 32, 64, 128]


def test_a_step_lies_in_the_first_rows_and_the_others_pad() -> None:
    step, target = make_step(3, 5), padding_step(4, 16, make_step(1, 1))
    fill(target, step)
    assert target.advance_S is not None
    for name in ("tokens_T", "cos_TR", "sin_TR", "slots_T", "context_lens_S", "state_slots_S", "fresh_S"):
        assert torch.equal(getattr(target, name)[:3], getattr(step, name)), name
    assert torch.equal(target.tables_SB[:3, :5], step.tables_SB)
    assert target.query_start_S1.tolist() == [0, 1, 2, 3, 4]
    assert target.advance_S.tolist() == [True, True, True, False]


def test_a_smaller_step_leaves_nothing_of_the_one_before_it() -> None:
    target = padding_step(4, 16, make_step(1, 1))
    fill(target, make_step(4, 7))
    fill(target, make_step(2, 5))
    assert target.advance_S is not None
    assert target.slots_T.tolist() == [100, 101, -1, -1]
    assert target.context_lens_S.tolist() == [41, 42, 0, 0]
    assert target.fresh_S.tolist() == [False, False, True, True]
    assert target.advance_S.tolist() == [True, True, False, False]


def test_only_steps_of_one_token_a_row_without_drafts_are_replayed() -> None:
    step = make_step(3, 5)
    assert can_replay(step)
    assert not can_replay(make_step(0, 0))
    assert not can_replay(dataclasses.replace(step, verified_U=torch.tensor([0])))
    assert not can_replay(dataclasses.replace(step, tokens_T=torch.arange(4)))
