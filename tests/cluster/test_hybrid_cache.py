"""A model with recurrent state, in a real engine: what is found of a prefix, and that finding it changes no token."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.chat_turns import chat as chat_turns
from cluster.config import EngineConfig
from router.request import Request, RequestId, SamplingParams, TokenEvent
from shards.mesh import Layout
from tests.support.live_engine import live_engine

GREEDY = SamplingParams(max_tokens=20, temperature=0.0)


def make_config(model: Path, layout: Layout | None = None) -> EngineConfig:
    return EngineConfig(
        model=model,
        layout=layout or Layout(),
        dtype="float32",
        kv_memory_bytes=8 << 20,
        max_rows=4,
        max_step_tokens=64,
        max_model_len=512,
        threads=1,
    )


def make_request(name: str, prompt: tuple[int, ...]) -> Request:
    return Request(id=RequestId(name), prompt_ids=prompt, sampling=GREEDY)


def tokens_of(answers: list[list[TokenEvent]]) -> list[list[int | None]]:
    return [[event.token_id for event in events] for events in answers]


def chat(config: EngineConfig, turns: int) -> list[list[TokenEvent]]:
    """A chat in which each turn's prompt is all that was said before and five new tokens."""
    numbers = itertools.count(7)
    said: list[int] = []
    answers: list[list[TokenEvent]] = []
    with live_engine(config) as engine:
        for turn in range(turns):
            said += itertools.islice(numbers, 5)
            answers += engine.serve(make_request(f"t{turn}", tuple(said)))
            said += [event.token_id for event in answers[-1] if event.token_id is not None]
    return answers


def test_each_of_ten_turns_goes_on_from_the_end_of_the_one_before(next_checkpoint: Path) -> None:
    config = make_config(next_checkpoint)
    warm, cold = (chat(replace(config, prefix_cache=on), 10) for on in (True, False))
    assert tokens_of(warm) == tokens_of(cold)
    found = [events[0].cached_tokens for events in warm]
    # Behind turn n lie 25 n tokens; the last one was sampled only, and blocks have 16.
    assert found == [0, *((25 * turn - 1) // 16 * 16 for turn in range(1, 10))]
    assert all(events[0].cached_tokens == 0 for events in cold)


def test_the_router_knows_before_each_turn_how_much_of_it_is_usable_kv_and_state(next_checkpoint: Path) -> None:
    turns = list(chat_turns(make_config(next_checkpoint), turns=10, asked=20, answered=13))
    assert [turn.prompt_tokens for turn in turns] == list(range(20, 350, 33))
    assert [turn.cached_tokens for turn in turns] == [0, *((33 * turn - 1) // 16 * 16 for turn in range(1, 10))]
    assert [turn.routed_tokens for turn in turns] == [turn.cached_tokens for turn in turns]


def test_states_in_bfloat16_leave_a_chats_tokens_the_same_with_and_without_hits_and_in_every_layout(
    next_checkpoint: Path,
) -> None:
    config = replace(make_config(next_checkpoint), state_dtype="bfloat16")
    warm, cold = (chat(replace(config, prefix_cache=on), 4) for on in (True, False))
    assert [events[0].cached_tokens for events in warm] == [0, 16, 48, 64]
    assert tokens_of(warm) == tokens_of(cold) == tokens_of(chat(replace(config, layout=Layout(tp=2)), 4))


def test_states_kept_in_int8_are_found_as_deep_as_exact_ones_and_mean_the_same_in_every_layout(
    next_checkpoint: Path,
) -> None:
    config = replace(make_config(next_checkpoint), state_checkpoints="int8")
    one, two = chat(config, 4), chat(replace(config, layout=Layout(tp=2)), 4)
    assert [events[0].cached_tokens for events in one] == [0, 16, 48, 64]
    assert tokens_of(one) == tokens_of(two)


def test_at_least_half_of_a_prefix_of_any_depth_is_found_the_second_time(next_checkpoint: Path) -> None:
    config = replace(make_config(next_checkpoint), kv_memory_bytes=32 << 20)
    depths = (16, 40, 100, 250, 480)
    shared = {depth: tuple((7 * depth + 3 * i) % 97 for i in range(depth)) for depth in depths}
    first, second = (
        [make_request(f"{part}{depth}", (*shared[depth], *range(begin, begin + 9))) for depth in depths]
        for part, begin in (("a", 5), ("b", 60))
    )
    with live_engine(config) as engine:
        engine.serve(*first)
        warm = engine.serve(*second)
    with live_engine(replace(config, prefix_cache=False)) as engine:
        cold = engine.serve(*second)
    assert tokens_of(warm) == tokens_of(cold)
    for depth, events in zip(depths, warm, strict=True):
        assert depth // config.block_size * config.block_size <= 2 * events[0].cached_tokens <= 2 * depth


@pytest.mark.slow
@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2), Layout(dp=2, ep=2)], ids=["one", "tp2", "dp2"])
def test_prompts_with_a_common_beginning_get_the_tokens_each_gets_cold(next_checkpoint: Path, layout: Layout) -> None:
    shared = tuple(range(3, 90))
    requests = [make_request(f"r{index}", (*shared, *range(index, 3 * index + 2))) for index in range(8)]
    config = make_config(next_checkpoint, layout)
    with live_engine(replace(config, prefix_cache=False)) as engine:
        cold = engine.serve(*requests)
    with live_engine(config) as engine:
        warm = [events for start in range(0, 8, 2) for events in engine.serve(*requests[start : start + 2])]
        again = engine.serve(*(replace(request, id=RequestId(f"{request.id}!")) for request in requests))
    assert tokens_of(cold) == tokens_of(warm) == tokens_of(again)
    assert all(events[0].cached_tokens >= 80 for events in again)
    assert warm[-1][0].cached_tokens >= 80
