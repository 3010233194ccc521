"""Prefill and decode members with real engines and ranks, over real streams: the tokens of one mixed member."""

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import pytest

from cluster.config import KvTransport
from cluster.dispatcher import Dispatcher
from router.request import Request, RequestId, SamplingParams, TokenEvent
from tests.support.fleet import until
from tests.support.members import EngineMember, dispatching

pytestmark = pytest.mark.anyio
LENGTHS = (1, 15, 16, 17, 40, 70)


def make_requests() -> list[Request]:
    """Greedy and sampled requests of mixed length."""
    return [
        Request(
            id=RequestId(f"r{index}"),
            prompt_ids=tuple((37 * index + 11 * position) % 250 for position in range(length)),
            sampling=SamplingParams(
                max_tokens=16, temperature=index % 2, seed=index, logprobs=1, repetition_penalty=1 + index / 20
            ),
        )
        for index, length in enumerate(LENGTHS)
    ]


async def collect(events: AsyncGenerator[TokenEvent, None]) -> list[TokenEvent]:
    return [event async for event in events]


async def run_all(dispatcher: Dispatcher) -> list[list[TokenEvent]]:
    return list(await asyncio.gather(*(collect(dispatcher.generate(request)) for request in make_requests())))


def tokens_of(events: list[list[TokenEvent]]) -> list[list[int | None]]:
    return [[event.token_id for event in one] for one in events]


async def mixed_tokens(checkpoint: Path) -> list[list[int | None]]:
    async with dispatching([EngineMember("m", "mixed", checkpoint)]) as dispatcher:
        return tokens_of(await run_all(dispatcher))


@pytest.mark.parametrize("arch", ["qwen3_moe", "qwen3_next"])
async def test_prefill_and_decode_members_give_the_tokens_of_one_mixed_member(
    make_checkpoint: Callable[..., Path], arch: str
) -> None:
    checkpoint = make_checkpoint(arch)
    wanted = await mixed_tokens(checkpoint)
    assert [len(tokens) for tokens in wanted] == [16] * len(LENGTHS)
    members = [EngineMember("p", "prefill", checkpoint), EngineMember("d", "decode", checkpoint)]
    async with dispatching(members) as dispatcher:
        assert tokens_of(await run_all(dispatcher)) == wanted
        stats = members[1].engine.stats()
        assert (stats.pulls, stats.failed_pulls) == (len(LENGTHS), 0)
        assert stats.pulled_bytes > 0
        assert stats.computed_tokens <= 15 * len(LENGTHS)
        await until(lambda: all(member.is_idle for member in members))


async def test_a_decode_member_of_one_row_serves_all_in_turn(make_checkpoint: Callable[..., Path]) -> None:
    checkpoint = make_checkpoint("qwen3_next")
    wanted = await mixed_tokens(checkpoint)
    members = [EngineMember("p", "prefill", checkpoint), EngineMember("d", "decode", checkpoint, max_rows=1)]
    async with dispatching(members) as dispatcher:
        assert tokens_of(await run_all(dispatcher)) == wanted
        assert members[1].engine.stats().failed_pulls == 0
        await until(lambda: all(member.is_idle for member in members))


@pytest.mark.parametrize("way", ["tcp", "p2p"])
async def test_members_on_any_transport_give_the_same_tokens(
    make_checkpoint: Callable[..., Path], way: KvTransport
) -> None:
    checkpoint = make_checkpoint("qwen3_next")
    wanted = await mixed_tokens(checkpoint)
    members = [
        EngineMember("p", "prefill", checkpoint),
        EngineMember("d", "decode", checkpoint, kv_transport=way),
    ]
    async with dispatching(members) as dispatcher:
        assert tokens_of(await run_all(dispatcher)) == wanted
        stats = members[1].engine.stats()
        assert (stats.pulls, stats.failed_pulls) == (len(LENGTHS), 0)


@pytest.mark.parametrize("arch", ["qwen3_moe", "qwen3_next"])
@pytest.mark.parametrize(("prefill_tp", "decode_tp"), [(2, 1), (1, 2)])
async def test_members_of_different_tp_give_the_same_tokens(
    make_checkpoint: Callable[..., Path], arch: str, prefill_tp: int, decode_tp: int
) -> None:
    checkpoint = make_checkpoint(arch)
    wanted = await mixed_tokens(checkpoint)
    members = [
        EngineMember("p", "prefill", checkpoint, tp=prefill_tp),
        EngineMember("d", "decode", checkpoint, tp=decode_tp),
    ]
    async with dispatching(members) as dispatcher:
        assert tokens_of(await run_all(dispatcher)) == wanted
        stats = members[1].engine.stats()
        assert (stats.pulls, stats.failed_pulls) == (len(LENGTHS), 0)
        await until(lambda: all(member.is_idle for member in members))


@pytest.mark.parametrize("arch", ["qwen3_moe", "qwen3_next"])
async def test_a_client_that_leaves_at_any_moment_leaves_every_block_free_within_a_second(
    make_checkpoint: Callable[..., Path], arch: str
) -> None:
    checkpoint = make_checkpoint(arch)
    members = [EngineMember("p", "prefill", checkpoint), EngineMember("d", "decode", checkpoint)]
    sampling = SamplingParams(max_tokens=100, temperature=0)
    async with dispatching(members) as dispatcher:

        def generate(name: str) -> AsyncGenerator[TokenEvent, None]:
            prompt = tuple(range(1, 120))
            return dispatcher.generate(Request(id=RequestId(name), prompt_ids=prompt, sampling=sampling))

        for taken in range(1, 5):
            events = generate(f"after-{taken}-tokens")
            for _ in range(taken):
                await anext(events)
            await events.aclose()
            await until(lambda: all(member.is_idle for member in members), timeout_s=1)
        for delay_ms in (0, 1, 2, 3, 5, 8, 13):
            waiting = asyncio.create_task(collect(generate(f"after-{delay_ms}-ms")))
            await asyncio.sleep(delay_ms / 1000)
            waiting.cancel()
            await asyncio.wait([waiting])
            await until(lambda: all(member.is_idle for member in members), timeout_s=1)
        # Load reports are up to 50 ms old: look once more when the last one is certain.
        await asyncio.sleep(0.2)
        assert all(member.is_idle for member in members)


async def test_members_change_roles_in_the_middle_of_streams_that_go_on_unchanged(
    make_checkpoint: Callable[..., Path],
) -> None:
    checkpoint = make_checkpoint("qwen3_next")
    wanted = await mixed_tokens(checkpoint)
    members = [EngineMember("p", "prefill", checkpoint), EngineMember("d", "decode", checkpoint)]
    async with dispatching(members) as dispatcher:
        running = asyncio.create_task(run_all(dispatcher))
        await until(lambda: members[1].engine.stats().sampled_tokens > 0)
        members[0].engine.set_role("decode")
        members[1].engine.set_role("prefill")
        dispatcher.update_members(
            [
                dataclasses.replace(info, role=member.engine.load().role)
                for info, member in zip(dispatcher.members, members, strict=True)
            ]
        )
        assert tokens_of(await running) == wanted
        await until(
            lambda: {each.member_id: each.role for each in dispatcher.loads()} == {"p": "decode", "d": "prefill"}
        )
        pulls = members[0].engine.stats().pulls
        assert tokens_of(await run_all(dispatcher)) == wanted
        assert members[0].engine.stats().pulls == pulls + len(LENGTHS)
        await until(lambda: all(member.is_idle for member in members))


LONG = tuple((13 * position) % 250 for position in range(200))


def make_long(name: str, prompt: tuple[int, ...] = LONG) -> Request:
    return Request(id=RequestId(name), prompt_ids=prompt, sampling=SamplingParams(max_tokens=12, temperature=0))


async def fetch_early(checkpoint: Path, prefill: EngineMember, decode: EngineMember) -> int:
    """Have a long prompt handed over, with the tokens of a mixed member -> pulls."""
    async with dispatching([EngineMember("m", "mixed", checkpoint)]) as dispatcher:
        wanted = tokens_of([await collect(dispatcher.generate(make_long("r")))])
    async with dispatching([prefill, decode]) as dispatcher:
        assert tokens_of([await collect(dispatcher.generate(make_long("r")))]) == wanted
        stats = decode.engine.stats()
        assert (stats.failed_pulls, stats.computed_tokens) == (0, 11)
        await until(lambda: prefill.is_idle and decode.is_idle)
    return stats.pulls


@pytest.mark.parametrize("arch", ["qwen3_moe", "qwen3_next"])
@pytest.mark.parametrize(("prefill_tp", "decode_tp", "way"), [(1, 1, "auto"), (2, 1, "tcp"), (1, 2, "p2p")])
async def test_chunks_of_a_long_prompt_are_fetched_while_the_rest_is_computed(
    make_checkpoint: Callable[..., Path], arch: str, prefill_tp: int, decode_tp: int, way: KvTransport
) -> None:
    checkpoint = make_checkpoint(arch)
    prefill = EngineMember("p", "prefill", checkpoint, tp=prefill_tp, chunk=32, early_tokens=32)
    decode = EngineMember("d", "decode", checkpoint, tp=decode_tp, kv_transport=way)
    assert await fetch_early(checkpoint, prefill, decode) >= 2


@pytest.mark.parametrize("arch", ["qwen3_moe", "qwen3_next"])
@pytest.mark.parametrize(("prefill_tp", "decode_tp", "way"), [(1, 1, "auto"), (2, 1, "tcp"), (1, 2, "p2p")])
async def test_layers_of_a_prompts_only_step_are_fetched_while_it_runs(
    make_checkpoint: Callable[..., Path], arch: str, prefill_tp: int, decode_tp: int, way: KvTransport
) -> None:
    checkpoint = make_checkpoint(arch)
    prefill = EngineMember("p", "prefill", checkpoint, tp=prefill_tp, chunk=200, step_tokens=200, early_tokens=32)
    decode = EngineMember("d", "decode", checkpoint, tp=decode_tp, kv_transport=way)
    assert await fetch_early(checkpoint, prefill, decode) == 2


async def test_a_client_that_leaves_while_its_prompt_is_fetched_early_leaves_nothing_behind(
    make_checkpoint: Callable[..., Path],
) -> None:
    checkpoint = make_checkpoint("qwen3_next")
    members = [
        EngineMember("p", "prefill", checkpoint, chunk=8, early_tokens=8),
        EngineMember("d", "decode", checkpoint),
    ]
    async with dispatching(members) as dispatcher:
        wanted = tokens_of([await collect(dispatcher.generate(make_long("first")))])
        for delay_ms in range(0, 60, 5):
            prompt = (delay_ms, *LONG[1:])
            waiting = asyncio.create_task(collect(dispatcher.generate(make_long(f"r{delay_ms}", prompt))))
            await asyncio.sleep(delay_ms / 1000)
            waiting.cancel()
            await asyncio.wait([waiting])
            await until(lambda: all(member.is_idle for member in members), timeout_s=2)
        assert tokens_of([await collect(dispatcher.generate(make_long("last")))]) == wanted
        await until(lambda: all(member.is_idle for member in members))
