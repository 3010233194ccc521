"""Decode steps of one token a row are played from tapes: one call of the library, whatever the model's layers."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from shards.batch import RowSampling, StepBatch
from shards.comm import Comms
from shards.mesh import Layout, Place
from shards.rank import Rank
from tests.support.reference import make_reference
from tests.support.stepping import Work, lane_batches, make_rank, needs_native
from tests.support.thread_comm import on_every_rank

pytestmark = needs_native
ARCHITECTURES = ["qwen3_moe", "qwen3_next"]


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
