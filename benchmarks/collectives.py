"""How long two ranks of one host take for a collective: gloo against shared memory.

    python benchmarks/collectives.py [--ranks 2] [--rounds 300]

Prints microseconds of one operation, the median over groups of ten back to back.
Ranks that outnumber the free cores measure the scheduler.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed import FileStore

from shards.collectives import make_comms
from shards.comm import Comm
from shards.kernels.library import load_library
from shards.mesh import Layout, Place

SIZES = {"4 KB": 4 << 10, "64 KB": 64 << 10, "1 MB": 1 << 20}
_TOGETHER = 10
Operation = Callable[[Comm, Tensor], object]


def _exchange(comm: Comm, x: Tensor) -> Tensor:
    counts = [x.shape[0] // comm.size] * comm.size
    return comm.all_to_all(x, counts, counts)


OPERATIONS: dict[str, Operation] = {
    "all_reduce": lambda comm, x: comm.all_reduce(x),
    "all_gather": lambda comm, x: comm.all_gather(x),
    "broadcast": lambda comm, x: comm.broadcast(x, 0),
    "all_to_all": _exchange,
}


def measure_us(comm: Comm, operation: Operation, x: Tensor, rounds: int) -> float:
    """Microseconds of one operation: the median over groups of ten."""
    times: list[float] = []
    for _ in range(max(2, rounds // _TOGETHER)):
        # Back to back: a rank that comes late in one round cannot hide its wait between two timed ones.
        start = time.perf_counter()
        for _ in range(_TOGETHER):
            operation(comm, x)
        times.append((time.perf_counter() - start) / _TOGETHER)
    return statistics.median(times) * 1e6


def _rank_main(rank: int, ranks: int, rounds: int, folder: Path) -> None:
    torch.set_num_threads(1)
    place = Place(layout=Layout(tp=ranks), rank=rank)
    results: dict[tuple[str, str], list[float]] = {}
    for generation, one_host in enumerate((False, True)):
        store = FileStore(str(folder / "store"), ranks)
        comms = make_comms(store, place, generation=generation, device="cpu", deterministic=False, one_host=one_host)
        for dtype in (torch.float32, torch.bfloat16):
            for size, num_bytes in SIZES.items():
                x = torch.zeros(num_bytes // dtype.itemsize, dtype=dtype)
                for name, operation in OPERATIONS.items():
                    label = f"{name} {str(dtype).removeprefix('torch.')}"
                    results.setdefault((label, size), []).append(measure_us(comms.world, operation, x, rounds))
        comms.world.barrier()
        comms.close()
    if rank == 0:
        _report(results, ranks)


def _report(results: dict[tuple[str, str], list[float]], ranks: int) -> None:
    print(f"{ranks} ranks, median us   {'size':>6} {'gloo':>9} {'shm':>9} {'ratio':>7}")
    for (label, size), (gloo_us, shm_us) in sorted(results.items()):
        print(f"{label:<22} {size:>6} {gloo_us:>9.1f} {shm_us:>9.1f} {gloo_us / shm_us:>6.1f}x")


def main() -> None:
    """Run the ranks and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--rounds", type=int, default=300, help="timed rounds of each operation (default 300)")
    options = parser.parse_args()
    if load_library() is None:
        raise SystemExit("the native library is not built: run `python hatch_build.py`")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank_main, (options.ranks, options.rounds, Path(folder)), nprocs=options.ranks)


if __name__ == "__main__":
    main()
