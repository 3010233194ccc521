"""A fault at each step of a hand-off: whoever leaves or dies, the others are free again within the lease.

Steps are held in place by real means: a member whose only row is taken, or a stopped rank. Both members have two
ranks, so that a member can lose the process of one.
"""

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pytest

from cluster.dispatcher import Dispatcher
from router.errors import MemberLostError, NoMemberError
from router.request import Request, RequestId, Role, SamplingParams, TokenEvent
from tests.support.fleet import until
from tests.support.members import EngineMember, dispatching, gateway

pytestmark = [pytest.mark.slow, pytest.mark.anyio]

Step = Literal["queued at prefill", "prefill", "first token", "queued at decode", "pull", "decode"]
STEPS: tuple[Step, ...] = ("queued at prefill", "prefill", "first token", "queued at decode", "pull", "decode")
LEASE_S = 1.0
GRACE_S = 2.0
FREE_WITHIN_S = LEASE_S + GRACE_S + 2.0
"""Expiry is looked at some times a second, on a machine that does other things too."""
PROMPT = tuple(range(1, 120))
NUM_TOKENS = 24
MAX_LEN = 4000


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A prefill and a decode member with one row each."""

    prefill: EngineMember
    decode: EngineMember
    dispatcher: Dispatcher

    def generate(self, name: str) -> AsyncGenerator[TokenEvent, None]:
        sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0)
        return self.dispatcher.generate(Request(id=RequestId(name), prompt_ids=PROMPT, sampling=sampling))

    @asynccontextmanager
    async def at(self, step: Step, name: str) -> AsyncIterator["Running"]:
        """A request that has come as far as `step`, held there until the context asks for more of it."""
        held = {"queued at prefill": self.prefill, "queued at decode": self.decode}.get(step)
        if held is self.prefill:
            await occupy(held)
        stopped = {"prefill": self.prefill, "pull": self.decode}.get(step)
        if stopped is not None:
            stopped.signal_peer(signal.SIGSTOP)
        if held is self.decode:
            self.prefill.signal_peer(signal.SIGSTOP)
        running = Running(self.generate(name))
        if held is self.decode:
            # A decode member that is full before that keeps the request at the gateway.
            await until(lambda: self._has_come("prefill", running), timeout_s=10)
            await occupy(held)
            self.prefill.signal_peer(signal.SIGCONT)
        try:
            await until(lambda: self._has_come(step, running), timeout_s=10)
            yield running
        finally:
            if stopped is not None:
                with contextlib.suppress(ProcessLookupError):
                    stopped.signal_peer(signal.SIGCONT)
            if held is not None:
                held.engine.abort(FILLER.id)

    def _has_come(self, step: Step, running: "Running") -> bool:
        prefill, decode = self.prefill.engine.load(), self.decode.engine.load()
        match step:
            case "queued at prefill":
                return prefill.waiting_requests == 1
            case "prefill":
                # An engine that waits for a stopped rank reports no load.
                return self.prefill.service.num_requests == 1 and running.age_s > 0.1
            case "first token":
                return len(running.tokens) >= 1
            case "queued at decode":
                return decode.waiting_requests == 1
            case "pull":
                return len(running.tokens) == 1 and decode.running_requests == 1
            case "decode":
                return len(running.tokens) >= 3


FILLER = Request(
    id=RequestId("filler"), prompt_ids=(1, 2, 3), sampling=SamplingParams(max_tokens=MAX_LEN - 3, temperature=0)
)


async def occupy(member: EngineMember) -> None:
    """Take the member's only row, for as many steps as take seconds."""
    member.engine.submit(FILLER)
    await until(lambda: member.engine.load().running_requests == 1)


class Running:
    """A request whose events are taken as they come."""

    def __init__(self, events: AsyncGenerator[TokenEvent, None]) -> None:
        self.tokens: list[int] = []
        self._begin_s = time.monotonic()
        self.task = asyncio.create_task(self._take(events))

    async def _take(self, events: AsyncGenerator[TokenEvent, None]) -> list[int]:
        async for event in events:
            assert event.token_id is not None
            self.tokens.append(event.token_id)
        return self.tokens

    @property
    def age_s(self) -> float:
        return time.monotonic() - self._begin_s

    async def leave(self) -> None:
        self.task.cancel()
        await asyncio.wait([self.task])


@asynccontextmanager
async def pair(checkpoint: Path) -> AsyncIterator[Pair]:
    def member(name: str, role: Role) -> EngineMember:
        return EngineMember(name, role, checkpoint, tp=2, chunk=16, max_rows=1, lease_s=LEASE_S, max_model_len=MAX_LEN)

    prefill, decode = member("p", "prefill"), member("d", "decode")
    async with dispatching([prefill, decode]) as dispatcher:
        yield Pair(prefill=prefill, decode=decode, dispatcher=dispatcher)


async def free(*members: EngineMember) -> None:
    await until(lambda: all(member.is_idle for member in members), timeout_s=FREE_WITHIN_S)


async def test_a_client_that_leaves_at_any_step_leaves_both_members_free(
    make_checkpoint: Callable[..., Path],
) -> None:
    async with pair(make_checkpoint("qwen3_next")) as one:
        wanted = await Running(one.generate("first")).task
        for step in STEPS:
            async with one.at(step, f"leaves at {step}") as running:
                await running.leave()
            await free(one.prefill, one.decode)
        assert await Running(one.generate("last")).task == wanted


async def test_a_gateway_that_ends_at_any_step_leaves_both_members_free(make_checkpoint: Callable[..., Path]) -> None:
    async with pair(make_checkpoint("qwen3_next")) as one:
        for step in STEPS:
            async with (
                gateway(one.dispatcher.members) as dispatcher,
                replace(one, dispatcher=dispatcher).at(step, f"at {step}") as running,
            ):
                await dispatcher.close()
                with contextlib.suppress(MemberLostError, NoMemberError):
                    await running.task
            await free(one.prefill, one.decode)


@pytest.mark.parametrize("step", STEPS)
async def test_a_prefill_member_lost_at_any_step_leaves_the_decode_member_free_and_tokens_right(
    make_checkpoint: Callable[..., Path], step: Step
) -> None:
    async with pair(make_checkpoint("qwen3_next")) as one:
        wanted = await Running(one.generate("first")).task
        await free(one.prefill, one.decode)
        async with one.at(step, "r") as running:
            one.prefill.signal_peer(signal.SIGKILL)
        if step in ("queued at prefill", "prefill"):
            with pytest.raises(MemberLostError):
                await running.task
        else:
            # The decode member has the KV, or computes the prompt again.
            assert await running.task == wanted
        await free(one.decode)


@pytest.mark.parametrize("step", STEPS)
async def test_a_decode_member_lost_at_any_step_leaves_the_prefill_member_free(
    make_checkpoint: Callable[..., Path], step: Step
) -> None:
    async with pair(make_checkpoint("qwen3_next")) as one:
        async with one.at(step, "r") as running:
            one.decode.signal_peer(signal.SIGKILL)
            await until(lambda: one.decode.engine.failure is not None, timeout_s=10)
        with pytest.raises((MemberLostError, NoMemberError)):
            await running.task
        assert len(running.tokens) < NUM_TOKENS
        await free(one.prefill)
