"""A member by itself on a real Ray cluster, without Serve: frozen ranks, starts that fail, and what stays behind."""

import asyncio
import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
from ray.util.placement_group import placement_group_table

from cluster.config import EngineConfig
from cluster.directory import MemberStatus, find_directory
from cluster.member import PoolMember, PoolMemberConfig
from router.errors import CheckpointError

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=128 << 20,
    )
    yield
    ray.shutdown()


def make_config(model: Path, *, threads: int = 1) -> PoolMemberConfig:
    """Listens on the node's address, as on a cluster of more than one machine."""
    engine = EngineConfig(model=model, dtype="float32", kv_memory_bytes=8 << 20, threads=threads)
    return PoolMemberConfig(role="mixed", engine=engine, interface="node", drain_s=2.0, look_timeout_s=3.0)


def reservations() -> list[str]:
    """States of the placement groups that are still there."""
    return [each["state"] for each in placement_group_table().values() if each["state"] != "REMOVED"]


async def listed(member: PoolMember) -> MemberStatus | None:
    directory = find_directory("moefleet")
    assert directory is not None
    found = await directory.statuses.remote()
    return next((each for each in found if each.info.member_id == member.member_id), None)


async def of_generation(member: PoolMember, generation: int) -> MemberStatus:
    """What the directory says once the member is in this generation."""
    async with asyncio.timeout(60.0):
        while True:
            status = await listed(member)
            if status is not None and status.info.generation == generation:
                return status
            await asyncio.sleep(0.1)


@pytest.mark.anyio
async def test_a_frozen_rank_0_is_replaced_and_one_that_freezes_later_does_not_hold_up_the_end(
    make_checkpoint: Callable[..., Path],
) -> None:
    member = PoolMember(make_config(make_checkpoint("qwen3_moe", dtype="float32")))
    await member.start()
    first = await of_generation(member, 0)
    assert first.info.address.rpartition(":")[0] == first.ranks[0].node
    os.kill(first.ranks[0].pid, signal.SIGSTOP)
    second = await of_generation(member, 1)
    member.check_health()
    os.kill(second.ranks[0].pid, signal.SIGSTOP)
    async with asyncio.timeout(15.0):
        await member.stop()
    assert await listed(member) is None
    assert reservations() == []


@pytest.mark.anyio
async def test_a_member_that_cannot_start_says_why_and_reserves_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        await PoolMember(make_config(tmp_path / "none")).start()
    assert reservations() == []


@pytest.mark.anyio
async def test_a_start_that_is_cancelled_while_it_waits_for_room_reserves_nothing(tmp_path: Path) -> None:
    start = asyncio.create_task(PoolMember(make_config(tmp_path, threads=64)).start())
    async with asyncio.timeout(10.0):
        while reservations() != ["PENDING"]:
            await asyncio.sleep(0.05)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert reservations() == []
