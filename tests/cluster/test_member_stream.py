"""Events of one request on one member: how a stream ends, and who releases its ticket."""

import asyncio
from dataclasses import replace

import pytest

from cluster.member_stream import MemberStream
from cluster.plan import KvTicket
from router.errors import MemberLostError, OverloadedError
from router.request import FinishReason, RequestId, TokenEvent
from tests.support.scheduler_bench import make_request, make_ticket

pytestmark = pytest.mark.anyio
TICKET = make_ticket(make_request())
PART = replace(TICKET, partial=True)


class Opened:
    """A stream, and what it asked of its member."""

    def __init__(self, max_events: int = 10) -> None:
        self.aborts = 0
        self.released: list[str] = []
        self.stream = MemberStream(
            RequestId("r"), 1, abort=self._abort, release=self.released.append, max_events=max_events
        )

    def _abort(self) -> None:
        self.aborts += 1

    def token(self, index: int = 0, finish: FinishReason | None = None) -> None:
        event = TokenEvent(request_id=RequestId("r"), index=index, token_id=7, finish=finish)
        self.stream.take(event, last=finish is not None)


async def test_a_stream_ends_behind_its_last_token() -> None:
    one = Opened()
    one.token(0)
    one.token(1, "length")
    assert [event.index for event in [event async for event in one.stream] if isinstance(event, TokenEvent)] == [0, 1]
    assert await one.stream.ended(0.0)
    one.stream.close()
    one.stream.close()
    assert (one.aborts, one.stream.is_closed, one.stream.lost) == (0, True, False)
    one.token(2)
    with pytest.raises(StopAsyncIteration):
        await anext(one.stream)


async def test_a_reader_that_waits_gets_events_as_they_come_and_in_order() -> None:
    one = Opened()
    waiting = asyncio.create_task(anext(one.stream))
    await asyncio.sleep(0)
    # Both before the reader's turn: the second finds it woken already.
    one.token(0)
    one.token(1, "length")
    first, second = await waiting, await anext(one.stream)
    assert isinstance(first, TokenEvent)
    assert isinstance(second, TokenEvent)
    assert (first.index, second.index) == (0, 1)


async def test_parts_of_a_ticket_come_before_the_first_token_and_the_ticket_ends_the_stream() -> None:
    one = Opened()
    one.stream.take(PART, last=False)
    one.token(0)
    one.stream.take(TICKET, last=True)
    kinds = [isinstance(event, KvTicket) async for event in one.stream]
    assert kinds == [True, False, True]
    assert one.stream.owns_ticket


@pytest.mark.parametrize(("taken", "released"), [(0, ["t"]), (1, [])])
async def test_a_ticket_of_a_closed_stream_is_released_by_whoever_has_it(taken: int, released: list[str]) -> None:
    one = Opened()
    one.stream.take(PART, last=False)
    one.token(0)
    one.stream.take(PART, last=False)
    for _ in range(taken):
        await anext(one.stream)
    await one.stream.aclose()
    assert (one.aborts, set(one.released)) == (1, set(released))
    assert not await one.stream.ended(0.0)


async def test_a_lost_member_is_raised_and_ends_the_stream() -> None:
    one = Opened()
    one.stream.take(MemberLostError("gone"), last=True)
    with pytest.raises(MemberLostError):
        await anext(one.stream)
    assert one.stream.lost
    with pytest.raises(StopAsyncIteration):
        await anext(one.stream)


async def test_a_reader_that_falls_behind_is_told_and_aborted_once() -> None:
    one = Opened(max_events=2)
    for index in range(4):
        one.token(index)
    assert one.aborts == 1
    for _ in range(2):
        await anext(one.stream)
    with pytest.raises(OverloadedError, match="2 tokens behind"):
        await anext(one.stream)
