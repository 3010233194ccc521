"""A decode member fetches a prompt's chunks while a prefill member computes the rest, as the dispatcher arranges it."""

import asyncio

import pytest

from router.errors import MemberLostError
from tests.support.dispatched import collect, fleet, prefill_and_decode, tokens_of
from tests.support.fleet import ScriptedMember, make_request, until
from tests.support.scripted_engine import expected_tokens

pytestmark = pytest.mark.anyio
LONG = tuple(range(64))
"""Four blocks of scripted members."""


async def test_a_decode_member_is_told_of_each_part_of_a_prompt_and_goes_on_with_its_request() -> None:
    prefill, decode = prefill_and_decode()
    prefill.engine.offers = 3
    async with fleet(prefill, decode) as one:
        events = await collect(one.dispatcher.generate(make_request(prompt=LONG)))
        assert tokens_of(events) == expected_tokens(make_request(prompt=LONG))
        told = [(blocks, tokens) for _, blocks, tokens in decode.engine.expected]
        # A scripted prefill says that a token more is computed each time; hashes end before the last one.
        assert told == [(3, 61), (3, 62), (3, 63)]
        assert decode.engine.modes == ["decode"]
        assert len(prefill.engine.released) == 1
        await until(lambda: one.is_idle)


@pytest.mark.parametrize("ending", ["client", "first token"])
async def test_a_request_that_ends_while_its_prompt_is_fetched_early_frees_both_members(ending: str) -> None:
    prefill, decode = prefill_and_decode()
    prefill.engine.offers = 1 if ending == "first token" else 1_000_000
    async with fleet(prefill, decode) as one:
        num_tokens = 1 if ending == "first token" else 8
        waiting = asyncio.create_task(
            collect(one.dispatcher.generate(make_request(prompt=LONG, num_tokens=num_tokens)))
        )
        await until(lambda: bool(decode.engine.expected))
        if ending == "client":
            waiting.cancel()
        await asyncio.wait([waiting])
        await until(lambda: one.is_idle, timeout_s=1)
        # Not before the decode member has let go of it.
        await until(lambda: prefill.engine.released == ["p/r"], timeout_s=1)
        assert decode.engine.modes == []


async def test_a_prefill_member_lost_behind_offers_is_a_retryable_error() -> None:
    prefill, decode = prefill_and_decode()
    prefill.engine.offers = 1_000_000
    async with fleet(prefill, decode) as one:
        waiting = asyncio.create_task(collect(one.dispatcher.generate(make_request(prompt=LONG))))
        await until(lambda: bool(decode.engine.expected))
        await prefill.stop()
        with pytest.raises(MemberLostError):
            await waiting
        await until(lambda: decode.is_idle, timeout_s=1)


async def test_a_decode_member_lost_while_it_fetches_early_is_replaced_and_the_rest_left_to_the_lease() -> None:
    prefill, decode = prefill_and_decode()
    prefill.engine.offers = 200
    async with fleet(prefill, decode) as one:
        other = ScriptedMember("d2", "decode")
        waiting = asyncio.create_task(collect(one.dispatcher.generate(make_request(prompt=LONG))))
        await until(lambda: bool(decode.engine.expected))
        one.dispatcher.update_members([prefill.info, await other.start()])
        assert tokens_of(await waiting) == expected_tokens(make_request(prompt=LONG))
        await until(lambda: other.is_idle)
        # The lost member may still read: only the lease frees it.
        assert prefill.engine.released == []
        await other.stop()
