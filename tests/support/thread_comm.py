"""Ranks as threads of one process: the groups of a layout, exchanging tensors through shared lists."""

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor
from torch.distributed import HashStore

from shards.collectives import make_comms
from shards.comm import Comm, Comms, LocalComm, mixed, sum_then_mix, tree_sum
from shards.mesh import Layout, Place, dp_groups, tp_groups

Result = TypeVar("Result")


class _Board:
    """What the threads of one group show each other."""

    def __init__(self, size: int) -> None:
        self.shown: list[list[Tensor]] = [[] for _ in range(size)]
        self.barrier = threading.Barrier(size, timeout=60)


class ThreadComm:
    """One thread's place in a group; sums as a balanced tree by rank."""

    near = True

    def __init__(self, board: _Board, rank: int) -> None:
        self._board = board
        self.size = len(board.shown)
        self.rank = rank

    def _exchange(self, pieces: list[Tensor]) -> list[list[Tensor]]:
        """Show a copy of my pieces, see everybody's."""
        self._board.shown[self.rank] = [piece.clone() for piece in pieces]
        self._board.barrier.wait()
        seen = [list(shown) for shown in self._board.shown]
        self._board.barrier.wait()
        return seen

    def all_reduce(self, x: Tensor) -> Tensor:
        return tree_sum([shown[0] for shown in self._exchange([x])])

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.cat([shown[0] for shown in self._exchange([x])])

    def broadcast(self, x: Tensor, src: int) -> Tensor:
        return self._exchange([x])[src][0].clone()

    def all_to_all(self, x: Tensor, send_counts: list[int], recv_counts: list[int]) -> Tensor:
        received = [shown[self.rank] for shown in self._exchange(list(x.split(send_counts)))]
        assert [piece.shape[0] for piece in received] == recv_counts
        return torch.cat(received)

    def sum_to(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return self.all_reduce(x).to(dtype)

    def mix_sums(
        self, y_TKC: Tensor, weights_TK: Tensor, shared_TC: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        return sum_then_mix(self, y_TKC, weights_TK, shared_TC, dtype)

    def mix_rows(self, y_TKC: Tensor, ids_TK: Tensor, held: int, weights_TK: Tensor) -> Tensor:
        return mixed(self.all_reduce(y_TKC), weights_TK)

    def barrier(self) -> None:
        self._board.barrier.wait()

    def close(self) -> None:
        self._board.barrier.abort()


def thread_comms(layout: Layout) -> list[Comms]:
    """The groups of every rank of a layout, by global rank."""

    def comms_of(groups: list[list[int]]) -> dict[int, Comm]:
        boards = [_Board(len(group)) for group in groups]
        return {
            rank: ThreadComm(board, i) if len(group) > 1 else LocalComm()
            for group, board in zip(groups, boards, strict=True)
            for i, rank in enumerate(group)
        }

    tp, dp = comms_of(tp_groups(layout)), comms_of(dp_groups(layout))
    world = comms_of([list(range(layout.world))])
    return [Comms(tp=tp[r], dp=dp[r], world=world[r]) for r in range(layout.world)]


def on_every_rank(
    layout: Layout, work: Callable[[Place, Comms], Result], *, shared_memory: bool = False
) -> list[Result]:
    """Run `work` on a thread for each rank; a rank that fails frees the others, and its error is raised.

    With `shared_memory` the groups are those of ranks that are processes of one host.
    """
    comms, store = thread_comms(layout), HashStore()

    def groups_of(place: Place) -> Comms:
        if not shared_memory:
            return comms[place.rank]
        return make_comms(store, place, generation=0, device="cpu", deterministic=True, one_host=True)

    def run(rank: int) -> Result:
        place = Place(layout=layout, rank=rank)
        groups = groups_of(place)
        try:
            return work(place, groups)
        finally:
            # All ranks are done with a group before one leaves it, or one of them failed.
            if sys.exc_info()[0] is not None or shared_memory:
                groups.close()

    with ThreadPoolExecutor(layout.world) as pool:
        futures = [pool.submit(run, rank) for rank in range(layout.world)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
        raise error
    return [future.result() for future in futures]
