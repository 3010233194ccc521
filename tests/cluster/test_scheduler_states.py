"""Sequences with recurrent state go on from states that were kept, one behaviour at a time."""

from dataclasses import replace

from cluster.plan import HandoffReady, PullDone
from cluster.scheduler_config import SchedulerConfig
from router.request import MemberId, TokenEvent
from shards.batch import NO_TOKEN, StepBatch
from tests.support.scheduler_bench import CONFIG, Bench, make_request, make_ticket

STATES = replace(CONFIG, num_slots=12, max_step_tokens=64, chunk_tokens=64, state_spacing=64)
PROMPT = tuple(range(10))


def run(bench: Bench) -> list[TokenEvent]:
    """Steps until nothing is left to do."""
    events: list[TokenEvent | HandoffReady] = []
    while (plan := bench.scheduler.schedule(0.0)) is not None:
        bench.scheduler.check_integrity()
        events += bench.commit(plan)
    return [event for event in events if isinstance(event, TokenEvent)]


def first_batch(bench: Bench) -> StepBatch:
    return bench.plan().lanes[0]


def cached(config: SchedulerConfig, *prompts: tuple[int, ...], max_tokens: int = 1) -> list[int]:
    """Prompts one after the other -> how many tokens of each were found."""
    bench = Bench(config)
    found = []
    for index, prompt in enumerate(prompts):
        bench.add(make_request(chr(97 + index), prompt, max_tokens=max_tokens))
        found.append(next(event.cached_tokens for event in run(bench) if event.index == 0))
    return found


def test_a_prompts_state_is_kept_at_its_last_block_and_the_same_prompt_goes_on_from_there() -> None:
    bench = Bench(STATES)
    bench.add(make_request("a", PROMPT, max_tokens=1))
    first = first_batch(bench)
    assert (first.counts_S, first.save_rows, first.save_ends) == ([10], [0, 0], [4, 8])
    assert first.starts[0].state_slot not in first.save_to
    bench = Bench(STATES)
    bench.add(make_request("a", PROMPT, max_tokens=1))
    run(bench)
    bench.add(make_request("b", PROMPT, max_tokens=1))
    again = first_batch(bench)
    assert (again.first_S, again.counts_S) == ([8], [2])
    assert again.restore_from == first.save_to[1:]
    assert again.restore_to == [again.starts[0].state_slot]


def test_a_state_is_not_found_before_its_step_is_committed() -> None:
    bench = Bench(STATES)
    bench.add(make_request("a", PROMPT))
    bench.plan()
    bench.add(make_request("b", PROMPT))
    assert first_batch(bench).first_S == [10, 0]


def test_the_second_sighting_of_a_shared_beginning_finds_half_of_it_and_the_third_all() -> None:
    shared = tuple(range(20))
    assert cached(STATES, (*shared, *range(50, 60)), (*shared, 60, 61), (*shared, 70, 71)) == [0, 16, 20]


def test_where_most_slots_are_taken_the_second_sighting_of_a_short_beginning_pays_and_the_third_finds_it() -> None:
    shared, before = tuple(range(20)), [tuple(range(start, start + 30)) for start in (200, 300)]
    prompts = [(*shared, *range(50, 60)), (*shared, 60, 61), (*shared, 70, 71)]
    assert cached(replace(STATES, num_blocks=40), *before, *prompts)[2:] == [0, 0, 20]


def test_states_spaced_over_a_prompt_serve_the_second_sighting() -> None:
    shared = tuple(range(20))
    config = replace(STATES, state_spacing=8)
    prompts = [(*shared, *range(start, start + 40)) for start in (100, 200, 300)]
    assert cached(replace(config, num_blocks=40), *prompts) == [0, 16, 20]


def test_a_chat_goes_on_from_the_end_of_its_last_turn() -> None:
    bench = Bench(STATES)
    bench.add(make_request("a", PROMPT, max_tokens=7))
    answer = [event.token_id for event in run(bench) if event.token_id is not None]
    bench.add(make_request("b", (*PROMPT, *answer, 90, 91), max_tokens=1))
    (event,) = run(bench)
    # The last generated token was never computed.
    assert event.cached_tokens == 16


def test_while_decoding_the_newest_state_replaces_the_one_before() -> None:
    bench = Bench(STATES)
    bench.add(make_request("a", PROMPT, max_tokens=20))
    run(bench)
    load = bench.scheduler.load(0.0, MemberId("m"), "mixed")
    assert load.free_state_slots == 12
    bench.add(make_request("b", PROMPT, max_tokens=1))
    (event,) = run(bench)
    assert event.cached_tokens == 8


def test_with_no_slot_to_spare_states_are_not_kept_but_all_is_computed() -> None:
    config = replace(STATES, num_slots=2, max_rows=2)
    bench = Bench(config)
    bench.add(make_request("a", PROMPT, max_tokens=9))
    bench.add(make_request("b", 9, max_tokens=9))
    run(bench)
    assert bench.scheduler.is_idle


def test_a_decoding_sequence_gives_up_its_own_earlier_state_when_no_slot_is_blank() -> None:
    config = replace(STATES, num_slots=3, max_rows=2)
    bench = Bench(config)
    bench.add(make_request("a", PROMPT, max_tokens=20))
    run(bench)
    bench.add(make_request("b", PROMPT, max_tokens=1))
    (event,) = run(bench)
    assert event.cached_tokens == 8


def test_the_only_slot_left_is_taken_over_with_the_state_in_it() -> None:
    config = replace(STATES, num_slots=2, max_rows=2)
    bench = Bench(config)
    bench.add(make_request("a", PROMPT, max_tokens=1))
    run(bench)
    bench.add(make_request("c", 1, max_tokens=9))
    kept_by_c = first_batch(bench)
    assert kept_by_c.rows_S == [0]
    bench.add(make_request("b", PROMPT, max_tokens=2))
    again = first_batch(bench)
    assert again.first_S == [1, 8]
    assert again.restore_from == []


def test_states_in_places_of_their_own_leave_all_slots_to_running_sequences() -> None:
    config = replace(STATES, num_slots=2, num_int8=3, max_rows=2, state_bytes=100, checkpoint_bytes=27)
    bench = Bench(config)
    bench.add(make_request("a", PROMPT, max_tokens=1))
    run(bench)
    bench.add(make_request("c", 1, max_tokens=9))
    assert first_batch(bench).rows_S == [0]
    bench.add(make_request("b", PROMPT, max_tokens=2))
    again = first_batch(bench)
    assert again.first_S == [1, 8]
    assert (again.restore_from, again.restore_to) == ([0], [again.starts[0].state_slot])
    load = bench.scheduler.load(0.0, MemberId("m"), "mixed")
    assert (load.total_state_slots, load.free_state_slots, load.state_checkpoints) == (2, 0, 2)
    assert (load.state_bytes, load.checkpoint_bytes) == (100, 27)


def test_one_slot_is_enough_where_states_are_kept_elsewhere() -> None:
    config = replace(STATES, num_slots=1, num_int8=1, max_rows=1)
    assert cached(config, PROMPT, PROMPT) == [0, 8]


def test_states_of_a_poisoned_or_aborted_step_are_not_kept() -> None:
    bench = Bench(STATES)
    request = make_request("a", tuple(range(7)), max_tokens=9)
    bench.add(request)
    for _ in range(3):
        bench.step()
    plan = bench.plan()
    while not plan.lanes[0].save_to:
        bench.commit(plan)
        plan = bench.plan()
    output = bench.answer(plan)
    bench.scheduler.commit(replace(output, lanes=(replace(output.lanes[0], tokens_N=[NO_TOKEN]),)), 0.0)
    bench.scheduler.check_integrity()
    assert bench.scheduler.is_idle
    bench.add(make_request("b", tuple(range(50, 60))))
    plan = bench.plan()
    assert plan.lanes[0].save_to
    bench.scheduler.abort(make_request("b").id, 0.0)
    bench.scheduler.check_integrity()
    bench.commit(plan)
    bench.add(make_request("c", tuple(range(50, 60))))
    assert first_batch(bench).first_S == [0]


def test_a_state_behind_drafts_of_which_one_was_wrong_is_not_kept() -> None:
    bench = Bench(replace(STATES, draft_tokens=3, draft_adaptive=False))
    prompt = tuple(range(4))
    bench.add(make_request("a", prompt, max_tokens=12))
    saved: dict[int, int] = {}
    while not (batch := (plan := bench.plan()).lanes[0]).verifies_S:
        saved |= dict(zip(batch.save_ends, batch.save_to, strict=True))
        bench.commit(plan)
    assert (batch.first_S, batch.verifies_S, batch.save_ends) == ([5], [2], [8])
    # One token: the first draft was wrong already.
    bench.commit(plan)
    bench.scheduler.abort(make_request("a").id, 0.0)
    bench.add(make_request("b", (*prompt, *range(100, 110))))
    again = first_batch(bench)
    assert (again.first_S, again.restore_from) == ([4], [saved[4]])


def test_a_preempted_sequence_goes_on_from_its_last_state() -> None:
    bench = Bench(replace(STATES, num_blocks=8, max_step_tokens=32))
    bench.add(make_request("a", 11, max_tokens=8))
    bench.add(make_request("b", 10, max_tokens=9))
    while bench.scheduler.num_preemptions == 0:
        bench.step()
    while not (plan := bench.plan()).lanes[0].starts:
        bench.commit(plan)
    assert plan.lanes[0].first_S[-1] >= 8


def test_a_pull_brings_its_state_and_needs_none_of_ours() -> None:
    bench = Bench(STATES)
    bench.add(make_request("a", PROMPT, max_tokens=1))
    run(bench)
    request = make_request("b", PROMPT, output=(70,), max_tokens=4)
    bench.scheduler.add_handoff(request, make_ticket(request), 0.0)
    plan = bench.plan()
    assert plan.lanes[0].restore_from == []
    # The two known blocks are not fetched again, the state is.
    assert len(plan.pulls[0].dst_blocks) == 1
    assert plan.pulls[0].dst_slot >= 0
    bench.scheduler.pull_done(PullDone(pull_id=plan.pulls[0].pull_id), 0.0)
    assert first_batch(bench).first_S == [10]


def test_a_lane_that_holds_the_state_draws_the_request() -> None:
    bench = Bench(replace(STATES, lanes=2))
    prompts = tuple(range(9)), tuple(range(50, 59))
    bench.add(make_request("a", prompts[0], max_tokens=1))
    bench.add(make_request("b", prompts[1], max_tokens=1))
    run(bench)
    bench.add(make_request("c", prompts[1]))
    assert [lane.counts_S for lane in bench.plan().lanes] == [[], [1]]


def test_what_is_computed_again_for_its_state_is_not_stored_again_where_others_read_it() -> None:
    bench, shared = Bench(replace(STATES, num_blocks=40)), tuple(range(20))
    bench.add(make_request("a", (*shared, *range(50, 60)), max_tokens=20))
    bench.commit(bench.plan())
    bench.add(make_request("b", (*shared, 60, 61), max_tokens=1))
    batch = first_batch(bench)
    (start,) = batch.starts
    # The state behind the last block of these tokens was not kept, its KV is there.
    assert (batch.first_S[-1], batch.counts_S[-1], start.num_stored) == (16, 6, 20)
    bench.scheduler.check_integrity()


def test_a_prompt_of_which_nothing_is_known_stores_all_of_it() -> None:
    bench = Bench(STATES)
    bench.add(make_request("a", PROMPT))
    assert first_batch(bench).starts[0].num_stored == 0
