"""What is refused, how requests end early, and what the router is told."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from cluster.plan import StepOutput
from cluster.scheduler_config import SchedulerConfig
from router.errors import ConfigError, InvalidRequestError, OverloadedError
from router.prefix import block_hashes
from router.request import MemberId, Request, RequestId, TokenEvent
from shards.batch import LaneOutput
from tests.support.scheduler_bench import CONFIG, Bench, make_request, make_ticket


@pytest.mark.parametrize(
    ("request_", "field", "told"),
    [
        (make_request("a", ()), "prompt_ids", "prompt_ids: is empty"),
        (make_request("a", 60, max_tokens=5), "max_tokens", "are 65, over the limit of 64"),
        (make_request("a", 40, max_tokens=24), "max_tokens", "need 16 KV blocks of 4 tokens, the cache has 15"),
        (make_request("a", 4, max_tokens=2, output=(1, 2)), "max_tokens", "must exceed the 2 tokens"),
        (make_request("taken"), "id", "request id taken is running here"),
    ],
)
def test_what_can_never_run_is_refused_by_name(request_: Request, field: str, told: str) -> None:
    bench = Bench(replace(CONFIG, num_blocks=15))
    bench.add(make_request("taken"))
    with pytest.raises(InvalidRequestError, match=told) as caught:
        bench.add(request_)
    assert caught.value.field == field


def test_a_prefill_needs_blocks_for_its_prompt_only() -> None:
    bench = Bench(replace(CONFIG, num_blocks=2))
    bench.add(make_request("a", 8, max_tokens=20), "prefill")
    with pytest.raises(InvalidRequestError, match="need 7 KV blocks"):
        bench.add(make_request("b", 8, max_tokens=20))


def test_a_full_waiting_list_refuses_for_now() -> None:
    bench = Bench(replace(CONFIG, max_waiting=2))
    bench.add(make_request("a"))
    bench.add(make_request("b"))
    with pytest.raises(OverloadedError, match="2 requests wait") as caught:
        bench.add(make_request("c"))
    assert caught.value.retry_after_s > 0


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: replace(CONFIG, block_size=0), "block_size must be at least 1, got 0"),
        (lambda: replace(CONFIG, num_slots=-1), "num_slots"),
        (lambda: replace(CONFIG, lease_s=0.0), "lease_s must be positive"),
        (lambda: replace(CONFIG, max_step_tokens=3), "raise max_step_tokens to 4"),
        (lambda: replace(CONFIG, num_slots=1), "turn prefix_cache off"),
    ],
)
def test_limits_that_cannot_work_are_refused_by_name(make: Callable[[], SchedulerConfig], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        make()


def test_an_abort_frees_a_waiting_and_a_running_sequence_at_once() -> None:
    bench = Bench(replace(CONFIG, max_rows=1))
    bench.add(make_request("a"))
    bench.add(make_request("b"))
    plan = bench.plan()
    for name in "ab":
        event = bench.scheduler.abort(RequestId(name), 0.0)
        assert event is not None
        assert (event.finish, event.token_id, event.index) == ("abort", None, 0)
    bench.scheduler.check_integrity()
    assert bench.free_blocks() == 16
    assert bench.commit(plan) == []
    assert bench.scheduler.is_idle
    assert bench.scheduler.abort(RequestId("a"), 0.0) is None


def test_a_passed_deadline_ends_a_sequence_with_an_error() -> None:
    bench = Bench()
    bench.add(make_request("a", max_tokens=9, deadline=5.0))
    bench.add(make_request("b", max_tokens=9))
    assert len(bench.step(now=4.0)) == 2
    token_a, token_b, end = bench.step(now=5.0)
    assert (token_a.request_id, token_b.request_id) == ("a", "b")
    assert isinstance(end, TokenEvent)
    assert (end.finish, end.index, end.error) == ("error", 2, "deadline passed after 2 tokens")


def test_deadlines_end_sequences_that_wait_too() -> None:
    bench = Bench()
    bench.add(make_request("a", deadline=5.0))
    (event,) = bench.scheduler.expire(6.0)
    assert event.finish == "error"
    assert bench.scheduler.is_idle


def test_results_out_of_order_are_an_error_and_empty_ones_are_not() -> None:
    bench = Bench()
    bench.add(make_request("a"))
    plan = bench.plan()
    assert bench.scheduler.commit(StepOutput(step=99, lanes=(LaneOutput(),)), 0.0) == []
    with pytest.raises(AssertionError, match="step 99 out of order"):
        bench.scheduler.commit(StepOutput(step=99, lanes=(LaneOutput(rows_N=[0], tokens_N=[1]),)), 0.0)
    with pytest.raises(AssertionError, match="ranks sampled rows"):
        bench.scheduler.commit(StepOutput(step=plan.step, lanes=(LaneOutput(),)), 0.0)


def test_integrity_names_a_request_that_lost_its_place() -> None:
    bench = Bench()
    bench.add(make_request("a"))
    bench.scheduler._lanes[0].waiting.clear()
    with pytest.raises(AssertionError, match=r"without a place in a lane: \['a'\]"):
        bench.scheduler.check_integrity()


def test_load_counts_what_waits_and_what_runs() -> None:
    bench = Bench(replace(CONFIG, lanes=2, max_rows=1, max_step_tokens=4))
    for name in "abc":
        bench.add(make_request(name, 7))
    request = make_request("d", tuple(range(10)), output=(77,))
    bench.scheduler.add_handoff(request, make_ticket(request), 0.0)
    bench.plan()
    load = bench.scheduler.load(0.0, MemberId("m"), "mixed")
    assert (load.member_id, load.role, load.sequence) == ("m", "mixed", 0)
    assert (load.running_requests, load.waiting_requests, load.max_requests) == (2, 2, 2)
    assert load.waiting_tokens == 2 + 2 + 7
    assert (load.free_blocks, load.total_blocks, load.block_size) == (28, 32, 4)
    assert bench.scheduler.load(0.0, MemberId("m"), "mixed").sequence == 1


def test_changes_of_the_prefix_cache_are_told_lane_by_lane() -> None:
    bench = Bench(replace(CONFIG, lanes=2, prefix_cache=True))
    bench.add(make_request("a", tuple(range(9)), max_tokens=1))
    bench.drain()
    told = bench.scheduler.take_cache_changes()
    assert [set(changes.kv) for changes in told] == [set(block_hashes(range(9), 4)), set()]
    assert not any(changes.kv for changes in bench.scheduler.take_cache_changes())
