"""Prefill on one member, decode on another, with equal and different tp: the tokens of one member that does both."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from router.request import Request, SamplingParams, TokenEvent
from shards.mesh import Layout
from tests.support.exactness import make_prompts, make_requests, same_bits
from tests.support.exactness_matrix import ARCHITECTURES, CASES, Serving, describe, engine_config, replica, run_case
from tests.support.reference import make_reference

PAIRS = ((Layout(), Layout()), (Layout(tp=2), Layout()), (Layout(), Layout(tp=2)), (Layout(dp=2), Layout(tp=2)))


def serve_apart(prefill: Serving, decode: Serving, requests: Sequence[Request]) -> list[list[TokenEvent]]:
    """Each request's first token from one engine, the rest from the other."""
    ids = [request.id for request in requests]
    for request in requests:
        prefill.engine.submit(request, mode="prefill")
    first, tickets = prefill.collect(ids)
    for request in requests:
        token = first[request.id][0].token_id
        assert token is not None
        decode.engine.submit_handoff(replace(request, output_ids=(token,)), tickets[request.id].ticket)
    rest, _ = decode.collect(ids)
    for ready in tickets.values():
        prefill.engine.release_ticket(ready.ticket.id)
    assert prefill.engine.drain(5)
    assert prefill.engine.load().free_blocks == prefill.engine.load().total_blocks
    return [[*first[request_id], *rest[request_id]] for request_id in ids]


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
