"""Prefix cache, drafts, chunked prompts, preemption, aborts and hand-offs all at once give the tokens of a cold run."""

from pathlib import Path

import pytest

from tests.support.mtp import make_mtp_reference
from tests.support.random_histories import Counts, open_histories
from tests.support.stepping import needs_native

FAST, SLOW = 12, 80
"""`python -m benchmarks.random_histories` runs thousands."""


def run(folder: Path, seeds: range) -> Counts:
    make_mtp_reference(folder, disturbance=1.4)
    with open_histories(folder) as histories:
        for seed in seeds:
            histories.run(seed)
        return histories.counts


@needs_native
def test_whatever_happens_each_request_gets_the_tokens_it_gets_alone(tmp_path: Path) -> None:
    counts = run(tmp_path, range(FAST))

    assert counts.histories == FAST
    assert min(counts.hits, counts.evicted_states, counts.aborts, counts.handoffs) > 5, counts


@needs_native
@pytest.mark.slow
def test_many_histories_with_all_that_can_happen(tmp_path: Path) -> None:
    counts = run(tmp_path, range(FAST, FAST + SLOW))

    assert counts.histories == SLOW
    assert min(counts.hits, counts.evicted_states, counts.aborts, counts.handoffs) > 50, counts
    assert min(counts.preemptions, counts.failed_pulls) > 5, counts
    assert 0 < counts.accepted < counts.drafted, counts
