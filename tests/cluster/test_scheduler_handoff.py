"""Prefilled room waits for its fetcher under a lease; fetched KV is decoded, or computed anew when that fails."""

from dataclasses import replace

import pytest

from cluster.plan import HandoffReady, PullDone, StepPlan
from cluster.scheduler_config import SchedulerConfig
from router.errors import HandoffError
from router.request import MemberId, RequestId, TokenEvent
from tests.support.scheduler_bench import CONFIG, Bench, make_request, make_ticket


def prefilled(config: SchedulerConfig = CONFIG) -> tuple[Bench, HandoffReady]:
    bench = Bench(config)
    bench.add(make_request("a", 6), "prefill")
    token, ready = bench.step(now=1.0)
    assert isinstance(token, TokenEvent)
    assert token.finish is None
    assert isinstance(ready, HandoffReady)
    return bench, ready


def test_a_prefilled_sequence_keeps_blocks_and_slot_but_no_row() -> None:
    bench, ready = prefilled(replace(CONFIG, prefix_cache=False, num_slots=4))
    assert (len(ready.blocks), ready.num_tokens, ready.expires_unix_s) == (2, 6, 11.0)
    assert ready.state_slot >= 0
    load = bench.scheduler.load(1.0, MemberId("m"), "prefill")
    assert (load.running_requests, load.handoff_requests) == (0, 1)
    assert (load.free_blocks, load.free_state_slots) == (14, 3)
    bench.scheduler.check_integrity()
    bench.scheduler.release_ticket(ready.ticket_id)
    bench.scheduler.release_ticket(ready.ticket_id)
    bench.scheduler.check_integrity()
    assert bench.scheduler.is_idle


def test_a_ticket_nobody_fetched_is_freed_after_lease_and_grace() -> None:
    bench, _ = prefilled()
    bench.scheduler.expire(12.9)
    assert bench.free_blocks() == 14
    bench.scheduler.expire(13.1)
    assert bench.free_blocks() == 16


def test_an_abort_releases_the_requests_ticket() -> None:
    bench, _ = prefilled()
    assert bench.scheduler.abort(RequestId("a"), 2.0) is None
    assert bench.scheduler.is_idle


def test_a_prefill_that_ends_with_its_first_token_leaves_no_ticket() -> None:
    bench = Bench()
    bench.add(make_request("a", max_tokens=1), "prefill")
    (event,) = bench.step()
    assert isinstance(event, TokenEvent)
    assert event.finish == "length"
    assert bench.scheduler.is_idle


def handed(bench: Bench, *, expires: float = 10.0) -> StepPlan:
    """The plan that pulls a request of ten prompt tokens and one generated."""
    request = make_request("a", tuple(range(10)), output=(77,))
    bench.scheduler.add_handoff(request, make_ticket(request, expires=expires), 0.0)
    return bench.plan()


def test_room_is_reserved_before_a_pull_goes_out_and_decoding_follows_it() -> None:
    bench = Bench()
    plan = handed(bench)
    (order,) = plan.pulls
    assert not plan.has_rows
    assert (order.first, order.ticket.blocks) == (0, (20, 21, 22))
    assert plan.lanes[0].starts[0].blocks == order.dst_blocks
    assert bench.scheduler.schedule(0.0) is None
    assert not bench.scheduler.is_idle
    bench.scheduler.pull_done(PullDone(pull_id=order.pull_id), 1.0)
    after = bench.plan()
    assert (after.lanes[0].first_S, after.lanes[0].counts_S) == ([10], [1])
    (event,) = bench.commit(after)
    assert isinstance(event, TokenEvent)
    assert (event.index, event.token_id) == (1, 100)


def test_blocks_found_in_the_own_cache_are_not_pulled() -> None:
    bench = Bench()
    bench.add(make_request("b", tuple(range(9)), max_tokens=1))
    bench.drain()
    (order,) = handed(bench).pulls
    assert order.first == 8
    assert len(order.dst_blocks) == 1


def test_blocks_known_behind_a_tickets_recurrent_state_are_computed_once_more() -> None:
    bench = Bench(replace(CONFIG, num_slots=4))
    bench.add(make_request("a", 14, max_tokens=1))
    bench.drain()
    request = replace(make_request("a", 14), output_ids=(100,))
    bench.scheduler.add_handoff(request, make_ticket(request, num_tokens=6), 0.0)
    plan = bench.plan()
    assert (plan.pulls[0].first, len(plan.pulls[0].dst_blocks)) == (4, 1)
    bench.scheduler.pull_done(PullDone(pull_id=plan.pulls[0].pull_id), 1.0)
    (batch,) = bench.plan().lanes
    assert (batch.first_S, batch.counts_S) == ([6], [9])


def test_pulled_blocks_are_found_by_later_requests() -> None:
    bench = Bench()
    (order,) = handed(bench).pulls
    bench.scheduler.pull_done(PullDone(pull_id=order.pull_id), 1.0)
    bench.add(make_request("b", tuple(range(10))))
    assert bench.plan().lanes[0].first_S == [10, 8]


@pytest.mark.parametrize(("error", "now"), [("torn", 1.0), ("", 10.5)])
def test_a_failed_or_late_pull_makes_the_sequence_compute_its_tokens(error: str, now: float) -> None:
    bench = Bench()
    (order,) = handed(bench).pulls
    bench.scheduler.pull_done(PullDone(pull_id=order.pull_id, error=error), now)
    bench.scheduler.check_integrity()
    plan = bench.plan(now)
    assert (plan.lanes[0].first_S, plan.lanes[0].counts_S, plan.pulls) == ([0], [11], ())


def test_a_ticket_that_expired_while_waiting_is_not_pulled() -> None:
    bench = Bench()
    plan = handed(bench, expires=0.0)
    assert plan.pulls == ()
    assert plan.lanes[0].counts_S == [11]


def test_room_that_a_pull_writes_is_freed_when_the_pull_is_done() -> None:
    bench = Bench()
    (order,) = handed(bench).pulls
    assert bench.scheduler.abort(RequestId("a"), 0.0) is not None
    bench.scheduler.check_integrity()
    assert bench.free_blocks() == 13
    assert not bench.scheduler.is_idle
    bench.scheduler.pull_done(PullDone(pull_id=order.pull_id), 0.0)
    bench.scheduler.pull_done(PullDone(pull_id=order.pull_id), 0.0)
    bench.scheduler.check_integrity()
    assert bench.scheduler.is_idle
    assert bench.free_blocks() == 16


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"block_size": 2}, "10 positions in 3 blocks"),
        ({"num_tokens": 11}, "11 positions in 3 blocks for a request of 11"),
        ({"num_tokens": 0}, "0 positions"),
    ],
)
def test_a_ticket_that_does_not_fit_is_refused(changes: dict[str, int], told: str) -> None:
    request = make_request("a", tuple(range(10)), output=(77,))
    ticket = make_ticket(request, num_tokens=changes.get("num_tokens"), block_size=changes.get("block_size", 4))
    with pytest.raises(HandoffError, match=told):
        Bench().scheduler.add_handoff(request, ticket, 0.0)
