"""Pools grow at once and shrink after a quiet while, within their bounds."""

from dataclasses import replace

import pytest

from router.errors import ConfigError
from router.load import MemberLoad
from router.request import MemberId
from router.scaling import ScalingConfig, ScalingState, desired_members
from router.step_time import StepTime

CONFIG = ScalingConfig(min_members=1, max_members=4, target_wait_s=1.0, down_delay_s=60.0, average_s=1e-3)


def make_load(
    *, waiting_tokens: int = 0, running: int = 0, free_blocks: int = 100, free_slots: int = 10, draining: bool = False
) -> MemberLoad:
    return MemberLoad(
        member_id=MemberId("m"),
        role="mixed",
        waiting_tokens=waiting_tokens,
        running_requests=running,
        max_requests=10,
        free_blocks=free_blocks,
        total_blocks=100,
        free_state_slots=free_slots,
        total_state_slots=10,
        step_time=StepTime(base_s=0.0, prefill_token_s=1e-3, decode_row_s=0.0),
        draining=draining,
    )


def wanted(*loads: MemberLoad) -> int:
    return desired_members(loads, CONFIG, 0.0, ScalingState(members=1))[0]


def test_each_kind_of_load_grows_the_pool_at_once() -> None:
    assert wanted(make_load()) == 1
    assert wanted(make_load(waiting_tokens=2500)) == 3
    assert wanted(make_load(running=10)) == 2
    assert wanted(make_load(free_blocks=10)) == 2
    assert wanted(make_load(free_slots=0)) == 2


def test_load_adds_up_over_members_and_stays_within_bounds() -> None:
    assert wanted(make_load(waiting_tokens=700), make_load(waiting_tokens=700)) == 2
    assert wanted(make_load(waiting_tokens=99_000)) == 4


def sizes(loads: list[MemberLoad]) -> list[int]:
    """What a pool is to have, a report a second, by the rule as it is by default."""
    config, state = ScalingConfig(max_members=8), ScalingState(members=1)
    seen: list[int] = []
    for now, load in enumerate(loads):
        size, state = desired_members([load], config, float(now), state)
        seen.append(size)
    return seen


def test_a_long_prompt_that_waits_for_a_moment_is_no_need_of_members() -> None:
    fast = StepTime(base_s=0.0, prefill_token_s=1e-4, decode_row_s=0.0)
    long = replace(make_load(waiting_tokens=12_000), step_time=fast)
    assert sizes([make_load(), *([long] * 2 + [make_load()] * 20) * 3]) == [1] * 67


def test_a_load_that_stays_grows_the_pool_within_seconds() -> None:
    assert sizes([make_load(), *[make_load(waiting_tokens=8000)] * 20])[5:] >= [2]
    assert sizes([make_load(), *[make_load(waiting_tokens=8000)] * 30])[-1] == 4


def test_what_waits_counts_by_the_time_that_its_member_takes_for_it() -> None:
    slow, fast = (StepTime(base_s=0.0, prefill_token_s=token_s, decode_row_s=0.0) for token_s in (1e-3, 1e-5))
    load = make_load(waiting_tokens=3000)
    assert [wanted(replace(load, step_time=each)) for each in (slow, fast)] == [3, 2]


def test_draining_members_do_not_count() -> None:
    assert wanted(make_load(), make_load(waiting_tokens=5000, draining=True)) == 1


def test_a_model_without_state_slots_is_judged_by_the_rest() -> None:
    load = MemberLoad(member_id=MemberId("m"), role="decode", free_blocks=1)
    assert wanted(load) == 1


def test_the_pool_shrinks_only_after_a_quiet_while_to_the_most_it_needed_meanwhile() -> None:
    state = ScalingState(members=4)
    seen = []
    for now, tokens in [(0.0, 500), (30.0, 1500), (59.0, 500), (60.0, 500), (61.0, 500), (121.0, 500)]:
        size, state = desired_members([make_load(waiting_tokens=tokens)], CONFIG, now, state)
        seen.append(size)
    assert seen == [4, 4, 4, 2, 2, 1]


def test_a_burst_restarts_the_quiet_while() -> None:
    state = ScalingState(members=2)
    seen = []
    for now, tokens in [(0.0, 0), (50.0, 2000), (70.0, 0), (110.0, 0), (130.0, 0)]:
        size, state = desired_members([make_load(waiting_tokens=tokens)], CONFIG, now, state)
        seen.append(size)
    assert seen == [2, 2, 2, 2, 1]


def test_without_reports_the_size_stays_within_bounds() -> None:
    assert desired_members([], CONFIG, 0.0, ScalingState(members=3))[0] == 3
    assert desired_members([], CONFIG, 0.0, ScalingState(members=0))[0] == 1


def test_bounds_and_targets_that_cannot_work_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="min_members"):
        ScalingConfig(min_members=3, max_members=2)
    with pytest.raises(ConfigError, match="target_rows"):
        ScalingConfig(target_rows=0.0)
    with pytest.raises(ConfigError, match="target_wait_s"):
        ScalingConfig(target_wait_s=0.0)
