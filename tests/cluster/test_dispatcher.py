"""Requests through a dispatcher to scripted members behind real services."""

import asyncio
import dataclasses
import time
from collections.abc import AsyncGenerator

import pytest

from cluster.dispatcher import Dispatcher
from router.admission import Admission, AdmissionConfig
from router.errors import (
    CorruptDataError,
    DeadlineExceededError,
    HandoffError,
    InvalidRequestError,
    MemberLostError,
    MoefleetError,
    NoMemberError,
    OverloadedError,
)
from router.request import MemberId, Request, TokenEvent
from router.router import Router
from tests.support.dispatched import collect, fleet, prefill_and_decode, tokens_of
from tests.support.fleet import TOKEN, ScriptedMember, make_request, until
from tests.support.scripted_engine import expected_tokens

pytestmark = pytest.mark.anyio


async def test_a_request_is_prefilled_on_one_member_and_decoded_on_another() -> None:
    prefill, decode = prefill_and_decode()
    async with fleet(prefill, decode) as one:
        events = await collect(one.dispatcher.generate(make_request(num_tokens=20)))
        assert tokens_of(events) == expected_tokens(make_request(num_tokens=20))
        assert [event.index for event in events] == list(range(20))
        assert events[-1].finish == "length"
        assert [event.cached_tokens for event in events] == [16] + [0] * 19
        assert (prefill.engine.modes, decode.engine.modes) == (["prefill"], ["decode"])
        assert decode.engine.redeemed == ["p/r"]
        await until(lambda: prefill.engine.released == ["p/r"] and one.is_idle)


async def test_many_requests_at_once_each_get_their_own_tokens() -> None:
    async with fleet(*prefill_and_decode(), ScriptedMember("d2", "decode")) as one:
        requests = [make_request(f"r{i}", prompt=(i, 3), num_tokens=10 + i % 7) for i in range(40)]
        got = await asyncio.gather(*(collect(one.dispatcher.generate(request)) for request in requests))
        assert [tokens_of(events) for events in got] == [expected_tokens(request) for request in requests]
        await until(lambda: one.is_idle)


async def test_a_mixed_pool_serves_a_request_on_one_member() -> None:
    member = ScriptedMember("m", "mixed")
    async with fleet(member) as one:
        events = await collect(one.dispatcher.generate(make_request()))
        assert tokens_of(events) == expected_tokens(make_request())
        assert member.engine.modes == ["full"]
        assert one.is_idle


async def test_a_request_goes_on_behind_the_tokens_it_brings() -> None:
    async with fleet(*prefill_and_decode()) as one:
        whole = expected_tokens(make_request(num_tokens=9))
        request = dataclasses.replace(make_request(num_tokens=9), output_ids=tuple(whole[:4]))
        events = await collect(one.dispatcher.generate(request))
        assert tokens_of(events) == whole[4:]
        assert events[0].index == 4


async def test_a_request_of_one_token_needs_no_decode_member_step() -> None:
    prefill, decode = prefill_and_decode()
    async with fleet(prefill, decode) as one:
        assert len(await collect(one.dispatcher.generate(make_request(num_tokens=1)))) == 1
        assert decode.engine.modes == []
        await until(lambda: one.is_idle)


async def test_the_trace_of_a_request_has_its_moments_in_order() -> None:
    async with fleet(*prefill_and_decode()) as one:
        await collect(one.dispatcher.generate(make_request()))
        trace = one.traces[0]
        assert (trace.prefill_member, trace.decode_member, trace.num_tokens) == ("p", "d", 8)
        moments = trace.moments
        names = (
            "received_s",
            "admitted_s",
            "routed_s",
            "submitted_s",
            "handoff_start_s",
            "first_token_s",
            "first_decode_s",
            "done_s",
        )
        assert sorted(moments, key=lambda name: moments[name]) == list(names)
        first = trace.between("received_s", "first_token_s")
        assert first is not None
        assert 0 < first < 5
        assert trace.between("received_s", "done_s") != trace.between("done_s", "received_s")


async def test_the_first_token_does_not_wait_for_the_decode_member() -> None:
    prefill, decode = prefill_and_decode()
    async with fleet(prefill, decode) as one:
        decode.engine.hold.set()
        events = one.dispatcher.generate(make_request())
        async with asyncio.timeout(2):
            assert (await anext(events)).token_id == expected_tokens(make_request())[0]
        decode.engine.hold.clear()
        assert tokens_of(await collect(events)) == expected_tokens(make_request())[1:]
        assert one.traces[0].between("first_token_s", "done_s") is not None
        assert one.traces[0].between("first_token_s", "handoff_start_s") is not None


@pytest.mark.parametrize("stage", ["prefill", "handoff", "decode"])
async def test_closing_a_request_at_any_stage_frees_both_members_within_a_second(stage: str) -> None:
    prefill, decode = prefill_and_decode()
    async with fleet(prefill, decode) as one:
        if stage == "prefill":
            prefill.engine.hold.set()
        if stage == "handoff":
            decode.engine.hold.set()
        events = one.dispatcher.generate(make_request(num_tokens=100_000))
        waiting = asyncio.create_task(anext(events))  # type: ignore[arg-type]
        if stage == "prefill":
            await until(lambda: prefill.engine.num_running == 1)
            waiting.cancel()
            await asyncio.wait([waiting])
        else:
            await waiting
            await until(lambda: decode.engine.num_running == 1)
            if stage == "decode":
                await anext(events)
        await events.aclose()
        await until(lambda: one.is_idle, timeout_s=1)
        assert (stage == "prefill") == (prefill.engine.released == [])


async def test_a_lost_decode_member_ends_its_streams_with_a_retryable_error() -> None:
    prefill, decode = prefill_and_decode()
    async with fleet(prefill, decode, ScriptedMember("d2", "decode")) as one:
        events = [one.dispatcher.generate(make_request(f"r{i}", num_tokens=100_000)) for i in range(6)]
        for one_of_them in events:
            await anext(one_of_them)
            await anext(one_of_them)
        await decode.service.stop()
        ends = await asyncio.gather(*(drain(stream, 20) for stream in events), return_exceptions=True)
        lost = [end for end in ends if isinstance(end, MemberLostError)]
        assert 0 < len(lost) < 6
        assert all("send the request again" in str(error) for error in lost)
        again = await collect(one.dispatcher.generate(make_request("again")))
        assert tokens_of(again) == expected_tokens(make_request())
        for stream in events:
            await stream.aclose()


async def drain(stream: AsyncGenerator[TokenEvent, None], num: int) -> None:
    for _ in range(num):
        await anext(stream)


async def test_a_lost_prefill_member_is_a_retryable_error() -> None:
    prefill, decode = prefill_and_decode()
    async with fleet(prefill, decode) as one:
        prefill.engine.hold.set()
        waiting = asyncio.create_task(collect(one.dispatcher.generate(make_request())))
        await until(lambda: prefill.engine.num_running == 1)
        await prefill.service.stop()
        with pytest.raises(MemberLostError):
            await waiting
        assert not one.admission.num_in_flight


async def test_a_failed_engine_is_a_lost_member() -> None:
    member = ScriptedMember("m")
    async with fleet(member) as one:
        events = one.dispatcher.generate(make_request(num_tokens=100_000))
        await anext(events)
        member.engine.fail(MemberLostError("rank 1 is lost"))
        with pytest.raises(MemberLostError, match="rank 1 is lost"):
            await collect(events)


async def test_without_a_ticket_the_decode_member_computes_the_prompt() -> None:
    prefill, decode = prefill_and_decode()
    async with fleet(prefill, decode) as one:
        decode.engine.refusals.append(HandoffError("layouts differ"))
        events = await collect(one.dispatcher.generate(make_request()))
        assert tokens_of(events) == expected_tokens(make_request())
        assert decode.engine.modes == ["decode", "full"]
        await until(lambda: one.is_idle)


async def test_a_refusing_decode_member_is_asked_again_or_another_one_takes_over() -> None:
    prefill, decode = prefill_and_decode()
    async with fleet(prefill, decode) as one:
        decode.engine.refusals += [OverloadedError("full", retry_after_s=1)] * 3
        events = await collect(one.dispatcher.generate(make_request()))
        assert tokens_of(events) == expected_tokens(make_request())
        assert decode.engine.modes == ["decode"] * 4
    prefill, decode = prefill_and_decode()
    second = ScriptedMember("d2", "decode")
    async with fleet(prefill, decode, second) as one:
        for member in (decode, second):
            member.engine.refusals.append(OverloadedError("full", retry_after_s=1))
        events = await collect(one.dispatcher.generate(make_request()))
        assert tokens_of(events) == expected_tokens(make_request())
        assert sorted(len(member.engine.modes) for member in (decode, second)) == [1, 2]
        assert prefill.engine.modes == ["prefill"]


async def test_a_full_decode_pool_keeps_a_prefilled_request_until_its_deadline() -> None:
    prefill, decode = prefill_and_decode()
    async with fleet(prefill, decode) as one:
        decode.engine.refusals += [OverloadedError("full", retry_after_s=1)] * 100
        events = one.dispatcher.generate(dataclasses.replace(make_request(), deadline_unix_s=time.time() + 0.3))
        assert (await anext(events)).index == 0
        with pytest.raises(DeadlineExceededError):
            await anext(events)
        await until(lambda: one.is_idle)


async def test_a_prefilled_request_whose_lease_ends_at_a_full_decode_pool_is_computed_there() -> None:
    prefill, decode = prefill_and_decode()
    # Behind every lease.
    async with fleet(prefill, decode, clock=lambda: time.time() + 1e6) as one:
        decode.engine.refusals.append(OverloadedError("full", retry_after_s=1))
        events = await collect(one.dispatcher.generate(make_request()))
        assert tokens_of(events) == expected_tokens(make_request())
        assert decode.engine.modes == ["decode", "full"]
        await until(lambda: one.is_idle)


async def test_a_decode_member_that_leaves_during_prefill_is_replaced() -> None:
    prefill, decode = prefill_and_decode()
    other = ScriptedMember("d2", "decode")
    async with fleet(prefill, decode, other) as one:
        prefill.engine.hold.set()
        waiting = asyncio.create_task(collect(one.dispatcher.generate(make_request())))
        await until(lambda: prefill.engine.num_running == 1)
        # The router may have chosen it or the other one; both must end well.
        one.dispatcher.update_members([prefill.info, other.info])
        prefill.engine.hold.clear()
        assert tokens_of(await waiting) == expected_tokens(make_request())


async def test_a_mixed_member_that_refuses_is_told_to_the_client() -> None:
    member = ScriptedMember("m")
    async with fleet(member) as one:
        for error in (OverloadedError("full", retry_after_s=1), InvalidRequestError("no", field="prompt_ids")):
            member.engine.refusals.append(error)
            with pytest.raises(type(error)):
                await collect(one.dispatcher.generate(make_request()))


async def test_missing_tokens_are_noticed() -> None:
    member = ScriptedMember("m")
    async with fleet(member) as one:
        member.engine.skip_index = 3
        with pytest.raises(CorruptDataError, match="token 4 came where 3 was due"):
            await collect(one.dispatcher.generate(make_request()))
        await until(lambda: one.is_idle)


@pytest.mark.parametrize("stage", ["prefill", "decode"])
async def test_a_passed_deadline_ends_the_request_on_both_members(stage: str) -> None:
    prefill, decode = prefill_and_decode()
    async with fleet(prefill, decode) as one:
        (prefill if stage == "prefill" else decode).engine.hold.set()
        request = dataclasses.replace(make_request(num_tokens=100_000), deadline_unix_s=time.time() + 0.15)
        with pytest.raises(DeadlineExceededError):
            await collect(one.dispatcher.generate(request))
        await until(lambda: one.is_idle)


async def test_admission_refuses_what_is_over_its_bounds_and_frees_places() -> None:
    async with fleet(*prefill_and_decode(), limits=AdmissionConfig(max_in_flight=1)) as one:
        events = one.dispatcher.generate(make_request("a", num_tokens=100_000))
        await anext(events)
        with pytest.raises(OverloadedError, match="max_in_flight"):
            await collect(one.dispatcher.generate(make_request("b")))
        await events.aclose()
        assert len(await collect(one.dispatcher.generate(make_request("b")))) == 8


async def test_health_and_members_follow_the_directory() -> None:
    member = ScriptedMember("m")
    async with fleet(member) as one:
        await one.dispatcher.health()
        assert one.dispatcher.num_connected == 1
        assert [info.member_id for info in one.dispatcher.members] == ["m"]
        one.dispatcher.update_members([])
        with pytest.raises(NoMemberError, match="0 of 0 listed"):
            await one.dispatcher.health()
        with pytest.raises(NoMemberError):
            await collect(one.dispatcher.generate(make_request()))


async def test_a_member_listed_with_another_generation_is_left_until_it_answers_as_that() -> None:
    member = ScriptedMember("m")
    async with fleet(member) as one:
        one.dispatcher.update_members([dataclasses.replace(member.info, generation=2)])
        assert one.dispatcher.loads() == ()
        one.dispatcher.update_members([member.info])
        await until(lambda: one.dispatcher.num_connected == 1 and bool(one.dispatcher.loads()))
        assert len(await collect(one.dispatcher.generate(make_request()))) == 8


async def test_a_member_lost_between_routing_and_sending_is_retryable() -> None:
    router = Router()
    dispatcher = Dispatcher(router, Admission(), TOKEN)
    member = ScriptedMember("gone")
    router.update(member.engine.load(), 0.0)
    with pytest.raises(MoefleetError, match="has left"):
        await collect(dispatcher.generate(make_request()))
    assert member.member_id == MemberId("gone")
    await dispatcher.close()


async def test_prompt_logprobs_are_asked_of_the_prefill_member_only() -> None:
    prefill, decode = prefill_and_decode()
    async with fleet(prefill, decode) as one:
        seen: list[Request] = []
        redeem = decode.engine.submit_handoff
        decode.engine.submit_handoff = lambda request, ticket: (seen.append(request), redeem(request, ticket))[1]  # type: ignore[method-assign]
        base = make_request()
        request = dataclasses.replace(base, sampling=dataclasses.replace(base.sampling, prompt_logprobs=2, logprobs=1))
        events = await collect(one.dispatcher.generate(request))
        assert seen[0].sampling.prompt_logprobs is None
        assert seen[0].output_ids == (events[0].token_id,)
        assert all(event.logprob is not None for event in events)
