"""Two gateways and one real member with recurrent state: what one had it compute, the other's router knows of."""

import itertools
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.dispatcher import Dispatcher
from router.admission import Admission
from router.prompt import prompt_of
from router.request import Request, RequestId, SamplingParams
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


@asynccontextmanager
async def two_gateways(checkpoint: Path) -> AsyncIterator[tuple[Gateway, Gateway]]:
    member = EngineMember("m", "mixed", checkpoint)
    info = await member.start()
    routers = [Router(RouterConfig(expected_s=1e-9)) for _ in range(2)]
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
