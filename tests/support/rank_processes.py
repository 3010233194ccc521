"""Ranks as processes of their own, with real groups: gloo, or shared memory where the native library is built."""

import tempfile
from pathlib import Path

import torch
import torch.multiprocessing as mp
from torch.distributed import FileStore

from shards.batch import LaneOutput, StepBatch
from shards.collectives import make_comms
from shards.mesh import Layout, Place
from tests.support.fork_server import fork_server
from tests.support.stepping import Work, lane_batches, make_rank


def run_in_processes(model: Path, work: Work, layout: Layout, *, one_host: bool) -> list[list[LaneOutput]]:
    """Carry out `work` with a process for each rank -> for each lane, its first rank's answers, step by step."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (model, work, layout, one_host, Path(folder))
        fork_server()
        mp.start_processes(_rank_main, arguments, nprocs=layout.world, start_method="forkserver")
        return [torch.load(Path(folder) / f"lane{lane}", weights_only=False) for lane in range(layout.dp)]


def _rank_main(index: int, model: Path, work: Work, layout: Layout, one_host: bool, folder: Path) -> None:
    torch.set_num_threads(1)
    place = Place(layout=layout, rank=index)
    store = FileStore(str(folder / "store"), layout.world)
    comms = make_comms(store, place, generation=0, device="cpu", deterministic=False, one_host=one_host)
    rank = make_rank(model, place, comms, max_rows=len(work.prompts))
    lanes = [lane_batches(work, lane, layout.dp) for lane in range(layout.dp)]
    mine = lanes[place.dp_rank]
    mine = mine + [StepBatch()] * (max(len(batches) for batches in lanes) - len(mine))
    outputs = [rank.step(batch) for batch in mine]
    if place.is_lane_leader:
        torch.save(outputs, folder / f"lane{place.dp_rank}")
    comms.world.barrier()
    rank.close()
    comms.close()
