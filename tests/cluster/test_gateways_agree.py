"""Two gateways and one real member with recurrent state: what one had it compute, the other's router knows of."""

import itertools
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from typing_extensions import override

from cluster.dispatcher import Dispatcher
from router.admission import Admission
from router.load import CacheEvents
from router.prompt import prompt_of
from router.request import MemberId, Request, RequestId, SamplingParams
from router.router import Router, RouterConfig
from tests.support.fleet import TOKEN, until
from tests.support.members import EngineMember

pytestmark = pytest.mark.anyio

PROMPT = tuple(range(3, 120))


@dataclass(frozen=True, slots=True, kw_only=True)
class Gateway:
    """One gateway's dispatcher and its router, which believes the member's word only."""

    dispatcher: Dispatcher
    router: Router

    async def serve(self, request: Request) -> tuple[int, ...]:
        """Its tokens; the first number is what the member had cached of its prompt."""
        events = [event async for event in self.dispatcher.generate(request)]
        return events[0].cached_tokens, *(event.token_id or 0 for event in events)

    def predict(self, request: Request) -> int:
        """Prompt tokens that its router takes to be cached."""
        return self.router.route(prompt_of(request), time.time()).cached_tokens


class LossyRouter(Router):
    """Loses cache events while it is told to, as a stream would that skips messages."""

    def __init__(self) -> None:
        super().__init__(RouterConfig(expected_s=1e-9))
        self.losing = False
        self.lost = 0
        self.snapshots = 0

    @override
    def take_events(self, member_id: MemberId, events: CacheEvents) -> bool:
        self.snapshots += events.cleared
        if self.losing:
            self.lost += 1
            return True
        return super().take_events(member_id, events)


@asynccontextmanager
async def two_gateways(checkpoint: Path, other: Router | None = None) -> AsyncIterator[tuple[Gateway, Gateway]]:
    member = EngineMember("m", "mixed", checkpoint)
    info = await member.start()
    routers = [Router(RouterConfig(expected_s=1e-9)), other or Router(RouterConfig(expected_s=1e-9))]
    dispatchers = [Dispatcher(router, Admission(), TOKEN) for router in routers]
    try:
        for dispatcher in dispatchers:
            dispatcher.update_members([info])
        await until(lambda: all(dispatcher.loads() for dispatcher in dispatchers))
        first, second = (Gateway(dispatcher=d, router=r) for d, r in zip(dispatchers, routers, strict=True))
        yield first, second
    finally:
        for dispatcher in dispatchers:
            await dispatcher.close()
        await member.stop()


def make_request(prompt: tuple[int, ...]) -> Request:
    name = f"r{next(_NAMES)}"
    return Request(id=RequestId(name), prompt_ids=prompt, sampling=SamplingParams(max_tokens=4, temperature=0.0))


_NAMES = itertools.count()


async def test_a_gateway_predicts_the_hit_that_the_member_finds_on_what_another_left(next_checkpoint: Path) -> None:
    async with two_gateways(next_checkpoint) as (first, second):
        await first.serve(make_request(PROMPT))
        await until(lambda: second.predict(make_request((*PROMPT, 7))) > 0)
        for length in (117, 100, 70, 40):
            request = make_request((*PROMPT[:length], 500 + length, 8))
            predicted = second.predict(request)
            cached, *_ = await first.serve(request)
            assert cached == predicted
            # What it left is told before the next one is predicted: all but its last token's block.
            whole = (len(request.prompt_ids) - 1) // 16 * 16
            await until(lambda request=request, whole=whole: second.predict(request) == whole)


async def test_a_gateway_that_lost_events_asks_for_a_snapshot_and_knows_the_cache_again(next_checkpoint: Path) -> None:
    lossy = LossyRouter()
    async with two_gateways(next_checkpoint, lossy) as (first, second):
        await first.serve(make_request(PROMPT))
        await until(lambda: second.predict(make_request((*PROMPT, 7))) > 0)
        snapshots = lossy.snapshots
        lossy.losing = True
        missed = tuple(range(300, 400))
        await first.serve(make_request(missed))
        await until(lambda: first.predict(make_request((*missed, 7))) > 0 and lossy.lost > 0)
        lossy.losing = False
        assert second.predict(make_request((*missed, 7))) == 0
        # What comes next does not follow on what it knows.
        await first.serve(make_request(tuple(range(400, 450))))
        for prompt in (PROMPT, missed, tuple(range(400, 450))):
            whole = len(prompt) // 16 * 16
            await until(lambda prompt=prompt, whole=whole: second.predict(make_request((*prompt, 7))) == whole)
        assert lossy.snapshots == snapshots + 1
