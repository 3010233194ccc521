"""A member's service over real connections on loopback, spoken to message by message."""

import asyncio
import dataclasses
import socket
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Literal

import pytest

from cluster.cache_log import CacheChanges
from cluster.gateway_connection import GatewayConnection
from cluster.member_codec import read_step, submit_message
from cluster.member_link import LinkLimits, MemberLink
from cluster.member_service import MemberService, ServiceLimits
from cluster.protos import member_pb2 as pb
from cluster.security import new_token
from router.errors import ConfigError, MemberLostError, OverloadedError
from router.request import Request, RequestId, SamplingParams
from tests.support.fleet import TOKEN, ScriptedMember, make_request, until
from tests.support.member_call import ConnectionList, MemberCall, calling, raw_link
from tests.support.scripted_engine import expected_tokens

pytestmark = pytest.mark.anyio
Kind = Literal["hello", "load", "cache", "step", "rejected"]


@asynccontextmanager
async def serving(member: ScriptedMember) -> AsyncIterator[ScriptedMember]:
    await member.start()
    try:
        yield member
    finally:
        await member.stop()


@asynccontextmanager
async def connected(member: ScriptedMember, token: str = TOKEN) -> AsyncIterator[MemberCall]:
    async with calling(member.address, token) as call:
        yield call


async def read_kind(call: MemberCall, kind: Kind) -> pb.MemberMessage:
    async with asyncio.timeout(5):
        while (message := await call.read()).WhichOneof("kind") != kind:
            pass
    return message


async def read_tokens(call: MemberCall, handles: Iterable[int]) -> dict[int, list[int]]:
    """All tokens of the handles until each has its last event."""
    tokens: dict[int, list[int]] = {handle: [] for handle in handles}
    ids = {handle: RequestId("") for handle in tokens}
    left = set(tokens)
    while left:
        message = await read_kind(call, "step")
        for handle, event in read_step(message.step, ids):
            assert event.index == len(tokens[handle])
            if event.token_id is not None:
                tokens[handle].append(event.token_id)
            if event.finish is not None:
                left.discard(handle)
    return tokens


async def test_a_stream_begins_with_hello_and_a_load_report_and_a_snapshot_of_the_cache() -> None:
    async with serving(ScriptedMember("m1", "decode")) as member, connected(member) as call:
        first, second = await call.read(), await call.read()
        assert first.hello.member_id == "m1"
        assert first.hello.role == "decode"
        assert first.hello.layout.fingerprint == "scripted"
        third = await read_kind(call, "cache")
        assert third.cache.cleared
        assert (await read_kind(call, "load")).load.sequence > second.load.sequence


async def test_cache_events_go_along_with_reports_and_a_snapshot_answers_a_resync() -> None:
    limits = ServiceLimits(load_period_s=0.01)
    async with serving(ScriptedMember("m1", limits=limits)) as member, connected(member) as call:
        assert (await read_kind(call, "cache")).cache.cleared
        member.engine.cache_log.record([CacheChanges(kv={5: True, 7: True})])
        told = (await read_kind(call, "cache")).cache
        assert (told.after, told.sequence, list(told.stored)) == (0, 1, [5, 7])
        await call.write(pb.GatewayMessage(resync=pb.Resync()))
        assert (await read_kind(call, "cache")).cache.cleared
        told = (await read_kind(call, "cache")).cache
        assert (told.after, told.sequence, set(told.stored)) == (1, 1, {5, 7})


async def test_tokens_of_several_requests_share_one_message_a_step() -> None:
    async with serving(ScriptedMember("m1", step_s=0.005)) as member, connected(member) as call:
        requests = {handle: make_request(f"r{handle}", prompt=(handle, 2)) for handle in range(1, 6)}
        member.engine.hold.set()
        for handle, request in requests.items():
            await call.write(submit_message(handle, request, "full", None))
        await until(lambda: member.engine.num_running == 5)
        member.engine.hold.clear()
        first = await read_kind(call, "step")
        assert len(first.step.handles) == 5
        tokens = await read_tokens_after(call, first, requests.keys())
        assert tokens == {handle: expected_tokens(request) for handle, request in requests.items()}
        assert member.service.num_requests == 0


async def read_tokens_after(call: MemberCall, first: pb.MemberMessage, handles: Iterable[int]) -> dict[int, list[int]]:
    ids = {handle: RequestId("") for handle in handles}
    begun = {handle: event.token_id for handle, event in read_step(first.step, ids)}
    rest: dict[int, list[int]] = {handle: [token] for handle, token in begun.items() if token is not None}
    left = set(ids)
    while left:
        for handle, event in read_step((await read_kind(call, "step")).step, ids):
            assert event.token_id is not None
            rest[handle].append(event.token_id)
            if event.finish is not None:
                left.discard(handle)
    return rest


async def test_whoever_does_not_prove_the_cluster_token_is_refused() -> None:
    async with serving(ScriptedMember("m1")) as member:
        with pytest.raises(asyncio.IncompleteReadError):
            async with connected(member, new_token()):
                pass
        assert member.service.num_connections == 0


async def test_strangers_who_say_nothing_keep_no_gateway_out_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cluster.member_link.HELLO_TIMEOUT_S", 0.2)
    async with serving(ScriptedMember("m1")) as member:
        host, _, port = member.address.rpartition(":")
        strangers = [socket.create_connection((host, int(port))) for _ in range(70)]
        await asyncio.sleep(0.4)
        async with connected(member) as call:
            assert (await call.read()).hello.member_id == "m1"
        for stranger in strangers:
            stranger.close()


async def test_a_prefill_ends_with_its_first_token_and_a_ticket() -> None:
    async with serving(ScriptedMember("m1", "prefill")) as member, connected(member) as call:
        await call.write(submit_message(1, make_request(), "prefill", None))
        step = (await read_kind(call, "step")).step
        assert list(step.token_ids) == expected_tokens(make_request())[:1]
        assert step.tickets[0].handle == 1
        assert step.tickets[0].ticket.id in member.engine.pinned
        await call.write(pb.GatewayMessage(release_ticket=pb.ReleaseTicket(ticket_id=step.tickets[0].ticket.id)))
        await until(lambda: not member.engine.pinned)


async def test_a_ticket_goes_to_the_engine_with_the_request() -> None:
    async with serving(ScriptedMember("m1", "prefill")) as member, connected(member) as call:
        await call.write(submit_message(1, make_request("a"), "prefill", None))
        step = (await read_kind(call, "step")).step
        message = submit_message(2, dataclasses.replace(make_request("b"), output_ids=(1,)), "full", None)
        message.submit.mode = pb.MODE_DECODE
        message.submit.ticket.CopyFrom(step.tickets[0].ticket)
        await call.write(message)
        await until(lambda: member.engine.redeemed == [step.tickets[0].ticket.id])


async def test_an_abort_ends_the_request_with_its_last_event() -> None:
    async with serving(ScriptedMember("m1")) as member, connected(member) as call:
        await call.write(submit_message(1, make_request(num_tokens=10_000), "full", None))
        await read_kind(call, "step")
        await call.write(pb.GatewayMessage(abort=pb.Abort(handle=1)))
        while (step := (await read_kind(call, "step")).step).finishes[0] == 0:
            pass
        assert list(step.token_ids) == [-1]
        assert member.is_idle


async def test_a_refusal_of_the_engine_reaches_the_gateway_typed() -> None:
    async with serving(ScriptedMember("m1")) as member, connected(member) as call:
        member.engine.refusals.append(OverloadedError("full", retry_after_s=2.5))
        await call.write(submit_message(1, make_request(), "full", None))
        rejected = (await read_kind(call, "rejected")).rejected
        assert (rejected.handle, rejected.code, rejected.retry_after_s) == (1, pb.Rejected.OVERLOADED, 2.5)
        assert member.is_idle


async def test_a_request_id_that_runs_is_refused_from_any_stream() -> None:
    async with serving(ScriptedMember("m1")) as member, connected(member) as one, connected(member) as two:
        await one.write(submit_message(1, make_request(num_tokens=10_000), "full", None))
        await read_kind(one, "step")
        await two.write(submit_message(1, make_request(), "full", None))
        assert (await read_kind(two, "rejected")).rejected.field == "id"


@pytest.mark.parametrize("ending", ["half-close", "cancel"])
async def test_the_end_of_a_gateway_aborts_its_requests_and_releases_its_tickets(ending: str) -> None:
    limits = ServiceLimits(orphan_ticket_s=0.02)
    async with serving(ScriptedMember("m1", "prefill", limits=limits)) as member:
        async with connected(member) as call:
            await call.write(submit_message(1, make_request("a"), "prefill", None))
            await read_kind(call, "step")
            await call.write(submit_message(2, make_request("b", num_tokens=10_000), "full", None))
            await read_kind(call, "step")
            assert member.engine.pinned
            if ending == "half-close":
                call.done_writing()
                await until(lambda: member.is_idle)
        await until(lambda: member.is_idle and member.service.num_connections == 0)


async def test_a_ticket_made_after_its_gateway_went_is_released() -> None:
    async with serving(ScriptedMember("m1", "prefill")) as member:
        member.engine.hold.set()
        async with connected(member) as call:
            await call.write(submit_message(1, make_request(), "prefill", None))
            await until(lambda: member.engine.num_running == 1)
            abort, member.engine.abort = member.engine.abort, lambda request_id: None  # type: ignore[method-assign]
        await until(lambda: member.service.num_connections == 0)
        member.engine.abort = abort  # type: ignore[method-assign]
        member.engine.hold.clear()
        await until(lambda: member.engine.released == ["m1/r"] and member.is_idle)


async def test_a_damaged_message_cuts_its_stream_and_no_other() -> None:
    async with serving(ScriptedMember("m1")) as member, connected(member) as bad, connected(member) as good:
        await good.write(submit_message(1, make_request(num_tokens=200), "full", None))
        await bad.write(pb.GatewayMessage(submit=pb.Submit(handle=1, mode=pb.MODE_DECODE)))
        assert "mode decode and ticket do not go together" in await bad.read_end()
        assert (await read_tokens(good, [1]))[1] == expected_tokens(make_request(num_tokens=200))


async def test_a_message_of_unknown_kind_or_a_handle_in_use_cuts_the_stream() -> None:
    first = submit_message(1, make_request("a", num_tokens=9999), "full", None).SerializeToString()
    again = submit_message(1, make_request("b"), "full", None).SerializeToString()
    for frames, reason in (([b"\xfa\x07\x00"], "unknown message"), ([first, again], "handle 1 is in use")):
        async with serving(ScriptedMember("m1")) as member, connected(member) as call:
            for frame in frames:
                call.write_frame(frame)
            assert reason in await call.read_end()
            await until(lambda member=member: member.is_idle)  # type: ignore[misc]


async def test_a_message_over_the_size_limit_ends_the_stream() -> None:
    limits = ServiceLimits(link=LinkLimits(max_frame_bytes=1000))
    async with serving(ScriptedMember("m1", limits=limits)) as member, connected(member) as call:
        await call.write(submit_message(1, make_request(prompt=tuple(range(1000))), "full", None))
        assert "exceeds the limit of 1000" in await call.read_end()


async def test_bytes_that_are_no_message_cut_the_stream() -> None:
    async with serving(ScriptedMember("m1")) as member, connected(member) as call:
        call.write_frame(b"\xff" * 9)
        assert "is no GatewayMessage" in await call.read_end()
        await until(lambda: member.service.num_connections == 0)


async def test_a_gateway_that_says_nothing_any_more_is_given_up() -> None:
    limits = ServiceLimits(link=LinkLimits(beat_s=0.02, silence_s=0.1))
    async with serving(ScriptedMember("m1", limits=limits)) as member, connected(member) as call:
        await call.write(submit_message(1, make_request(num_tokens=100_000), "full", None))
        await until(lambda: member.engine.num_running == 1)
        await until(lambda: member.is_idle and member.service.num_connections == 0)


async def test_a_gateway_that_does_not_read_is_cut_and_others_go_on() -> None:
    # More than all messages that the reading gateway gets: however slow the machine, it cannot be the one that is cut.
    limits = ServiceLimits(max_queued_messages=300)
    member = ScriptedMember("m1", step_s=0.0005, limits=limits)
    async with serving(member), connected(member) as slow, connected(member) as good:
        sampling = SamplingParams(max_tokens=100_000, logprobs=1000)
        for handle in range(1, 11):
            request = Request(id=RequestId(f"s{handle}"), prompt_ids=(1,), sampling=sampling)
            await slow.write(submit_message(handle, request, "full", None))
        await until(lambda: member.engine.num_running == 10)
        await good.write(submit_message(1, make_request("good", num_tokens=50), "full", None))
        assert (await read_tokens(good, [1]))[1] == expected_tokens(make_request(num_tokens=50))
        await until(lambda: member.engine.num_running == 0, timeout_s=60)
        assert member.service.num_connections == 1


async def test_a_failed_engine_ends_every_stream_as_unavailable() -> None:
    async with serving(ScriptedMember("m1")) as member, connected(member) as call:
        await call.write(submit_message(1, make_request(num_tokens=10_000), "full", None))
        await read_kind(call, "step")
        member.engine.fail(MemberLostError("rank 1 is lost"))
        assert "rank 1" in await call.read_end()


async def test_a_port_in_use_is_an_os_error() -> None:
    async with serving(ScriptedMember("m1")) as member:
        with pytest.raises(OSError, match="cannot listen"):
            await ScriptedMember("m2").start(int(member.address.split(":")[1]))


async def test_a_service_needs_a_usable_token() -> None:
    with pytest.raises(ConfigError):
        MemberService(hello=None, token="")  # type: ignore[arg-type]


async def test_events_before_the_start_and_for_strangers_change_nothing() -> None:
    member = ScriptedMember("m1")
    member.service.on_events([])
    async with serving(member):
        assert member.is_idle


async def test_a_connection_keeps_no_more_messages_than_its_limit() -> None:
    ours, theirs = socket.socketpair()
    owner = ConnectionList()
    found: list[GatewayConnection] = []

    def welcome(link: MemberLink) -> GatewayConnection:
        found.append(owner.new(link, 2))
        return found[0]

    limits = LinkLimits(close_s=0.01)
    with theirs:
        await asyncio.get_running_loop().create_connection(lambda: raw_link(welcome, limits), sock=ours)
        theirs.send(b".")
        await until(lambda: bool(found))
        # More than what the system keeps for a reader that does not read.
        found[0].send([pb.MemberMessage(ended=pb.Ended(reason="x" * (8 << 20)))])
        for _ in range(5):
            found[0].send([pb.MemberMessage()])
            assert found[0].num_queued <= 2
        assert found[0].closed
        await until(lambda: owner.forgotten == found)
