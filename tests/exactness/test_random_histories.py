"""Prefix cache, drafts, chunked prompts, preemption, aborts and hand-offs all at once give the tokens of a cold run."""

from pathlib import Path

import pytest

from shards.mesh import Layout
from tests.support.history_counts import Counts
from tests.support.history_machine import run_histories
from tests.support.mtp import make_mtp_reference
from tests.support.random_histories import open_world
from tests.support.stepping import needs_native

FAST, SLOW, SLOW_GROUPS = 15, 150, 6
"""`python -m benchmarks.random_histories` runs thousands."""


def run(folder: Path, count: int, layout: Layout | None = None, *, one_host: bool = True) -> Counts:
    make_mtp_reference(folder, disturbance=1.4)
    with open_world(folder, layout, one_host=one_host) as world:
        run_histories(world, count)
        return world.counts


@needs_native
def test_whatever_happens_each_request_gets_the_tokens_it_gets_alone(tmp_path: Path) -> None:
    counts = run(tmp_path, FAST)

    assert counts.histories >= FAST
    assert min(counts.requests, counts.hits, counts.tokens) > 5, counts


@needs_native
@pytest.mark.slow
@pytest.mark.side_by_side
def test_many_histories_with_all_that_can_happen(tmp_path: Path) -> None:
    counts = run(tmp_path, SLOW)

    assert counts.histories >= SLOW
    assert min(counts.hits, counts.evicted_states, counts.aborts, counts.handoffs) > 20, counts
    # Some ten and a hundred on average; 2 preemptions were seen.
    assert min(counts.preemptions, counts.failed_pulls) > 0, counts
    assert 0 < counts.accepted < counts.drafted, counts


@needs_native
@pytest.mark.slow
@pytest.mark.parametrize("one_host", [True, False])
@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(tp=2, ep=2), Layout(dp=2, ep=2)], ids=str)
def test_members_of_several_ranks_give_the_tokens_of_one_rank_alone(
    tmp_path: Path, layout: Layout, *, one_host: bool
) -> None:
    counts = run(tmp_path, SLOW_GROUPS, layout, one_host=one_host)

    assert counts.histories >= SLOW_GROUPS
    assert min(counts.hits, counts.requests, counts.tokens) > 0, counts
