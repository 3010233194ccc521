"""Prefill in one layout, decode in each: the tokens of one member that does both, whatever tp, dp and ep of either."""

from pathlib import Path

import pytest

from shards.mesh import Layout
from tests.support.disaggregated import LAYOUTS, hand_over_to_each, pair_requests
from tests.support.exactness import same_bits
from tests.support.exactness_matrix import CASES, describe, engine_config, replica, run_case
from tests.support.reference import make_reference


@pytest.mark.slow
@pytest.mark.parametrize("source", LAYOUTS, ids=describe)
# With recurrent state and without: what a family computes beside that crosses no wire.
@pytest.mark.parametrize("architecture", ["qwen3_moe", "qwen3_next"])
def test_handed_off_requests_get_the_tokens_of_one_member(architecture: str, source: Layout, tmp_path: Path) -> None:
    make_reference(tmp_path, architecture)
    requests = pair_requests(131)
    with replica(engine_config(tmp_path, Layout())) as (engine, ranks):
        whole = run_case(engine, ranks, CASES[0], requests).events
    for apart in hand_over_to_each(tmp_path, source, requests):
        assert (apart.stats.pulls, apart.stats.failed_pulls) == (len(requests), 0), describe(apart.target)
        assert [[event.token_id for event in events] for events in apart.events] == [
            [event.token_id for event in events] for events in whole
        ], describe(apart.target)
        if engine.deterministic:
            assert same_bits(whole, apart.events), describe(apart.target)
