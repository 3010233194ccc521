"""make_comms forms the right groups of real processes, over gloo and shared memory, and an operation never hangs."""

import threading
import time

import pytest
import torch
from torch.distributed import HashStore, Store

from shards.collectives import make_comms
from shards.comm import CommError, LocalComm
from shards.kernels.library import load_library
from shards.mesh import Layout, Place
from tests.support.comm_checks import exercise_groups, form, lose_rank_one, run_ranks

needs_library = pytest.mark.skipif(load_library() is None, reason="the native library needs a C++ compiler")


@pytest.mark.slow
def test_gloo_ranks_form_lanes_and_do_every_operation_in_two_generations() -> None:
    assert run_ranks(exercise_groups, Layout(tp=2, dp=2), one_host=False) == [0, 0, 0, 0]


@pytest.mark.slow
@needs_library
def test_shared_memory_ranks_form_lanes_and_do_every_operation_in_two_generations() -> None:
    assert run_ranks(exercise_groups, Layout(tp=2, dp=2), one_host=True) == [0, 0, 0, 0]


def test_two_gloo_ranks_of_one_lane_share_the_worlds_group() -> None:
    assert run_ranks(exercise_groups, Layout(tp=2), one_host=False) == [0, 0]


@pytest.mark.slow
@needs_library
def test_a_killed_rank_frees_the_others_of_shared_memory_at_once_and_they_go_on() -> None:
    assert run_ranks(lose_rank_one, Layout(tp=3), one_host=True) == [0, -9, 0]


@pytest.mark.slow
def test_a_killed_rank_frees_the_others_of_gloo_within_the_timeout_and_they_go_on() -> None:
    assert run_ranks(lose_rank_one, Layout(tp=3), one_host=False) == [0, -9, 0]


def wait_to_be_closed(store: Store, place: Place, one_host: bool) -> None:
    """Rank 1 waits for rank 0, which never comes, until another thread closes the group."""
    comms = form(store, place, one_host, generation=0, timeout_s=50.0)
    if place.rank == 0:
        store.wait(["freed"])
        comms.close()
        return
    timer = threading.Timer(0.5, comms.close)
    timer.start()
    started = time.monotonic()
    with pytest.raises(CommError, match=r"all_reduce on rank 1 .*the group was closed"):
        comms.world.all_reduce(torch.ones(4))
    timer.join()
    assert time.monotonic() - started < 10.0
    alone = Place(layout=Layout(), rank=0)
    form(store, alone, one_host, generation=1).world.barrier()
    store.set("freed", "1")


@pytest.mark.parametrize("one_host", [False, pytest.param(True, marks=needs_library)])
def test_close_from_another_thread_frees_a_rank_whose_peer_never_comes(one_host: bool) -> None:
    assert run_ranks(wait_to_be_closed, Layout(tp=2), one_host=one_host) == [0, 0]


def test_one_rank_is_local_and_needs_no_store() -> None:
    place = Place(layout=Layout(), rank=0)
    comms = make_comms(HashStore(), place, generation=0, device="cpu", deterministic=True, one_host=False)
    assert isinstance(comms.world, LocalComm)
    assert comms.tp is comms.dp is comms.world


def test_a_missing_rank_and_bad_options_are_refused() -> None:
    place = Place(layout=Layout(tp=2), rank=1)
    with pytest.raises(CommError, match="rank 1 of 2"):
        make_comms(HashStore(), place, generation=0, device="cpu", deterministic=True, one_host=False, timeout_s=0.2)
    with pytest.raises(ValueError, match="device must be cpu or cuda, got 'meta'"):
        make_comms(HashStore(), place, generation=0, device="meta", deterministic=True, one_host=False)
    with pytest.raises(ValueError, match="timeout_s must be positive, got 0"):
        make_comms(HashStore(), place, generation=0, device="cpu", deterministic=True, one_host=False, timeout_s=0)
