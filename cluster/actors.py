"""What runs as a Ray actor for each rank: rank 0 with engine and member service, the others behind it."""

import asyncio
import logging
import os
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ray
from ray.actor import ActorClass

from cluster.config import EngineConfig
from cluster.engine import Engine, EngineOutlets
from cluster.member_codec import MemberHello
from cluster.member_service import MemberService
from cluster.ticket import ticket_maker
from router.errors import MoefleetError
from router.load import MemberLoad
from router.request import MemberId, Role

if TYPE_CHECKING:
    from torch.distributed import TCPStore

    from cluster.rank_process import LoadProgress, RankProcessConfig
    from cluster.resolve import ResolvedEngine

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessFacts:
    """Where an actor runs."""

    pid: int
    node: str
    """Address of its node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStart:
    """What one rank is told; Ray's calls carry it, no command line and no log."""

    engine: EngineConfig
    ranks_here: int
    """Ranks of this member on one node, at most."""
    rank: int
    member_id: MemberId
    role: Role
    token: str
    generation: int
    host: str
    """Address of the rank's interface."""
    store_host: str
    store_port: int

    def __repr__(self) -> str:
        return f"RankStart({self.member_id}, rank={self.rank}, generation={self.generation})"


class RankHost:
    """One rank's process. Rank 0: `open`, `lead`; others: `follow`, which returns when the rank ends.

    Torch is imported by the methods that run in the rank's process: the supervisor, which names this class, does
    without its 250 MB and two seconds.
    """

    def __init__(self) -> None:
        # A worker process of Ray shows warnings alone.
        logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        logging.getLogger("cluster").setLevel(logging.INFO)
        self._store: TCPStore | None = None
        self._resolved: ResolvedEngine | None = None
        self._engine: Engine | None = None
        self._service: MemberService | None = None
        self._failed: Future[str] = Future()

    @ray.method(concurrency_group="control")
    def facts(self) -> ProcessFacts:
        """Where this process runs."""
        return ProcessFacts(pid=os.getpid(), node=ray.util.get_node_ip_address())

    @ray.method
    def open(self, config: EngineConfig, host: str, ranks_here: int) -> tuple[int, int]:
        """Check the engine against model and machine, open the replica's rendezvous -> (store port, max_model_len)."""
        from cluster.pair import open_store
        from cluster.resolve import resolve_engine

        self._resolved = resolve_engine(config, ranks_here=ranks_here)
        self._store = open_store(host)
        return self._store.port, self._resolved.max_model_len

    @ray.method
    def lead(self, start: RankStart) -> str:
        """Load with the other ranks, then serve; returns the member service's host:port once all are ready."""
        from cluster.rank_process import start_leader

        assert self._store is not None
        assert self._resolved is not None
        config = process_config(start, self._resolved)
        ranks = start_leader(config, self._store, on_progress=_ProgressLog(start.member_id))
        layout = self._resolved.kv_layout()
        hello = MemberHello(member_id=start.member_id, role=start.role, generation=start.generation, layout=layout)
        service = MemberService(hello, start.token)
        outlets = EngineOutlets(
            on_events=service.on_events,
            make_ticket=ticket_maker(start.member_id, layout, ranks.sources),
            on_failure=lambda error: self._fail(service, error),
        )
        limits = self._resolved.scheduler_config()
        self._engine = Engine(
            limits,
            ranks,
            outlets,
            member_id=start.member_id,
            role=start.role,
            step_timeout_s=start.engine.step_timeout_s,
        )
        self._service = service
        loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, name="member-service", daemon=True).start()
        address = asyncio.run_coroutine_threadsafe(service.start(self._engine, start.host), loop).result()
        self._engine.start()
        logger.info("%s generation %s serves at %s", start.member_id, start.generation, address)
        return address

    @ray.method
    def follow(self, start: RankStart) -> int:
        """Run a rank other than 0 until rank 0 ends it or is gone."""
        from cluster.rank_process import run_peer
        from cluster.resolve import resolve_engine

        return run_peer(process_config(start, resolve_engine(start.engine, ranks_here=start.ranks_here)))

    @ray.method(concurrency_group="control")
    def load(self) -> MemberLoad | None:
        """Rank 0's load; None before it leads. That the engine has failed is told by `wait_failed`."""
        return None if self._engine is None else self._engine.load()

    @ray.method(concurrency_group="control")
    def set_role(self, role: Role) -> None:
        """Report another role to the gateways."""
        if self._engine is not None:
            self._engine.set_role(role)

    @ray.method(concurrency_group="watch")
    def wait_failed(self) -> str:
        """Returns when rank 0's engine has ended by itself, with the reason."""
        return self._failed.result()

    @ray.method(concurrency_group="control")
    def drain(self, timeout_s: float) -> bool:
        """Refuse new requests, finish running ones and keep KV until fetched; True when nothing is left."""
        return self._engine is None or self._engine.drain(timeout_s)

    @ray.method(concurrency_group="control")
    def stop(self) -> None:
        """End the engine and all ranks in order."""
        if self._engine is not None:
            self._engine.stop()

    def _fail(self, service: MemberService, error: MoefleetError) -> None:
        service.on_failure(error)
        if not self._failed.done():
            self._failed.set_result(str(error))


def process_config(start: RankStart, engine: "ResolvedEngine") -> "RankProcessConfig":
    """What the process of one rank runs with; imports torch."""
    from cluster.rank_process import RankProcessConfig

    return RankProcessConfig(
        engine=engine,
        rank=start.rank,
        store_host=start.store_host,
        store_port=start.store_port,
        token=start.token,
        generation=start.generation,
        host=start.host,
        handoff=True,
    )


class _ProgressLog:
    """A log line each tenth of the weights read."""

    def __init__(self, member_id: MemberId) -> None:
        self._member_id = member_id
        self._tenth = -1

    def __call__(self, progress: "LoadProgress") -> None:
        if progress.total_bytes and (tenth := 10 * progress.done_bytes // progress.total_bytes) != self._tenth:
            self._tenth = tenth
            read, total = progress.done_bytes / 1e9, progress.total_bytes / 1e9
            logger.info("%s: weights %.2f of %.2f GB read", self._member_id, read, total)


# Long calls (lead, follow) have the default group's one thread; looks and orders come in beside them.
# Ray's stub of remote() leaves concurrency_groups out.
RankActor: ActorClass[RankHost] = ray.remote(
    concurrency_groups={"watch": 1, "control": 4},  # pyrefly: ignore[unexpected-keyword]
    max_restarts=0,
    max_task_retries=0,
)(RankHost)
