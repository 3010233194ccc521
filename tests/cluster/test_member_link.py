"""Frames between two ends over real sockets on loopback."""

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager

import pytest
import uvloop
from typing_extensions import override

from cluster.member_link import LinkLimits, LinkListener, MemberLink, connect_link
from cluster.security import new_token, server_exchange
from router.errors import CorruptDataError
from tests.support.fleet import TOKEN, until
from tests.support.member_call import raw_link

pytestmark = pytest.mark.anyio


class Ear:
    """An end that keeps what it hears."""

    def __init__(self) -> None:
        self.frames: list[bytes] = []
        self.refused: list[str] = []
        self.reasons: list[str] = []
        self.links: list[MemberLink] = []

    def welcome(self, link: MemberLink) -> "Ear":
        self.links.append(link)
        return self

    def take(self, frame: bytes) -> None:
        if frame == b"nonsense":
            raise CorruptDataError("this makes no sense")
        self.frames.append(frame)

    def corrupt(self, text: str) -> None:
        self.refused.append(text)

    def lost(self, reason: str) -> None:
        self.reasons.append(reason)


class Hasty(Ear):
    """An end that closes its link at once."""

    @override
    def welcome(self, link: MemberLink) -> "Ear":
        link.close()
        link.close()
        return super().welcome(link)


@asynccontextmanager
async def listening(ear: Ear, limits: LinkLimits | None = None, host: str = "127.0.0.1") -> AsyncIterator[str]:
    listener = LinkListener(TOKEN, ear.welcome, limits or LinkLimits())
    try:
        yield f"{host}:{await listener.start(host)}"
    finally:
        listener.close()
        for link in ear.links:
            link.close()


@asynccontextmanager
async def to_a_raw_end(ear: Ear, limits: LinkLimits | None = None) -> AsyncIterator[tuple[MemberLink, socket.socket]]:
    """A link, and the bare socket at its other end."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    loop = asyncio.get_running_loop()
    _, link = await loop.create_connection(lambda: raw_link(ear.welcome, limits or LinkLimits()), sock=ours)
    with theirs:
        theirs.send(b".")
        await until(lambda: bool(ear.links))
        yield link, theirs
        link.close()
        await until(lambda: bool(ear.reasons))


def framed(*frames: bytes) -> bytes:
    return b"".join(len(one).to_bytes(4, "little") + one for one in frames)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_messages_go_both_ways_in_order_and_an_end_is_told(host: str) -> None:
    member, gateway = Ear(), Ear()
    async with listening(member, host=host) as address:
        link = await connect_link(address, TOKEN, gateway.welcome, LinkLimits())
        long = bytes(range(256)) * 4096
        link.send([b"one", long])
        link.send([b"two"])
        member.links[0].send([b"answer"])
        await until(lambda: member.frames == [b"one", long, b"two"] and gateway.frames == [b"answer"])
        link.send([b"last"])
        link.close()
        await until(lambda: member.reasons == ["it ended the stream"] and bool(gateway.reasons))
        assert member.frames[-1] == b"last"


async def test_a_frame_may_come_in_any_pieces() -> None:
    ear, stream = Ear(), framed(b"one", b"", b"two" * 50, b"three")
    async with to_a_raw_end(ear) as (_, raw):
        for at in range(len(stream)):
            raw.send(stream[at : at + 1])
            await asyncio.sleep(0)
        await until(lambda: ear.frames == [b"one", b"two" * 50, b"three"])


@pytest.mark.parametrize(
    ("frame", "text"), [(b"nonsense", "this makes no sense"), (b"x" * 101, "101 bytes exceeds the limit of 100")]
)
async def test_nothing_is_handed_on_behind_what_makes_no_sense_or_is_too_long(frame: bytes, text: str) -> None:
    ear = Ear()
    async with to_a_raw_end(ear, LinkLimits(max_frame_bytes=100)) as (_, raw):
        raw.send(framed(b"good", frame, b"behind"))
        await until(lambda: bool(ear.refused))
        raw.send(framed(b"more"))
        await asyncio.sleep(0.02)
        assert ear.frames == [b"good"]
        assert len(ear.refused) == 1
        assert text in ear.refused[0]


async def test_what_the_network_does_not_take_waits_in_order_and_goes_on() -> None:
    ear = Ear()
    long = b"x" * (4 << 20)
    async with to_a_raw_end(ear) as (link, raw):
        link.send([long])
        link.send([b"a"])
        link.send([b"b"])
        assert link.num_waiting == 2
        wanted, got = framed(long, b"a", b"b"), bytearray()
        while len(got) < len(wanted):
            got += await asyncio.get_running_loop().sock_recv(raw, 1 << 20)
        assert got == wanted
        assert link.num_waiting == 0


async def test_a_reader_may_be_slow_where_nothing_waits_behind_what_it_reads() -> None:
    ear = Ear()
    async with to_a_raw_end(ear) as (link, raw):
        link.send([b"x" * (4 << 20)])
        got = 0
        while got < 4 + (4 << 20):
            got += len(await asyncio.get_running_loop().sock_recv(raw, 1 << 20))
        link.close()
        link.send([b"too late"])
        assert await asyncio.get_running_loop().sock_recv(raw, 1) == b""


async def test_a_link_that_nobody_reads_ends_a_moment_after_it_was_closed() -> None:
    ear = Ear()
    async with to_a_raw_end(ear, LinkLimits(close_s=0.05, beat_s=0.01)) as (link, _):
        link.send([b"x" * (4 << 20)])
        link.send([b"waits"])
        await asyncio.sleep(0.03)
        link.close()
        link.send([b"too late"])
        assert ear.reasons == []
        await until(lambda: len(ear.reasons) == 1)


async def test_an_end_that_says_nothing_is_lost_and_one_that_beats_is_not() -> None:
    silent, beating = Ear(), Ear()
    limits = LinkLimits(beat_s=0.02, silence_s=0.1)
    async with to_a_raw_end(silent, limits), listening(beating, limits) as address:
        link = await connect_link(address, TOKEN, beating.welcome, limits)
        await until(lambda: bool(silent.reasons))
        await asyncio.sleep(0.3)
        assert "it said nothing for" in silent.reasons[0]
        assert beating.reasons == []
        link.close()


async def test_ends_that_stand_still_together_do_not_lose_each_other() -> None:
    member, gateway = Ear(), Ear()
    limits = LinkLimits(beat_s=0.02, silence_s=0.1)
    async with listening(member, limits) as address:
        link = await connect_link(address, TOKEN, gateway.welcome, limits)
        await asyncio.sleep(0.05)
        # Both live on this loop.
        time.sleep(0.3)
        await asyncio.sleep(0.1)
        assert member.reasons == gateway.reasons == []
        link.close()


async def test_an_end_may_close_at_once() -> None:
    ear = Ear()
    async with listening(Hasty()) as address:
        await connect_link(address, TOKEN, ear.welcome, LinkLimits())
        await until(lambda: len(ear.reasons) == 1)


async def test_a_broken_connection_is_lost_with_its_reason() -> None:
    ear = Ear()
    async with listening(ear) as address:
        other = Ear()
        link = await connect_link(address, TOKEN, other.welcome, LinkLimits(beat_s=60))
        await until(lambda: bool(ear.links))
        # Unread bytes at its end make the connection break, not end.
        ear.links[0].send([b"unread" * 100])
        transport = link._transport
        assert transport is not None
        transport.pause_reading()
        await asyncio.sleep(0.05)
        transport.abort()
        await until(lambda: bool(ear.reasons))
        assert "reset" in ear.reasons[0].lower()


async def test_nobody_gets_in_or_out_without_the_token() -> None:
    ear = Ear()
    async with listening(ear) as address:
        with pytest.raises(CorruptDataError, match="closed the connection; do the cluster tokens agree"):
            await connect_link(address, new_token(), ear.welcome, LinkLimits())
        assert ear.links == []
    with pytest.raises(OSError, match=r"refused|Connect call failed"):
        await connect_link(address, TOKEN, ear.welcome, LinkLimits())


async def test_a_listener_that_closes_lets_go_of_those_who_have_not_proven_it() -> None:
    ear = Ear()
    async with listening(ear) as address:
        host, _, port = address.rpartition(":")
        stranger = socket.create_connection((host, int(port)))
        await asyncio.sleep(0.05)
    with stranger:
        stranger.settimeout(5)
        assert await asyncio.to_thread(stranger.recv, 100)
        assert await asyncio.to_thread(stranger.recv, 100) == b""


async def test_whoever_waits_too_long_with_the_proof_is_refused_on_either_side(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="cluster.member_link")
    monkeypatch.setattr("cluster.member_link.HELLO_TIMEOUT_S", 0.1)
    async with listening(Ear()) as address:
        host, _, port = address.rpartition(":")
        with socket.create_connection((host, int(port))):
            await until(lambda: "did not prove the cluster token in time" in caplog.text)
    with (
        socket.create_server(("127.0.0.1", 0)) as mute,
        pytest.raises(CorruptDataError, match="did not prove the cluster token in time"),
    ):
        await connect_link(f"127.0.0.1:{mute.getsockname()[1]}", TOKEN, Ear().welcome, LinkLimits())


async def test_a_call_that_nobody_waits_for_any_more_is_hung_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await connect_link(address, TOKEN, Ear().welcome, LinkLimits())
        sock, _ = mute.accept()
        with sock:
            sock.settimeout(5)
            # An abort may tell so by a reset.
            with contextlib.suppress(ConnectionError):
                assert await asyncio.to_thread(sock.recv, 1) == b""


async def test_a_proof_that_comes_just_when_nobody_waits_any_more_is_no_error() -> None:
    loop, problems, ear = asyncio.get_running_loop(), list[object](), Ear()
    loop.set_exception_handler(lambda _, context: problems.append(context))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        call = asyncio.create_task(
            connect_link(f"127.0.0.1:{listener.getsockname()[1]}", TOKEN, ear.welcome, LinkLimits())
        )
        await asyncio.sleep(0.05)
        sock, _ = listener.accept()
        with sock:
            exchange = server_exchange(TOKEN, "the test")
            sock.send(next(exchange)[0])
            await asyncio.sleep(0.05)
            sock.send(exchange.send(sock.recv(100))[0])
            # Before the loop looks at what came.
            loop.call_soon(call.cancel)
            with pytest.raises(asyncio.CancelledError):
                await call
            await asyncio.sleep(0.05)
    assert problems == []
    assert ear.links == []


async def test_a_listener_that_never_began_and_a_link_to_nobody_may_be_closed() -> None:
    LinkListener(TOKEN, Ear().welcome, LinkLimits()).close()
    link = raw_link(Ear().welcome, LinkLimits())
    link.close()
    link.abort("no more")


async def test_no_more_strangers_are_greeted_at_once_than_a_bound() -> None:
    ear = Ear()
    async with listening(ear) as address:
        host, _, port = address.rpartition(":")
        strangers = [socket.create_connection((host, int(port))) for _ in range(65)]
        greetings = [await asyncio.to_thread(stranger.recv, 100) for stranger in strangers]
        # Each was greeted, and who came first then made room.
        assert b"" not in greetings
        assert [await asyncio.to_thread(strangers[0].recv, 100), len(ear.links)] == [b"", 0]
        link = await connect_link(address, TOKEN, Ear().welcome, LinkLimits())
        link.close()
        for stranger in strangers:
            stranger.close()


@pytest.mark.parametrize(
    "test",
    [
        test_a_frame_may_come_in_any_pieces,
        test_what_the_network_does_not_take_waits_in_order_and_goes_on,
        test_a_link_that_nobody_reads_ends_a_moment_after_it_was_closed,
        test_an_end_that_says_nothing_is_lost_and_one_that_beats_is_not,
        test_an_end_may_close_at_once,
        test_nobody_gets_in_or_out_without_the_token,
        test_a_listener_that_closes_lets_go_of_those_who_have_not_proven_it,
        test_no_more_strangers_are_greeted_at_once_than_a_bound,
    ],
)
def test_it_is_the_same_on_the_loops_that_rays_processes_run(test: Callable[[], Coroutine[None, None, None]]) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(test())
