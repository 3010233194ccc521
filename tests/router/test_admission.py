"""Admission is bounded and fair, says when to come back, and never leaks a place."""

import random
from dataclasses import replace

import pytest

from router.admission import Admission, AdmissionConfig, Capacity, Entrant, entrant_of, member_priority
from router.errors import ConfigError, DeadlineExceededError, InvalidRequestError, OverloadedError
from router.request import Request, RequestId, SamplingParams
from router.simulated_fleet import Fleet
from router.simulated_member import MemberSpec
from router.simulation import percentile, simulate_tenants
from router.step_time import StepTime
from router.trace import TraceRequest

ONE = Capacity(members=1, step_tokens=10)


def make(
    name: str, tenant: str = "", *, tokens: int = 100, deadline_s: float | None = None, priority: int = 0
) -> Entrant:
    return Entrant(
        id=RequestId(name), tokens=tokens, max_output=1, tenant=tenant, priority=priority, deadline_s=deadline_s
    )


def run_one(admission: Admission, now: float) -> RequestId:
    """The next request's turn, its first token and its end."""
    (released,) = admission.decide(ONE, now).released
    admission.started(released, now)
    admission.done(released, now)
    return released


def test_an_entrant_is_what_a_request_says() -> None:
    request = Request(
        id=RequestId("r"),
        prompt_ids=(1, 2),
        output_ids=(3,),
        sampling=SamplingParams(max_tokens=7),
        priority=-3,
        tenant="t",
        deadline_unix_s=9.0,
    )
    assert entrant_of(request) == Entrant(
        id=RequestId("r"), tokens=3, max_output=7, tenant="t", priority=-3, deadline_s=9.0
    )


def test_turns_come_while_members_have_room_and_go_on_with_first_tokens() -> None:
    admission = Admission()
    for name in "abc":
        admission.admit(make(name), 0.0)
    assert admission.decide(Capacity(members=2, step_tokens=10), 0.0).released == ("a", "b")
    assert admission.waiting() == {1: 0, 0: 1, -1: 0}
    admission.started(RequestId("a"), 1.0)
    assert admission.decide(Capacity(members=2, step_tokens=10), 1.0).released == ("c",)
    assert (admission.num_in_flight, admission.num_queued) == (3, 2)


def test_short_prompts_share_steps_and_without_members_all_go() -> None:
    admission = Admission()
    for number in range(20):
        admission.admit(make(f"r{number}", tokens=9), 0.0)
    assert len(admission.decide(Capacity(members=1, step_tokens=100), 0.0).released) == 10
    assert len(admission.decide(Capacity(members=0, step_tokens=0), 0.0).released) == 10


def test_a_request_over_the_bound_is_refused_until_another_is_done() -> None:
    admission = Admission(AdmissionConfig(max_in_flight=2, max_queue=2))
    for name in "ab":
        admission.admit(make(name), 0.0)
        admission.decide(Capacity(members=9, step_tokens=1), 0.0)
    with pytest.raises(OverloadedError, match="max_in_flight=2"):
        admission.admit(make("c"), 0.0)
    admission.done(RequestId("a"), 1.0)
    admission.admit(make("c"), 1.0)
    assert admission.num_in_flight == 2


def test_all_places_are_free_when_all_are_done_however_often_that_is_said() -> None:
    admission = Admission()
    for number in range(10):
        admission.admit(make(f"r{number}"), 0.0)
    admission.decide(ONE, 0.0)
    for number in [*range(10), *range(10), 77]:
        admission.started(RequestId(f"r{number}"), 1.0)
        admission.done(RequestId(f"r{number}"), 1.0)
    assert (admission.num_in_flight, admission.num_queued) == (0, 0)
    assert admission.waiting() == {1: 0, 0: 0, -1: 0}


def test_a_full_queue_makes_room_for_others_at_the_cost_of_whoever_fills_it() -> None:
    admission = Admission(AdmissionConfig(max_queue=4))
    for number in range(4):
        admission.admit(make(f"hog{number}", "hog", tokens=6000), 0.0)
    with pytest.raises(OverloadedError, match="max_queue=4"):
        admission.admit(make("hog4", "hog"), 0.0)
    admission.admit(make("small", "other"), 0.0)
    decisions = admission.decide(ONE, 0.0)
    assert [name for name, _ in decisions.refused] == ["hog3"]
    assert decisions.released == ("small",)
    with pytest.raises(OverloadedError):
        admission.admit(make("large", "other", tokens=20_000), 0.0)


def test_a_full_queue_is_told_of_before_a_request_is_looked_at_to_whoever_fills_it_alone() -> None:
    admission = Admission(AdmissionConfig(max_queue=2, max_in_flight=3))
    admission.check_room("hog", 0)
    admission.admit(make("hog0", "hog"), 0.0)
    admission.admit(make("hog1", "hog"), 0.0)
    with pytest.raises(OverloadedError, match="max_queue=2") as early:
        admission.check_room("hog", 0)
    with pytest.raises(OverloadedError) as late:
        admission.admit(make("hog2", "hog", tokens=1), 0.0)
    assert early.value.retry_after_s == late.value.retry_after_s
    # Its other classes and other tenants may have a place.
    admission.check_room("hog", 1)
    admission.check_room("other", 0)
    # Nobody waits who could make room.
    admission.decide(Capacity(members=3, step_tokens=1000), 0.0)
    with pytest.raises(OverloadedError):
        admission.check_room("other", 0)


def test_retry_after_is_the_wait_at_the_pace_of_a_busy_fleet() -> None:
    admission = Admission(AdmissionConfig(max_queue=21, max_retry_s=500.0))
    for number in range(20):
        admission.admit(make(f"w{number}", tokens=99), 0.0)
    for number in range(300):
        admission.admit(make(f"r{number}", tokens=99), number * 0.1)
        run_one(admission, number * 0.1)
    admission.admit(make("last", tokens=99), 30.0)
    admission.decide(ONE, 30.0)
    with pytest.raises(OverloadedError) as caught:
        admission.admit(make("late", tokens=99), 30.0)
    # 20 requests wait, ten a second had their first token.
    assert caught.value.retry_after_s == pytest.approx(2.0, rel=0.15)


def test_a_burst_after_quiet_times_is_not_refused_at_the_pace_of_those() -> None:
    admission = Admission()
    for number in range(100):
        admission.admit(make(f"r{number}", tokens=99), float(number))
        run_one(admission, number + 0.01)
    # One request a second came; what the members could do is not known.
    for number in range(20):
        admission.admit(make(f"b{number}", tokens=99, deadline_s=105.0), 100.0)
        admission.decide(ONE, 100.0)
    assert admission.num_queued == 20


def test_what_cannot_make_its_deadline_is_refused_at_once_or_when_its_turn_comes() -> None:
    admission = Admission()
    with pytest.raises(DeadlineExceededError, match=r"2\.000 s ago"):
        admission.admit(make("a", deadline_s=8.0), 10.0)
    admission.admit(make("a"), 10.0)
    admission.decide(ONE, 10.0)
    admission.admit(make("b", deadline_s=10.7), 10.0)
    with pytest.raises(DeadlineExceededError, match=r"its turn comes in 0\.5 s"):
        admission.admit(make("c", deadline_s=10.4), 10.0)
    admission.done(RequestId("a"), 11.0)
    decisions = admission.decide(ONE, 11.0)
    assert decisions.released == ()
    assert "passed in the queue" in str(decisions.refused[0][1])


def test_classes_and_tenants_get_turns_by_weight_and_nobody_starves() -> None:
    admission = Admission(AdmissionConfig(max_in_flight=10**6, max_queue=10**6, tenant_weights={"gold": 2.0}))
    for number in range(3000):
        admission.admit(make(f"low{number}", tokens=999, priority=-5), 0.0)
        admission.admit(make(f"plain{number}", tokens=999), 0.0)
        admission.admit(make(f"gold{number}", "gold", tokens=999), 0.0)
    turns = [run_one(admission, 1.0).rstrip("0123456789") for _ in range(2000)]
    counts = {name: turns.count(name) for name in ("low", "plain", "gold")}
    assert counts["gold"] == pytest.approx(2 * counts["plain"], rel=0.1)
    assert counts["plain"] == pytest.approx(4 * counts["low"], rel=0.2)


def test_an_id_in_flight_is_refused() -> None:
    admission = Admission()
    admission.admit(make("a"), 0.0)
    with pytest.raises(InvalidRequestError, match="a is in flight"):
        admission.admit(make("a"), 0.0)


def test_bounds_that_cannot_work_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="max_queue must be at least 1, got 0"):
        AdmissionConfig(max_queue=0)
    with pytest.raises(ConfigError, match="min_retry_s"):
        AdmissionConfig(min_retry_s=2.0, max_retry_s=1.0)
    for weight in (0.0, 1e-4, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match=r"tenant_weights\.x must be from 0\.001 to"):
            AdmissionConfig(tenant_weights={"x": weight})


def make_arrivals(rng: random.Random, tenant: str, rate: float, length_s: float) -> list[TraceRequest]:
    """Poisson arrivals of prompts that share nothing."""
    found: list[TraceRequest] = []
    at = rng.expovariate(rate)
    while at < length_s:
        prompt = rng.randrange(1000, 8000)
        blocks = tuple(rng.getrandbits(60) for _ in range(prompt // 512))
        output = rng.randrange(50, 300)
        found.append(
            TraceRequest(arrival_s=at, prompt_tokens=prompt, output_tokens=output, blocks=blocks, tenant=tenant)
        )
        at += rng.expovariate(rate)
    return found


def make_short(
    rng: random.Random, tenant: str, rate: float, length_s: float, prompts: tuple[int, int]
) -> list[TraceRequest]:
    """As `make_arrivals`, of requests with few tokens."""
    found: list[TraceRequest] = []
    at = rng.expovariate(rate)
    while at < length_s:
        prompt, output = rng.randrange(*prompts), rng.randrange(8, 48)
        blocks = tuple(rng.getrandbits(60) for _ in range(prompt // 16))
        found.append(
            TraceRequest(arrival_s=at, prompt_tokens=prompt, output_tokens=output, blocks=blocks, tenant=tenant)
        )
        at += rng.expovariate(rate)
    return found


def test_a_hog_at_ten_times_what_the_fleet_can_do_leaves_the_others_their_first_tokens() -> None:
    length_s = 100.0
    step = StepTime(base_s=0.008, prefill_token_s=1e-4, decode_row_s=1e-4, context_token_s=2e-8)
    spec = MemberSpec(step_time=step, step_tokens=2048, kv_tokens=4_000_000)
    fleet = Fleet(members=8, spec=spec, admission=AdmissionConfig())
    for seed in range(3):
        alone: list[float] = []
        beside: list[float] = []
        rng = random.Random(seed)
        # 8 members serve about 16 such requests a second; four tenants ask for half of that.
        others = [each for tenant in "abcd" for each in make_arrivals(rng, tenant, 2.0, length_s)]
        hog = make_arrivals(rng, "hog", 160.0, length_s)
        for trace, found in ((others, alone), (others + hog, beside)):
            times = simulate_tenants(sorted(trace, key=lambda each: each.arrival_s), fleet, "cost")
            found += [value for tenant in "abcd" for value in times[tenant]]
        assert len(times["hog"]) > 5 * length_s
        assert len(alone) == len(beside)
        assert percentile(sorted(beside), 0.99) < 1.5 * percentile(sorted(alone), 0.99)


def test_whoever_left_the_members_free_has_its_part_of_them_beside_those_who_fill_them() -> None:
    members = Capacity(members=4, step_tokens=10)
    admission = Admission()
    for number in range(8):
        admission.admit(make(f"hog{number}", "hog", tokens=6000), 0.0)
    assert admission.decide(members, 0.0).released == ("hog0", "hog1", "hog2", "hog3")
    for number in range(5):
        admission.admit(make(f"quiet{number}", "quiet"), 1.0)
    # Its share is two of four places, of which it may take three.
    assert admission.decide(members, 1.0).released == ("quiet0", "quiet1", "quiet2")
    admission.admit(make("new", "new"), 1.0)
    assert admission.decide(members, 1.0).released == ("new",)
    # With three flows there it may take two.
    admission.done(RequestId("quiet0"), 2.0)
    assert admission.decide(members, 2.0).released == ()
    admission.done(RequestId("quiet1"), 2.0)
    assert admission.decide(members, 2.0).released == ("quiet3",)
    for name in ("hog0", "hog1", "hog2", "quiet2"):
        admission.started(RequestId(name), 3.0)
    assert admission.decide(members, 3.0).released == ("quiet4",)


def test_what_a_client_says_of_its_requests_moves_them_at_a_member_among_those_alike_alone() -> None:
    assert [member_priority(each, saver=False) for each in (-100, 0, 1, 100)] == [-1, 0, 1, 1]
    assert member_priority(0, saver=True) > member_priority(100, saver=False)
    # What can wait is not put before anybody's, however seldom its tenant asks.
    assert [member_priority(each, saver=True) for each in (-100, 0, 1)] == [-1, 2, 3]


def test_gateways_that_share_members_give_turns_for_their_part_of_them_and_for_one_at_least() -> None:
    for gateways, turns in ((1, 8), (2, 4), (4, 2), (100, 1)):
        admission = Admission(AdmissionConfig(gateways=gateways))
        for number in range(9):
            admission.admit(make(f"r{number}", tokens=1000), 0.0)
        full = Capacity(members=8, step_tokens=10, backlog_tokens=1000)
        assert len(admission.decide(full, 0.0).released) == turns
    with pytest.raises(ConfigError, match="gateways must be at least 1, got 0"):
        AdmissionConfig(gateways=0)


@pytest.mark.parametrize(("hog_prompts", "bound"), [((64, 448), 1.5), ((900, 960), 1.9)])
def test_a_hog_leaves_the_others_of_a_fleet_of_one_their_first_tokens(
    hog_prompts: tuple[int, int], bound: float
) -> None:
    length_s = 300.0
    # Steps as a Qwen3-MoE of 0.7 billion parameters has them on one core.
    step = StepTime(base_s=0.012, prefill_token_s=0.0017, decode_row_s=5e-4, experts_s=0.07, expert_share=0.125)
    spec = MemberSpec(step_time=step, step_tokens=256, kv_tokens=500_000, max_rows=32, block_size=16)
    fleet = Fleet(members=1, spec=spec, admission=AdmissionConfig())
    alone: list[float] = []
    beside: list[float] = []
    for seed in range(5):
        rng = random.Random(seed)
        # It serves some 1.6 of their requests a second, of which they ask for half.
        others = [each for tenant in "abcd" for each in make_short(rng, tenant, 0.2, length_s, (64, 448))]
        hog = make_short(rng, "hog", 10.0, length_s, hog_prompts)
        for trace, found in ((others, alone), (others + hog, beside)):
            times = simulate_tenants(sorted(trace, key=lambda each: each.arrival_s), fleet, "cost")
            found += [value for tenant in "abcd" for value in times[tenant]]
    assert len(alone) == len(beside)
    assert percentile(sorted(beside), 0.99) < bound * percentile(sorted(alone), 0.99)


@pytest.mark.parametrize("gateways", [2, 4])
def test_a_hog_at_several_gateways_leaves_the_others_their_first_tokens_too(gateways: int) -> None:
    length_s = 60.0
    step = StepTime(base_s=0.008, prefill_token_s=1e-4, decode_row_s=1e-4, context_token_s=2e-8)
    spec = MemberSpec(step_time=step, step_tokens=2048, kv_tokens=4_000_000)
    fleet = Fleet(members=8, spec=spec, admission=AdmissionConfig(gateways=gateways), gateways=gateways)
    rng = random.Random(5)
    others = [each for tenant in "abcd" for each in make_arrivals(rng, tenant, 2.0, length_s)]
    tails = []
    for trace in (others, others + make_arrivals(rng, "hog", 160.0, length_s)):
        times = simulate_tenants(sorted(trace, key=lambda each: each.arrival_s), fleet, "cost")
        tails.append(percentile(sorted(value for tenant in "abcd" for value in times[tenant]), 0.99))
    assert tails[1] < 1.5 * tails[0]


def test_what_is_taken_beside_others_has_a_bound() -> None:
    members = Capacity(members=2, step_tokens=10)
    admission = Admission()
    for number in range(2):
        admission.admit(make(f"hog{number}", "hog"), 0.0)
    admission.decide(members, 0.0)
    for name in "abcdefgh":
        admission.admit(make(name, name), 1.0)
    # Eight in all of a small fleet, with those that the hog has.
    assert len(admission.decide(members, 1.0).released) == 6


def test_beside_others_a_quiet_tenant_has_two_places_of_a_small_fleet() -> None:
    members = Capacity(members=1, step_tokens=10)
    admission = Admission()
    admission.admit(make("hog", "hog"), 0.0)
    admission.decide(members, 0.0)
    for number in range(3):
        admission.admit(make(f"quiet{number}", "quiet"), 1.0)
    decisions = admission.decide(members, 1.0)
    assert decisions.released == ("quiet0", "quiet1")
    assert decisions.savers == {"quiet0", "quiet1"}


def test_a_fleet_with_few_prompt_tokens_before_it_gets_more_requests() -> None:
    admission = Admission()
    for name in "abcd":
        admission.admit(Entrant(id=RequestId(name), tokens=14, max_output=1), 0.0)
    full = Capacity(members=1, step_tokens=20, backlog_tokens=20)
    assert admission.decide(full, 0.0).released == ("a", "b")
    admission.routed(RequestId("a"))
    admission.routed(RequestId("b"))
    assert admission.decide(full, 0.0).released == ()
    # What has its turn counts until it is in the backlog.
    assert admission.decide(replace(full, backlog_tokens=6), 0.0).released == ("c",)
    assert admission.decide(replace(full, backlog_tokens=6), 0.0).released == ()
    admission.routed(RequestId("c"))
    assert admission.decide(replace(full, backlog_tokens=19), 0.0).released == ("d",)


def test_requests_wait_while_nobody_has_room_to_decode_them() -> None:
    admission = Admission()
    for name in "ab":
        admission.admit(make(name), 0.0)
    assert admission.decide(Capacity(members=2, step_tokens=1000, decode_places=0), 0.0).released == ()
    assert admission.decide(Capacity(members=2, step_tokens=1000, decode_places=1), 0.0).released == ("a",)
    assert admission.decide(Capacity(members=2, step_tokens=1000, decode_places=1), 0.0).released == ()
    assert admission.decide(Capacity(members=2, step_tokens=1000, decode_places=2), 0.0).released == ("b",)


def test_requests_wait_while_the_members_have_no_room_for_their_kv_but_for_one() -> None:
    admission = Admission()
    for name in "abc":
        admission.admit(make(name, tokens=99), 0.0)
    assert admission.decide(Capacity(members=9, step_tokens=1, free_tokens=0), 0.0).released == ("a",)
    assert admission.decide(Capacity(members=9, step_tokens=1, free_tokens=100), 0.0).released == ()
    assert admission.decide(Capacity(members=9, step_tokens=1, free_tokens=101), 0.0).released == ("b",)
    admission.started(RequestId("a"), 1.0)
    assert admission.decide(Capacity(members=9, step_tokens=1, free_tokens=101), 1.0).released == ("c",)
