"""Decode steps, with drafts or without, are played from tapes: one call of the library, whatever the model's layers."""

import random
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from shards.batch import LaneOutput, RowSampling, StepBatch
from shards.comm import Comms
from shards.mesh import Layout, Place
from shards.rank import Rank
from tests.support.mtp import make_mtp_reference
from tests.support.reference import make_reference
from tests.support.stepping import BLOCKS_A_ROW, Work, lane_batches, lane_starts, make_rank, needs_native
from tests.support.thread_comm import on_every_rank

pytestmark = needs_native
ARCHITECTURES = ["qwen3_moe", "qwen3_next"]
MOST_DRAFTS = 3


class Operators(TorchDispatchMode):
    """Counts torch's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    @override
    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def operators_of_decoding(rank: Rank, sampling: RowSampling) -> list[list[str]]:
    """torch's operators in each decode step of two prompts."""
    work = Work(prompts=[[1, 2, 3], [4, 5]], new_tokens=6, samplings=[sampling] * 2)
    counted: list[list[str]] = []
    for batch in lane_batches(work, 0, 1):
        with Operators() as operators:
            rank.step(batch)
        if set(batch.counts_S) == {1}:
            counted.append(operators.names)
    return counted


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2), Layout(tp=2, ep=2)], ids=str)
def test_a_greedy_step_runs_next_to_none_of_torch_s_operators(
    architecture: str, layout: Layout, tmp_path: Path
) -> None:
    make_reference(tmp_path, architecture, {})

    def work(place: Place, comms: Comms) -> list[list[str]]:
        return operators_of_decoding(
            make_rank(tmp_path, place, comms, max_rows=2, kernels="native"), RowSampling(temperature=0.0)
        )

    for steps in on_every_rank(layout, work, shared_memory=layout.world > 1):
        # The first one is written down.
        assert len(steps) == 5
        assert all(len(names) <= 2 for names in steps[1:]), steps[1:]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_sampled_step_runs_as_many_operators_whatever_the_layers(architecture: str, tmp_path: Path) -> None:
    counts = []
    for layers in (2, 4):
        folder = tmp_path / str(layers)
        folder.mkdir()
        kinds = ["full_attention"] if architecture == "qwen3_moe" else ["linear_attention", "full_attention"]
        changes = {"num_hidden_layers": layers, "layer_types": (kinds * layers)[:layers]}
        make_reference(folder, architecture, changes if architecture == "qwen3_next" else {"num_hidden_layers": layers})
        rank = make_rank(folder, Place(layout=Layout(), rank=0), Comms.local(), max_rows=2, kernels="native")
        counts.append([len(names) for names in operators_of_decoding(rank, RowSampling(temperature=0.8, seed=3))[1:]])
    assert counts[0] == counts[1]


def test_a_row_that_leaves_and_one_that_comes_change_nothing_for_the_others(tmp_path: Path) -> None:
    make_reference(tmp_path, "qwen3_next", {})
    greedy = RowSampling(temperature=0.0)
    work = Work(prompts=[[1, 2, 3], [4, 5], [6, 7, 8, 9]], new_tokens=9, samplings=[greedy] * 3)
    place = Place(layout=Layout(), rank=0)
    together = make_rank(tmp_path, place, Comms.local(), max_rows=3, kernels="native")
    prefill = lane_batches(work, 0, 1)[0]
    together.step(prefill)
    found: dict[int, list[int]] = {0: [], 1: [], 2: []}
    done = {row: len(prompt) for row, prompt in enumerate(work.prompts)}
    for rows in ([0, 1, 2], [2, 0], [1], [2, 0], [0, 1, 2], [1], [0, 2, 1]):
        batch = StepBatch(
            rows_S=rows, first_S=[done[row] for row in rows], counts_S=[1] * len(rows), samples_S=[1] * len(rows)
        )
        output = together.step(batch)
        assert output is not None
        for row, token in zip(output.rows_N, output.tokens_N, strict=True):
            found[row].append(token)
            done[row] += 1
    for row, prompt in enumerate(work.prompts):
        alone = make_rank(tmp_path, place, Comms.local(), max_rows=1, kernels="native")
        outputs = [
            alone.step(batch) for batch in lane_batches(Work(prompts=[prompt], new_tokens=9, samplings=[greedy]), 0, 1)
        ]
        tokens = [output.tokens_N[0] for output in outputs if output is not None]
        assert found[row] == tokens[1 : 1 + len(found[row])]


class Pair:
    """Rows of a rank that plays tapes, and the same rows of one that has a prompt in each step and so plays none."""

    def __init__(self, model: Path, dtype: str, samplings: list[RowSampling]) -> None:
        self.prompts = [[1 + row, 2, 3, 4 + row] for row in range(len(samplings))]
        self._bystander = len(samplings)
        prompts = [*self.prompts, list(range(200))]
        work = Work(prompts=prompts, samplings=[*samplings, RowSampling()])
        place, rows = Place(layout=Layout(), rank=0), len(prompts)
        self.played, self.run = (
            make_rank(
                model, place, Comms.local(), max_rows=rows, kernels="native", dtype=dtype, draft_tokens=MOST_DRAFTS
            )
            for _ in range(2)
        )
        self._starts = lane_starts(work, 0, 1)
        self._steps = 0
        self.counted: list[list[str]] = []

    def step(self, batch: StepBatch) -> LaneOutput:
        """Carry it out on both -> what both answer."""
        starts = self._starts if not self._steps else ()
        with Operators() as operators:
            one = self.played.step(replace(batch, starts=starts[:-1]))
        self.counted.append(operators.names)
        columns = {
            "rows_S": [*batch.rows_S, self._bystander],
            "first_S": [*batch.first_S, self._steps],
            "counts_S": [*batch.counts_S, 1],
            "samples_S": [*batch.samples_S, 0],
            "verifies_S": [*(batch.verifies_S or [0] * self._bystander), 0],
            "drafts_S": [*(batch.drafts_S or [0] * self._bystander), 0],
        }
        other = self.run.step(replace(batch, starts=starts, **columns))
        assert one is not None
        assert other is not None
        assert replace(one, compute_s=0.0) == replace(other, compute_s=0.0)
        self._steps += 1
        return one

    def held(self) -> list[tuple[Tensor, Tensor]]:
        """KV and states of both, the prompt's left out."""
        rows = len(self.prompts)
        pairs: list[tuple[Tensor, Tensor]] = []
        for one, other in zip(
            (*self.played.cache.k_pools, *self.played.cache.v_pools),
            (*self.run.cache.k_pools, *self.run.cache.v_pools),
            strict=True,
        ):
            pairs.append((one[: rows * BLOCKS_A_ROW], other[: rows * BLOCKS_A_ROW]))
        for one, other in zip(self.played.cache.states, self.run.cache.states, strict=True):
            pairs += [(one.conv_MQW[:rows], other.conv_MQW[:rows]), (one.delta_MVDD[:rows], other.delta_MVDD[:rows])]
        return pairs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sampling", [RowSampling(temperature=0.0), RowSampling(temperature=0.9, seed=5, logprobs=1)])
def test_steps_that_verify_and_draft_as_much_as_each_row_wants_leave_the_bits_of_steps_that_are_not_played(
    dtype: str, sampling: RowSampling, tmp_path: Path
) -> None:
    make_mtp_reference(tmp_path, disturbance=1.4)
    rng = random.Random(dtype + str(sampling))
    pair = Pair(tmp_path, dtype, [sampling] * 3)
    rows = range(3)
    pair.step(StepBatch(rows_S=[0, 1, 2], first_S=[0] * 3, counts_S=[4] * 3, samples_S=[1] * 3, drafts_S=[1, 2, 0]))
    done, ready, right = [4] * 3, [1, 2, 0], 0
    for step in range(60):
        keeps = step % 16 < 12
        mine = [row for row in rows if rng.random() < 0.8] or [1]
        drafts = [rng.choice((0, 1, MOST_DRAFTS)) if keeps else 0 for _ in mine]
        output = pair.step(
            StepBatch(
                rows_S=mine,
                first_S=[done[row] for row in mine],
                counts_S=[1 + ready[row] for row in mine],
                samples_S=[1] * len(mine),
                verifies_S=[ready[row] for row in mine],
                drafts_S=drafts,
                keeps_mtp=keeps,
            )
        )
        for row, count, more in zip(mine, output.counts_N or [1] * len(mine), drafts, strict=True):
            right += count - 1
            done[row] += count
            ready[row] = more
    assert right > 10
    for one, other in pair.held():
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def test_a_greedy_step_with_drafts_runs_next_to_none_of_torch_s_operators(tmp_path: Path) -> None:
    make_mtp_reference(tmp_path, disturbance=1.4)
    pair = Pair(tmp_path, "float32", [RowSampling(temperature=0.0)] * 2)
    done = [4, 4]
    pair.step(StepBatch(rows_S=[0, 1], first_S=[0, 0], counts_S=[4, 4], samples_S=[1, 1], drafts_S=[2, 2]))
    for _ in range(5):
        output = pair.step(
            StepBatch(
                rows_S=[0, 1],
                first_S=list(done),
                counts_S=[3, 3],
                samples_S=[1, 1],
                verifies_S=[2, 2],
                drafts_S=[2, 2],
            )
        )
        done = [first + count for first, count in zip(done, output.counts_N, strict=True)]
    # The prompts' step aside: with drafts steps of few rows were recorded when the model was loaded.
    assert all(len(names) <= 4 for names in pair.counted[1:]), pair.counted[1:]


KINDS = [
    (4, 0, 0, False), (4, 0, 0, True), (4, 0, 2, True), (4, 2, 2, True), (4, 2, 0, True), (4, 0, 3, True),
    (4, 3, 0, False), (1, 0, 1, True), (1, 1, 1, True), (5, 0, 1, True),
]  # fmt: skip
"""Rows, what each verifies and drafts, and whether the layer's KV is kept."""


@pytest.mark.parametrize("sampling", [RowSampling(temperature=0.0), RowSampling(temperature=0.9, seed=5)])
def test_what_up_to_four_rows_with_drafts_come_to_is_recorded_when_the_model_is_loaded(
    sampling: RowSampling, tmp_path: Path
) -> None:
    make_mtp_reference(tmp_path, disturbance=1.4)
    pair = Pair(tmp_path, "float32", [sampling] * 5)
    pair.step(StepBatch(rows_S=list(range(5)), first_S=[0] * 5, counts_S=[4] * 5, samples_S=[1] * 5))
    done = [4] * 5
    for rows, verifies, drafts, keeps in KINDS * 2:
        output = pair.step(
            StepBatch(
                rows_S=list(range(rows)),
                first_S=done[:rows],
                counts_S=[1 + verifies] * rows,
                samples_S=[1] * rows,
                verifies_S=[verifies] * rows,
                drafts_S=[drafts] * rows,
                keeps_mtp=keeps,
            )
        )
        for row, count in enumerate(output.counts_N or [1] * rows):
            done[row] += count
    counts = [len(names) for names in pair.counted[1:]]
    first, again = counts[: len(KINDS)], counts[len(KINDS) :]
    assert first[:-1] == again[:-1]
    assert first[-1] > again[-1], "five rows are recorded when they come"
    for one, other in pair.held():
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def test_steps_whose_rows_verify_different_numbers_of_drafts_are_written_down_when_they_come_again(
    tmp_path: Path,
) -> None:
    make_mtp_reference(tmp_path, disturbance=1.4)
    pair = Pair(tmp_path, "float32", [RowSampling(temperature=0.0)] * 2)
    done = [4, 4]
    pair.step(StepBatch(rows_S=[0, 1], first_S=[0, 0], counts_S=[4, 4], samples_S=[1, 1], drafts_S=[2, 1]))
    for _ in range(4):
        uneven = {"counts_S": [3, 2], "verifies_S": [2, 1], "drafts_S": [2, 1]}
        output = pair.step(StepBatch(rows_S=[0, 1], first_S=list(done), samples_S=[1, 1], **uneven))
        done = [first + count for first, count in zip(done, output.counts_N, strict=True)]
    # Run as it is, written down, and played twice.
    assert [len(names) <= 4 for names in pair.counted[1:]] == [False, False, True, True]


def test_the_tape_that_was_not_played_for_longest_is_given_up_for_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shards.decode_tapes._MOST_TAPES", 2)
    make_reference(tmp_path, "qwen3_moe", {})
    work = Work(prompts=[[1, 2], [3, 4], [5, 6]], new_tokens=9, samplings=[RowSampling(temperature=0.0)] * 3)
    rank = make_rank(tmp_path, Place(layout=Layout(), rank=0), Comms.local(), max_rows=3, kernels="native")
    rank.step(lane_batches(work, 0, 1)[0])
    done, played = [2] * 3, list[bool]()
    for rows in (1, 2, 1, 3, 1, 2):
        batch = StepBatch(rows_S=list(range(rows)), first_S=done[:rows], counts_S=[1] * rows, samples_S=[1] * rows)
        with Operators() as operators:
            rank.step(batch)
        played.append(len(operators.names) <= 4)
        done = [count + (row < rows) for row, count in enumerate(done)]
    assert played == [False, False, True, False, True, False]
