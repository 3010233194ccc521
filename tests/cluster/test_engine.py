import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue

import pytest

from cluster.engine import Engine, EngineEvent, EngineOutlets, Rejected, TicketReady
from cluster.plan import KvLayout, KvTicket
from cluster.scheduler_config import SchedulerConfig
from cluster.ticket import ticket_maker
from router.errors import InvalidRequestError, MemberLostError, MoefleetError, OverloadedError
from router.request import MemberId, Request, RequestId, SamplingParams, TokenEvent
from tests.support.counting_ranks import CountingRanks, continued
from tests.support.events import one_by_one

LAYOUT = KvLayout(fingerprint="test", tp=1, block_size=4, num_blocks=64, num_slots=0, dtype="float32")


def make_limits(**changes: int) -> SchedulerConfig:
    limits = {"lanes": 1, "num_blocks": 64, "max_rows": 8, "max_step_tokens": 32, "chunk_tokens": 8} | changes
    return SchedulerConfig(
        lanes=limits["lanes"],
        num_blocks=limits["num_blocks"],
        num_slots=0,
        block_size=4,
        max_rows=limits["max_rows"],
        max_step_tokens=limits["max_step_tokens"],
        chunk_tokens=limits["chunk_tokens"],
        max_model_len=200,
        vocab_size=1 << 20,
        prefix_cache=True,
        max_waiting=100,
    )


def make_request(name: str, prompt: tuple[int, ...] = (5, 11, 2), max_tokens: int = 6, **more: object) -> Request:
    output_ids = more.get("output_ids", ())
    assert isinstance(output_ids, tuple)
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    return Request(id=RequestId(name), prompt_ids=prompt, sampling=sampling, output_ids=output_ids)


Event = TokenEvent | TicketReady | Rejected


@dataclass
class Running:
    engine: Engine
    ranks: CountingRanks
    events: SimpleQueue[list[EngineEvent]] = field(default_factory=SimpleQueue)
    failures: list[MoefleetError] = field(default_factory=list)

    def until_end(self, count: int = 1, timeout_s: float = 5) -> list[Event]:
        """Events until `count` requests have ended, in whichever way."""
        found: list[Event] = []
        while count:
            try:
                arrived = one_by_one(self.events.get(timeout=timeout_s))
            except Empty:
                pytest.fail(f"no end within {timeout_s} s; so far {found}")
            found += arrived
            count -= sum(not isinstance(event, TokenEvent) or event.finish is not None for event in arrived)
        return found


@contextmanager
def running(
    limits: SchedulerConfig | None = None, ranks: CountingRanks | None = None, *, step_timeout_s: float = 60.0
) -> Iterator[Running]:
    limits = limits or make_limits()
    ranks = ranks or CountingRanks(limits.lanes)
    events: SimpleQueue[list[EngineEvent]] = SimpleQueue()
    failures: list[MoefleetError] = []
    make_ticket = ticket_maker(MemberId("p0"), LAYOUT, lambda _: ())
    outlets = EngineOutlets(on_events=events.put, make_ticket=make_ticket, on_failure=failures.append)
    engine = Engine(limits, ranks, outlets, member_id=MemberId("p0"), step_timeout_s=step_timeout_s)
    engine.start()
    try:
        yield Running(engine, ranks, events, failures)
    finally:
        engine.stop()


def tokens_of(events: list[Event], name: str) -> list[int]:
    mine = [event for event in events if isinstance(event, TokenEvent) and event.request_id == name]
    assert [event.index for event in mine] == list(range(mine[0].index, mine[0].index + len(mine)))
    return [event.token_id for event in mine if event.token_id is not None]


def make_ticket(num_tokens: int) -> KvTicket:
    return KvTicket(
        id="x/0",
        member_id="p1",
        layout=LAYOUT,
        ranks=(),
        blocks=(9,),
        state_slot=-1,
        num_tokens=num_tokens,
        expires_unix_s=time.time() + 30,
    )


@pytest.mark.parametrize("lanes", [1, 2])
def test_requests_together_get_the_tokens_each_gets_alone(lanes: int) -> None:
    with running(make_limits(lanes=lanes)) as run:
        prompts = {f"r{i}": tuple(range(1, 2 + 5 * i)) for i in range(6)}
        for name, prompt in prompts.items():
            run.engine.submit(make_request(name, prompt, max_tokens=20))
        events = run.until_end(len(prompts))
        for name, prompt in prompts.items():
            assert tokens_of(events, name) == continued(prompt, 20)


def test_next_step_is_launched_while_one_runs() -> None:
    with running() as run:
        run.engine.submit(make_request("r", max_tokens=30))
        run.until_end()
        assert run.ranks.most_in_flight == 2
        assert run.engine.stats().sampled_tokens >= 30


def test_preempted_requests_still_get_their_tokens() -> None:
    with running(make_limits(num_blocks=10)) as run:
        for i in range(4):
            run.engine.submit(make_request(f"r{i}", (i + 1, 2, 3), max_tokens=30))
        events = run.until_end(4)
        for i in range(4):
            assert tokens_of(events, f"r{i}") == continued((i + 1, 2, 3), 30)
        stats = run.engine.stats()
        assert stats.admissions - stats.preemptions == stats.requests == 4
        assert stats.preemptions > 0


def test_idle_engine_wakes_at_once() -> None:
    with running() as run:
        time.sleep(0.05)
        began = time.monotonic()
        run.engine.submit(make_request("r", max_tokens=1))
        run.until_end()
        assert time.monotonic() - began < 0.05


def test_prefill_ends_with_first_token_then_ticket_and_release_frees_its_blocks() -> None:
    with running() as run:
        run.engine.submit(make_request("r", (1, 2, 3, 4, 5)), mode="prefill")
        token, ready = run.until_end()
        assert isinstance(token, TokenEvent)
        assert [token.token_id] == continued((1, 2, 3, 4, 5), 1)
        assert isinstance(ready, TicketReady)
        assert ready.ticket.num_tokens == 5
        assert not run.engine.drain(0.1)
        run.engine.release_ticket(ready.ticket.id)
        assert run.engine.drain(2)
        assert run.engine.load().free_blocks == 64


@pytest.mark.parametrize("pull_error", ["", "source is gone"])
def test_handed_off_request_goes_on_whether_its_pull_succeeds_or_fails(pull_error: str) -> None:
    with running() as run:
        run.ranks.pull_error = pull_error
        first = continued((5, 11, 2), 1)
        request = make_request("r", output_ids=tuple(first))
        run.engine.submit_handoff(request, make_ticket(3))
        assert tokens_of(run.until_end(), "r") == continued((5, 11, 2), 6)[1:]
        stats = run.engine.stats()
        assert stats.failed_pulls == int(bool(pull_error))
        assert (stats.pull_s > 0) != bool(pull_error)


def test_aborted_request_ends_and_frees_its_room() -> None:
    with running() as run:
        run.engine.submit(make_request("r", (1, 2, 3), max_tokens=190), mode="full")
        run.engine.abort(RequestId("r"))
        run.engine.abort(RequestId("unknown"))
        last = run.until_end()[-1]
        assert isinstance(last, TokenEvent)
        assert last.finish == "abort"
        assert run.engine.drain(2)
        assert run.engine.load().running_requests == 0


def test_request_that_never_fits_is_rejected_with_the_field() -> None:
    with running() as run:
        run.engine.submit(make_request("r", max_tokens=1000))
        (event,) = run.until_end()
        assert isinstance(event, Rejected)
        assert isinstance(event.error, InvalidRequestError)
        assert event.error.field == "max_tokens"


def test_draining_engine_finishes_what_runs_and_refuses_the_rest() -> None:
    with running() as run:
        run.engine.submit(make_request("r", max_tokens=40))
        first = one_by_one(run.events.get(timeout=5))
        assert run.engine.drain(5)
        run.engine.submit(make_request("late"))
        *events, refused = first + run.until_end(2)
        assert tokens_of(events, "r") == continued((5, 11, 2), 40)
        assert isinstance(refused, Rejected)
        assert isinstance(refused.error, OverloadedError)
        assert run.engine.load().draining


def test_engine_that_has_work_but_does_nothing_is_lost_and_logs_its_state(caplog: pytest.LogCaptureFixture) -> None:
    with running(replace(make_limits(), lease_s=0.1), step_timeout_s=0.1) as run:
        run.ranks.pulls_end = False
        request = make_request("r", output_ids=tuple(continued((5, 11, 2), 1)))
        run.engine.submit_handoff(request, make_ticket(3))
        last = run.until_end()[-1]
        assert isinstance(last, TokenEvent)
        assert last.finish == "error"
        assert "has work and did nothing" in last.error
        assert isinstance(run.engine.failure, MemberLostError)
    assert "engine stalls: 1 sequences [r pulling: 4 tokens" in caplog.text
    assert "pulls [0]" in caplog.text


def test_a_pull_whose_end_is_lost_while_others_run_makes_the_member_lost() -> None:
    with running(replace(make_limits(), lease_grace_s=0.0), step_timeout_s=0.1) as run:
        run.ranks.pulls_end = False
        request = make_request("r", output_ids=tuple(continued((5, 11, 2), 1)))
        run.engine.submit_handoff(request, replace(make_ticket(3), expires_unix_s=time.time() + 0.2))
        # The engine is never idle meanwhile.
        for number in range(2000):
            run.engine.submit(make_request(f"busy{number}", max_tokens=3))
            if run.engine.failure is not None:
                break
            time.sleep(0.002)
        assert isinstance(run.engine.failure, MemberLostError)
        assert "behind its lease" in str(run.engine.failure)


def test_kv_that_waits_to_be_fetched_is_no_stall() -> None:
    with running(replace(make_limits(), lease_s=0.01), step_timeout_s=0.01) as run:
        run.engine.submit(make_request("r"), mode="prefill")
        _, ready = run.until_end()
        time.sleep(0.2)
        assert run.engine.failure is None
        assert isinstance(ready, TicketReady)


def test_draining_engine_keeps_kv_that_nobody_fetches_until_its_lease_is_over() -> None:
    with running(replace(make_limits(), lease_s=0.4, lease_grace_s=0.1)) as run:
        run.engine.submit(make_request("r"), mode="prefill")
        _, ready = run.until_end()
        assert isinstance(ready, TicketReady)
        assert run.engine.drain(10)
        assert time.time() >= ready.ticket.expires_unix_s + 0.1
        assert run.engine.load().free_blocks == 64


def test_lost_rank_ends_every_request_with_an_error_and_rejects_later_ones() -> None:
    with running() as run:
        run.ranks.fail = MemberLostError("rank 1 of 2 is lost")
        run.engine.submit(make_request("a"))
        run.engine.submit(make_request("b"))
        ends = [event for event in run.until_end(2) if isinstance(event, TokenEvent)]
        assert {(event.request_id, event.finish, event.error) for event in ends} == {
            ("a", "error", "rank 1 of 2 is lost"),
            ("b", "error", "rank 1 of 2 is lost"),
        }
        run.engine.submit(make_request("late"))
        (late,) = run.until_end()
        assert isinstance(late, Rejected)
        assert isinstance(late.error, MemberLostError)
        assert run.failures == [run.engine.failure]


def test_stopped_engine_aborts_what_runs_and_closes_the_ranks() -> None:
    with running() as run:
        run.engine.submit(make_request("r", max_tokens=190))
        first = run.events.get(timeout=5)
        run.engine.stop()
        last = (first + run.until_end())[-1] if first[-1] else None
        assert isinstance(last, TokenEvent)
        assert last.finish in ("abort", "length")
        assert run.ranks.closed
