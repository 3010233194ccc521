"""A Qwen3-Next model split over Ray actors, prefilled in one pool and decoded in another, through HTTP and gRPC."""

import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import openai
import pytest
from ray.exceptions import RayTaskError

from cluster.config import EngineConfig
from deploy.generate import GenerateOptions, run_generate
from deploy.validation import SamplingInput
from tests.support.ray_fleet import RayFleet, until

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
PROMPTS = ((5, 6, 7), tuple(range(20, 140)), (300,) * 33 + (7, 8))
NEW = 48


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("qwen3_next", dtype="float32")


@pytest.fixture(scope="module")
def fleet(checkpoint: Path) -> Iterator[RayFleet]:
    """Unequal tp on the two sides of the hand-off."""
    room = {"kv_memory": "32MiB", "max_rows": 8}
    with RayFleet(checkpoint, {"prefill": {"tp": 2, **room}, "decode": {"tp": 1, **room}}, lease_s=5.0) as fleet:
        yield fleet


def generate(checkpoint: Path, prompt: tuple[int, ...], *, max_tokens: int = NEW, seed: int | None = None) -> list[int]:
    """The same without Ray, one rank in this process."""
    out = io.StringIO()
    options = GenerateOptions(
        engine=EngineConfig(model=checkpoint, dtype="float32"),
        sampling=SamplingInput(
            max_tokens=max_tokens, ignore_eos=True, temperature=0.0 if seed is None else 1.0, seed=seed
        ),
        prompt_ids=(",".join(map(str, prompt)),),
        json=True,
    )
    assert run_generate(options, out) == 0
    return json.loads(out.getvalue())["token_ids"]


def token_ids(event: Mapping[str, Any]) -> list[int]:
    """Those of one SSE event; the last one may have none."""
    return event["choices"][0]["token_ids"] if event["choices"] else []


def test_tokens_through_http_and_grpc_are_those_of_generate(fleet: RayFleet, checkpoint: Path) -> None:
    for prompt in PROMPTS:
        expected = generate(checkpoint, prompt)
        assert list(fleet.complete(list(prompt), max_tokens=NEW, ignore_eos=True).token_ids) == expected
        assert list(fleet.grpc_tokens(prompt, NEW)) == expected


def test_seeded_tokens_through_http_and_grpc_are_those_of_generate(fleet: RayFleet, checkpoint: Path) -> None:
    prompt = PROMPTS[1]
    expected = generate(checkpoint, prompt, seed=11)
    reply = fleet.complete(list(prompt), max_tokens=NEW, ignore_eos=True, temperature=1.0, seed=11, top_p=1.0, top_k=0)
    assert list(reply.token_ids) == expected
    assert list(fleet.grpc_tokens(prompt, NEW, seed=11)) == expected


def test_a_member_takes_another_role_and_streams_go_on(fleet: RayFleet, checkpoint: Path) -> None:
    member = fleet.member("decode").info.member_id
    expected = generate(checkpoint, PROMPTS[1])
    for role in ("mixed", "decode"):
        stream = fleet.stream_lines(list(PROMPTS[1]), max_tokens=NEW, ignore_eos=True, return_token_ids=True)
        tokens = [*token_ids(next(stream))]
        fleet.set_role(member, role)
        for event in stream:
            tokens += token_ids(event)
        assert tokens == expected
        until(lambda role=role: fleet.role_of(member) == role, 5.0)
        assert list(fleet.complete(list(PROMPTS[1]), max_tokens=NEW, ignore_eos=True).token_ids) == expected
    with pytest.raises(RayTaskError, match="no member to decode"):
        fleet.set_role(member, "prefill")


def test_the_openai_client_streams_a_chat(fleet: RayFleet) -> None:
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{fleet.http_port}/v1", api_key="none", max_retries=0)
    stream = client.chat.completions.create(
        model="m",
        messages=[{"role": "user", "content": "hello"}],
        max_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    chunks = list(stream)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"


def test_blocks_on_both_sides_are_free_within_a_second_of_a_client_leaving(fleet: RayFleet) -> None:
    until(fleet.is_idle, 5.0)
    lines = fleet.stream_lines([9, 8, 7], max_tokens=1000, ignore_eos=True)
    for _ in range(5):
        next(lines)
    lines.close()  # type: ignore[attr-defined]
    assert until(fleet.is_idle, 3.0) < 1.0


@pytest.mark.parametrize(("role", "rank"), [("decode", 0), ("prefill", 1)])
def test_a_killed_member_ends_its_streams_with_a_retryable_error_and_the_pool_heals(
    fleet: RayFleet, role: str, rank: int
) -> None:
    expected = fleet.complete([1, 2, 3], max_tokens=NEW, ignore_eos=True)
    prompt = [4] * 1500 if role == "prefill" else [4, 5]
    lines = fleet.stream_lines(prompt, max_tokens=400, ignore_eos=True)
    if role == "decode":
        next(lines)
    generation = fleet.member(role).info.generation
    fleet.kill_rank(role, rank)
    events = list(lines)
    if role == "decode":
        assert "error" in events[-1], events[-1]
    until(lambda: any(m.info.role == role and m.info.generation > generation for m in fleet.members()), 60.0)
    until(lambda: fleet.http.get("/health").status_code == 200, 10.0)
    assert fleet.complete([1, 2, 3], max_tokens=NEW, ignore_eos=True).token_ids == expected.token_ids
    # KV that the lost member had not fetched yet is freed with its lease.
    until(fleet.is_idle, 10.0)
