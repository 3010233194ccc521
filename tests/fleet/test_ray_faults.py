"""What happens when a gateway, a supervisor or the directory is killed with -9."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import httpx
import psutil
import pytest
import ray
from ray.actor import ActorHandle

from cluster.directory import Directory, find_directory
from tests.support.ray_fleet import RayFleet, until

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
PROMPT = [3, 2, 1]


@pytest.fixture(scope="module")
def fleet(make_checkpoint: Callable[..., Path]) -> Iterator[RayFleet]:
    checkpoint = make_checkpoint("qwen3_moe", dtype="float32")
    with RayFleet(checkpoint, {"mixed": {"kv_memory": "32MiB", "max_rows": 8}}, prefix_cache=False) as fleet:
        yield fleet


def replica_pid(deployment: str) -> int:
    """The process of a deployment's only replica."""
    mine = psutil.Process().children(recursive=True)
    found = [each.pid for each in mine if f"ServeReplica:moefleet:{deployment}" in " ".join(each.cmdline())]
    assert len(found) == 1, found
    return found[0]


def answers(fleet: RayFleet) -> bool:
    try:
        return fleet.http.get("/health", timeout=5.0).status_code == 200
    except httpx.HTTPError:
        return False


def test_a_killed_gateway_leaves_no_orphan_work_and_another_takes_its_place(fleet: RayFleet) -> None:
    expected = fleet.complete(PROMPT, max_tokens=30, ignore_eos=True)
    lines = fleet.stream_lines(PROMPT, max_tokens=1500, ignore_eos=True)
    next(lines)
    os.kill(replica_pid("Gateway"), signal.SIGKILL)
    with pytest.raises(httpx.HTTPError):
        list(lines)
    until(lambda: answers(fleet), 60.0)
    until(fleet.is_idle, 5.0)
    assert fleet.complete(PROMPT, max_tokens=30, ignore_eos=True).token_ids == expected.token_ids


def test_a_killed_directory_is_not_missed_by_running_streams_and_fills_itself_again(fleet: RayFleet) -> None:
    expected = fleet.complete(PROMPT, max_tokens=300, ignore_eos=True)
    before = fleet.member("mixed")
    directory = find_directory(fleet.config.ray.namespace)
    assert directory is not None
    token = ray.get(directory.token.remote())
    lines = fleet.stream_lines(PROMPT, max_tokens=300, ignore_eos=True, return_token_ids=True)
    first = next(lines)
    # ray.kill is typed for handles alone, find_directory for what .remote() is called on.
    ray.kill(cast("ActorHandle[Directory]", directory), no_restart=False)
    tokens = [
        token_id
        for line in (first, *lines)
        for choice in line["choices"]  # type: ignore[union-attr]
        for token_id in choice["token_ids"]  # type: ignore[index]
    ]
    assert tuple(tokens) == expected.token_ids
    until(lambda: _listed(fleet), 20.0)
    assert fleet.member("mixed").info == before.info
    assert ray.get(directory.token.remote()) == token


def _listed(fleet: RayFleet) -> bool:
    try:
        return bool(fleet.members())
    except ray.exceptions.RayActorError:
        return False


def test_ranks_end_with_their_killed_supervisor_and_the_pool_gets_a_new_member(fleet: RayFleet) -> None:
    expected = fleet.complete(PROMPT, max_tokens=30, ignore_eos=True)
    before = fleet.member("mixed")
    os.kill(replica_pid("MixedPool"), signal.SIGKILL)
    until(lambda: not psutil.pid_exists(before.ranks[0].pid), 10.0)
    until(lambda: any(each.info.member_id != before.info.member_id for each in fleet.members()), 60.0)
    until(lambda: answers(fleet), 20.0)
    assert fleet.complete(PROMPT, max_tokens=30, ignore_eos=True).token_ids == expected.token_ids
