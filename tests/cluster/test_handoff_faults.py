"""A fault at each step of a hand-off: whoever leaves or dies, the others are free again within the lease."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.handoff_faults import (
    FREE_WITHIN_S,
    GENTLE,
    NUM_TOKENS,
    STEPS,
    Fault,
    Running,
    Step,
    damage,
    inject,
    overstay,
    pair,
)

pytestmark = [pytest.mark.slow, pytest.mark.anyio]
ENDS: dict[Fault, set[str]] = {
    "client leaves": {"cancelled"},
    "deadline passes": {"DeadlineExceededError", "complete"},
    "gateway ends": {"MemberLostError", "NoMemberError", "complete"},
    "members are unlisted": {"MemberLostError", "NoMemberError", "complete"},
}


@pytest.mark.parametrize("fault", GENTLE)
async def test_both_members_are_free_after_a_fault_of_others_at_any_step(
    make_checkpoint: Callable[..., Path], fault: Fault
) -> None:
    async with pair(make_checkpoint("qwen3_next")) as one:
        wanted = await Running(one.generate("first")).task
        for step in STEPS:
            outcome = await inject(one, fault, step)
            assert outcome.ended in ENDS[fault], outcome
            assert outcome.free_s < FREE_WITHIN_S
        assert await Running(one.generate("last")).task == wanted


@pytest.mark.parametrize("step", STEPS)
async def test_a_prefill_member_lost_at_any_step_leaves_the_decode_member_free_and_tokens_right(
    make_checkpoint: Callable[..., Path], step: Step
) -> None:
    checkpoint = make_checkpoint("qwen3_next")
    async with pair(checkpoint) as one:
        outcome = await inject(one, "prefill rank is killed", step)
    if step in ("queued at prefill", "prefill", "early pull", "layers' pull"):
        assert outcome.ended == "MemberLostError"
        return
    # The decode member has the KV, or computes the prompt again.
    assert outcome.ended == "complete"
    async with pair(checkpoint) as one:
        name = f"prefill rank is killed at {step}"
        async with one.at("first token", name) as running:
            assert await running.task == outcome.tokens


@pytest.mark.parametrize("step", STEPS)
async def test_a_decode_member_lost_at_any_step_leaves_the_prefill_member_free(
    make_checkpoint: Callable[..., Path], step: Step
) -> None:
    async with pair(make_checkpoint("qwen3_next")) as one:
        outcome = await inject(one, "decode rank is killed", step)
    assert outcome.ended in ("MemberLostError", "NoMemberError")
    assert len(outcome.tokens) < NUM_TOKENS


async def test_a_lease_that_runs_out_at_a_full_or_slow_decode_member_costs_time_and_no_token(
    make_checkpoint: Callable[..., Path],
) -> None:
    async with pair(make_checkpoint("qwen3_next")) as one:
        late: Step
        for late in ("queued at decode", "pull"):
            outcome = await overstay(one, late)
            assert outcome.ended == "complete"
            async with one.at("first token", f"lease runs out at {late}") as running:
                assert await running.task == outcome.tokens


async def test_damaged_frames_are_fetched_again_and_counted_or_cost_the_pull_and_no_token(
    make_checkpoint: Callable[..., Path],
) -> None:
    checkpoint = make_checkpoint("qwen3_next")
    whole, none = await damage(checkpoint, (), "nothing")
    once, some = await damage(checkpoint, (5000,), "a frame is damaged")
    ever, more = await damage(checkpoint, tuple(range(3000, 300_000, 1000)), "every frame is damaged")
    assert (none, some) == (0, 1)
    assert more >= 2
    assert {one.ended for one in (whole, once, ever)} == {"complete"}
    assert whole.tokens == once.tokens == ever.tokens
