"""Captured decode steps, with a recorder that runs them anew: captures themselves need a GPU and are not tested."""

import dataclasses

import pytest
import torch
from torch import Tensor

from shards.cuda_graphs import DecodeGraphs, can_replay, fill, padded_blocks, padded_rows, padding_step
from shards.rows import StepTensors
from tests.support.graphs import Rerun

CPU = torch.device("cpu")


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
    step, target = make_step(3, 5), padding_step(4, 16, rotary_dim=4, device=CPU)
    fill(target, step)
    assert target.advance_S is not None
    for name in ("tokens_T", "cos_TR", "sin_TR", "slots_T", "context_lens_S", "state_slots_S", "fresh_S"):
        assert torch.equal(getattr(target, name)[:3], getattr(step, name)), name
    assert torch.equal(target.tables_SB[:3, :5], step.tables_SB)
    assert target.query_start_S1.tolist() == [0, 1, 2, 3, 4]
    assert target.advance_S.tolist() == [True, True, True, False]


def test_a_smaller_step_leaves_nothing_of_the_one_before_it() -> None:
    target = padding_step(4, 16, rotary_dim=4, device=CPU)
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


def hidden_of(step: StepTensors) -> Tensor:
    """Stands for a model: each row's numbers follow from all that the row is given."""
    assert step.advance_S is None or bool(step.fresh_S[~step.advance_S].all())
    numbers = (step.tokens_T, step.slots_T, step.context_lens_S, step.state_slots_S, step.tables_SB[:, 0])
    return torch.stack([column.float() for column in numbers], dim=1) * step.cos_TR[:, :1]


def test_captured_steps_give_what_the_model_gives_and_are_captured_once_a_size(
    caplog: pytest.LogCaptureFixture,
) -> None:
    recorder = Rerun()
    graphs = DecodeGraphs(hidden_of, recorder)
    for rows, blocks in ((3, 5), (4, 7), (1, 1), (3, 2), (3, 17)):
        step = make_step(rows, blocks)
        assert torch.equal(graphs.forward(step), hidden_of(step))
    assert recorder.records == 3
    longer = dataclasses.replace(make_step(2, 3), verified_U=torch.tensor([0]))
    assert torch.equal(graphs.forward(longer), hidden_of(longer))
    assert recorder.records == 3
    assert caplog.messages == [], "every capture was good"


def test_a_failed_capture_is_told_and_its_step_runs_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Rerun(broken=1)
    graphs = DecodeGraphs(hidden_of, recorder)
    for _ in range(2):
        assert torch.equal(graphs.forward(make_step(3, 5)), hidden_of(make_step(3, 5)))
    assert recorder.records == 2, "what spoilt it may be over"
    (message,) = caplog.messages
    assert "3 rows runs without a CUDA graph, slower; the next one is tried: operation not permitted" in message


@pytest.mark.parametrize("recorder", [Rerun(broken=9), Rerun(off_by=0.5)], ids=["no capture", "wrong replay"])
def test_no_more_is_tried_after_some_failures_and_no_wrong_result_is_used(
    recorder: Rerun, caplog: pytest.LogCaptureFixture
) -> None:
    graphs = DecodeGraphs(hidden_of, recorder)
    for rows in (1, 2, 3, 4, 9, 17):
        assert torch.equal(graphs.forward(make_step(rows, 5)), hidden_of(make_step(rows, 5)))
    assert recorder.records == len(caplog.messages) == 3
    assert "no more graphs are made" in caplog.messages[-1]
