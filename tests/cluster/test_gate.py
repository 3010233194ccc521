"""Requests at the gateway get their turn, or an error, and leave nothing behind."""

import asyncio
from dataclasses import replace

import pytest

from cluster.gate import Gate
from router.admission import Admission, AdmissionConfig
from router.errors import OverloadedError
from router.load import MemberLoad
from router.request import MemberId, Request, RequestId, Role, SamplingParams

pytestmark = pytest.mark.anyio


def make_load(name: str, role: Role = "mixed") -> MemberLoad:
    return MemberLoad(member_id=MemberId(name), role=role, step_tokens=1, free_blocks=100)


def make_request(name: str, tenant: str = "", tokens: int = 3) -> Request:
    return Request(id=RequestId(name), prompt_ids=(1,) * tokens, sampling=SamplingParams(max_tokens=1), tenant=tenant)


class Fleet:
    """A gate over members that can be changed."""

    def __init__(self, *loads: MemberLoad, config: AdmissionConfig | None = None) -> None:
        self.loads = loads
        self.admission = Admission(config)
        self.backlog = 100
        self.gate = Gate(self.admission, lambda: self.loads, lambda: self.backlog, lambda: 0.0)


async def test_turns_go_on_with_first_tokens_and_ends() -> None:
    fleet = Fleet(make_load("p", "prefill"), make_load("d", "decode"))
    turns = {name: fleet.gate.enter(make_request(name)) for name in "abcd"}
    assert [name for name, turn in turns.items() if turn.done()] == ["a"]
    fleet.gate.started(RequestId("a"))
    assert turns["b"].done()
    fleet.gate.leave(RequestId("b"))
    assert turns["c"].done()
    fleet.gate.leave(RequestId("d"))
    for name in "abc":
        fleet.gate.leave(RequestId(name))
    assert (fleet.admission.num_in_flight, fleet.admission.num_queued) == (0, 0)


async def test_who_fills_the_gate_is_told_before_its_request_is_looked_at() -> None:
    fleet = Fleet(make_load("a"), config=AdmissionConfig(max_queue=2))
    fleet.gate.check_room("hog", 0)
    for name in "ab":
        fleet.gate.enter(make_request(name, "hog"))
    with pytest.raises(OverloadedError, match="max_queue=2"):
        fleet.gate.check_room("hog", 0)
    fleet.gate.check_room("other", 0)


async def test_a_turn_says_whether_its_tenant_left_room_unused_before() -> None:
    fleet = Fleet(make_load("a"), config=AdmissionConfig(expected_output=2000))
    many = [
        replace(make_request(f"hog{number}", "hog"), sampling=SamplingParams(max_tokens=1500)) for number in range(4)
    ]
    turns = [fleet.gate.enter(each) for each in many]
    for each in many[:3]:
        fleet.gate.leave(each.id)
    # A flow can save 4096 tokens up.
    assert [await turn for turn in turns] == [True, True, False, False]


async def test_members_that_are_about_to_run_out_of_prompts_get_the_next() -> None:
    fleet = Fleet(replace(make_load("a"), step_tokens=5))
    turns = {name: fleet.gate.enter(make_request(name)) for name in "abc"}
    fleet.backlog = 0
    fleet.gate.refresh()
    assert [name for name, turn in turns.items() if turn.done()] == ["a", "b"]
    fleet.gate.routed(RequestId("a"))
    fleet.gate.routed(RequestId("b"))
    fleet.gate.refresh()
    assert turns["c"].done()


async def test_a_new_member_gives_turns_to_those_who_wait() -> None:
    fleet = Fleet(make_load("a"))
    fleet.gate.refresh()
    fleet.gate.enter(make_request("a"))
    turn = fleet.gate.enter(make_request("b"))
    fleet.gate.refresh()
    assert not turn.done()
    fleet.loads = (make_load("a"), make_load("b"))
    fleet.gate.refresh()
    assert turn.done()


async def test_whoever_makes_room_for_others_is_told() -> None:
    fleet = Fleet(make_load("a"), config=AdmissionConfig(max_queue=5))
    hogs = [fleet.gate.enter(make_request(f"hog{number}", "hog", 30)) for number in range(5)]
    fleet.gate.enter(make_request("other", "other"))
    with pytest.raises(OverloadedError, match="max_queue=5"):
        await hogs[4]
    hogs[3].cancel()
    fleet.gate.enter(make_request("another", "third"))
    fleet.gate.leave(RequestId("hog3"))
    # hog0 had the first turn, hog1 one beside other's, and the others one each beside these.
    assert fleet.gate.waiting() == {1: 0, 0: 1, -1: 0}


async def test_a_turn_that_comes_for_somebody_who_was_cancelled_is_passed_over() -> None:
    fleet = Fleet(make_load("a"))
    fleet.gate.enter(make_request("a"))
    turn = fleet.gate.enter(make_request("b"))
    turn.cancel()
    fleet.gate.leave(RequestId("a"))
    await asyncio.sleep(0)
    fleet.gate.leave(RequestId("b"))
    assert fleet.admission.num_in_flight == 0


async def test_a_full_decode_pool_keeps_requests_before_their_prefill() -> None:
    prefill, decode = make_load("p", "prefill"), make_load("d", "decode")
    fleet = Fleet(prefill, replace(decode, running_requests=1))
    turn = fleet.gate.enter(make_request("a"))
    assert not turn.done()
    for full in ((replace(prefill, handoff_requests=1), decode), (prefill, replace(decode, waiting_requests=1))):
        fleet.loads = full
        fleet.gate.refresh()
        assert not turn.done()
    fleet.loads = (prefill, decode)
    fleet.gate.refresh()
    assert turn.done()
    fleet.gate.leave(RequestId("a"))


async def test_members_without_room_for_more_kv_get_one_request_at_a_time() -> None:
    decode, prefill = replace(make_load("a", "decode"), max_requests=2), make_load("b", "prefill")
    fleet = Fleet(replace(decode, free_blocks=0), prefill, replace(prefill, member_id=MemberId("c")))
    fleet.gate.enter(make_request("a"))
    turn = fleet.gate.enter(make_request("b"))
    assert not turn.done()
    fleet.loads = (decode, *fleet.loads[1:])
    fleet.gate.refresh()
    assert turn.done()
