"""What every group of ranks must do, and ranks as processes to do it in."""

import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed import FileStore, Store

from shards.collectives import make_comms
from shards.comm import Comm, CommError, Comms, mixed, tree_sum
from shards.mesh import Layout, Place
from tests.support.fork_server import fork_server

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.uint8)
RankMain = Callable[[Store, Place, bool], None]


def run_ranks(main: RankMain, layout: Layout, *, one_host: bool) -> list[int | None]:
    """Run `main(store, place, one_host)` in a process for each rank -> exit codes by rank, -9 for a killed one."""
    with tempfile.TemporaryDirectory() as folder:
        context = fork_server()
        processes = [
            context.Process(
                target=_process_main, args=(main, Path(folder) / "store", Place(layout=layout, rank=r), one_host)
            )
            for r in range(layout.world)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + 100
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
            process.join()
        return codes


def _process_main(main: RankMain, path: Path, place: Place, one_host: bool) -> None:
    torch.set_num_threads(1)
    main(FileStore(str(path), place.layout.world), place, one_host)


def make_part(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The tensor of one rank: the same wherever it is made."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(rank)) * 30
    return x.abs().to(dtype) if dtype == torch.uint8 else x.to(dtype)


def check_operations(comm: Comm, *, tree: bool) -> None:
    """Every operation over dtypes and shapes; `tree`: sums must have tree_sum's bits."""
    for dtype in DTYPES:
        for shape in ((1,), (3, 5), (0, 4), (700, 9)):
            parts = [make_part(r, shape, dtype) for r in range(comm.size)]
            gathered = comm.all_gather(parts[comm.rank].clone())
            assert torch.equal(gathered, torch.cat(parts))
            for src in range(comm.size):
                assert torch.equal(comm.broadcast(parts[comm.rank].clone(), src), parts[src])
            if dtype != torch.uint8:
                check_sum(comm, parts, tree=tree)
        check_exchange(comm, dtype)
    check_strided(comm)
    if tree:
        check_mixes(comm)
    comm.barrier()


def check_sum(comm: Comm, parts: list[Tensor], *, tree: bool) -> None:
    """all_reduce of `parts`."""
    wide = [part.float() for part in parts] if parts[0].dtype == torch.bfloat16 else parts
    expected = tree_sum(wide).to(parts[0].dtype)
    total = comm.all_reduce(parts[comm.rank].clone())
    if tree or not expected.is_floating_point():
        assert torch.equal(total, expected)
    else:
        torch.testing.assert_close(total, expected, rtol=0.05, atol=1.0)


def check_mixes(comm: Comm) -> None:
    """Weighted sums of experts' results: parts of sums, with and without a row beside them, and whole rows."""
    for dtype in (torch.float32, torch.bfloat16):
        for T, K, C in ((0, 2, 8), (1, 1, 3), (9, 3, 21)):
            weights = make_part(50, (T, K), torch.float32)
            parts = [make_part(r, (T, K, C), torch.float32) for r in range(comm.size)]
            shared = [make_part(60 + r, (T, C), torch.float32) for r in range(comm.size)]
            total, alone = tree_sum(parts).to(dtype), tree_sum(shared).to(dtype)
            out, none = comm.mix_sums(parts[comm.rank].clone(), weights, None, dtype)
            assert torch.equal(out, mixed(total, weights))
            assert none is None
            out, beside = comm.mix_sums(parts[comm.rank].clone(), weights, shared[comm.rank].clone(), dtype)
            assert beside is not None
            assert torch.equal(out, mixed(total, weights))
            assert torch.equal(beside, alone)
            ids = torch.randint(0, 3 * comm.size, (T, K), generator=torch.Generator().manual_seed(T))
            rows = make_part(70, (T, K, C), dtype)
            mine = rows.masked_fill((ids // 3 != comm.rank).unsqueeze(2), 0)
            assert torch.equal(comm.mix_rows(mine, ids, 3, weights), mixed(rows, weights))
            assert torch.equal(comm.sum_to(parts[comm.rank].clone(), dtype), total)


def check_exchange(comm: Comm, dtype: torch.dtype) -> None:
    """all_to_all with uneven pieces, empty ones, and nothing at all."""

    def uneven(src: int, dst: int) -> int:
        return 0 if (src + dst) % 3 == 0 else 400 * src + dst

    def one_way(src: int, dst: int) -> int:
        return 900 * dst if src == 0 else 0

    def none(src: int, dst: int) -> int:
        return 0

    for count in (uneven, one_way, none):
        ranks = range(comm.size)
        sent = [make_part(src, (sum(count(src, dst) for dst in ranks), 3), dtype) for src in ranks]
        recv_counts = [count(src, comm.rank) for src in ranks]
        expected = [sent[src].split([count(src, dst) for dst in ranks])[comm.rank] for src in ranks]
        send_counts = [count(comm.rank, dst) for dst in ranks]
        got = comm.all_to_all(sent[comm.rank], send_counts, recv_counts)
        assert got.dtype == dtype
        assert torch.equal(got, torch.cat(expected))


def check_strided(comm: Comm) -> None:
    """Inputs that are not contiguous."""
    parts = [make_part(r, (6, 8), torch.float32).t() for r in range(comm.size)]
    mine = parts[comm.rank]
    assert torch.equal(comm.all_gather(mine), torch.cat(parts))
    assert torch.equal(comm.broadcast(mine, comm.size - 1), parts[-1])
    split = [8] + [0] * (comm.size - 1)
    expected = torch.cat(parts) if comm.rank == 0 else torch.empty(0, 6)
    assert torch.equal(comm.all_to_all(mine, split, [8 if comm.rank == 0 else 0] * comm.size), expected)
    torch.testing.assert_close(comm.all_reduce(mine), tree_sum([part.clone() for part in parts]))


def form(store: Store, place: Place, one_host: bool, *, generation: int, timeout_s: float = 60.0) -> Comms:
    """Deterministic groups in generation 1 and later, plain ones in generation 0."""
    return make_comms(
        store,
        place,
        generation=generation,
        device="cpu",
        deterministic=generation > 0,
        one_host=one_host,
        timeout_s=timeout_s,
    )


def exercise_groups(store: Store, place: Place, one_host: bool) -> None:
    """Two generations, one behind the other; groups have the right members and do every operation."""
    for generation in (0, 1):
        comms = form(store, place, one_host, generation=generation)
        layout = place.layout
        assert (comms.tp.size, comms.dp.size, comms.world.size) == (layout.tp, layout.dp, layout.world)
        assert (comms.tp.rank, comms.dp.rank, comms.world.rank) == (place.tp_rank, place.dp_rank, place.rank)
        lane = comms.tp.all_gather(torch.tensor([place.rank])).tolist()
        assert lane == [place.dp_rank * layout.tp + t for t in range(layout.tp)]
        equals = comms.dp.all_gather(torch.tensor([place.rank])).tolist()
        assert equals == [d * layout.tp + place.tp_rank for d in range(layout.dp)]
        for comm in {id(c): c for c in (comms.tp, comms.dp, comms.world) if c.size > 1}.values():
            check_operations(comm, tree=one_host or generation > 0)
        comms.close()
        comms.close()
        if comms.world.size > 1:
            with pytest.raises(CommError, match="the group was closed"):
                comms.world.barrier()


def lose_rank_one(store: Store, place: Place, one_host: bool) -> None:
    """Rank 1 is killed while all loop over sums; the others see an error, and form the next generation without it."""
    comms = form(store, place, one_host, generation=0, timeout_s=8.0)
    x = torch.ones(500)
    for _ in range(50):
        comms.world.all_reduce(x.clone())
    if place.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(CommError, match="all_reduce on rank"):
        comms.world.all_reduce(x.clone())
    waited_s = time.monotonic() - started
    assert waited_s < (2.0 if one_host else 20.0)
    comms.close()
    layout = Layout(tp=place.layout.world - 1)
    heir = Place(layout=layout, rank=place.rank - (place.rank > 1))
    comms = form(store, heir, one_host, generation=1)
    assert comms.world.all_reduce(torch.ones(3)).tolist() == [float(layout.world)] * 3
    comms.close()
