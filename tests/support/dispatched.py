"""A dispatcher with scripted members, for tests of what it does with requests."""

import dataclasses
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from cluster.dispatcher import Dispatcher, DispatcherConfig
from cluster.journey import RequestTrace
from router.admission import Admission, AdmissionConfig
from router.request import TokenEvent
from router.router import Router
from tests.support.fleet import TOKEN, ScriptedMember, until


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """A dispatcher and its members."""

    dispatcher: Dispatcher
    admission: Admission
    traces: list[RequestTrace]
    members: Sequence[ScriptedMember]

    @property
    def is_idle(self) -> bool:
        return all(member.is_idle for member in self.members) and not self.admission.num_in_flight


@asynccontextmanager
async def fleet(
    *members: ScriptedMember,
    config: DispatcherConfig | None = None,
    limits: AdmissionConfig | None = None,
    clock: Callable[[], float] = time.time,
) -> AsyncIterator[Fleet]:
    traces: list[RequestTrace] = []
    admission = Admission(limits)
    dispatcher = Dispatcher(Router(), admission, TOKEN, config=config, on_trace=traces.append, clock=clock)
    dispatcher.update_members([await member.start() for member in members])
    try:
        await until(lambda: len(dispatcher.loads()) == len(members))
        yield Fleet(dispatcher=dispatcher, admission=admission, traces=traces, members=members)
    finally:
        await dispatcher.close()
        for member in members:
            await member.stop()


def prefill_and_decode() -> tuple[ScriptedMember, ScriptedMember]:
    return ScriptedMember("p", "prefill"), ScriptedMember("d", "decode")


async def collect(events: AsyncGenerator[TokenEvent, None]) -> list[TokenEvent]:
    return [event async for event in events]


def tokens_of(events: Sequence[TokenEvent]) -> list[int | None]:
    return [event.token_id for event in events]
