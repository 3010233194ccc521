"""Serving with drafts gives the tokens and log probabilities of serving without, in every way of serving."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.config import EngineConfig
from cluster.resolve import resolve_engine
from router.errors import ConfigError
from router.request import Request, RequestId, SamplingParams, TokenEvent
from shards.mesh import Layout
from tests.support.exactness import make_prompts, make_requests, same_bits
from tests.support.exactness_matrix import CASES, Case, Serving, engine_config, replica, run_case
from tests.support.mtp import make_mtp_reference
from tests.support.reference import make_reference
from tests.support.stepping import needs_native

MIXED = 1.4
"""Disturbance that makes some drafts right and some wrong."""
LENGTHS = (1, 15, 16, 17, 40, 70)
SAMPLED = SamplingParams(
    max_tokens=30,
    min_tokens=9,
    temperature=0.8,
    top_p=0.95,
    seed=11,
    presence_penalty=0.3,
    repetition_penalty=1.1,
    stop_token_ids=(3, 5, 17, 40, 77, 90),
    logprobs=1,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose head is right now and then."""
    folder = tmp_path_factory.mktemp("mtp")
    make_mtp_reference(folder, disturbance=MIXED)
    return folder


def both_kinds() -> list[Request]:
    """Greedy requests, and sampled ones with penalties that end early."""
    prompts = make_prompts(131, LENGTHS)
    return [*make_requests(prompts, name="g"), *make_requests(prompts, name="s", sampling=SAMPLED)]


def served_with(
    config: EngineConfig, cases: Sequence[Case], requests: Sequence[Request], **changes: int | str
) -> list[tuple[list[list[TokenEvent]], int, int]]:
    """Each case's events, and how many drafts were verified and right."""
    found: list[tuple[list[list[TokenEvent]], int, int]] = []
    with replica(replace(config, **changes)) as (engine, ranks):  # type: ignore[arg-type]
        for case in cases:
            served = run_case(engine, ranks, case, requests)
            found.append((served.events, served.stats.drafted_tokens, served.stats.accepted_tokens))
    return found


@needs_native
@pytest.mark.parametrize("draft_tokens", [1, 2, 3])
def test_every_case_gives_the_bits_without_drafts(draft_tokens: int, checkpoint: Path) -> None:
    requests, config = both_kinds(), engine_config(checkpoint, Layout(), kernels="native")
    cases = [case for case in CASES if not case.alone and case.chunk != 1]
    plain = served_with(config, cases[:1], requests)[0][0]

    for case, (events, drafted, accepted) in zip(
        cases,
        served_with(config, cases, requests, draft_tokens=draft_tokens, draft_policy="always"),
        strict=True,
    ):
        assert same_bits(events, plain), case.name
        assert 0 < accepted < drafted, case.name
        for ours, theirs in zip(events, plain, strict=True):
            assert [event.index for event in ours] == list(range(len(ours)))
            assert ours[-1].finish == theirs[-1].finish


@needs_native
@pytest.mark.slow
@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(dp=2), Layout(dp=2, ep=2), Layout(tp=2, dp=2, ep=4)], ids=str)
def test_every_layout_gives_the_bits_of_one_rank_without_drafts(layout: Layout, checkpoint: Path) -> None:
    requests, config = both_kinds(), engine_config(checkpoint, Layout(), kernels="native")
    cases = [case for case in CASES if case.name in ("together, whole prompts", "prefix cache hit", "preempted")]
    plain = served_with(config, cases[:1], requests)[0][0]
    found = served_with(replace(config, layout=layout), cases, requests, draft_tokens=2, draft_policy="always")

    assert all(same_bits(events, plain) for events, _, _ in found)
    assert all(accepted for _, _, accepted in found)


@needs_native
def test_a_hand_over_between_members_that_draft_gives_the_bits_without(checkpoint: Path) -> None:
    requests, config = both_kinds(), engine_config(checkpoint, Layout(), kernels="native")
    plain = served_with(config, CASES[:1], requests)[0][0]
    drafting = replace(config, draft_tokens=2, draft_policy="always")

    with (
        replica(drafting, handoff=True) as (engine, ranks),
        Serving(engine, ranks, member="prefill") as prefill,
        replica(drafting, handoff=True) as (decode_engine, decode_ranks),
        Serving(decode_engine, decode_ranks, member="decode") as decode,
    ):
        for request in requests:
            prefill.engine.submit(request, mode="prefill")
        first, tickets = prefill.collect([request.id for request in requests])
        for request in requests:
            token = first[request.id][0].token_id
            assert token is not None
            if request.id in tickets:
                decode.engine.submit_handoff(replace(request, output_ids=(token,)), tickets[request.id].ticket)
        rest, _ = decode.collect(list(tickets))
        stats = decode.engine.stats()

    assert same_bits([first[request.id] + rest.get(request.id, []) for request in requests], plain)
    assert stats.failed_pulls == 0
    assert stats.accepted_tokens > 0


@needs_native
def test_adaptive_drafting_changes_no_token(checkpoint: Path) -> None:
    requests, config = both_kinds(), engine_config(checkpoint, Layout(), kernels="native")
    plain = served_with(config, CASES[:1], requests)[0][0]

    assert same_bits(served_with(config, CASES[:1], requests, draft_tokens=3)[0][0], plain)


def test_drafts_without_a_head_are_refused_before_the_first_step(tmp_path: Path) -> None:
    make_reference(tmp_path / "next", "qwen3_next")
    make_reference(tmp_path / "moe", "qwen3_moe")

    with pytest.raises(ConfigError, match=r"draft_tokens=2 needs a multi-token prediction head, .* holds no weights"):
        resolve_engine(replace(engine_config(tmp_path / "next", Layout()), draft_tokens=2))
    with pytest.raises(ConfigError, match="draft_tokens=2 needs a multi-token prediction head, which qwen3_moe has"):
        resolve_engine(replace(engine_config(tmp_path / "moe", Layout()), draft_tokens=2))
    with pytest.raises(ConfigError, match="draft_tokens=9: a head drafts 8 tokens a step at most; use 1 to 8"):
        EngineConfig(model=tmp_path, draft_tokens=9)


def test_an_aborted_request_leaves_the_others_as_they_were(checkpoint: Path) -> None:
    config = replace(engine_config(checkpoint, Layout()), draft_tokens=2, draft_policy="always")
    requests = make_requests(make_prompts(131, LENGTHS))
    gone = replace(requests[3], id=RequestId("gone"))
    with replica(config) as (engine, ranks), Serving(engine, ranks) as serving:
        expected = serving.serve(requests)
        serving.engine.submit(gone)
        for request in requests:
            serving.engine.submit(replace(request, id=RequestId(f"{request.id}-again")))
        serving.engine.abort(gone.id)
        found, _ = serving.collect([gone.id, *(RequestId(f"{request.id}-again") for request in requests)])

    assert found[gone.id][-1].finish == "abort"
    again = [found[RequestId(f"{request.id}-again")] for request in requests]
    assert [[e.token_id for e in each] for each in again] == [[e.token_id for e in each] for each in expected]
