"""What is known of a request on its way: times, order of tokens, deadline."""

import asyncio
import dataclasses

import pytest

from cluster.journey import Journey
from router.errors import CorruptDataError, DeadlineExceededError
from router.request import MemberId, TokenEvent
from router.router import Route
from tests.support.scheduler_bench import make_request

pytestmark = pytest.mark.anyio
ROUTE = Route(prefill=MemberId("p"), decode=MemberId("d"), cached_tokens=0, cost_s=0.0)


def event(index: int, token_id: int | None = 3) -> TokenEvent:
    return TokenEvent(request_id=make_request().id, index=index, token_id=token_id)


def test_the_first_time_of_a_moment_counts() -> None:
    times = iter([1.0, 2.0, 5.0, 9.0, 10.0])
    journey = Journey(make_request(), lambda: next(times))
    journey.routed(ROUTE)
    journey.take(event(0))
    journey.take(event(1))
    journey.take(event(2, token_id=None))
    trace = journey.trace()
    assert (trace.prefill_member, trace.decode_member, trace.num_tokens) == ("p", "d", 2)
    assert trace.between("received_s", "routed_s") == 1.0
    assert trace.between("routed_s", "first_token_s") == 3.0
    assert trace.between("routed_s", "done_s") is None
    assert not journey.handed_over


def test_a_missing_token_is_noticed() -> None:
    journey = Journey(make_request(output=(5,)), lambda: 0.0)
    journey.take(event(1))
    with pytest.raises(CorruptDataError, match="token 3 came where 2 was due"):
        journey.take(event(3))


async def test_nothing_is_waited_for_longer_than_the_deadline() -> None:
    assert await Journey(make_request(), lambda: 0.0).within(asyncio.sleep(0, "done")) == "done"
    journey = Journey(dataclasses.replace(make_request(), deadline_unix_s=5.0), lambda: 4.99)
    assert not journey.is_late
    assert await journey.within(asyncio.sleep(0, "done")) == "done"
    with pytest.raises(DeadlineExceededError):
        await journey.within(asyncio.sleep(60))
