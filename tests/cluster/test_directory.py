"""The directory as a plain object: leases, versions, watching."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from cluster.directory import Directory, MemberStatus
from cluster.members import MemberInfo
from router.errors import ConfigError
from router.request import MemberId, Role


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make_directory(*, lease_s: float = 10.0, clock: Callable[[], float] | None = None) -> Any:
    """Called as a plain object; its methods are typed as remote ones, hence Any."""
    return Directory("t" * 32, lease_s=lease_s, clock=clock or Clock())


def make_status(
    name: str = "m", *, role: Role = "decode", generation: int = 0, max_model_len: int = 100
) -> MemberStatus:
    info = MemberInfo(member_id=MemberId(name), role=role, address="127.0.0.1:1", generation=generation)
    return MemberStatus(info=info, ranks=(), tp=1, dp=1, ep=1, max_model_len=max_model_len, since_unix_s=0.0)


@pytest.mark.anyio
async def test_a_watcher_hears_of_a_new_member_at_once() -> None:
    directory = make_directory()
    first = await directory.watch(-1, 0.0)
    waiting = asyncio.create_task(directory.watch(first.version, 10.0))
    await asyncio.sleep(0)
    await directory.put(make_status())
    async with asyncio.timeout(1.0):
        seen = await waiting
    assert [each.member_id for each in seen.members] == ["m"]
    assert seen.version > first.version


@pytest.mark.anyio
async def test_renewing_a_lease_changes_no_version_but_a_new_generation_does() -> None:
    directory = make_directory()
    await directory.put(make_status())
    before = await directory.watch(-1, 0.0)
    await directory.put(make_status())
    assert (await directory.watch(-1, 0.0)).version == before.version
    await directory.put(make_status(generation=1))
    assert (await directory.watch(-1, 0.0)).version > before.version


@pytest.mark.anyio
async def test_a_silent_member_is_dropped_after_its_lease() -> None:
    clock = Clock()
    directory = make_directory(lease_s=5.0, clock=clock)
    await directory.put(make_status("a"))
    clock.now = 4.0
    await directory.put(make_status("b"))
    clock.now = 6.0
    assert [each.info.member_id for each in await directory.statuses()] == ["b"]


@pytest.mark.anyio
async def test_a_removed_member_is_gone_and_an_unknown_one_is_no_error() -> None:
    directory = make_directory()
    await directory.put(make_status())
    await directory.remove(MemberId("m"))
    await directory.remove(MemberId("nobody"))
    assert (await directory.watch(-1, 0.0)).members == ()


@pytest.mark.anyio
async def test_the_longest_request_promised_is_the_least_that_members_hold_and_outlives_the_last_of_them() -> None:
    directory = make_directory()
    await directory.put(make_status("a", max_model_len=100))
    await directory.put(make_status("b", max_model_len=80))
    await directory.put(make_status("c", role="prefill", max_model_len=90))
    assert (await directory.watch(-1, 0.0)).max_model_len == {"decode": 80, "prefill": 90}
    await directory.remove(MemberId("b"))
    await directory.remove(MemberId("c"))
    assert (await directory.watch(-1, 0.0)).max_model_len == {"decode": 100, "prefill": 90}


@pytest.mark.anyio
async def test_a_young_directory_says_that_it_may_not_know_every_member_and_tells_when_it_does() -> None:
    clock = Clock()
    directory = make_directory(lease_s=5.0, clock=clock)
    await directory.put(make_status("a"))
    young = await directory.watch(-1, 0.0)
    assert not young.settled
    clock.now = 4.0
    await directory.put(make_status("a"))
    clock.now = 5.0
    settled = await directory.watch(young.version, 10.0)
    assert settled.settled
    assert settled.members == young.members


@pytest.mark.anyio
async def test_a_watcher_of_what_does_not_change_is_answered_after_its_time() -> None:
    directory = make_directory(clock=time.monotonic)
    first = await directory.watch(-1, 0.0)
    assert await directory.watch(first.version, 0.05) == first


@pytest.mark.anyio
async def test_the_token_is_the_one_it_was_made_with() -> None:
    assert await make_directory().token() == "t" * 32


@pytest.mark.anyio
async def test_a_member_hears_of_its_new_role_with_each_report_until_it_leaves() -> None:
    directory = make_directory()
    assert await directory.put(make_status("p", role="prefill")) is None
    await directory.put(make_status("d", role="decode"))
    await directory.set_role(MemberId("p"), "mixed")
    assert await directory.put(make_status("d", role="decode")) is None
    assert await directory.put(make_status("p", role="prefill")) == "mixed"
    before = await directory.watch(-1, 0.0)
    assert await directory.put(make_status("p", role="mixed")) == "mixed"
    after = await directory.watch(-1, 0.0)
    assert after.version > before.version
    assert {each.member_id: each.role for each in after.members} == {"p": "mixed", "d": "decode"}
    await directory.remove(MemberId("p"))
    await directory.statuses()
    assert await directory.put(make_status("p", role="prefill")) is None


@pytest.mark.anyio
async def test_a_role_that_would_leave_nobody_to_prefill_or_decode_is_refused() -> None:
    directory = make_directory()
    await directory.put(make_status("p", role="prefill"))
    await directory.put(make_status("d", role="decode"))
    with pytest.raises(ConfigError, match="no member to prefill"):
        await directory.set_role(MemberId("p"), "decode")
    with pytest.raises(ConfigError, match="no member to decode"):
        await directory.set_role(MemberId("d"), "prefill")
    await directory.set_role(MemberId("p"), "mixed")
    with pytest.raises(ConfigError, match="no member to prefill"):
        await directory.set_role(MemberId("p"), "decode")
    await directory.set_role(MemberId("d"), "prefill")


@pytest.mark.anyio
async def test_a_role_for_a_member_that_is_not_up_is_refused_with_those_that_are() -> None:
    directory = make_directory()
    await directory.put(make_status("a"))
    with pytest.raises(ConfigError, match="'b' is not up; members are a"):
        await directory.set_role(MemberId("b"), "mixed")
