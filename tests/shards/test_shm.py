"""Ranks over shared memory, as threads of this process: every size and piece length, and every way to fail."""

import ctypes
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore, PrefixStore

from shards.comm import CommError
from shards.kernels.library import load_library
from shards.shm import SLOT_BYTES, ShmComm
from shards.tape import Recorder
from tests.support.comm_checks import check_operations, check_sum, make_part

LIBRARY = load_library()
needs_library = pytest.mark.skipif(LIBRARY is None, reason="the native library needs a C++ compiler")


def run_threads(
    size: int, main: Callable[[ShmComm], None], *, timeout_s: float = 20.0, slot_bytes: int = SLOT_BYTES
) -> None:
    """Run main(comm) on `size` ranks; the first failure is raised."""
    assert LIBRARY is not None
    library = LIBRARY
    store = HashStore()

    def rank_main(rank: int) -> None:
        comm = ShmComm(
            library, PrefixStore("g", store), rank=rank, size=size, timeout_s=timeout_s, slot_bytes=slot_bytes
        )
        try:
            main(comm)
        finally:
            comm.close()

    with ThreadPoolExecutor(size) as pool:
        for future in [pool.submit(rank_main, rank) for rank in range(size)]:
            future.result()


@needs_library
@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_every_operation_gives_what_it_should_in_one_piece_and_in_many(size: int) -> None:
    run_threads(size, lambda comm: check_operations(comm, tree=True))
    run_threads(size, lambda comm: check_operations(comm, tree=True), slot_bytes=512)


@needs_library
def test_sums_of_other_dtypes_and_of_special_values_are_those_of_the_tree() -> None:
    def main(comm: ShmComm) -> None:
        for dtype in (torch.float64, torch.int32):
            check_sum(comm, [make_part(r, (7, 3), dtype) for r in range(3)], tree=True)
        for dtype in (torch.float32, torch.bfloat16):
            special = torch.tensor([float("inf"), float("nan"), -0.0, 3.3e38, 1e-40], dtype=dtype)
            total = comm.all_reduce(special.clone())
            expected = ((special.float() + special.float()) + special.float()).to(dtype)
            torch.testing.assert_close(total, expected, rtol=0, atol=0, equal_nan=True)
        # In float16 2048 + 1 is 2048.
        half = comm.all_reduce(torch.tensor([2048.0 if comm.rank == 0 else 1.0], dtype=torch.float16))
        assert half.dtype == torch.float16
        assert half.tolist() == [2050.0]

    run_threads(3, main)


@needs_library
def test_ranks_may_run_ahead_without_overwriting_what_others_read() -> None:
    def main(comm: ShmComm) -> None:
        for step in range(300):
            if (step + comm.rank) % 50 == 0:
                time.sleep(0.002)
            x = torch.full((200,), float(step * comm.size + comm.rank))
            total = comm.all_reduce(x)
            assert total[0] == total[-1] == sum(step * comm.size + r for r in range(comm.size))

    run_threads(3, main, slot_bytes=256)


@needs_library
def test_an_absent_rank_is_named_when_the_time_is_up() -> None:
    gone = threading.Barrier(3, timeout=30)
    reasons: list[str] = []

    def main(comm: ShmComm) -> None:
        if comm.rank < 2:
            with pytest.raises(CommError) as caught:
                comm.all_gather(torch.ones(2))
            reasons.append(str(caught.value))
            with pytest.raises(CommError, match="was stopped"):
                comm.barrier()
        gone.wait()

    run_threads(3, main, timeout_s=0.5)
    # The first to give up leaves the group, which may be what the other one sees and tells before it.
    named = [reason.endswith("timed out after 0.5 s: rank 2 of 3 did not come") for reason in reasons]
    assert any(named)
    assert all(told or "lost a peer" in reason for told, reason in zip(named, reasons, strict=True))


@needs_library
def test_closing_frees_our_own_thread_and_the_peers() -> None:
    freed = threading.Barrier(3, timeout=30)

    def main(comm: ShmComm) -> None:
        if comm.rank == 0:
            freed.wait()
            return
        started = time.monotonic()
        if comm.rank == 1:
            threading.Timer(0.1, comm.close).start()
        reason = (
            "was stopped: the group was closed"
            if comm.rank == 1
            else "lost a peer: rank 1 of 3 died, failed or closed the group"
        )
        with pytest.raises(CommError, match=reason):
            comm.barrier()
        assert time.monotonic() - started < 5.0
        freed.wait()

    run_threads(3, main)


@needs_library
def test_ranks_that_disagree_on_the_operation_are_told() -> None:
    def main(comm: ShmComm) -> None:
        with pytest.raises(CommError, match=r"another operation, size or split|lost a peer"):
            comm.all_reduce(torch.ones(4 + comm.rank))

    def unequal_split(comm: ShmComm) -> None:
        if comm.rank == 0:
            with pytest.raises(CommError, match=r"another operation, size or split on some rank of the 2"):
                comm.all_to_all(torch.ones(2, 2), [1, 1], [1, 2])
        else:
            comm.all_to_all(torch.ones(2, 2), [1, 1], [1, 1])
            with pytest.raises(CommError, match=r"lost a peer: rank 0"):
                comm.barrier()

    run_threads(2, main)
    run_threads(2, unequal_split)


@needs_library
def test_counts_that_do_not_fit_are_refused_before_anything_is_sent() -> None:
    def main(comm: ShmComm) -> None:
        with pytest.raises(ValueError, match="all_to_all over 2 ranks got 1 send and 2 recv counts"):
            comm.all_to_all(torch.ones(2), [2], [1, 1])
        with pytest.raises(ValueError, match="must be cuts of the 2 rows"):
            comm.all_to_all(torch.ones(2), [2, 1], [1, 1])
        comm.barrier()

    run_threads(2, main)


@needs_library
def test_nothing_is_left_open_or_in_dev_shm() -> None:
    before = (len(os.listdir("/proc/self/fd")), set(os.listdir("/dev/shm")))
    run_threads(2, lambda comm: comm.barrier())
    assert (len(os.listdir("/proc/self/fd")), set(os.listdir("/dev/shm"))) == before
    assert "moefleet-comm" not in Path("/proc/self/maps").read_text()


@needs_library
def test_a_peer_that_never_joins_is_an_error() -> None:
    assert LIBRARY is not None
    with pytest.raises(CommError, match=r"rank 1 of 2 cannot join the shared-memory group.*one_host=False"):
        ShmComm(LIBRARY, HashStore(), rank=1, size=2, timeout_s=0.2)


@needs_library
def test_a_group_goes_onto_the_tapes_of_one_rank_alone() -> None:
    def main(comm: ShmComm) -> None:
        assert LIBRARY is not None
        comm.go_through(Recorder(LIBRARY))
        with pytest.raises(ValueError, match="tapes of another rank; form a group for each"):
            comm.go_through(Recorder(LIBRARY))

    run_threads(2, main)


def test_sizes_out_of_range_are_refused() -> None:
    library = ctypes.CDLL(None)
    with pytest.raises(ValueError, match="2 to 64 ranks, got size=65"):
        ShmComm(library, HashStore(), rank=0, size=65, timeout_s=1.0)
    with pytest.raises(ValueError, match="slot_bytes must be a multiple of 128"):
        ShmComm(library, HashStore(), rank=0, size=2, timeout_s=1.0, slot_bytes=100)
