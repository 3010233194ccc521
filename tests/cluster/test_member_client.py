"""The gateway's end of the member stream, against real services on loopback."""

import asyncio
import dataclasses
import logging
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager

import pytest

from cluster.cache_log import CacheChanges
from cluster.member_client import ClientLimits, MemberClient, MemberStream
from cluster.member_codec import PROTOCOL, MemberHello, hello_message
from cluster.member_link import LinkLimits
from cluster.member_service import ServiceLimits
from cluster.members import MemberInfo
from cluster.plan import KvTicket
from cluster.security import new_token, server_hello
from router.errors import InvalidRequestError, MemberLostError, OverloadedError
from router.load import CacheEvents, MemberLoad
from router.request import MemberId, TokenColumns, TokenEvent
from tests.support.fleet import TOKEN, ScriptedMember, make_request, until
from tests.support.scripted_engine import LAYOUT, expected_tokens

pytestmark = pytest.mark.anyio


class Gateway:
    """A client with what it told."""

    def __init__(self, info: MemberInfo, *, token: str = TOKEN, limits: ClientLimits | None = None) -> None:
        self.loads: list[MemberLoad] = []
        self.lost: list[MemberId] = []
        self.events: list[CacheEvents] = []
        self.missing = False
        self.client = MemberClient(
            info, token, on_load=self.loads.append, on_cache=self.take, on_lost=self.lost.append, limits=limits
        )

    def take(self, events: CacheEvents) -> bool:
        self.events.append(events)
        return not self.missing


@asynccontextmanager
async def connected(member: ScriptedMember, *, limits: ClientLimits | None = None) -> AsyncIterator[Gateway]:
    await member.start()
    gateway = Gateway(member.info, limits=limits)
    gateway.client.start()
    try:
        await until(lambda: bool(gateway.loads))
        yield gateway
    finally:
        await gateway.client.close()
        await member.stop()


async def tokens_of(stream: MemberStream) -> list[int]:
    return [
        event.token_id
        for event in [event async for event in stream]
        if isinstance(event, TokenEvent) and event.token_id is not None
    ]


async def test_requests_of_one_stream_get_their_own_tokens() -> None:
    member = ScriptedMember("m1", "decode")
    async with connected(member) as gateway:
        requests = [make_request(f"r{i}", prompt=(i, 1), num_tokens=5 + i) for i in range(10)]
        streams = [gateway.client.submit(request, mode="full") for request in requests]
        got = await asyncio.gather(*(tokens_of(stream) for stream in streams))
        assert got == [expected_tokens(request) for request in requests]
        assert gateway.client.hello is not None
        assert gateway.client.hello.role == "decode"
        assert gateway.loads[-1].member_id == "m1"
        assert member.is_idle


async def test_a_prefill_stream_ends_with_its_ticket() -> None:
    async with connected(ScriptedMember("m1", "prefill")) as gateway:
        events = [event async for event in gateway.client.submit(make_request(), mode="prefill")]
        assert isinstance(events[0], TokenEvent)
        assert isinstance(events[1], KvTicket)
        assert len(events) == 2


async def test_closing_a_stream_aborts_its_request_on_the_member() -> None:
    member = ScriptedMember("m1")
    async with connected(member) as gateway:
        stream = gateway.client.submit(make_request(num_tokens=100_000), mode="full")
        await anext(stream)
        await stream.aclose()
        assert await stream.ended(2)
        assert member.is_idle
        with pytest.raises(StopAsyncIteration):
            await anext(stream)


async def test_a_ticket_that_arrives_after_its_stream_was_closed_is_released() -> None:
    member = ScriptedMember("m1", "prefill")
    async with connected(member) as gateway:
        member.engine.hold.set()
        stream = gateway.client.submit(make_request(), mode="prefill")
        await until(lambda: member.engine.num_running == 1)
        member.engine.abort = lambda request_id: None  # type: ignore[method-assign]
        stream.close()
        member.engine.hold.clear()
        assert await stream.ended(2)
        await until(lambda: member.engine.released == ["m1/r"])


async def test_a_ticket_that_arrived_but_was_never_taken_is_released_when_its_stream_is_closed() -> None:
    member = ScriptedMember("m1", "prefill")
    async with connected(member) as gateway:
        stream = gateway.client.submit(make_request(), mode="prefill")
        await anext(stream)
        assert await stream.ended(2)
        assert member.engine.pinned
        stream.close()
        await until(lambda: member.engine.released == ["m1/r"])
        assert member.is_idle


async def test_a_refusal_is_raised_from_the_stream() -> None:
    member = ScriptedMember("m1")
    async with connected(member) as gateway:
        member.engine.refusals.append(InvalidRequestError("too long", field="prompt_ids"))
        with pytest.raises(InvalidRequestError, match="too long") as refused:
            await anext(gateway.client.submit(make_request(), mode="full"))
        assert refused.value.field == "prompt_ids"


async def test_a_member_that_ends_is_noticed_at_once_and_found_again() -> None:
    member = ScriptedMember("m1")
    async with connected(member) as gateway:
        stream = gateway.client.submit(make_request(num_tokens=100_000), mode="full")
        await anext(stream)
        began = time.monotonic()
        await member.service.stop()
        with pytest.raises(MemberLostError, match="m1 was lost"):
            await tokens_of(stream)
        assert time.monotonic() - began < 1
        assert gateway.lost == ["m1"]
        with pytest.raises(MemberLostError, match="not connected"):
            gateway.client.submit(make_request("again"), mode="full")
        again = ScriptedMember("m1")
        await again.start(int(member.address.split(":")[1]))
        await until(lambda: gateway.client.hello is not None)
        assert await tokens_of(gateway.client.submit(make_request("b"), mode="full")) == expected_tokens(make_request())
        await again.stop()


async def test_closing_the_client_ends_its_requests_on_both_sides() -> None:
    member = ScriptedMember("m1")
    async with connected(member) as gateway:
        stream = gateway.client.submit(make_request(num_tokens=100_000), mode="full")
        await anext(stream)
        await gateway.client.close()
        with pytest.raises(MemberLostError):
            await tokens_of(stream)
        await until(lambda: member.is_idle)
        gateway.client.release_ticket("nobody")


@pytest.mark.parametrize("change", [{"member_id": MemberId("m2")}, {"generation": 9}])
async def test_another_member_at_the_address_is_not_taken_for_ours(change: dict[str, object]) -> None:
    member = ScriptedMember("m1")
    await member.start()
    gateway = Gateway(dataclasses.replace(member.info, **change))  # type: ignore[arg-type]
    gateway.client.start()
    await asyncio.sleep(0.2)
    assert gateway.client.hello is None
    assert gateway.loads == []
    await gateway.client.close()
    await member.stop()


async def test_a_gateway_with_another_token_never_connects() -> None:
    member = ScriptedMember("m1")
    await member.start()
    gateway = Gateway(member.info, token=new_token())
    gateway.client.start()
    await asyncio.sleep(0.2)
    assert gateway.client.hello is None
    assert member.service.num_connections == 0
    await gateway.client.close()
    await member.stop()


async def test_a_silent_server_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        info = MemberInfo(member_id=MemberId("m1"), role="mixed", address=address)
        gateway = Gateway(info, limits=ClientLimits(hello_timeout_s=0.05))
        gateway.client.start()
        await asyncio.sleep(0.3)
        assert gateway.client.hello is None
        await gateway.client.close()


async def test_a_request_whose_reader_lags_is_aborted_and_told_why() -> None:
    member = ScriptedMember("m1", step_s=0.0005)
    async with connected(member, limits=ClientLimits(max_queued_events=10)) as gateway:
        stream = gateway.client.submit(make_request(num_tokens=100_000), mode="full")
        assert await stream.ended(5)
        with pytest.raises(OverloadedError, match="10 tokens behind"):
            await tokens_of(stream)
        assert member.is_idle


async def test_requests_are_refused_while_too_much_waits_to_be_sent() -> None:
    async with frozen_member() as (info, answer):
        gateway = Gateway(info, limits=ClientLimits(max_queued_messages=3))
        gateway.client.start()
        await answer()
        await until(lambda: gateway.client.hello is not None)
        # More than what the system keeps for a member that does not read.
        for number in range(4):
            gateway.client.submit(make_request(f"r{number}", prompt=(1 << 30,) * (1 << 20)), mode="full")
        with pytest.raises(OverloadedError, match="3 messages wait for m1"):
            gateway.client.submit(make_request("more"), mode="full")
        await gateway.client.close()


@asynccontextmanager
async def frozen_member(
    protocol: int = PROTOCOL,
) -> AsyncIterator[tuple[MemberInfo, Callable[[], Coroutine[None, None, None]]]]:
    """A listener, and what lets one gateway in, says hello and nothing more."""
    hello = hello_message(MemberHello(member_id=MemberId("m1"), role="mixed", generation=1, layout=LAYOUT))
    hello.hello.protocol = protocol
    frame = hello.SerializeToString()
    sockets: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def say_hello() -> None:
            sock, _ = listener.accept()
            sockets.append(sock)
            server_hello(sock, TOKEN)
            sock.sendall(len(frame).to_bytes(4, "little") + frame)

        address = f"127.0.0.1:{listener.getsockname()[1]}"
        info = MemberInfo(member_id=MemberId("m1"), role="mixed", address=address, generation=1)
        yield info, lambda: asyncio.to_thread(say_hello)
    for sock in sockets:
        sock.close()


async def test_a_member_that_freezes_is_lost_after_a_silence() -> None:
    async with frozen_member() as (info, answer):
        gateway = Gateway(info, limits=ClientLimits(link=LinkLimits(beat_s=0.02, silence_s=0.1)))
        gateway.client.start()
        await answer()
        await until(lambda: gateway.client.hello is not None)
        with pytest.raises(MemberLostError, match="it said nothing for"):
            await anext(gateway.client.submit(make_request(), mode="full"))
        assert gateway.lost == ["m1"]
        await gateway.client.close()


async def test_a_quiet_stream_stays_up_on_both_sides() -> None:
    beats = LinkLimits(beat_s=0.02, silence_s=0.2)
    member = ScriptedMember("m1", limits=ServiceLimits(link=beats, load_period_s=60))
    async with connected(member, limits=ClientLimits(link=beats)) as gateway:
        await asyncio.sleep(0.5)
        assert gateway.lost == []
        assert member.service.num_connections == 1


@pytest.mark.parametrize("protocol", [0, PROTOCOL + 1])
async def test_a_member_of_another_protocol_is_refused_and_the_log_says_what_would_do(
    protocol: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="cluster.member_client")
    async with frozen_member(protocol) as (info, answer):
        gateway = Gateway(info)
        gateway.client.start()
        await answer()
        await until(lambda: bool(caplog.messages))
        assert f"speaks protocol {protocol} " in caplog.messages[0]
        assert "run one release everywhere" in caplog.messages[0]
        assert gateway.client.hello is None
        await gateway.client.close()


async def test_tokens_of_a_request_that_has_ended_go_to_nobody_though_its_columns_are_still_the_same() -> None:
    member = ScriptedMember("m1")
    async with connected(member) as gateway:
        member.engine.hold.set()
        one, other = (gateway.client.submit(make_request(name), mode="full") for name in "ab")
        await until(lambda: member.service.num_requests == 2)
        ids = [one.request_id, other.request_id]

        def step(index: int) -> TokenColumns:
            return TokenColumns(request_ids=ids, indices=[index, index], token_ids=[10 + index, 20 + index])

        member.service.on_events([step(0)])
        end = TokenEvent(request_id=one.request_id, index=1, token_id=11, finish="stop")
        member.service.on_events([end])
        member.service.on_events([step(1)])
        member.service.on_events([step(2)])
        last = TokenEvent(request_id=other.request_id, index=3, token_id=23, finish="length")
        member.service.on_events([last])
        assert await tokens_of(one) == [10, 11]
        assert await tokens_of(other) == [20, 21, 22, 23]
        assert member.service.num_requests == 0


async def test_cache_events_behind_a_gap_bring_one_call_for_a_snapshot() -> None:
    member = ScriptedMember("m1", limits=ServiceLimits(load_period_s=0.01))
    async with connected(member) as gateway:
        await until(lambda: bool(gateway.events))
        gateway.missing = True
        for value in (5, 6, 7):
            member.engine.cache_log.record([CacheChanges(kv={value: True})])
            await until(lambda value=value: any(value in events.stored for events in gateway.events))
        await until(lambda: sum(events.cleared for events in gateway.events) == 2)
        gateway.missing = False
        member.engine.cache_log.record([CacheChanges(kv={8: True})])
        await until(lambda: gateway.events[-1].stored == (8,))
        assert sum(events.cleared for events in gateway.events) == 2


async def test_ended_tells_when_the_member_stays_silent() -> None:
    member = ScriptedMember("m1")
    async with connected(member) as gateway:
        member.engine.hold.set()
        stream = gateway.client.submit(make_request(), mode="full")
        assert not await stream.ended(0.02)
        stream.close()
        stream.close()
