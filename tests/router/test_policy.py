"""Prices grow with what makes a request wait, in the seconds that the member's step times say."""

from dataclasses import replace

import pytest

from router.errors import ConfigError
from router.load import MemberCounts, MemberLoad
from router.policy import Extra, PolicyConfig, decode_price, mixed_price, prefill_price
from router.request import MemberId
from router.step_time import StepTime

NOTHING = Extra()
ALONE = PolicyConfig(others_weight=0.0, work_weight=0.0, stall_weight=0.0)
LOAD = MemberLoad(
    member_id=MemberId("m"),
    role="mixed",
    max_requests=8,
    step_tokens=100,
    step_time=StepTime(base_s=0.1, prefill_token_s=0.01, decode_row_s=0.02, context_token_s=0.001),
    free_blocks=100,
    total_blocks=100,
)


def test_a_prompt_waits_for_the_queue_and_for_what_was_routed_since() -> None:
    price = prefill_price(replace(LOAD, waiting_tokens=300), Extra(requests=1, tokens=100), ALONE)
    # A full step of 100 tokens takes 1.1 s.
    assert price.base_s == pytest.approx(4.4)
    assert price.token_s == pytest.approx(0.011)
    assert price.output_s == 0


def test_decode_rows_slow_a_prompt_down() -> None:
    busy = replace(LOAD, running_requests=5, context_tokens=400)
    assert prefill_price(busy, NOTHING, ALONE).token_s == pytest.approx((0.1 + 0.95 + 0.1 + 0.4) / 95)


def test_computing_costs_more_where_others_will_come_behind_it() -> None:
    queued, often = replace(LOAD, waiting_tokens=100), Extra(arrivals_per_s=2.0)
    price = prefill_price(queued, often, ALONE)
    # While the queue of 1.1 s lasts, 2.2 requests come.
    weighed = prefill_price(queued, often, replace(ALONE, others_weight=3.0))
    assert weighed.token_s == pytest.approx((1 + 3 * 2.2) * price.token_s)
    assert weighed.base_s == price.base_s


def test_computing_costs_more_wherever_it_is_than_the_wait_for_it() -> None:
    price, weighed = (prefill_price(LOAD, NOTHING, replace(ALONE, work_weight=weight)) for weight in (0.0, 5.0))
    assert weighed.token_s == pytest.approx(price.token_s + 5 * 0.01)


def test_a_hand_off_pays_for_its_bytes_and_a_step_for_its_rows() -> None:
    config = PolicyConfig(others_weight=0.0, transfer_bytes_per_s=1000.0)
    load = replace(LOAD, token_bytes=10, state_bytes=500, running_requests=4, context_tokens=100)
    price = decode_price(load, Extra(requests=1, tokens=50), config)
    assert price.base_s == pytest.approx(0.5 + 0.5)
    assert price.token_s == pytest.approx(0.01)
    assert price.output_s == pytest.approx(5 * 0.02 + 0.1)


@pytest.mark.parametrize(
    ("num_bytes", "seconds", "bandwidth"),
    [(10**13, 5000.0, 2e9), (200_000, 0.05, 1e9)],
    ids=["many bytes say what bytes take", "a small pull's latency does not"],
)
def test_a_member_s_pulls_weigh_by_their_bytes(num_bytes: int, seconds: float, bandwidth: float) -> None:
    measured = MemberCounts(pulled_bytes=num_bytes, pull_s=seconds)
    load = replace(LOAD, token_bytes=10**6, state_bytes=5 * 10**8, counts=measured)
    price = decode_price(load, NOTHING, PolicyConfig(transfer_bytes_per_s=1e9))
    assert price.base_s == pytest.approx(5e8 / bandwidth, rel=0.8 if num_bytes < 1e6 else 1e-4)
    assert price.token_s == pytest.approx(1e6 / bandwidth, rel=0.8 if num_bytes < 1e6 else 1e-4)


def test_a_mixed_member_pays_for_both_phases_and_moves_nothing() -> None:
    load = replace(LOAD, token_bytes=10**6, state_bytes=10**9, running_requests=2)
    price = mixed_price(load, NOTHING, replace(ALONE, stall_weight=1.0))
    assert price.base_s == prefill_price(load, NOTHING, ALONE).base_s
    assert price.token_s == pytest.approx(prefill_price(load, NOTHING, ALONE).token_s + 2 * 0.01)
    assert price.output_s == pytest.approx(2 * 0.02)


def test_rows_share_the_experts_that_a_step_reads_anyway() -> None:
    step = replace(LOAD.step_time, experts_s=1.0, expert_share=0.5)
    few, many = (
        decode_price(replace(LOAD, step_time=step, running_requests=rows), NOTHING, ALONE).output_s for rows in (1, 7)
    )
    # Of two rows 0.75 of all experts are read, of one 0.5; of eight 0.996.
    assert few == pytest.approx(0.02 + 0.25)
    assert many == pytest.approx(7 * 0.02 + 0.996 - 0.5, abs=1e-3)


def test_a_full_member_makes_wait_until_rows_blocks_or_slots_come_back() -> None:
    config = PolicyConfig(others_weight=0.0, output_tokens=10.0)
    decode_s = 10 * (0.1 + 8 * 0.02)
    rows = replace(LOAD, running_requests=8, waiting_requests=1)
    assert decode_price(rows, NOTHING, config).base_s == pytest.approx(decode_s * 2 / 8)
    blocks = replace(LOAD, running_requests=7, free_blocks=10, waiting_tokens=16 * 55)
    decode_s = 10 * (0.1 + 7 * 0.02)
    assert decode_price(blocks, NOTHING, config).base_s == pytest.approx(decode_s * 45 / 90)
    slots = replace(LOAD, running_requests=7, waiting_requests=0, free_state_slots=0, total_state_slots=10)
    assert decode_price(slots, NOTHING, config).base_s == pytest.approx(decode_s * 1 / 10)


def test_room_is_needed_for_all_that_a_member_will_hold() -> None:
    config = PolicyConfig(others_weight=0.0, output_tokens=32.0)
    load = replace(LOAD, running_requests=1, free_blocks=10, waiting_requests=1)
    full = Extra(requests=1, tokens=0, held_tokens=16 * 12)
    # The one that waits produces 2 blocks, the one that is on its way holds 12, cached or not: 4 of 90 more.
    assert decode_price(load, full, config).base_s == pytest.approx(32 * 0.12 * 4 / 90)
    assert decode_price(replace(load, role="prefill"), full, config).base_s == pytest.approx(32 * 0.12 * 2 / 90)


@pytest.mark.parametrize(
    ("values", "named"),
    [({"transfer_bytes_per_s": 0.0}, "transfer_bytes_per_s"), ({"tie_s": -1.0}, "tie_s")],
)
def test_values_that_cannot_work_are_refused_by_name(values: dict[str, float], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        PolicyConfig(**values)
