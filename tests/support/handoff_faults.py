"""Faults at each step of a hand-off between two members of two ranks each, and what is left behind them.

Steps are held in place by real means: a member whose only row is taken, or a stopped rank.
"""

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from cluster.config import KvTransport
from cluster.dispatcher import Dispatcher
from cluster.plan import KvTicket
from router.errors import MoefleetError
from router.request import Request, RequestId, Role, SamplingParams, TokenEvent
from tests.support.fleet import until
from tests.support.members import EngineMember, dispatching, gateway
from tests.support.relay import damaging

Step = Literal[
    "queued at prefill", "prefill", "early pull", "layers' pull", "first token", "queued at decode", "pull", "decode"
]
STEPS: tuple[Step, ...] = (
    "queued at prefill",
    "prefill",
    "early pull",
    "layers' pull",
    "first token",
    "queued at decode",
    "pull",
    "decode",
)
Fault = Literal[
    "client leaves",
    "deadline passes",
    "gateway ends",
    "members are unlisted",
    "prefill rank is killed",
    "decode rank is killed",
]
GENTLE: tuple[Fault, ...] = ("client leaves", "deadline passes", "gateway ends", "members are unlisted")
"""Both members live on."""
KILLS: tuple[Fault, ...] = ("prefill rank is killed", "decode rank is killed")
LEASE_S = 1.0
GRACE_S = 2.0
FREE_WITHIN_S = LEASE_S + GRACE_S + 2.0
"""Expiry is looked at some times a second, on a machine that does other things too."""
PROMPT = tuple(range(1, 120))
LONG_PROMPT = tuple((7 * position) % 120 for position in range(1500))
"""Takes long enough to be met while it is computed."""
ONE_STEP = 16
"""Prompt tokens of a step."""
NUM_TOKENS = 24
MAX_LEN = 4000
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a fault."""

    fault: str
    step: str
    ended: str
    """The request: its tokens are all there, or why not."""
    tokens: Sequence[int]
    free_s: float
    """From the fault until free blocks and slots of the living members are all there, and nothing runs."""


class StillHeldError(Exception):
    """A member that lives holds something of a request that has ended; says what."""


def _held(member: EngineMember) -> str:
    load = member.engine.load()
    return (
        f"{load.member_id}: {load.free_blocks} of {load.total_blocks} blocks free, {load.running_requests} running, "
        f"{load.waiting_requests} waiting, {load.handoff_requests} to be fetched"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A prefill and a decode member with one row each."""

    prefill: EngineMember
    decode: EngineMember
    dispatcher: Dispatcher
    lost: list[EngineMember] = field(default_factory=list)

    def generate(
        self, name: str, prompt: tuple[int, ...] = PROMPT, deadline_s: float | None = None
    ) -> AsyncGenerator[TokenEvent, None]:
        sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0)
        deadline = None if deadline_s is None else time.time() + deadline_s
        return self.dispatcher.generate(
            Request(id=RequestId(name), prompt_ids=prompt, sampling=sampling, deadline_unix_s=deadline)
        )

    @asynccontextmanager
    async def at(self, step: Step, name: str, deadline_s: float | None = None) -> AsyncIterator[Running]:
        """A request that has come as far as `step`, held there until the context asks for more of it."""
        held = {"queued at prefill": self.prefill, "queued at decode": self.decode}.get(step)
        if held is self.prefill:
            await occupy(held)
        stopped = {
            "prefill": [self.prefill],
            # One rank is in its only step, and waits for the other.
            "layers' pull": [self.prefill],
            "pull": [self.decode],
            "early pull": [self.decode],
        }.get(step, [])
        if step == "layers' pull":
            # Behind a whole request no step of one before is under way, which would count among those launched ahead.
            await Running(self.generate(f"before {name}", FILLER.prompt_ids)).task
        for member in stopped:
            member.signal_peer(signal.SIGSTOP)
        if held is self.decode:
            self.prefill.signal_peer(signal.SIGSTOP)
        # Of their own, or the cache would know them.
        prompt = {"early pull": LONG_PROMPT, "layers' pull": PROMPT[:ONE_STEP]}.get(step, PROMPT)
        running = Running(self.generate(name, (sum(name.encode()) % 120, *prompt[1:]), deadline_s))
        if held is self.decode:
            # A decode member that is full before that keeps the request at the gateway.
            await until(lambda: self._has_come("prefill", running), timeout_s=10)
            await occupy(held)
            self.prefill.signal_peer(signal.SIGCONT)
        try:
            await self._until_come(step, running)
            if step == "early pull":
                self.prefill.signal_peer(signal.SIGSTOP)
                stopped.append(self.prefill)
            yield running
        finally:
            for member in stopped:
                with contextlib.suppress(ProcessLookupError):
                    member.signal_peer(signal.SIGCONT)
            if held is not None:
                held.engine.abort(FILLER.id)

    async def _until_come(self, step: Step, running: Running) -> None:
        try:
            await until(lambda: self._has_come(step, running), timeout_s=10)
        except TimeoutError as error:
            await running.leave()
            requests = [member.service.num_requests for member in (self.prefill, self.decode)]
            raise TimeoutError(
                f"{step} did not come in 10 s; {_held(self.prefill)}; {_held(self.decode)}; requests: {requests}; "
                f"the gateway's loads: {self.dispatcher.loads()}"
            ) from error

    def _has_come(self, step: Step, running: Running) -> bool:
        prefill, decode = self.prefill.engine.load(), self.decode.engine.load()
        match step:
            case "queued at prefill":
                return prefill.waiting_requests == 1
            case "prefill":
                # An engine that waits for a stopped rank reports no load.
                return self.prefill.service.num_requests == 1 and running.age_s > 0.1
            case "early pull":
                return self.decode.service.num_requests == 1 and not running.tokens
            case "layers' pull":
                return self.decode.service.num_requests == 1 and running.age_s > 0.1
            case "first token":
                return len(running.tokens) >= 1
            case "queued at decode":
                return decode.waiting_requests == 1
            case "pull":
                # It waits for its early pull, or pulls.
                return len(running.tokens) == 1 and decode.running_requests + decode.waiting_requests == 1
            case "decode":
                return len(running.tokens) >= 3

    async def free_s(self, since: float, *members: EngineMember) -> float:
        """Wait until members hold nothing -> seconds since the fault.

        Raises:
            StillHeldError: they hold something for longer than the lease.
        """
        try:
            await until(lambda: all(member.is_idle for member in members), timeout_s=FREE_WITHIN_S)
        except TimeoutError:
            raise StillHeldError("; ".join(map(_held, members))) from None
        return time.monotonic() - since


@asynccontextmanager
async def pair(
    checkpoint: Path,
    *,
    through: Callable[[KvTicket], KvTicket] = lambda ticket: ticket,
    kv_transport: KvTransport = "auto",
) -> AsyncIterator[Pair]:
    """Two members and a gateway; `through` changes the prefill member's tickets."""

    def member(name: str, role: Role) -> EngineMember:
        return EngineMember(
            name,
            role,
            checkpoint,
            tp=2,
            chunk=ONE_STEP,
            max_rows=1,
            lease_s=LEASE_S,
            max_model_len=MAX_LEN,
            early_tokens=16,
            through=through,
            kv_transport=kv_transport,
        )

    prefill, decode = member("p", "prefill"), member("d", "decode")
    async with dispatching([prefill, decode]) as dispatcher:
        yield Pair(prefill=prefill, decode=decode, dispatcher=dispatcher)


async def ended(running: Running) -> str:
    """Wait for a request's end."""
    try:
        await running.task
    except asyncio.CancelledError:
        return "cancelled"
    except MoefleetError as error:
        return type(error).__name__
    return "complete"


async def inject(one: Pair, fault: Fault, step: Step) -> Outcome:
    """Cause a fault at a step.

    Raises:
        StillHeldError: members that live hold something for longer than the lease.
        TimeoutError: the request did not come as far as the step.
    """
    name = f"{fault} at {step}"
    members = [one.prefill, one.decode]
    async with contextlib.AsyncExitStack() as stack:
        own = one
        if fault in ("gateway ends", "members are unlisted"):
            dispatcher = await stack.enter_async_context(gateway(one.dispatcher.members))
            own = replace(one, dispatcher=dispatcher)
        deadline_s = 1.5 if fault == "deadline passes" else None
        async with own.at(step, name, deadline_s) as running:
            match fault:
                case "client leaves":
                    await running.leave()
                case "deadline passes":
                    await asyncio.sleep(max(0.0, 1.5 - running.age_s))
                case "gateway ends":
                    await own.dispatcher.close()
                case "members are unlisted":
                    own.dispatcher.update_members(())
                case "prefill rank is killed":
                    one.prefill.signal_peer(signal.SIGKILL)
                    members.remove(one.prefill)
                case "decode rank is killed":
                    one.decode.signal_peer(signal.SIGKILL)
                    members.remove(one.decode)
                    await until(lambda: one.decode.engine.failure is not None, timeout_s=10)
            began = time.monotonic()
        told = await ended(running)
        free_s = await one.free_s(began, *members)
    return Outcome(fault=fault, step=step, ended=told, tokens=running.tokens, free_s=free_s)


async def overstay(one: Pair, step: Step) -> Outcome:
    """Hold a request at a step until its lease is over, then let it go on: a full decode member, or a slow reader."""
    async with one.at(step, f"lease runs out at {step}") as running:
        await asyncio.sleep(LEASE_S + 0.5)
        began = time.monotonic()
    told = await ended(running)
    free_s = await one.free_s(began, one.prefill, one.decode)
    return Outcome(fault="lease runs out", step=step, ended=told, tokens=running.tokens, free_s=free_s)


async def damage(checkpoint: Path, offsets: Sequence[int], name: str) -> tuple[Outcome, int]:
    """Flip bytes of what the first source rank sends over TCP -> also how many frames were fetched again."""
    with ExitStack() as stack:
        relays: dict[str, str] = {}

        def through(ticket: KvTicket) -> KvTicket:
            first = ticket.ranks[0]
            if first.address not in relays:
                relays[first.address] = stack.enter_context(damaging(first.address, offsets))
            return replace(ticket, ranks=(replace(first, address=relays[first.address]), *ticket.ranks[1:]))

        async with pair(checkpoint, through=through, kv_transport="tcp") as one:
            running = Running(one.generate("damaged"))
            told = await ended(running)
            free_s = await one.free_s(time.monotonic(), one.prefill, one.decode)
            refetched = one.decode.engine.stats().refetched_frames
    return Outcome(fault=name, step="pull", ended=told, tokens=running.tokens, free_s=free_s), refetched
