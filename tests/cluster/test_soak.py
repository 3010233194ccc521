"""Many requests of all kinds, some abandoned at random moments, on members too small for them."""

import asyncio
import os
import random
import threading
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path

import pytest

from router.request import Request, RequestId, SamplingParams, TokenEvent
from tests.support.fleet import until
from tests.support.members import EngineMember, dispatching
from tests.support.reference import make_reference

pytestmark = [pytest.mark.anyio, pytest.mark.slow]
VOCAB = 131
KINDS = 40
AT_ONCE = 14
REQUESTS = 600


def make_request(kind: int) -> Request:
    """The same kind is the same request but for its id."""
    rng = random.Random(kind)
    length, shared = rng.choice([1, 5, 16, 17, 40, 70, 100]), rng.choice([0, 20, 33])
    prompt = (*(7,) * min(shared, length), *(rng.randrange(VOCAB) for _ in range(length - shared)))
    max_tokens = rng.choice([1, 2, 8, 30, 60])
    sampling = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min(max_tokens, rng.choice([0, 0, 5])),
        temperature=rng.choice([0.0, 0.8, 1.2]),
        top_p=rng.choice([1.0, 0.9]),
        top_k=rng.choice([0, 0, 20]),
        presence_penalty=rng.choice([0.0, 0.5]),
        frequency_penalty=rng.choice([0.0, 0.7]),
        repetition_penalty=rng.choice([1.0, 1.3]),
        logit_bias=rng.choice([(), ((3, 2.0), (9, -50.0))]),
        seed=kind,
        stop_token_ids=rng.choice([(), (5, 6, 11, 12)]),
        logprobs=rng.choice([None, 0, 3]),
        prompt_logprobs=rng.choice([None, None, None, 2]),
    )
    return Request(
        id=RequestId(f"kind-{kind}"),
        prompt_ids=prompt,
        sampling=sampling,
        cache_salt=rng.choice(["", "x"]),
        priority=rng.choice([0, 0, 1]),
    )


async def told(events: AsyncGenerator[TokenEvent, None]) -> list[tuple[object, ...]]:
    """All that a client sees but how much was cached."""
    return [(e.index, e.token_id, e.finish, e.logprob, e.prompt_logprobs) async for e in events]


def open_files_and_threads() -> tuple[int, int]:
    return len(os.listdir("/proc/self/fd")), threading.active_count()


@pytest.mark.parametrize(("architecture", "kv_memory_bytes"), [("qwen3_moe", 300_000), ("qwen3_next", 270_000)])
async def test_every_kept_request_says_what_it_says_alone_and_nothing_is_left_behind(
    architecture: str, kv_memory_bytes: int, tmp_path: Path
) -> None:
    make_reference(tmp_path, architecture, {"mlp_only_layers": [1]})
    async with dispatching([EngineMember("m", "mixed", tmp_path)]) as dispatcher:
        alone = [await told(dispatcher.generate(make_request(kind))) for kind in range(KINDS)]
    members = [
        EngineMember(name, role, tmp_path, kv_memory_bytes=kv_memory_bytes, chunk=9)
        for name, role in (("p", "prefill"), ("d", "decode"))
    ]
    rng = random.Random(0)
    kept = 0
    async with dispatching(members) as dispatcher:

        async def check(kind: int, name: str) -> None:
            nonlocal kept
            assert await told(dispatcher.generate(replace(make_request(kind), id=RequestId(name)))) == alone[kind]
            kept += 1

        running: set[asyncio.Task[None]] = set()
        before = None
        for number in range(REQUESTS):
            running.add(asyncio.create_task(check(rng.randrange(KINDS), f"r{number}")))
            await asyncio.sleep(rng.random() * 0.02)
            if rng.random() < 0.3:
                rng.choice(list(running)).cancel()
            while len(running) >= AT_ONCE:
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                _raise_failures(done)
            before = before or (open_files_and_threads() if number > REQUESTS // 4 else None)
        _raise_failures((await asyncio.wait(running))[0])
        await until(lambda: all(member.is_idle for member in members))
        assert before is not None
        # gRPC opens a socket or two when it likes; a leak would be hundreds.
        assert all(now <= then + 8 for now, then in zip(open_files_and_threads(), before, strict=True))
        assert kept > REQUESTS / 2


def _raise_failures(done: set[asyncio.Task[None]]) -> None:
    for task in done:
        if not task.cancelled():
            task.result()
