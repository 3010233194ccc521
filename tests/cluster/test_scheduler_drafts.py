from dataclasses import replace

from cluster.plan import StepOutput, StepPlan
from cluster.scheduler import Scheduler
from cluster.scheduler_config import SchedulerConfig
from router.request import Request, RequestId, SamplingParams, TokenEvent
from tests.support.content_ranks import BLOCK, FakeLane, next_token
from tests.support.events import one_by_one


def make_scheduler(draft_tokens: int = 2, *, num_blocks: int = 20) -> Scheduler:
    config = SchedulerConfig(
        lanes=1,
        num_blocks=num_blocks,
        num_slots=0,
        block_size=BLOCK,
        max_rows=4,
        max_step_tokens=16,
        chunk_tokens=16,
        max_model_len=32,
        vocab_size=1 << 20,
        prefix_cache=False,
        draft_tokens=draft_tokens,
        draft_adaptive=False,
        max_waiting=8,
    )
    return Scheduler(config)


def make_request(name: str = "a", *, max_tokens: int = 20) -> Request:
    return Request(id=RequestId(name), prompt_ids=(1, 2, 3), sampling=SamplingParams(max_tokens=max_tokens))


def planned(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.schedule(0.0)
    assert plan is not None
    return plan


def tokens_of(scheduler: Scheduler, lane: FakeLane, plan: StepPlan) -> list[int]:
    events = one_by_one(scheduler.commit(StepOutput(step=plan.step, lanes=(lane.run(plan.lanes[0]),)), 0.0))
    return [event.token_id for event in events if isinstance(event, TokenEvent) and event.token_id is not None]


def test_a_prompt_that_goes_first_hurries_no_more_once_its_token_is_on_its_way() -> None:
    scheduler, lane = make_scheduler(), FakeLane()
    scheduler.add(replace(make_request("first"), priority=2), mode="full", now=0.0)
    prompt = planned(scheduler)
    long = Request(id=RequestId("long"), prompt_ids=tuple(range(20)), sampling=SamplingParams(max_tokens=2))
    scheduler.add(long, mode="full", now=0.0)
    assert planned(scheduler).lanes[0].counts_S == [1, 15]
    tokens_of(scheduler, lane, prompt)


def test_nothing_is_planned_while_drafts_are_verified_and_all_rows_together_after() -> None:
    scheduler, lane = make_scheduler(), FakeLane()
    scheduler.add(make_request(), mode="full", now=0.0)
    tokens_of(scheduler, lane, planned(scheduler))
    plain = planned(scheduler)
    assert (plain.lanes[0].counts_S, plain.lanes[0].drafts_S, plain.lanes[0].verifies_S) == ([1], [2], [])
    # How far a plain step gets is known: the next one is planned while it runs.
    verifying = planned(scheduler)
    assert (verifying.lanes[0].counts_S, verifying.lanes[0].verifies_S) == ([3], [2])
    tokens_of(scheduler, lane, plain)

    scheduler.add(make_request("b"), mode="full", now=0.0)
    assert scheduler.schedule(0.0) is None

    assert len(tokens_of(scheduler, lane, verifying)) >= 1
    assert planned(scheduler).lanes[0].rows_S == [0, 1]


def test_drafts_stop_before_the_last_token_and_what_was_right_is_counted() -> None:
    scheduler, lane, tokens = make_scheduler(), FakeLane(), [1, 2, 3]
    scheduler.add(make_request(max_tokens=12), mode="full", now=0.0)
    while not scheduler.is_idle:
        plan = planned(scheduler)
        assert sum(plan.lanes[0].counts_S[:1]) <= 3
        tokens += tokens_of(scheduler, lane, plan)

    assert len(tokens) == 15
    assert all(next_token(tuple(tokens[:i])) == tokens[i] for i in range(3, 15))
    assert 0 < scheduler.num_accepted <= scheduler.num_drafted


def test_drafts_take_no_block_that_another_sequence_needs() -> None:
    scheduler, lane = make_scheduler(num_blocks=3), FakeLane()
    scheduler.add(make_request("a", max_tokens=6), mode="full", now=0.0)
    scheduler.add(make_request("b", max_tokens=2), mode="full", now=0.0)
    tokens = 0
    while not scheduler.is_idle:
        tokens += len(tokens_of(scheduler, lane, planned(scheduler)))
        scheduler.check_integrity()

    assert tokens == 8
    assert scheduler.num_preemptions == 0
