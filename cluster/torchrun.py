"""A replica whose ranks torchrun started: each process finds its place in torchrun's variables."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from torch.distributed import PrefixStore, TCPStore

from cluster.executor import RankGroup
from cluster.rank_process import RankProcessConfig, run_peer, start_leader
from cluster.reports import LoadProgress
from cluster.resolve import ResolvedEngine
from cluster.security import new_token
from router.errors import ConfigError
from shards.mesh import Layout

_LOOPBACK: Final = "127.0.0.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchrunPlace:
    """What torchrun tells a process."""

    rank: int
    world: int
    local_rank: int
    """Place among the ranks of this machine."""
    ranks_here: int
    """Ranks that torchrun runs on this machine."""
    address: str
    """Of rank 0's machine, where torchrun's store is."""
    port: int
    restart: int
    agent_store: bool
    """torchrun itself serves the store; else rank 0 does."""


def torchrun_place(environment: Mapping[str, str] | None = None) -> TorchrunPlace:
    """Read torchrun's variables.

    Raises:
        ConfigError: this process was not started by torchrun.
    """
    given = os.environ if environment is None else environment
    try:
        return TorchrunPlace(
            rank=int(given["RANK"]),
            world=int(given["WORLD_SIZE"]),
            local_rank=int(given["LOCAL_RANK"]),
            ranks_here=int(given["LOCAL_WORLD_SIZE"]),
            address=given["MASTER_ADDR"],
            port=int(given["MASTER_PORT"]),
            restart=int(given.get("TORCHELASTIC_RESTART_COUNT", "0")),
            agent_store=given.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )
    except KeyError as error:
        raise ConfigError(
            f"{error.args[0]} is not set: start the ranks with torchrun --nproc-per-node N, or let them be spawned"
        ) from error


def check_world(place: TorchrunPlace, layout: Layout) -> None:
    """Refuse a layout of another number of ranks than torchrun started.

    Raises:
        ConfigError: names both numbers.
    """
    if place.world != layout.world:
        raise ConfigError(
            f"torchrun started {place.world} rank(s), the layout tp={layout.tp} dp={layout.dp} has {layout.world}; "
            "make them equal"
        )


class TorchrunReplica:
    """Rank 0's view of a replica under torchrun. A context manager that ends the other ranks."""

    def __init__(
        self,
        engine: ResolvedEngine,
        place: TorchrunPlace,
        *,
        on_progress: Callable[[LoadProgress], None] | None = None,
    ) -> None:
        check_world(place, engine.config.layout)
        self._store = TCPStore(place.address, place.port, is_master=not place.agent_store, wait_for_workers=False)
        token = new_token()
        PrefixStore("token", self._store).set(str(place.restart), token)
        config = _process_config(engine, place, token)
        self.ranks: RankGroup = start_leader(config, self._store, on_progress=on_progress)

    def __enter__(self) -> "TorchrunReplica":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all ranks."""
        self.ranks.close()


def run_torchrun_peer(engine: ResolvedEngine, place: TorchrunPlace) -> int:
    """Run a rank other than 0 until rank 0 ends it; returns a process exit status. Raises as `run_peer`."""
    check_world(place, engine.config.layout)
    store = TCPStore(place.address, place.port, is_master=False, wait_for_workers=False)
    token = PrefixStore("token", store).get(str(place.restart)).decode()
    return run_peer(_process_config(engine, place, token))


def _process_config(engine: ResolvedEngine, place: TorchrunPlace, token: str) -> RankProcessConfig:
    return RankProcessConfig(
        engine=engine,
        rank=place.rank,
        gpu=place.local_rank,
        store_host=place.address,
        store_port=place.port,
        token=token,
        generation=place.restart,
        host=_LOOPBACK if place.ranks_here == place.world else place.address,
    )
