"""Costs grow with what makes a request wait."""

from itertools import pairwise

import pytest

from router.errors import ConfigError
from router.load import MemberLoad
from router.policy import Ask, Extra, PolicyConfig, decode_cost_s, mixed_cost_s, prefill_cost_s
from router.request import MemberId

NOTHING = Extra()
ASK = Ask(num_tokens=100, cached_tokens=0)
POLICY = PolicyConfig()


def make_load(
    *,
    waiting_tokens: int = 0,
    waiting: int = 0,
    running: int = 0,
    free_blocks: int = 100,
    slots: tuple[int, int] = (0, 0),
) -> MemberLoad:
    return MemberLoad(
        member_id=MemberId("m"),
        role="mixed",
        waiting_tokens=waiting_tokens,
        waiting_requests=waiting,
        running_requests=running,
        max_requests=8,
        free_blocks=free_blocks,
        total_blocks=100,
        free_state_slots=slots[0],
        total_state_slots=slots[1],
    )


def test_prefill_cost_is_the_queue_and_the_uncached_prompt_over_the_rate() -> None:
    policy = PolicyConfig(prefill_tokens_per_s=100.0, pressure_s=0.0)
    load = make_load(waiting_tokens=300)
    assert prefill_cost_s(load, NOTHING, ASK, policy) == pytest.approx(4.0)
    assert prefill_cost_s(load, NOTHING, Ask(num_tokens=100, cached_tokens=50), policy) == pytest.approx(3.5)
    assert prefill_cost_s(load, Extra(requests=1, tokens=100), ASK, policy) == pytest.approx(5.0)


def test_decode_cost_grows_with_running_sequences_up_to_a_full_member_and_then_with_the_wait() -> None:
    policy = PolicyConfig(pressure_s=0.0, decode_row_s=0.001, decode_steps=100.0, row_wait_s=3.0)
    costs = [decode_cost_s(make_load(running=n), NOTHING, ASK, policy) for n in (0, 7)]
    assert costs[1] - costs[0] == pytest.approx(0.7)
    full = decode_cost_s(make_load(running=8, waiting=1), NOTHING, ASK, policy)
    assert full - costs[1] == pytest.approx(0.1 + 2 * 3.0)


def test_a_mixed_member_pays_for_both_phases() -> None:
    load = make_load(running=4, waiting_tokens=50)
    assert mixed_cost_s(load, NOTHING, ASK, POLICY) > prefill_cost_s(load, NOTHING, ASK, POLICY)


def test_kv_pressure_is_steep_near_full_and_bounded() -> None:
    costs = [prefill_cost_s(make_load(free_blocks=free), NOTHING, ASK, POLICY) for free in (90, 50, 10, 0)]
    gaps = [b - a for a, b in pairwise(costs)]
    assert gaps == sorted(gaps)
    assert gaps[-1] > 10 * gaps[0]
    assert costs[-1] < 100 * POLICY.pressure_s + 1


def test_short_state_slots_press_like_short_kv() -> None:
    roomy = decode_cost_s(make_load(slots=(10, 10)), NOTHING, ASK, POLICY)
    assert decode_cost_s(make_load(slots=(1, 10)), NOTHING, ASK, POLICY) > roomy


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"prefill_tokens_per_s": 0.0}, "prefill_tokens_per_s"),
        ({"tie_s": -1.0}, "tie_s"),
        ({"pressure_limit": 1.0}, "pressure_limit"),
    ],
)
def test_rates_that_cannot_work_are_refused_by_name(values: dict[str, float], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        PolicyConfig(**values)
