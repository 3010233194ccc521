"""A simulated fleet follows its load by the scaling code of pools, and its gateways know of each other by reports."""

import random

import pytest

from router.admission import AdmissionConfig
from router.choosers import POLICIES, PolicyName
from router.errors import ConfigError
from router.scaling import ScalingConfig
from router.simulated_fleet import Fleet, FleetRun, Growth
from router.simulated_member import Job, MemberSpec
from router.simulation import simulate
from router.step_time import StepTime
from router.trace import TraceRequest

SPEC = MemberSpec(
    step_time=StepTime(base_s=0.01, prefill_token_s=1e-4, decode_row_s=1e-4), kv_tokens=200_000, step_tokens=2048
)
SCALING = ScalingConfig(min_members=1, max_members=4, down_delay_s=20.0, average_s=1.0)


def make_trace(rate: float, length_s: float, start_s: float = 0.0, sessions: int = 10_000) -> list[TraceRequest]:
    """Poisson arrivals of prompts of 2 to 8 blocks; equal ones belong to a session."""
    rng = random.Random(rate)
    found: list[TraceRequest] = []
    at_s = start_s
    while at_s < start_s + length_s:
        session = rng.randrange(sessions)
        blocks = tuple(range(10 * session, 10 * session + 2 + session % 7))
        found.append(TraceRequest(arrival_s=at_s, prompt_tokens=512 * len(blocks) + 1, output_tokens=20, blocks=blocks))
        at_s += rng.expovariate(rate)
    return found


def run(fleet: Fleet, trace: list[TraceRequest], policy: PolicyName = "cost") -> tuple[list[Job], FleetRun]:
    jobs = [Job(number=number, request=each, arrival_s=each.arrival_s) for number, each in enumerate(trace)]
    found = FleetRun(fleet, policy, lambda _: None)
    found.serve(jobs)
    return jobs, found


# Three members' load for a minute, then next to nothing.
RUSH = [*make_trace(9.0, 60.0), *make_trace(0.2, 90.0, 60.0)]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_fleet_grows_under_load_serves_all_and_shrinks_again_under_every_policy(policy: PolicyName) -> None:
    growth = Growth(scaling=SCALING, start_s=5.0)
    small = simulate(RUSH, Fleet(members=1, spec=SPEC), policy)
    grown = simulate(RUSH, Fleet(members=1, spec=SPEC, growth=growth), policy)
    assert grown.requests == small.requests == len(RUSH)
    assert (small.mean_members, small.most_members) == (1.0, 1)
    assert grown.most_members == 4
    assert 1.3 < grown.mean_members < 3.5
    assert grown.mean_ttft_s < 0.5 * small.mean_ttft_s


def test_a_new_member_comes_up_in_its_time_and_one_that_is_not_needed_any_more_leaves_after_its_last_request() -> None:
    jobs, found = run(Fleet(members=1, spec=SPEC, growth=Growth(scaling=SCALING, start_s=10.0)), RUSH)
    first, *others = found.members
    assert all(job.end_s > 0 for job in jobs)
    assert len(others) >= 3
    assert first.busy_s > 10.0
    ends = [found.sizes(at_s) for at_s in (9.0, 60.0, 150.0)]
    assert ends[0] == (1.0, 1)
    assert ends[1][1] == 4
    # After the rush and the delay of the pool one is left, but for moments in which two long prompts meet.
    rest_s = 150.0 - 90.0
    assert (150.0 * ends[2][0] - 90.0 * found.sizes(90.0)[0]) / rest_s < 2.0


def test_a_member_that_is_not_up_yet_is_given_up_when_the_rush_is_over() -> None:
    scaling = ScalingConfig(min_members=1, max_members=4, down_delay_s=1.0, average_s=0.1)
    trace = [*make_trace(20.0, 2.0), *make_trace(0.5, 30.0, 3.0)]
    jobs, found = run(Fleet(members=1, spec=SPEC, growth=Growth(scaling=scaling, start_s=25.0)), trace)
    assert all(job.end_s > 0 for job in jobs)
    assert len(found.members) > 1
    assert found.sizes(30.0) == (1.0, 1)


def test_those_who_wait_at_the_gate_get_the_places_of_new_members() -> None:
    growth = Growth(scaling=SCALING, start_s=5.0)
    fleet = Fleet(members=1, spec=SPEC, admission=AdmissionConfig(max_queue=10_000), growth=growth)
    jobs, found = run(fleet, make_trace(12.0, 20.0))
    assert all(job.end_s > 0 and not job.refused for job in jobs)
    assert found.sizes(30.0)[1] == 4


def test_gateways_that_know_of_each_other_by_reports_lose_little_to_one_that_knows_all() -> None:
    trace = make_trace(20.0, 60.0, sessions=60)
    results = [simulate(trace, Fleet(members=8, spec=SPEC, gateways=gateways), "cost") for gateways in (1, 4)]
    assert [each.requests for each in results] == [len(trace)] * 2
    one, four = results
    assert four.mean_ttft_s != one.mean_ttft_s
    assert four.mean_ttft_s < 1.5 * one.mean_ttft_s
    assert four.hit_rate > 0.9 * one.hit_rate


def test_blind_gateways_that_count_only_their_own_balance_worse_than_one() -> None:
    trace = make_trace(20.0, 60.0)
    one, four = (simulate(trace, Fleet(members=8, spec=SPEC, gateways=count), "least-load") for count in (1, 4))
    assert four.mean_ttft_s > one.mean_ttft_s


def test_sizes_that_make_no_fleet_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"fleet\.members must be at least 1, got 0"):
        Fleet(members=0, spec=SPEC)
    with pytest.raises(ConfigError, match=r"fleet\.gateways must be at least 1, got 0"):
        Fleet(members=1, spec=SPEC, gateways=0)
