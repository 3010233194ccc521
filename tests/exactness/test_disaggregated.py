"""Prefill on one member, decode on another, with equal and different tp: the tokens of one member that does both."""

from pathlib import Path

import pytest

from router.request import SamplingParams
from shards.mesh import Layout
from tests.support.disaggregated import serve_apart
from tests.support.exactness import make_prompts, make_requests, same_bits
from tests.support.exactness_matrix import ARCHITECTURES, CASES, Serving, describe, engine_config, replica, run_case
from tests.support.reference import make_reference

PAIRS = ((Layout(), Layout()), (Layout(tp=2), Layout()), (Layout(), Layout(tp=2)), (Layout(dp=2), Layout(tp=2)))


@pytest.mark.parametrize(
    ("prefill_layout", "decode_layout"),
    [
        pytest.param(*pair, id=" to ".join(map(describe, pair)), marks=() if index == 0 else pytest.mark.slow)
        for index, pair in enumerate(PAIRS)
    ],
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_handed_off_requests_get_the_tokens_of_one_member(
    architecture: str, prefill_layout: Layout, decode_layout: Layout, tmp_path: Path
) -> None:
    make_reference(tmp_path, architecture)
    prompts = make_prompts(131)
    requests = make_requests(prompts)
    requests += make_requests(
        prompts, name="s", sampling=SamplingParams(max_tokens=32, temperature=0.8, seed=9, logprobs=0)
    )
    with replica(engine_config(tmp_path, Layout())) as (engine, ranks):
        whole = run_case(engine, ranks, CASES[0], requests).events
    with (
        replica(engine_config(tmp_path, prefill_layout), handoff=True) as (source, source_ranks),
        replica(engine_config(tmp_path, decode_layout), handoff=True) as (target, target_ranks),
        Serving(source, source_ranks, member="p") as prefill,
        Serving(target, target_ranks, member="d") as decode,
    ):
        apart = serve_apart(prefill, decode, requests)
        stats = decode.engine.stats()
    assert stats.pulls == len(requests)
    assert stats.failed_pulls == 0
    assert [[event.token_id for event in events] for events in apart] == [
        [event.token_id for event in events] for events in whole
    ]
    if source.deterministic:
        assert same_bits(whole, apart)
