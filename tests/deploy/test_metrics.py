"""What a scrape shows."""

from dataclasses import asdict, fields, replace

from cluster.journey import RequestTrace as JourneyTrace
from deploy.metrics import GatewayMetrics
from deploy.trace import RequestTrace
from router.load import MemberCounts, MemberLoad
from router.request import MemberId, RequestId


class FakeClock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make_load(member: str, *, waiting: int = 0, free: int = 1, total: int = 1) -> MemberLoad:
    return MemberLoad(
        member_id=MemberId(member), role="mixed", waiting_requests=waiting, free_blocks=free, total_blocks=total
    )


def sample(metrics: GatewayMetrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"moefleet:{name}", {"model_name": "tiny", **labels})


def test_latencies_count_from_the_arrival_of_the_request() -> None:
    clock, metrics = FakeClock(), GatewayMetrics("tiny")
    trace = RequestTrace(clock)
    for moment, mark in ((100.5, trace.mark_tokenized), (101.0, trace.mark_token), (103.0, trace.mark_token)):
        clock.now = moment
        mark()
    metrics.request_started(5)
    metrics.request_ended(trace, complete=True)

    assert sample(metrics, "request_tokenize_time_seconds_sum") == 0.5
    assert sample(metrics, "time_to_first_token_seconds_sum") == 1.0
    assert sample(metrics, "e2e_request_latency_seconds_sum") == 3.0
    assert sample(metrics, "num_requests_in_flight") == 0
    assert sample(metrics, "prompt_tokens_total") == 5


def test_a_request_that_failed_has_no_total_latency() -> None:
    metrics = GatewayMetrics("tiny")
    metrics.request_started(1)
    metrics.request_ended(RequestTrace(FakeClock()), complete=False)

    assert sample(metrics, "e2e_request_latency_seconds_count") is None


def test_gauges_show_the_members_that_are_there_now() -> None:
    metrics = GatewayMetrics("tiny")
    metrics.render([make_load("a", waiting=3, free=25, total=100)], {})
    assert sample(metrics, "num_requests_waiting", member_id="a", role="mixed") == 3
    assert sample(metrics, "kv_cache_usage_perc", member_id="a", role="mixed") == 0.75

    text = metrics.render([make_load("b")], {}).decode()
    assert 'member_id="b"' in text
    assert 'member_id="a"' not in text


def test_a_member_without_state_slots_uses_none() -> None:
    metrics = GatewayMetrics("tiny")
    metrics.render([make_load("a")], {})

    assert sample(metrics, "state_cache_usage_perc", member_id="a", role="mixed") == 0


def test_two_gateways_in_one_process_do_not_share_series() -> None:
    first, second = GatewayMetrics("tiny"), GatewayMetrics("tiny")
    first.error("http", "overloaded")

    assert sample(first, "request_errors_total", api="http", code="overloaded") == 1
    assert sample(second, "request_errors_total", api="http", code="overloaded") is None


def test_stages_split_a_disaggregated_request_and_leave_out_what_it_did_not_reach() -> None:
    metrics = GatewayMetrics("tiny")
    trace = JourneyTrace(
        request_id=RequestId("r"),
        prefill_member=MemberId("p"),
        decode_member=MemberId("d"),
        num_tokens=3,
        moments={"received_s": 1.0, "submitted_s": 1.5, "first_token_s": 3.5, "handoff_start_s": 3.5},
    )
    metrics.stages(trace)

    assert sample(metrics, "request_stage_seconds_sum", stage="gateway") == 0.5
    assert sample(metrics, "request_stage_seconds_sum", stage="prefill") == 2.0
    assert sample(metrics, "request_stage_seconds_sum", stage="handoff") is None


def test_what_members_count_is_told() -> None:
    metrics = GatewayMetrics("tiny")
    counts = MemberCounts(
        preemptions=1,
        drafted_tokens=20,
        accepted_tokens=15,
        pulls=6,
        failed_pulls=2,
        refetched_frames=3,
        pulled_bytes=4096,
        pull_s=0.5,
    )
    metrics.render([replace(make_load("a"), counts=counts)], {})
    found = {field.name: sample(metrics, field.name, member_id="a", role="mixed") for field in fields(counts)}
    assert found == asdict(counts)


def test_members_with_recurrent_state_tell_how_many_states_they_keep() -> None:
    metrics = GatewayMetrics("tiny")
    kept = replace(
        make_load("a"), total_state_slots=9, state_checkpoints=3, checkpoint_bytes=100, evicted_checkpoints=2
    )
    metrics.render([kept, make_load("b")], {})
    found = [
        sample(metrics, name, member_id="a", role="mixed")
        for name in ("state_checkpoints", "state_checkpoint_bytes", "state_checkpoints_evicted")
    ]
    assert found == [3, 300, 2]
    assert sample(metrics, "state_checkpoints", member_id="b", role="mixed") is None


def test_the_queue_at_the_gateway_is_told_by_priority() -> None:
    metrics = GatewayMetrics("tiny")
    metrics.render([], {1: 2, 0: 5, -1: 0})

    assert sample(metrics, "num_requests_queued", priority="positive") == 2
    assert sample(metrics, "num_requests_queued", priority="none") == 5
    assert sample(metrics, "num_requests_queued", priority="negative") == 0
