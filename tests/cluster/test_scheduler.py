"""What each step computes, one behaviour at a time; ranks answer 100, 101, ... in the order of sampling."""

from dataclasses import replace

import pytest

from cluster.plan import HandoffReady, PullDone
from router.request import MemberId, RequestId, TokenEvent
from shards.batch import NO_TOKEN, LogprobColumns
from tests.support.events import one_by_one
from tests.support.scheduler_bench import CONFIG, Bench, make_request, make_ticket, tokens_of


def test_decodes_come_first_and_prompts_share_what_is_left_of_the_step() -> None:
    bench = Bench(replace(CONFIG, max_step_tokens=8, chunk_tokens=6))
    bench.add(make_request("a", 2))
    bench.step()
    bench.add(make_request("b", 9))
    bench.add(make_request("c", 9))
    batch = bench.plan().lanes[0]
    assert batch.counts_S == [1, 6, 1]
    assert batch.samples_S == [1, 0, 0]
    assert [start.prompt_len for start in batch.starts] == [9, 9]


def test_only_the_last_chunk_of_a_prompt_samples() -> None:
    bench = Bench(replace(CONFIG, chunk_tokens=4))
    bench.add(make_request("a", 10))
    batches = [bench.plan().lanes[0]]
    batches.append(bench.plan().lanes[0])
    assert bench.scheduler.num_uncommitted == 2
    assert [(batch.first_S, batch.counts_S, batch.samples_S) for batch in batches] == [
        ([0], [4], [0]),
        ([4], [4], [0]),
    ]


def test_a_prompt_waits_while_others_use_up_the_step() -> None:
    bench = Bench(replace(CONFIG, max_step_tokens=4, chunk_tokens=3))
    for name in "abc":
        bench.add(make_request(name, 3))
    bench.add(make_request("d", 8))
    first = bench.plan()
    assert first.lanes[0].counts_S == [3, 1]
    bench.commit(first)
    second = bench.plan()
    assert second.lanes[0].counts_S == [1, 2, 1]
    bench.commit(second)
    assert bench.plan().lanes[0].counts_S == [1, 1, 2]


def test_a_running_prompt_waits_a_step_when_decodes_and_earlier_prompts_use_it_up() -> None:
    bench = Bench(replace(CONFIG, max_rows=3, max_step_tokens=4, chunk_tokens=3))
    bench.add(make_request("c", 12))
    bench.step()
    request = make_request("h", 6, output=(77,))
    bench.scheduler.add_handoff(request, make_ticket(request), 0.0)
    bench.add(make_request("d", 8))
    plan = bench.plan()
    assert plan.lanes[0].counts_S == [3, 1]
    bench.commit(plan)
    bench.scheduler.pull_done(PullDone(pull_id=plan.pulls[0].pull_id), 0.0)
    assert bench.plan().lanes[0].counts_S == [1, 3]


def test_higher_priority_goes_first_and_equals_in_order_of_arrival() -> None:
    bench = Bench(replace(CONFIG, max_rows=1))
    bench.add(make_request("a", max_tokens=1))
    bench.add(make_request("b", max_tokens=1))
    bench.add(make_request("c", max_tokens=1, priority=5))
    order = [tokens_of(bench.step())[0][0] for _ in range(3)]
    assert order == ["c", "a", "b"]


def test_beside_a_prompt_that_goes_first_others_fill_its_step_to_half() -> None:
    bench = Bench(replace(CONFIG, max_step_tokens=8, chunk_tokens=8))
    bench.add(make_request("first", 10, priority=2))
    bench.add(make_request("long", 12))
    bench.add(make_request("waits", 3))
    assert bench.plan().lanes[0].counts_S == [8]
    # Four tokens, two of them of the prompt that goes first.
    batch = bench.plan().lanes[0]
    assert batch.counts_S == [2, 2]
    assert [start.prompt_len for start in batch.starts] == [12]


def test_a_prompt_that_goes_first_shares_the_step_with_others_that_do() -> None:
    bench = Bench(replace(CONFIG, max_step_tokens=8, chunk_tokens=8))
    bench.add(make_request("first", 5, priority=2))
    bench.add(make_request("second", 2, priority=3))
    bench.add(make_request("long", 9))
    assert bench.plan().lanes[0].counts_S == [2, 5]


def test_a_prompt_that_goes_first_need_not_wait_for_the_rest_of_a_long_one() -> None:
    bench = Bench(replace(CONFIG, max_step_tokens=8, chunk_tokens=8))
    bench.add(make_request("long", 30))
    bench.step()
    bench.add(make_request("equal", 3))
    bench.add(make_request("first", 3, priority=3))
    batch = bench.plan().lanes[0]
    assert [start.prompt_len for start in batch.starts] == [3]
    assert sorted(batch.counts_S) == [1, 3]
    assert sum(batch.samples_S) == 1


def test_the_next_step_is_planned_before_the_token_is_known() -> None:
    bench = Bench()
    bench.add(make_request("a", 4, max_tokens=9))
    first, second = bench.plan(), bench.plan()
    assert second.lanes[0].first_S == [4]
    assert second.lanes[0].grown_rows == [0]
    assert tokens_of(bench.commit(first)) == [("a", 100)]
    assert tokens_of(bench.commit(second)) == [("a", 101)]


def test_a_sequence_is_not_planned_beyond_its_length() -> None:
    bench = Bench()
    bench.add(make_request("a", max_tokens=1))
    bench.plan()
    assert bench.scheduler.schedule(0.0) is None


def test_the_extra_result_of_a_stopped_sequence_is_dropped() -> None:
    bench = Bench()
    bench.add(make_request("a", stops=(100,)))
    first, second = bench.plan(), bench.plan()
    (event,) = bench.commit(first)
    assert isinstance(event, TokenEvent)
    assert event.finish == "stop"
    assert bench.commit(second) == []
    assert bench.scheduler.is_idle


def test_log_probabilities_are_cut_to_what_was_asked_for() -> None:
    bench = Bench()
    bench.add(make_request("a", logprobs=1))
    bench.add(make_request("b"))
    asked, silent = bench.step()
    assert isinstance(asked, TokenEvent)
    assert asked.logprob is not None
    assert (asked.logprob.logprob, asked.logprob.rank, asked.logprob.top_ids) == (-1.0, 2, (5,))
    assert isinstance(silent, TokenEvent)
    assert silent.logprob is None


def test_prompt_log_probabilities_of_all_chunks_are_on_the_first_event() -> None:
    bench = Bench(replace(CONFIG, chunk_tokens=2))
    request = make_request("a", 4)
    bench.add(replace(request, sampling=replace(request.sampling, prompt_logprobs=0)))
    events: list[TokenEvent | HandoffReady] = []
    for values in ([-1.0, -2.0], [-3.0]):
        output = bench.answer(bench.plan())
        columns = LogprobColumns(
            logprobs_N=values, ranks_N=[1] * len(values), top_ids_NK=[[]] * 2, top_logprobs_NK=[[]] * 2
        )
        output = replace(output, lanes=(replace(output.lanes[0], prompt_logprobs={0: columns}),))
        events += one_by_one(bench.scheduler.commit(output, 0.0))
    (event,) = events
    assert isinstance(event, TokenEvent)
    assert [entry and entry.logprob for entry in event.prompt_logprobs] == [None, -1.0, -2.0, -3.0]


def test_new_sequences_go_to_the_lane_with_the_least_load() -> None:
    bench = Bench(replace(CONFIG, lanes=2))
    bench.add(make_request("a", 9))
    bench.add(make_request("b", 3))
    bench.add(make_request("c", 3))
    lanes = bench.plan().lanes
    assert [sum(lane.counts_S) for lane in lanes] == [9, 6]


def test_a_cached_prefix_draws_a_sequence_to_its_lane() -> None:
    bench = Bench(replace(CONFIG, lanes=2))
    prompts = tuple(range(9)), tuple(range(50, 59))
    bench.add(make_request("a", prompts[0], max_tokens=1))
    bench.add(make_request("b", prompts[1], max_tokens=1))
    bench.step()
    bench.add(make_request("c", prompts[1]))
    assert [lane.counts_S for lane in bench.plan().lanes] == [[], [1]]


def test_nothing_to_do_is_no_plan() -> None:
    bench = Bench()
    assert bench.scheduler.schedule(0.0) is None
    assert bench.scheduler.is_idle


def test_a_finished_prompt_is_found_again_but_its_last_token_is_computed() -> None:
    bench = Bench()
    bench.add(make_request("a", tuple(range(8)), max_tokens=1))
    bench.drain()
    bench.add(make_request("b", tuple(range(8)), max_tokens=1))
    plan = bench.plan()
    assert (plan.lanes[0].first_S, plan.lanes[0].counts_S) == ([4], [4])
    (event,) = bench.commit(plan)
    assert isinstance(event, TokenEvent)
    assert event.cached_tokens == 4


def test_blocks_are_not_found_before_their_step_is_committed() -> None:
    bench = Bench()
    bench.add(make_request("a", tuple(range(9))))
    first = bench.plan()
    bench.add(make_request("b", tuple(range(9))))
    second = bench.plan()
    assert second.lanes[0].first_S == [9, 0]
    bench.commit(first)
    bench.commit(second)


def test_requests_that_want_prompt_log_probabilities_compute_the_whole_prompt() -> None:
    bench = Bench()
    bench.add(make_request("a", tuple(range(8)), max_tokens=1))
    bench.drain()
    request = make_request("b", tuple(range(8)))
    bench.add(replace(request, sampling=replace(request.sampling, prompt_logprobs=1)))
    assert bench.plan().lanes[0].first_S == [0]


def tight() -> Bench:
    """Two running sequences; after six steps the first needs a block and all eight are taken."""
    bench = Bench(replace(CONFIG, num_blocks=8, max_step_tokens=32))
    bench.add(make_request("a", 11, max_tokens=8))
    bench.add(make_request("b", 10, max_tokens=9))
    return bench


def test_the_newest_sequence_is_preempted_and_keeps_its_token_in_flight() -> None:
    bench = tight()
    for _ in range(5):
        bench.step()
    before = bench.plan()
    preempting = bench.plan()
    assert preempting.lanes[0].rows_S == [0]
    assert bench.scheduler.num_preemptions == 1
    assert tokens_of(bench.commit(before)) == [("a", 110), ("b", 111)]
    last = bench.plan()
    assert last.lanes[0].starts == ()
    bench.commit(preempting)
    bench.commit(last)
    again = bench.plan()
    (start,) = again.lanes[0].starts
    assert start.token_ids[10:] == (101, 103, 105, 107, 109, 111)
    assert again.lanes[0].samples_S == [1]
    assert tokens_of(bench.commit(again)) == [("b", 114)]


def test_both_finish_although_only_one_fits() -> None:
    bench = tight()
    bench.drain()
    assert bench.scheduler.is_idle
    assert bench.free_blocks() == 8


def test_a_sequence_waits_a_step_when_nobody_behind_it_can_give_room() -> None:
    bench = Bench(replace(CONFIG, num_blocks=5, prefix_cache=False))
    bench.add(make_request("p", 7, max_tokens=4), "prefill")
    bench.step()
    bench.add(make_request("a", 11, max_tokens=8))
    bench.step()
    bench.step()
    assert bench.scheduler.schedule(0.0) is None
    bench.scheduler.abort(RequestId("p"), 0.0)
    bench.drain()
    assert bench.scheduler.is_idle


def test_a_sequence_about_to_end_is_not_preempted() -> None:
    bench = Bench(replace(CONFIG, num_blocks=5, prefix_cache=False))
    bench.add(make_request("a", 7, max_tokens=8))
    bench.step()
    bench.add(make_request("b", 4, max_tokens=1))
    bench.add(make_request("c", 3, max_tokens=1))
    first = bench.plan()
    assert first.lanes[0].counts_S == [1, 4]
    second = bench.plan()
    third_events = bench.commit(first)
    assert ("b", 102) in tokens_of(third_events)
    bench.commit(second)
    bench.drain()
    assert bench.scheduler.is_idle


def test_load_tells_whether_prefixes_are_cached() -> None:
    for prefix_cache in (True, False):
        bench = Bench(replace(CONFIG, prefix_cache=prefix_cache))
        assert bench.scheduler.load(0.0, MemberId("m"), "mixed").prefix_cache is prefix_cache


def test_a_request_whose_logits_are_not_finite_ends_with_an_error_and_others_go_on() -> None:
    bench = Bench()
    bench.add(make_request("a", 8))
    bench.add(make_request("b", 8))
    first, second = bench.plan(), bench.plan()
    output = bench.answer(first)
    lane = replace(output.lanes[0], tokens_N=[NO_TOKEN, 7])
    events = bench.scheduler.commit(replace(output, lanes=(lane,)), 0.0)
    bench.scheduler.check_integrity()
    kept = [event for event in events if isinstance(event, TokenEvent)]
    assert [(event.request_id, event.token_id, event.finish) for event in kept] == [
        ("a", None, "error"),
        ("b", 7, None),
    ]
    assert "logits behind 8 tokens are not finite" in kept[0].error
    assert tokens_of(bench.commit(second)) == [("b", 103)]
    # What it computed is not found by others.
    bench.drain()
    bench.add(make_request("a", 8))
    assert bench.plan().lanes[0].first_S == [0]
    assert bench.free_blocks() == CONFIG.num_blocks - 2


def test_description_names_who_waits_and_what_is_free() -> None:
    bench = Bench()
    assert not bench.scheduler.has_work
    bench.add(make_request("a", 4))
    bench.plan()
    assert bench.scheduler.has_work
    assert bench.scheduler.describe() == (
        "1 sequences [a running: 4 tokens, 1 pending, 4 computed, 0 settled], pulls [], 0 tickets, 1 plans given out; "
        "lane 0: 1 active, 0 waiting, 15 blocks, 3 rows and 0 slots free"
    )


def test_a_report_counts_waiting_tokens_that_are_not_cached_and_what_steps_take() -> None:
    bench = Bench(replace(CONFIG, max_rows=1))
    bench.add(make_request("a", 12, max_tokens=1))
    bench.commit(bench.plan(now=1.0), now=1.5)
    assert bench.scheduler.load(2.0, MemberId("m"), "mixed").step_time.step_s(
        prefill_tokens=12, decode_rows=0, context_tokens=0
    ) == pytest.approx(0.5, rel=0.01)
    bench.add(make_request("a", 12))
    bench.add(make_request("b", 12))
    assert bench.scheduler.load(2.0, MemberId("m"), "mixed").waiting_tokens == 4 + 12
