"""Requests that arrive by a clock at a gateway with one real member, and what their clients saw of it."""

import asyncio
import random
import statistics
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

from cluster.config import Dtype
from cluster.dispatcher import Dispatcher
from cluster.engine import Engine
from cluster.engine_stats import EngineStats
from router.errors import OverloadedError
from router.load import MemberLoad
from router.prefix import block_hashes
from router.request import Request, RequestId, SamplingParams
from router.simulated_member import MemberSpec
from router.simulation import work_s
from router.trace import TraceRequest
from tests.support.fleet import until
from tests.support.members import EngineMember

PROMPTS = (64, 448)
OUTPUTS = (8, 48)
COMMON = 128
"""Tokens that half of the prompts begin with, one of a few."""
ROWS = 32
STEP_TOKENS = 256
BLOCK = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """One request; times are seconds from the start."""

    at_s: float
    prompt: tuple[int, ...]
    output: int
    tenant: str


@dataclass(slots=True, kw_only=True)
class Seen:
    """What a client saw."""

    tenant: str
    refused: bool = False
    ttft_s: float = -1.0
    gaps_s: list[float] = field(default_factory=list)
    late_s: float = 0.0
    """That it was sent after its time; of HTTP clients."""


def make_member(model: Path, dtype: Dtype, name: str = "m") -> EngineMember:
    """A member of this process with room for all that runs at once."""
    return EngineMember(
        name,
        "mixed",
        model,
        kv_memory_bytes=1 << 30,
        chunk=STEP_TOKENS,
        max_rows=ROWS,
        max_model_len=1024,
        step_tokens=STEP_TOKENS,
        dtype=dtype,
    )


def make_arrivals(
    rng: random.Random, tenant: str, rate: float, length_s: float, prompts: tuple[int, int] = PROMPTS
) -> list[Arrival]:
    """Poisson arrivals of prompts that differ behind a common beginning, of the first up to the second length."""
    common = [tuple(rng.randrange(2000) for _ in range(COMMON)) for _ in range(4)]
    found: list[Arrival] = []
    at_s = rng.expovariate(rate)
    while at_s < length_s:
        begin = rng.choice(common) if rng.random() < 0.5 else ()
        fresh = tuple(rng.randrange(2000) for _ in range(rng.randrange(*prompts) - len(begin)))
        found.append(Arrival(at_s=at_s, prompt=begin + fresh, output=rng.randrange(*OUTPUTS), tenant=tenant))
        at_s += rng.expovariate(rate)
    return found


def as_trace(arrivals: Sequence[Arrival]) -> list[TraceRequest]:
    """The same for the simulation."""
    return [
        TraceRequest(
            arrival_s=each.at_s,
            prompt_tokens=len(each.prompt),
            output_tokens=each.output,
            blocks=tuple(block_hashes(each.prompt, BLOCK)),
            tenant=each.tenant,
        )
        for each in arrivals
    ]


def spec_of(load: MemberLoad) -> MemberSpec:
    """A simulated member like the one that reports this."""
    return MemberSpec(
        step_time=load.step_time,
        block_size=load.block_size,
        kv_tokens=load.total_blocks * load.block_size,
        max_rows=load.max_requests,
        step_tokens=load.step_tokens,
        report_s=0.05,
    )


async def calibrate(dispatcher: Dispatcher) -> MemberSpec:
    """Let the member measure its steps, with few requests at once and with many."""
    requests = make_arrivals(random.Random(7), "", 1.0, 100.0)
    for number in (1, 2, 1, 4, 2, 8, 16, 1):
        await replay(dispatcher, [replace(requests.pop(), at_s=0.0) for _ in range(number)])
    await asyncio.sleep(0.2)
    (load,) = dispatcher.loads()
    return spec_of(load)


async def way_s(dispatcher: Dispatcher, engine: Engine) -> float:
    """Seconds from a client to the engine, and back: half of what a first token takes besides its step, when a request
    of one step is alone.
    """
    rng = random.Random(8)
    found: list[float] = []
    for _ in range(9):
        prompt = tuple(rng.randrange(2000) for _ in range(PROMPTS[0]))
        before = engine.stats()
        (seen,) = await replay(dispatcher, [Arrival(at_s=0.0, prompt=prompt, output=1, tenant="")])
        after = engine.stats()
        found.append(seen.ttft_s - sum(_step_s(after)) + sum(_step_s(before)))
    return max(statistics.median(found) / 2, 0.0)


def _step_s(stats: EngineStats) -> tuple[float, float, float]:
    """What is in a step's time as the engine calibrates it."""
    return stats.schedule_s, stats.launch_s, stats.wait_s


def capacity(spec: MemberSpec, prompts: tuple[int, int] = PROMPTS) -> float:
    """Requests a second that keep the member busy, with its steps full."""
    arrivals = make_arrivals(random.Random(9), "", 10.0, 60.0, prompts)
    step = spec.step_time
    common_s = step.step_s(prefill_tokens=0, decode_rows=ROWS, context_tokens=0) - ROWS * step.decode_row_s
    seconds = work_s(as_trace(arrivals), spec, 1) + sum(each.output for each in arrivals) * common_s / ROWS
    return len(arrivals) / seconds


async def replay(dispatcher: Dispatcher, arrivals: Sequence[Arrival]) -> list[Seen]:
    """Send each request at its time; returns when all have ended."""
    began = time.perf_counter()

    async def send(each: Arrival) -> Seen:
        await asyncio.sleep(max(each.at_s - (time.perf_counter() - began), 0.0))
        return await _client(dispatcher, each)

    seen = await asyncio.gather(*(send(each) for each in arrivals))
    await until(lambda: all(not load.running_requests for load in dispatcher.loads()))
    return list(seen)


_NUMBERS = count()


async def _client(dispatcher: Dispatcher, arrival: Arrival) -> Seen:
    sampling = SamplingParams(max_tokens=arrival.output, temperature=0.0)
    request = Request(
        id=RequestId(f"r{next(_NUMBERS)}"), prompt_ids=arrival.prompt, sampling=sampling, tenant=arrival.tenant
    )
    seen, last = Seen(tenant=arrival.tenant), time.perf_counter()
    began = last
    try:
        async with aclosing(dispatcher.generate(request)) as events:
            async for _ in events:
                now = time.perf_counter()
                if seen.ttft_s < 0:
                    seen.ttft_s = now - began
                else:
                    seen.gaps_s.append(now - last)
                last = now
    except OverloadedError:
        seen.refused = True
    return seen
