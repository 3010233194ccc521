"""Requests prefilled by one engine and decoded by another, both of this process."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.engine_stats import EngineStats
from router.request import Request, SamplingParams, TokenEvent
from shards.mesh import Layout
from tests.support.exactness import make_prompts, make_requests
from tests.support.exactness_matrix import Serving, engine_config, replica

LAYOUTS = (Layout(), Layout(tp=2), Layout(dp=2, ep=2), Layout(tp=2, ep=2))
"""Each hands over to each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Apart:
    """What came of requests that one layout prefilled and another decoded."""

    target: Layout
    events: list[list[TokenEvent]]
    stats: EngineStats
    """Of the one that decoded."""


def pair_requests(vocab_size: int) -> list[Request]:
    """Greedy and sampled ones, of 1 to 130 tokens."""
    prompts = make_prompts(vocab_size)
    sampling = SamplingParams(max_tokens=32, temperature=0.8, seed=9, logprobs=0)
    return [*make_requests(prompts), *make_requests(prompts, name="s", sampling=sampling)]


def hand_over_to_each(folder: Path, source_layout: Layout, requests: Sequence[Request]) -> Iterator[Apart]:
    """Prefill in one layout, decode in each in turn."""
    with replica(engine_config(folder, source_layout), handoff=True) as (source, source_ranks):
        for target_layout in LAYOUTS:
            with (
                replica(engine_config(folder, target_layout), handoff=True) as (target, target_ranks),
                Serving(source, source_ranks, member="p") as prefill,
                Serving(target, target_ranks, member="d") as decode,
            ):
                events = serve_apart(prefill, decode, requests)
                yield Apart(target=target_layout, events=events, stats=decode.engine.stats())


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
