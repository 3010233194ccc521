"""A simulated member takes the time that its step-time model says, whatever is joined into one event."""

from dataclasses import replace

import pytest

from router.request import MemberId
from router.simulated_cache import SimulatedCache
from router.simulated_member import Job, MemberSpec, SimulatedMember
from router.step_time import StepTime
from router.trace import TraceRequest

SPEC = MemberSpec(
    step_time=StepTime(base_s=0.1, prefill_token_s=0.01, decode_row_s=0.02),
    block_size=10,
    kv_tokens=1000,
    max_rows=2,
    step_tokens=100,
    report_s=1e9,
)


def make_job(number: int, prompt: int, output: int, blocks: tuple[int, ...] = ()) -> Job:
    request = TraceRequest(arrival_s=0.0, prompt_tokens=prompt, output_tokens=output, blocks=blocks)
    return Job(number=number, request=request, arrival_s=0.0)


def run(member: SimulatedMember, end_s: float | None) -> float:
    """Until nothing is left to do; returns when that was."""
    now = 0.0
    while end_s is not None:
        now = end_s
        _, end_s = member.advance(now)
    return now


def test_a_request_alone_takes_its_prompt_and_its_steps() -> None:
    member = SimulatedMember(MemberId("m"), SPEC)
    job = make_job(0, 150, 5)
    assert run(member, member.add(job, 0.0)) == pytest.approx(job.end_s)
    assert job.first_token_s == pytest.approx(1.5 + 2 * 0.1)
    assert job.end_s - job.first_token_s == pytest.approx(4 * 0.12)


def test_a_prompt_that_comes_while_others_decode_waits_for_the_step_that_runs_and_the_one_planned_behind_it() -> None:
    member = SimulatedMember(MemberId("m"), SPEC)
    first, second = make_job(0, 10, 100), make_job(1, 10, 1)
    end_s = member.add(first, 0.0)
    assert end_s is not None
    _, end_s = member.advance(end_s)
    assert end_s == pytest.approx(0.2 + 99 * 0.12)
    end_s = member.add(second, 0.2 + 1.5 * 0.12)
    assert end_s == pytest.approx(0.2 + 3 * 0.12)
    run(member, end_s)
    assert second.first_token_s == pytest.approx(0.2 + 3 * 0.12 + 0.12 + 0.1)
    assert second.end_s == second.first_token_s
    assert first.end_s == pytest.approx(0.2 + 99 * 0.12 + 0.1)


def test_a_request_in_the_last_steps_of_a_span_changes_no_end() -> None:
    member = SimulatedMember(MemberId("m"), SPEC)
    end_s = member.add(make_job(0, 10, 2), 0.0)
    assert end_s is not None
    late = make_job(1, 10, 2)
    assert member.add(late, 0.05) is None
    _, end_s = member.advance(end_s)
    # The step behind the first was planned when that began, with one row and without the late prompt.
    assert end_s == pytest.approx(0.2 + 0.12)
    _, end_s = member.advance(end_s or 0.0)
    assert end_s == pytest.approx(0.32 + 0.2)
    assert member.add(make_job(2, 10, 1), end_s or 0.0) is None


def test_a_request_that_comes_to_an_idle_member_is_planned_at_once() -> None:
    member = SimulatedMember(MemberId("m"), SPEC)
    first, second = make_job(0, 10, 1), make_job(1, 10, 1)
    end_s = member.add(first, 0.0)
    assert member.add(second, 0.1) is None
    run(member, end_s)
    assert (first.first_token_s, second.first_token_s) == (pytest.approx(0.2), pytest.approx(0.4))


def test_prompts_share_a_step_as_far_as_it_has_room() -> None:
    member = SimulatedMember(MemberId("m"), SPEC)
    jobs = [make_job(0, 130, 1), make_job(1, 40, 1), make_job(2, 10, 1)]
    ends = [member.add(job, 0.0) for job in jobs]
    run(member, ends[0])
    # 100 of the first, then its other 30 with 40; there are two rows, and the third waits for one.
    assert [job.first_token_s for job in jobs] == [pytest.approx(1.1 + each) for each in (0.8, 0.8, 1.0)]


def test_the_way_between_client_and_engine_adds_to_a_first_token_and_to_no_gap() -> None:
    spec = MemberSpec(step_time=SPEC.step_time, block_size=10, kv_tokens=1000, step_tokens=100, way_s=0.05)
    member = SimulatedMember(MemberId("m"), spec)
    job, close_behind = make_job(0, 10, 3), make_job(1, 10, 1)
    end_s = member.add(job, 1.0)
    assert end_s == pytest.approx(1.05 + 0.2)
    member.add(close_behind, 1.2)
    run(member, end_s)
    assert job.first_token_s == pytest.approx(1.0 + 0.2 + 2 * 0.05)
    # It came to the engine just as the last step ended.
    assert job.end_s == pytest.approx(1.25 + 0.12 + 0.22 + 0.05)


def test_rows_and_room_are_waited_for() -> None:
    member = SimulatedMember(MemberId("m"), SPEC)
    jobs = [make_job(number, 10, 10) for number in range(3)]
    ends = [member.add(job, 0.0) for job in jobs]
    run(member, ends[0])
    assert jobs[2].first_token_s > min(jobs[0].end_s, jobs[1].end_s)
    large = [make_job(number, 600, 2) for number in range(2)]
    ends = [member.add(job, 0.0) for job in large]
    run(member, ends[0])
    assert large[1].first_token_s > large[0].end_s
    assert not member.can_hold(make_job(0, 1000, 1).request)


def test_a_known_prefix_is_not_computed_again_and_reports_and_events_tell_of_it() -> None:
    member = SimulatedMember(MemberId("m"), SPEC)
    first = member.take_events()
    assert first is not None
    assert first.cleared
    blocks = tuple(range(10))
    run(member, member.add(make_job(0, 100, 1, blocks), 0.0))
    events = member.take_events()
    assert events is not None
    assert (events.after, events.sequence, set(events.stored)) == (1, 2, set(blocks[:9]))
    assert member.take_events() is None
    again = make_job(1, 100, 5, blocks)
    end_s = member.add(again, 0.0)
    load = member.load()
    assert (load.waiting_tokens, load.running_requests, load.free_blocks) == (0, 1, 100 - 11)
    run(member, end_s)
    assert again.cached_tokens == 90
    assert member.load().free_blocks == 100


def test_long_spans_are_cut_for_reports() -> None:
    spec = MemberSpec(step_time=SPEC.step_time, block_size=10, kv_tokens=10_000, step_tokens=100, report_s=3.0)
    member = SimulatedMember(MemberId("m"), spec)
    end_s = member.add(make_job(0, 1000, 1), 0.0)
    assert end_s == pytest.approx(2.2)
    member.advance(end_s or 0.0)
    # Of the 800 that are left two steps are planned.
    assert member.load().waiting_tokens == 600


def test_the_cache_gives_up_what_was_freed_longest_ago_and_the_end_of_a_prefix_first() -> None:
    cache = SimulatedCache(6)
    assert cache.reserve((1, 2, 3), 1)
    cache.fill((1, 2, 3))
    assert cache.reserve((1, 2), 0)
    assert not cache.reserve((7,), 2)
    cache.release((1, 2), 0)
    cache.release((1, 2, 3), 1)
    assert cache.depth((1, 2, 3)) == 3
    assert cache.take_changes() == ((1, 2, 3), ())
    assert cache.reserve((8, 9), 2)
    assert cache.take_changes() == ((), (3,))
    assert cache.depth((1, 2, 3)) == 2
    cache.release((8, 9), 2)
    cache.fill((8,))
    assert cache.num_free == 6


def test_a_saver_goes_before_the_rest_of_a_long_prompt_and_before_those_who_wait() -> None:
    member = SimulatedMember(MemberId("m"), SPEC)
    long, waits, saver = make_job(0, 300, 1), make_job(1, 100, 1), make_job(2, 100, 1)
    saver.saver = True
    member.add(long, 0.0)
    member.add(waits, 0.1)
    # The step that runs and the one that is planned behind it are the long prompt's.
    end_s = member.add(saver, 0.2)
    assert end_s == pytest.approx(2 * 1.1)
    run(member, end_s)
    assert saver.first_token_s == pytest.approx(3 * 1.1)
    assert long.first_token_s == pytest.approx(4 * 1.1)
    assert waits.first_token_s == pytest.approx(5 * 1.1)


def test_beside_the_prompt_of_a_saver_others_fill_its_step_to_half() -> None:
    member = SimulatedMember(MemberId("m"), replace(SPEC, max_rows=8))
    first, long, waits = make_job(0, 100, 1), make_job(1, 130, 1), make_job(2, 100, 1)
    savers = [make_job(3, 30, 1), make_job(4, 90, 1)]
    end_s = member.add(first, 0.0)
    for job in (long, waits, *savers):
        job.saver = job in savers
        member.add(job, 0.1)
    run(member, end_s)
    # Steps of 30 and 70 tokens, of 20 and 30, of 100, and of 100.
    assert [job.first_token_s for job in savers] == pytest.approx([2.2, 2.8])
    assert [job.first_token_s for job in (long, waits)] == pytest.approx([3.9, 5.0])
