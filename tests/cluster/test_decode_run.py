"""Sequences that decode together are planned and told as columns; whoever has more to tell is told by himself."""

from dataclasses import replace

from cluster.plan import HandoffReady, StepOutput, StepPlan
from cluster.scheduler import Scheduler
from router.request import Request, RequestId, TokenColumns, TokenEvent
from shards.batch import NO_TOKEN, LaneOutput
from tests.support.scheduler_bench import CONFIG, Bench, make_request

ROOM = replace(CONFIG, num_blocks=64, max_step_tokens=64)


def decoding(*requests: Request) -> Bench:
    """A scheduler whose requests have had their first token; what comes next decodes them together."""
    bench = Bench(ROOM)
    for request in requests:
        bench.add(request)
    bench.step()
    return bench


def planned(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.schedule(0.0)
    assert plan is not None
    return plan


def answered(bench: Bench, plan: StepPlan, *tokens: int) -> list[TokenEvent | TokenColumns | HandoffReady]:
    """The events of a step that samples these tokens."""
    lane = LaneOutput(rows_N=plan.lanes[0].rows_S, tokens_N=list(tokens))
    events = bench.scheduler.commit(StepOutput(step=plan.step, lanes=(lane,)), 0.0)
    bench.scheduler.check_integrity()
    return events


def test_what_goes_on_is_told_in_one_event_that_names_the_same_requests_each_time() -> None:
    bench = decoding(make_request("a", 5, max_tokens=9), make_request("b", 6, max_tokens=9))
    (first,) = answered(bench, planned(bench.scheduler), 7, 8)
    (second,) = answered(bench, planned(bench.scheduler), 9, 10)
    assert first == TokenColumns(request_ids=[RequestId("a"), RequestId("b")], indices=[1, 1], token_ids=[7, 8])
    assert isinstance(first, TokenColumns)
    assert isinstance(second, TokenColumns)
    assert (second.indices, second.token_ids) == ([2, 2], [9, 10])
    assert second.request_ids is first.request_ids
    assert second.events()[1] == TokenEvent(request_id=RequestId("b"), index=2, token_id=10)


def test_a_sequence_that_ends_is_told_by_itself_and_the_others_together() -> None:
    bench = decoding(
        make_request("a", 5, max_tokens=9), make_request("b", 6, max_tokens=9, stops=(3,)), make_request("c", 7)
    )
    rest, *others = answered(bench, planned(bench.scheduler), 3, 3, 4)
    assert isinstance(rest, TokenColumns)
    assert (rest.request_ids, rest.token_ids) == (["c"], [4])
    # What ends one sequence is a token like any other to those beside it.
    assert others == [
        TokenEvent(request_id=RequestId("a"), index=1, token_id=3),
        TokenEvent(request_id=RequestId("b"), index=1, token_id=3, finish="stop"),
    ]
    assert planned(bench.scheduler).lanes[0].rows_S == [0, 2]


def test_the_last_token_of_one_is_told_with_its_finish() -> None:
    bench = decoding(make_request("a", 5, max_tokens=2), make_request("b", 6, max_tokens=3))
    rest, ended = answered(bench, planned(bench.scheduler), 7, 8)
    assert isinstance(rest, TokenColumns)
    assert isinstance(ended, TokenEvent)
    assert (rest.request_ids, ended.request_id, ended.finish) == (["b"], "a", "length")


def test_one_whose_logits_are_not_finite_ends_and_the_others_go_on() -> None:
    bench = decoding(make_request("a", 5), make_request("b", 6))
    rest, failed = answered(bench, planned(bench.scheduler), NO_TOKEN, 8)
    assert isinstance(rest, TokenColumns)
    assert isinstance(failed, TokenEvent)
    assert (rest.token_ids, failed.request_id, failed.finish) == ([8], "a", "error")


def test_log_probabilities_go_with_events_of_their_own() -> None:
    bench = decoding(make_request("a", 5, logprobs=1), make_request("b", 6))
    events = bench.scheduler.commit(bench.answer(planned(bench.scheduler)), 0.0)
    rest, told = events
    assert isinstance(rest, TokenColumns)
    assert isinstance(told, TokenEvent)
    assert told.logprob is not None
    assert rest.request_ids == ["b"]


def test_one_that_is_aborted_in_mid_step_is_told_no_more_and_leaves_the_run() -> None:
    bench = decoding(make_request("a", 5, max_tokens=9), make_request("b", 6, max_tokens=9))
    plan = planned(bench.scheduler)
    bench.scheduler.abort(RequestId("a"), 0.0)
    (rest,) = answered(bench, plan, 7, 8)
    assert isinstance(rest, TokenColumns)
    assert (rest.request_ids, rest.token_ids) == (["b"], [8])
    assert planned(bench.scheduler).lanes[0].rows_S == [1]


def test_a_block_that_decoding_fills_can_be_found_once_its_step_is_committed() -> None:
    bench = decoding(make_request("a", (1, 2, 3), max_tokens=9), make_request("b", 6, max_tokens=9))
    plan = planned(bench.scheduler)
    assert not any(changes.kv for changes in bench.scheduler.take_cache_changes()[1:])
    answered(bench, plan, 7, 8)
    (changes,) = bench.scheduler.take_cache_changes()
    assert list(changes.kv.values()) == [True]


def test_a_sequence_in_another_row_makes_another_run() -> None:
    bench = decoding(make_request("a", 5, max_tokens=2), make_request("b", 6, max_tokens=9))
    assert [planned(bench.scheduler).lanes[0].rows_S, planned(bench.scheduler).lanes[0].rows_S] == [[0, 1], [1]]
