"""What a step writes is read layer by layer while it runs, and nobody waits for more than that step."""

import dataclasses
import time
from collections.abc import Callable

import pytest

from cluster.config import KvTransport
from cluster.kv_connection import KvConnection
from cluster.rank_memory import RankMemory
from tests.support.kv_patterns import Geometry, assert_moved, make_lane
from tests.support.model_configs import make_moe_config
from tests.support.pulling import BLOCKS, TOKEN, WAYS, Pulling, make_order, pull, sourcing


def until_true(condition: Callable[[], bool]) -> None:
    """Wait for what another thread does."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("src_tp", "dst_tp"), [(1, 1), (2, 1), (1, 2)])
def test_layers_of_a_step_are_pulled_as_it_writes_them(src_tp: int, dst_tp: int, way: KvTransport) -> None:
    with sourcing(make_moe_config(), Geometry(tp=src_tp)) as source:
        ticket = dataclasses.replace(source.ticket, step=9)
        lane = make_lane(source.model, Geometry(tp=dst_tp))
        pullings = [
            Pulling(cache, source, Geometry(tp=dst_tp), tp_rank=rank, way=way) for rank, cache in enumerate(lane)
        ]
        for pulling in pullings:
            pulling.puller.start(make_order(ticket))
        began = time.monotonic()
        for cache in source.lane:
            cache.progress.begin(9)
            cache.progress.wrote(1)
        until_true(lambda: all(bool(cache.k_pools[0].any() and cache.v_pools[0].any()) for cache in lane))
        time.sleep(0.1)
        assert not any(bool(pool.any()) for cache in lane for pool in (*cache.k_pools[1:], *cache.v_pools[1:]))
        for cache in source.lane:
            cache.progress.end()
        done = [pulling.result() for pulling in pullings]
        assert [one.error for one in done] == [""] * dst_tp
        # Waiting is no part of what a transfer takes.
        assert all(one.num_bytes > 0 and one.seconds < time.monotonic() - began - 0.1 for one in done)
        assert_moved(lane, source.state, BLOCKS, None)
        for pulling in pullings:
            pulling.puller.close()


@pytest.mark.parametrize("way", WAYS)
def test_a_pull_behind_a_step_that_does_not_get_on_ends_with_its_lease(way: KvTransport) -> None:
    with sourcing(make_moe_config(), Geometry(tp=1), lease_s=1.0) as source:
        source.lane[0].progress.begin(9)
        _, done = pull(source, dataclasses.replace(source.ticket, step=9), Geometry(tp=1), way=way)
        assert "expired" in done[0].error or "lost" in done[0].error


def test_a_pull_behind_a_step_ends_with_its_source() -> None:
    with sourcing(make_moe_config(), Geometry(tp=1)) as source:
        source.lane[0].progress.begin(9)
        pulling = Pulling(make_lane(source.model, Geometry(tp=1))[0], source, Geometry(tp=1))
        pulling.puller.start(make_order(dataclasses.replace(source.ticket, step=9)))
        time.sleep(0.2)
        source.servers[0].close()
        assert "source rank at" in pulling.result().error
        pulling.puller.close()


def test_pulls_that_wait_for_steps_do_not_hold_up_others() -> None:
    with sourcing(make_moe_config(), Geometry(tp=1)) as source:
        source.lane[0].progress.begin(9)
        pulling = Pulling(make_lane(source.model, Geometry(tp=1))[0], source, Geometry(tp=1))
        for _ in range(2):
            pulling.puller.start(make_order(dataclasses.replace(source.ticket, step=9)))
        assert pulling.wait(make_order(source.ticket)).error == ""
        source.lane[0].progress.end()
        assert [pulling.result().error for _ in range(2)] == ["", ""]
        pulling.puller.close()


def test_a_connection_that_only_waits_for_steps_is_in_use() -> None:
    with sourcing(make_moe_config(), Geometry(tp=1)) as source:
        source.lane[0].progress.begin(9)
        source.lane[0].progress.wrote(1)
        (cache,) = make_lane(source.model, Geometry(tp=1))
        connection = KvConnection(source.servers[0].address, TOKEN, RankMemory(cache.buffer), timeout_s=5.0)
        made = connection.used_s
        assert connection.written(9, 0, time.time() + 5) == 1
        assert connection.used_s > made
        connection.close()
