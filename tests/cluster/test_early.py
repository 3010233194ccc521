"""What is computed of a long prompt is fetched while the rest is: it is found later, or it is as if it never came."""

import math
from dataclasses import replace

import pytest

from cluster.plan import HandoffReady, KvTicket, PullDone, PullOrder
from cluster.scheduler_config import SchedulerConfig
from cluster.sequence import Mode
from router.errors import ConfigError, HandoffError
from router.prefix import block_hashes
from router.request import MemberId, Request, RequestId, TokenEvent
from tests.support.scheduler_bench import CONFIG, Bench, make_request, make_ticket

PROMPT = tuple(range(40))
CHUNKS = replace(CONFIG, chunk_tokens=8, early_tokens=8)


def offers_of(bench: Bench, now: float = 0.0) -> list[HandoffReady]:
    return [event for event in bench.step(now) if isinstance(event, HandoffReady)]


def begun(config: SchedulerConfig = CHUNKS) -> tuple[Bench, HandoffReady]:
    """A prefill whose first chunk of three is computed, and what was offered of it."""
    bench = Bench(config)
    bench.add(make_request("a", PROMPT[:24]), "prefill")
    (offer,) = offers_of(bench)
    return bench, offer


def test_each_chunk_of_a_prompt_is_offered_under_the_tickets_id() -> None:
    bench, first = begun()
    (second,) = offers_of(bench, 1.0)
    assert [(one.partial, one.num_tokens, len(one.blocks)) for one in (first, second)] == [(True, 8, 2), (True, 16, 4)]
    assert (first.expires_unix_s, second.expires_unix_s, second.state_slot) == (10.0, 11.0, -1)
    token, ready = bench.step(2.0)
    assert isinstance(token, TokenEvent)
    assert isinstance(ready, HandoffReady)
    assert (ready.ticket_id, ready.partial, ready.num_tokens) == (first.ticket_id, False, 24)
    assert ready.blocks[:2] == first.blocks
    bench.scheduler.release_ticket(ready.ticket_id)
    assert bench.scheduler.is_idle


def test_a_prompt_is_offered_again_when_it_has_grown_by_enough() -> None:
    bench = Bench(replace(CHUNKS, early_tokens=16))
    bench.add(make_request("a", PROMPT), "prefill")
    assert [len(offers_of(bench)) for _ in range(4)] == [0, 1, 0, 1]


def test_a_prompt_that_is_decoded_here_is_not_offered() -> None:
    bench = Bench(CHUNKS)
    bench.add(make_request("a", PROMPT))
    assert offers_of(bench) == []


@pytest.mark.parametrize("slots", [0, 4])
def test_offered_blocks_stay_when_the_sequence_ends_until_they_are_released(slots: int) -> None:
    bench, offer = begun(replace(CHUNKS, num_slots=slots))
    assert bench.scheduler.abort(RequestId("a"), 1.0) is not None
    bench.scheduler.check_integrity()
    assert bench.free_blocks() == 16 - 6
    assert bench.scheduler.load(1.0, MemberId("m"), "prefill").free_state_slots == slots
    bench.scheduler.release_ticket(offer.ticket_id)
    bench.scheduler.check_integrity()
    assert bench.free_blocks() == 16


def test_offered_blocks_of_an_ended_sequence_are_freed_when_the_offer_is_over() -> None:
    bench, _ = begun()
    bench.scheduler.abort(RequestId("a"), 1.0)
    bench.scheduler.expire(11.9)
    assert bench.free_blocks() == 10
    bench.scheduler.expire(12.1)
    assert bench.free_blocks() == 16


def test_a_sequence_that_others_may_read_is_not_preempted() -> None:
    def preemptions(early_tokens: int) -> int:
        bench = Bench(replace(CONFIG, num_blocks=12, chunk_tokens=4, early_tokens=early_tokens))
        bench.add(make_request("a", PROMPT), "prefill")
        bench.step()
        bench.add(make_request("b", 4, max_tokens=9, priority=1))
        for _ in range(8):
            bench.step()
        return bench.scheduler.num_preemptions

    assert (preemptions(4), preemptions(100)) == (0, 1)


def expected(
    bench: Bench,
    num_tokens: int = 8,
    *,
    expires: float = 10.0,
    prompt: tuple[int, ...] = PROMPT,
    name: str = "a",
    step: int = -1,
) -> None:
    """Word of what is computed of a request elsewhere."""
    request = make_request(name, prompt)
    ticket = replace(make_ticket(request, num_tokens=num_tokens, expires=expires), partial=True, step=step)
    bench.scheduler.expect(request.id, block_hashes(prompt[:num_tokens], 4), ticket)


def order_of(bench: Bench) -> PullOrder:
    plan = bench.plan()
    assert not plan.has_rows
    (order,) = plan.pulls
    return order


def hand_over(bench: Bench, *, num_tokens: int = 24) -> Request:
    request = make_request("a", PROMPT[:24], output=(77,))
    bench.scheduler.add_handoff(request, make_ticket(request, num_tokens=num_tokens), 0.0)
    return request


def test_what_was_pulled_early_is_not_pulled_again() -> None:
    bench = Bench()
    expected(bench, 9)
    order = order_of(bench)
    assert (order.first, order.ticket.num_tokens, len(order.dst_blocks), order.dst_slot) == (0, 8, 2, -1)
    bench.scheduler.pull_done(PullDone(pull_id=order.pull_id), 1.0)
    bench.scheduler.check_integrity()
    assert bench.free_blocks() == 16
    expected(bench, 17)
    assert order_of(bench).first == 8
    bench.scheduler.pull_done(PullDone(pull_id=1), 1.0)
    hand_over(bench)
    assert order_of(bench).first == 16


def test_only_blocks_that_are_not_known_are_pulled_early() -> None:
    bench = Bench()
    bench.add(make_request("b", PROMPT[:9], max_tokens=1))
    bench.drain()
    expected(bench, 8)
    assert bench.scheduler.schedule(0.0) is None
    expected(bench, 16)
    assert order_of(bench).first == 8


def test_room_for_an_early_pull_is_not_made_of_the_blocks_before_it() -> None:
    bench = Bench(replace(CONFIG, num_blocks=4))
    bench.add(make_request("b", PROMPT[:9], max_tokens=1))
    bench.drain()
    expected(bench, 20)
    assert bench.scheduler.schedule(0.0) is None
    bench.add(make_request("c", PROMPT[:9], max_tokens=1))
    assert bench.plan().lanes[0].first_S == [8]


def test_a_request_waits_for_its_own_early_pull_and_for_no_other() -> None:
    bench = Bench()
    expected(bench)
    order = order_of(bench)
    hand_over(bench)
    bench.add(make_request("b", 4))
    plan = bench.plan()
    assert (plan.pulls, len(plan.lanes[0].rows_S)) == ((), 1)
    bench.commit(plan)
    bench.scheduler.pull_done(PullDone(pull_id=order.pull_id), 1.0)
    assert [pull.first for pull in bench.plan().pulls] == [8]


@pytest.mark.parametrize(("error", "now"), [("torn", 1.0), ("", 10.0)])
def test_what_came_torn_or_late_is_not_found(error: str, now: float) -> None:
    bench = Bench()
    expected(bench)
    order = order_of(bench)
    hand_over(bench)
    bench.scheduler.pull_done(PullDone(pull_id=order.pull_id, error=error), now)
    assert order_of(bench).first == 0


def test_what_is_pulled_for_a_request_that_ends_meanwhile_is_not_found() -> None:
    bench = Bench()
    expected(bench)
    order = order_of(bench)
    event = bench.scheduler.abort(RequestId("a"), 0.0)
    assert event is not None
    assert (event.finish, event.token_id) == ("abort", None)
    assert bench.scheduler.abort(RequestId("a"), 0.0) is None
    assert bench.scheduler.has_work
    bench.scheduler.pull_done(PullDone(pull_id=order.pull_id), 1.0)
    assert bench.scheduler.is_idle
    hand_over(bench)
    assert order_of(bench).first == 0


def test_a_request_that_comes_without_a_ticket_does_not_use_a_pull_under_way() -> None:
    bench = Bench()
    expected(bench)
    order = order_of(bench)
    bench.add(make_request("a", PROMPT[:24]))
    bench.scheduler.pull_done(PullDone(pull_id=order.pull_id), 1.0)
    assert bench.plan().lanes[0].first_S == [0]


def test_a_refused_hand_over_ends_what_was_expected() -> None:
    bench = Bench()
    expected(bench)
    order = order_of(bench)
    with pytest.raises(HandoffError):
        hand_over(bench, num_tokens=25)
    bench.scheduler.pull_done(PullDone(pull_id=order.pull_id), 1.0)
    assert bench.scheduler.abort(RequestId("a"), 0.0) is None
    hand_over(bench)
    assert order_of(bench).first == 0


def test_nothing_is_pulled_early_without_room_or_time_or_cache() -> None:
    for config, expires in (
        (replace(CONFIG, num_blocks=4), 10.0),
        (CONFIG, 0.0),
        (replace(CONFIG, prefix_cache=False), 10.0),
    ):
        bench = Bench(config)
        expected(bench, 20, expires=expires)
        assert bench.scheduler.schedule(0.0) is None
        assert bench.scheduler.is_idle


def test_a_second_word_waits_for_the_first_pull_and_the_newest_counts() -> None:
    bench = Bench()
    expected(bench, 8)
    order = order_of(bench)
    expected(bench, 12)
    expected(bench, 20)
    assert bench.scheduler.schedule(0.0) is None
    bench.scheduler.pull_done(PullDone(pull_id=order.pull_id), 1.0)
    order = order_of(bench)
    assert (order.first, order.ticket.num_tokens) == (8, 20)


def test_behind_a_pull_that_failed_nothing_is_pulled_before_the_hand_off() -> None:
    bench = Bench()
    expected(bench, 8)
    order = order_of(bench)
    expected(bench, 12)
    bench.scheduler.pull_done(PullDone(pull_id=order.pull_id, error="another model"), 1.0)
    expected(bench, 16)
    assert bench.scheduler.schedule(0.0) is None
    hand_over(bench)
    assert order_of(bench).first == 0
    bench.scheduler.abort(RequestId("a"), 0.0)
    expected(bench, 8, prompt=PROMPT[5:])
    assert len(bench.plan().pulls) == 1


def test_word_of_a_request_that_is_here_changes_nothing() -> None:
    bench = Bench()
    bench.add(make_request("a", 4))
    bench.drain()
    bench.add(make_request("a", 4, max_tokens=9))
    expected(bench)
    assert bench.plan().pulls == ()


def test_requests_are_expected_on_the_lane_with_the_least_to_do_and_come_there() -> None:
    bench = Bench(replace(CONFIG, lanes=2))
    bench.add(make_request("b", 12, max_tokens=9))
    expected(bench)
    plan = bench.plan()
    assert [order.lane for order in plan.pulls] == [1]
    bench.commit(plan)
    bench.scheduler.pull_done(PullDone(pull_id=0), 1.0)
    bench.add(make_request("d", 15, max_tokens=9))
    hand_over(bench)
    (order,) = bench.plan().pulls
    assert (order.lane, order.first) == (1, 8)


def test_a_limit_that_offers_nothing_new_is_refused() -> None:
    with pytest.raises(ConfigError, match="early_tokens"):
        replace(CONFIG, early_tokens=0)


def test_a_ticket_lasts_until_its_expiry() -> None:
    ticket: KvTicket = make_ticket(make_request("a", 4), expires=5.0)
    assert (ticket.lasts(4.9), ticket.lasts(5.0)) == (True, False)


def test_pulls_under_way_are_to_end_with_the_first_of_their_leases() -> None:
    bench = Bench()
    assert bench.scheduler.first_lease_end() == math.inf
    expected(bench, expires=9.0)
    order = order_of(bench)
    assert bench.scheduler.first_lease_end() == 9.0
    other = make_request("b", PROMPT[:20], output=(77,))
    bench.scheduler.add_handoff(other, make_ticket(other, expires=7.0), 0.0)
    order_of(bench)
    assert bench.scheduler.first_lease_end() == 7.0
    bench.scheduler.pull_done(PullDone(pull_id=1), 1.0)
    bench.scheduler.pull_done(PullDone(pull_id=order.pull_id), 1.0)
    assert bench.scheduler.first_lease_end() == math.inf


def test_a_prompts_last_step_is_offered_under_the_tickets_id_when_it_is_planned() -> None:
    bench = Bench(replace(CHUNKS, offers_layers=True, first_step=70))
    bench.add(make_request("a", PROMPT[:24]), "prefill")
    first = bench.plan()
    second = bench.scheduler.schedule(0.0)
    assert second is not None
    assert (first.offers, second.offers) == ((), ())
    (word,) = [event for event in bench.commit(first) if isinstance(event, HandoffReady)]
    last = bench.scheduler.schedule(1.0)
    assert last is not None
    (offer,) = last.offers
    assert (offer.step, last.step, word.step) == (72, 72, -1)
    assert (offer.ticket_id, offer.partial, offer.num_tokens, len(offer.blocks)) == (word.ticket_id, True, 24, 6)
    # What is committed meanwhile is no more than that.
    assert bench.commit(second) == []
    _, ready = bench.commit(last)
    assert isinstance(ready, HandoffReady)
    assert (ready.ticket_id, ready.partial, ready.step) == (offer.ticket_id, False, -1)


@pytest.mark.parametrize(
    ("offers", "tokens", "mode"), [(False, 24, "prefill"), (True, 7, "prefill"), (True, 24, "full")]
)
def test_a_step_is_not_offered_where_that_cannot_be_told_or_does_not_pay(offers: bool, tokens: int, mode: Mode) -> None:
    bench = Bench(replace(CONFIG, early_tokens=8, offers_layers=offers))
    bench.add(make_request("a", PROMPT[:tokens]), mode)
    assert bench.plan().offers == ()


def test_what_a_step_of_others_has_written_is_found_when_its_request_is_here() -> None:
    bench = Bench()
    expected(bench, 24, step=5)
    order = order_of(bench)
    assert (order.ticket.step, order.ticket.partial, len(order.dst_blocks)) == (5, False, 6)
    bench.scheduler.pull_done(PullDone(pull_id=order.pull_id), 1.0)
    bench.scheduler.check_integrity()
    # The step may have failed: nobody else finds it.
    bench.add(make_request("b", PROMPT[:9], max_tokens=1))
    plan = bench.plan()
    assert plan.lanes[0].first_S == [0]
    bench.commit(plan)
    assert bench.free_blocks() == 10
    hand_over(bench)
    assert order_of(bench).first == 24
    bench.scheduler.check_integrity()


def test_a_request_that_is_here_before_the_pull_behind_a_step_has_ended_waits_for_it() -> None:
    bench = Bench()
    expected(bench, 24, step=5)
    order = order_of(bench)
    hand_over(bench)
    assert bench.scheduler.schedule(0.0) is None
    bench.scheduler.pull_done(PullDone(pull_id=order.pull_id), 1.0)
    assert order_of(bench).first == 24


def test_what_a_step_has_written_whose_request_does_not_come_is_nobodys() -> None:
    bench = Bench()
    expected(bench, 24, step=5)
    bench.scheduler.pull_done(PullDone(pull_id=order_of(bench).pull_id), 1.0)
    assert bench.free_blocks() == 10
    assert bench.scheduler.abort(RequestId("a"), 1.0) is not None
    bench.scheduler.check_integrity()
    assert bench.free_blocks() == 16
    hand_over(bench)
    assert order_of(bench).first == 0


def test_no_more_than_two_pulls_wait_behind_steps() -> None:
    bench = Bench(replace(CONFIG, num_blocks=32))
    for index, name in enumerate("abc"):
        expected(bench, 8, name=name, prompt=PROMPT[index:], step=5)
    plan = bench.plan()
    assert len(plan.pulls) == 2
    expected(bench, 8, name="d", prompt=PROMPT[3:])
    assert [order.ticket.step for order in bench.plan().pulls] == [-1]
    bench.scheduler.pull_done(PullDone(pull_id=plan.pulls[0].pull_id), 1.0)
    assert [order.ticket.step for order in bench.plan().pulls] == [5]
