"""Seeded sampling gives the same tokens and log probabilities however and on whatever layout it is served."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from router.request import Request, RequestId, SamplingParams, TokenEvent
from shards.mesh import Layout
from tests.support.exactness import make_prompts, same_bits
from tests.support.exactness_matrix import (
    ARCHITECTURES,
    CASES,
    FEW_CASES,
    Case,
    engine_config,
    layouts,
    replica,
    run_case,
)
from tests.support.reference import make_reference

SAMPLINGS = (
    SamplingParams(max_tokens=48, temperature=1.0, seed=1, logprobs=0),
    SamplingParams(max_tokens=48, temperature=0.7, top_p=0.8, top_k=20, seed=2, logprobs=0),
    SamplingParams(max_tokens=48, temperature=1.3, min_p=0.05, seed=2**64 - 1, logprobs=0),
    SamplingParams(
        max_tokens=48,
        temperature=0.9,
        presence_penalty=0.5,
        frequency_penalty=0.3,
        repetition_penalty=1.2,
        seed=3,
        logprobs=0,
    ),
    SamplingParams(max_tokens=48, temperature=0.0, frequency_penalty=1.0, logit_bias=((7, 2.0),), logprobs=0),
    SamplingParams(max_tokens=48, temperature=1.0, seed=4, min_tokens=20, stop_token_ids=tuple(range(30)), logprobs=0),
)


def make_sampled(vocab_size: int) -> list[Request]:
    prompts = make_prompts(vocab_size, (1, 9, 16, 33, 40, 90), seed=5)
    return [
        Request(id=RequestId(f"s{index}"), prompt_ids=prompt, sampling=sampling)
        for index, (prompt, sampling) in enumerate(zip(prompts, SAMPLINGS, strict=True))
    ]


def serve(folder: Path, layout: Layout, cases: Sequence[Case]) -> list[list[list[TokenEvent]]]:
    """Events by case and request."""
    with replica(engine_config(folder, layout)) as (engine, ranks):
        if not engine.deterministic:
            pytest.skip("no compiler: bits are promised for the native kernels only")
        return [run_case(engine, ranks, case, make_sampled(131)).events for case in cases]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sampled_tokens_do_not_depend_on_batch_chunk_cache_or_preemption(architecture: str, tmp_path: Path) -> None:
    make_reference(tmp_path, architecture)
    first, *others = serve(tmp_path, Layout(), CASES)
    assert len({tuple(event.token_id for event in events) for events in first}) == len(SAMPLINGS)
    for case, events in zip(CASES[1:], others, strict=True):
        assert same_bits(first, events), case.name


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sampled_tokens_do_not_depend_on_the_layout(architecture: str, tmp_path: Path) -> None:
    make_reference(tmp_path, architecture)
    (first,) = serve(tmp_path, Layout(), CASES[:1])
    for layout in (layout for layout in layouts(architecture) if layout.world == 2):
        for case, events in zip(FEW_CASES, serve(tmp_path, layout, FEW_CASES), strict=True):
            assert same_bits(first, events), f"{layout}, {case.name}"


def test_repeated_seed_gives_the_same_and_another_seed_other_tokens(tmp_path: Path) -> None:
    make_reference(tmp_path, "qwen3_moe")
    prompt = make_prompts(131, (20,))[0]
    requests = [
        Request(
            id=RequestId(f"s{index}"),
            prompt_ids=prompt,
            sampling=SamplingParams(max_tokens=32, temperature=1.0, seed=seed, logprobs=0),
        )
        for index, seed in enumerate((5, 5, 6))
    ]
    with replica(engine_config(tmp_path, Layout())) as (engine, ranks):
        same, again, other = run_case(engine, ranks, CASES[0], requests).events
    assert same_bits([same], [again])
    assert not same_bits([same], [other])
