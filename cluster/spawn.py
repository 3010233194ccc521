"""A replica whose ranks are processes of this machine: no Ray."""

import logging
import multiprocessing
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess

from cluster.executor import RankGroup
from cluster.pair import open_store
from cluster.rank_process import RankProcessConfig, run_peer, start_leader
from cluster.reports import LoadProgress
from cluster.resolve import ResolvedEngine
from cluster.security import new_token
from router.errors import MemberLostError
from shards.step_profile import StepProfile

_HOST = "127.0.0.1"
_JOIN_S = 15.0


class LocalReplica:
    """Rank 0 in this process and a child process for each other rank. A context manager that leaves none behind.

    Args:
        handoff: serve the caches to other members and pull from theirs.
        token: the cluster token of members that hand over by sockets; "" draws one for this replica alone.
        on_progress, profile: as `start_leader`.
        context: how the processes are made. A forked copy of torch's threads and locks is unsafe, so they start clean;
            who makes many replicas has them forked from a server that imports torch once.
    """

    def __init__(
        self,
        engine: ResolvedEngine,
        *,
        handoff: bool = False,
        token: str = "",
        on_progress: Callable[[LoadProgress], None] | None = None,
        profile: StepProfile | None = None,
        context: SpawnContext | ForkServerContext | None = None,
    ) -> None:
        self._store = open_store(_HOST)
        leader = RankProcessConfig(
            engine=engine,
            rank=0,
            store_host=_HOST,
            store_port=self._store.port,
            token=token or new_token(),
            host=_HOST,
            handoff=handoff,
        )
        self.children: list[BaseProcess] = []
        try:
            self._spawn(leader, context or multiprocessing.get_context("spawn"))
            self.ranks: RankGroup = start_leader(
                leader, self._store, on_progress=on_progress, check=self._check, profile=profile
            )
        except BaseException:
            # Also when interrupted: processes would stay.
            self._end_children()
            raise

    def _spawn(self, leader: RankProcessConfig, context: SpawnContext | ForkServerContext) -> None:
        for rank in range(1, leader.place.layout.world):
            child = context.Process(
                target=_child_main,
                args=(replace(leader, rank=rank, gpu=rank),),
                name=f"moefleet-rank{rank}",
                daemon=True,
            )
            child.start()
            self.children.append(child)

    def _check(self) -> None:
        for rank, child in enumerate(self.children, start=1):
            if child.exitcode is not None:
                raise MemberLostError(f"rank {rank}'s process ended with status {child.exitcode} before it was ready")

    def __enter__(self) -> "LocalReplica":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all ranks."""
        self.ranks.close()
        self._end_children()

    def _end_children(self) -> None:
        for child in self.children:
            child.join(_JOIN_S)
            if child.exitcode is None:
                child.kill()
                child.join()


def _child_main(config: RankProcessConfig) -> None:
    """A child ends with its connection to rank 0; Ctrl-C, which the terminal sends to all, is rank 0's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.WARNING, format=f"rank{config.rank} %(levelname)s %(name)s: %(message)s")
    sys.exit(run_peer(config))
