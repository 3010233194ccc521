"""Pulls between real caches: over shared memory, TCP and P2P, any tp to any tp, and every way they may fail."""

import dataclasses
import os
import queue
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from cluster.config import KvTransport
from cluster.handoff import Puller
from cluster.kv_server import KvServer
from cluster.kv_wire import HEAD, OK, TAIL, checksum
from cluster.plan import KV_FORMAT, PullDone
from cluster.rank_memory import RankMemory
from cluster.security import new_token, server_hello
from cluster.transports import host_key, make_transports
from shards.config import ModelConfig
from tests.support.kv_patterns import Geometry, assert_moved, make_lane, rank_part
from tests.support.model_configs import make_moe_config, make_next_config
from tests.support.pulling import BLOCKS, NIXL, TOKEN, WAYS, Pulling, make_order, pull, sourcing
from tests.support.relay import damaging


@contextmanager
def silent_pair() -> Iterator[str]:
    """A source that agrees to form a pair, names a port where nobody listens, and is gone."""
    listener, closed = socket.create_server(("127.0.0.1", 0)), socket.create_server(("127.0.0.1", 0))
    port = str(closed.getsockname()[1]).encode()
    closed.close()

    def serve() -> None:
        sock, _ = listener.accept()
        with sock:
            server_hello(sock, TOKEN)
            sock.recv(4096)
            sock.sendall(HEAD.pack(OK, len(port)) + port + TAIL.pack(OK, checksum([memoryview(port)])))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        thread.join(5)
        listener.close()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make_config", [make_moe_config, make_next_config])
@pytest.mark.parametrize(("src_tp", "dst_tp"), [(1, 1), (2, 2), (2, 1), (1, 2), (4, 2), (2, 4)])
def test_a_pull_moves_blocks_and_state_between_lanes_of_any_tp(
    make_config: Callable[[], ModelConfig], src_tp: int, dst_tp: int, way: KvTransport
) -> None:
    with sourcing(make_config(), Geometry(tp=src_tp, dtype=torch.bfloat16)) as source:
        geometry = Geometry(tp=dst_tp, dtype=torch.bfloat16, num_blocks=10, num_slots=2)
        lane, done = pull(source, source.ticket, geometry, way=way)
        assert [one.error for one in done] == [""] * dst_tp
        assert all(one.pull_id == 5 and one.seconds > 0 for one in done)
        shape = lane[0].shape
        slots = (2, 1) if source.model.delta_layers else None
        assert done[0].num_bytes == 3 * shape.bytes_per_block + (shape.bytes_per_slot if slots else 0)
        assert_moved(lane, source.state, BLOCKS, slots)


def test_a_source_of_another_process_is_mapped() -> None:
    with sourcing(make_next_config(), Geometry(tp=1)) as source:
        # A child that inherits the memory file stands for the prefill rank; nobody serves its TCP address.
        child = subprocess.Popen(["sleep", "60"], pass_fds=(source.lane[0].fd,))
        try:
            rank = dataclasses.replace(source.ticket.ranks[0], pid=child.pid, address="127.0.0.1:1")
            lane, done = pull(source, dataclasses.replace(source.ticket, ranks=(rank,)), Geometry(tp=1))
        finally:
            child.kill()
            child.wait()
        assert done[0].error == ""
        assert_moved(lane, source.state, BLOCKS, (2, 1))


def test_a_dead_source_of_this_host_fails_the_pull() -> None:
    with sourcing(make_moe_config(), Geometry(tp=1)) as source:
        gone = subprocess.Popen(["true"])
        gone.wait()
        rank = dataclasses.replace(source.ticket.ranks[0], pid=gone.pid)
        _, done = pull(source, dataclasses.replace(source.ticket, ranks=(rank,)), Geometry(tp=1))
        assert "gone" in done[0].error


def test_a_file_too_small_to_be_the_source_cache_is_refused() -> None:
    with sourcing(make_moe_config(), Geometry(tp=1)) as source, open("/proc/self/status") as other:
        rank = dataclasses.replace(source.ticket.ranks[0], pool_fd=other.fileno())
        _, done = pull(source, dataclasses.replace(source.ticket, ranks=(rank,)), Geometry(tp=1))
        assert "does not belong" in done[0].error


@pytest.mark.parametrize("way", ["tcp", "p2p", NIXL])
def test_a_dead_source_of_another_host_fails_the_pull(way: KvTransport) -> None:
    with sourcing(make_moe_config(), Geometry(tp=1)) as source:
        source.servers[0].close()
        _, done = pull(source, source.ticket, Geometry(tp=1), way=way)
        assert "cannot be reached" in done[0].error


def test_a_pull_that_fails_in_an_unforeseen_way_is_told_and_the_next_one_works() -> None:
    with sourcing(make_moe_config(), Geometry(tp=1)) as source:
        (cache,) = make_lane(source.model, Geometry(tp=1))
        order = make_order(source.ticket)
        outside = dataclasses.replace(order, pull_id=6, dst_blocks=tuple(10**6 for _ in order.dst_blocks))
        # More than there are threads.
        done = Pulling(cache, source, Geometry(tp=1)).run(outside, outside, outside, order)
        assert sorted((each.pull_id, bool(each.error)) for each in done) == [(5, False), *[(6, True)] * 3]


@pytest.mark.parametrize("way", WAYS)
def test_an_expired_ticket_is_not_pulled(way: KvTransport) -> None:
    with sourcing(make_moe_config(), Geometry(tp=1), lease_s=-1) as source:
        lane, done = pull(source, source.ticket, Geometry(tp=1), way=way)
        assert "expired" in done[0].error
        assert not lane[0].buffer.any()


@pytest.mark.parametrize("way", ["tcp", "p2p", NIXL])
def test_a_source_killed_between_two_pulls_fails_the_second_and_its_successor_serves_again(way: KvTransport) -> None:
    model, geometry = make_moe_config(), Geometry(tp=1)
    with sourcing(model, geometry) as source:
        (cache,) = make_lane(model, geometry)
        pulling = Pulling(cache, source, geometry, way=way)
        order = make_order(source.ticket)
        assert pulling.wait(order).error == ""
        # Cuts the kept connection and its pair, as the death of the process does.
        source.servers[0].close()
        assert "hand-off" in pulling.wait(order).error
        successor = KvServer(source.lane[0].buffer, TOKEN)
        rank = dataclasses.replace(source.ticket.ranks[0], address=successor.address)
        again = dataclasses.replace(order, ticket=dataclasses.replace(source.ticket, ranks=(rank,)))
        assert pulling.wait(again).error == ""
        pulling.run()
        successor.close()


def test_a_source_that_dies_before_its_pair_is_formed_fails_the_pull() -> None:
    with sourcing(make_moe_config(), Geometry(tp=1)) as source, silent_pair() as address:
        rank = dataclasses.replace(source.ticket.ranks[0], address=address)
        _, done = pull(source, dataclasses.replace(source.ticket, ranks=(rank,)), Geometry(tp=1), way="p2p")
        assert "cannot be reached" in done[0].error


def test_a_ticket_that_expires_during_the_copy_fails_the_pull() -> None:
    with sourcing(make_moe_config(), Geometry(tp=1)) as source:
        expires = source.ticket.expires_unix_s
        times = iter([expires - 1.0])
        cache = make_lane(source.model, Geometry(tp=1))[0]
        pulling = Pulling(cache, source, Geometry(tp=1), now=lambda: next(times, expires + 0.5))
        assert "expired 0.500 s before" in pulling.run(make_order(source.ticket))[0].error


@pytest.mark.parametrize("way", ["tcp", "p2p", NIXL])
def test_another_cluster_token_is_refused(way: KvTransport) -> None:
    with sourcing(make_moe_config(), Geometry(tp=1)) as source:
        _, done = pull(source, source.ticket, Geometry(tp=1), way=way, token=new_token())
        assert "token" in done[0].error


def test_members_of_another_dtype_or_version_are_refused_naming_both() -> None:
    with sourcing(make_moe_config(), Geometry(tp=1)) as source:
        older = dataclasses.replace(source.ticket, layout=dataclasses.replace(source.ticket.layout, version=1))
        _, done = pull(source, older, Geometry(tp=1))
        assert f"version=1, this member version={KV_FORMAT}" in done[0].error
        _, done = pull(source, source.ticket, Geometry(tp=1, dtype=torch.bfloat16))
        assert "float32" in done[0].error
        assert "bfloat16" in done[0].error


def test_a_ticket_without_all_ranks_or_state_is_refused() -> None:
    with sourcing(make_next_config(), Geometry(tp=2)) as source:
        half = dataclasses.replace(source.ticket, ranks=source.ticket.ranks[:1])
        assert "names 1 ranks" in pull(source, half, Geometry(tp=1))[1][0].error
        stateless = dataclasses.replace(source.ticket, state_slot=-1)
        order = dataclasses.replace(make_order(source.ticket), ticket=stateless)
        (cache,) = make_lane(source.model, Geometry(tp=1))
        assert "no recurrent state" in Pulling(cache, source, Geometry(tp=1)).run(order)[0].error


@pytest.mark.parametrize("way", ["tcp", "p2p", NIXL])
def test_many_pulls_run_one_after_the_other_over_kept_connections(way: KvTransport) -> None:
    with sourcing(make_next_config(), Geometry(tp=2)) as source:
        cache = make_lane(source.model, Geometry(tp=1))[0]
        orders = [dataclasses.replace(make_order(source.ticket), pull_id=number) for number in range(20)]
        done = Pulling(cache, source, Geometry(tp=1), way=way).run(*orders)
        assert {one.pull_id for one in done} == set(range(20))
        assert not any(one.error for one in done)
        assert_moved([cache], source.state, BLOCKS, (2, 1))


def test_a_connection_that_is_made_while_its_transport_closes_is_cut() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    came, closed = threading.Event(), threading.Event()
    asked: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def serve() -> None:
        sock, _ = listener.accept()
        with sock:
            came.set()
            closed.wait(5)
            server_hello(sock, TOKEN)
            asked.put(sock.recv(1))

    with sourcing(make_moe_config(), Geometry(tp=1)) as source:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        ranks = (dataclasses.replace(source.ticket.ranks[0], address=address),)
        (cache,) = make_lane(source.model, Geometry(tp=1))
        (way,) = make_transports("tcp", RankMemory(cache.buffer), TOKEN)
        done: queue.SimpleQueue[PullDone] = queue.SimpleQueue()
        layout = Geometry(tp=1).layout(source.model)
        puller = Puller(cache, source.model, layout, tp_rank=0, transports=(way,), on_done=done.put)
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        puller.start(make_order(dataclasses.replace(source.ticket, ranks=ranks)))
        assert came.wait(5)
        way.close()
        closed.set()
        assert asked.get(timeout=5) == b""
        assert "ended while it connected" in done.get(timeout=5).error
        puller.close()
        thread.join(5)
    listener.close()


def test_the_source_rank_of_a_cache_can_be_reached_as_it_says() -> None:
    with sourcing(make_moe_config(), Geometry(tp=1)) as source:
        rank = source.ticket.ranks[0]
        assert rank.pid == os.getpid()
        assert rank.host_key == host_key()
        assert rank.pool_fd == source.lane[0].fd
        assert rank.address == source.servers[0].address


def pull_through(offsets: tuple[int, ...]) -> tuple[PullDone, bool]:
    """A pull over TCP whose source's bytes are damaged at `offsets`; how it ended and whether all bytes are right."""
    model = make_moe_config()
    with sourcing(model, Geometry(tp=1)) as source, damaging(source.servers[0].address, offsets) as address:
        rank = dataclasses.replace(source.ticket.ranks[0], address=address)
        ticket = dataclasses.replace(source.ticket, ranks=(rank,))
        lane, (done,) = pull(source, ticket, Geometry(tp=1), way="tcp")
        if done.error:
            return done, False
        assert_moved(lane, source.state, BLOCKS, None)
        return done, True


def payload_bytes() -> int:
    return 3 * make_lane(make_moe_config(), Geometry(tp=1))[0].shape.bytes_per_block


def test_a_damaged_frame_is_fetched_again_and_counted() -> None:
    size = payload_bytes()
    done, arrived = pull_through((size // 2,))
    assert (done.error, done.refetches, arrived) == ("", 1, True)
    done, arrived = pull_through((size // 2, size + size // 2))
    assert (done.error, done.refetches, arrived) == ("", 2, True)


def test_bytes_that_are_damaged_every_time_fail_the_pull() -> None:
    size = payload_bytes()
    done, _ = pull_through((size // 2, size + size // 2, 2 * size + size // 2))
    assert "checksum" in done.error
    assert done.refetches == 2


@pytest.mark.parametrize("way", WAYS)
def test_a_member_with_blocks_of_another_size_pulls_from_behind_what_it_holds(way: KvTransport) -> None:
    model = make_next_config()
    with sourcing(model, Geometry(tp=2)) as source:
        geometry = Geometry(tp=1, block_size=2)
        (cache,) = make_lane(model, geometry)
        order = dataclasses.replace(make_order(source.ticket), first=2, dst_blocks=(5, 1, 0, 9, 4))
        (done,) = Pulling(cache, source, geometry, way=way).run(order)
        assert done.error == ""
        k, v, _, _ = rank_part(source.state, cache)
        for pool, part in zip(cache.k_pools + cache.v_pools, k + v, strict=True):
            for at in range(2, 11):
                moved = pool[order.dst_blocks[(at - 2) // 2], :, at % 2]
                assert torch.equal(moved, part[source.ticket.blocks[at // 4], :, at % 4])
