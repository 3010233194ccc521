"""Lanes of caches with contents behind real KV servers, and pullers that read them."""

import dataclasses
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec

import pytest

from cluster.config import KvTransport
from cluster.handoff import Puller, source_rank
from cluster.kv_server import KvServer
from cluster.plan import KvTicket, PullDone, PullOrder
from cluster.rank_memory import RankMemory
from cluster.security import new_token
from cluster.transports import make_transports
from shards.cache import KvCache
from shards.config import ModelConfig
from tests.support.kv_patterns import Geometry, GlobalState, fill, make_global, make_lane

TOKEN = new_token()
NIXL = pytest.param(
    "nixl", marks=pytest.mark.skipif(find_spec("nixl") is None, reason="nixl is not installed: moefleet[nixl]")
)
WAYS = ("auto", "tcp", "p2p", NIXL)
"""auto is shared memory here."""
BLOCKS = ((7, 2), (8, 3), (1, 9))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A lane of caches with contents, each with its server, and a ticket on them."""

    model: ModelConfig
    state: GlobalState
    servers: list[KvServer]
    lane: list[KvCache]
    ticket: KvTicket


@contextmanager
def sourcing(model: ModelConfig, geometry: Geometry, *, lease_s: float = 60) -> Iterator[Source]:
    lane, state = make_lane(model, geometry), make_global(model, geometry)
    fill(lane, state)
    servers = [KvServer(cache.buffer, TOKEN, cache.progress) for cache in lane]
    ticket = KvTicket(
        id="t1",
        member_id="p0",
        layout=geometry.layout(model),
        ranks=tuple(source_rank(cache, rank, servers[rank]) for rank, cache in enumerate(lane)),
        blocks=(7, 8, 1),
        state_slot=2 if model.delta_layers else -1,
        num_tokens=11,
        expires_unix_s=time.time() + lease_s,
    )
    try:
        yield Source(model=model, state=state, servers=servers, lane=lane, ticket=ticket)
    finally:
        for server in servers:
            server.close()


def make_order(ticket: KvTicket) -> PullOrder:
    return PullOrder(
        pull_id=5,
        ticket=ticket,
        lane=0,
        first=0,
        dst_blocks=tuple(dst for _, dst in BLOCKS),
        dst_slot=1 if ticket.state_slot >= 0 else -1,
    )


class Pulling:
    """A puller, and what it told."""

    def __init__(
        self,
        cache: KvCache,
        source: Source,
        geometry: Geometry,
        *,
        tp_rank: int = 0,
        token: str = TOKEN,
        way: KvTransport = "auto",
        now: Callable[[], float] = time.time,
    ) -> None:
        self._done: queue.SimpleQueue[PullDone] = queue.SimpleQueue()
        self.puller = Puller(
            cache,
            source.model,
            geometry.layout(source.model),
            tp_rank=tp_rank,
            transports=make_transports(way, RankMemory(cache.buffer), token, now=now),
            on_done=self._done.put,
            now=now,
        )

    def wait(self, order: PullOrder) -> PullDone:
        """Carry out one order."""
        self.puller.start(order)
        return self.result()

    def result(self) -> PullDone:
        """How the next pull ends."""
        return self._done.get(timeout=20)

    def run(self, *orders: PullOrder) -> list[PullDone]:
        """Carry out orders and end."""
        for order in orders:
            self.puller.start(order)
        done = [self._done.get(timeout=20) for _ in orders]
        self.puller.close()
        return done


def pull(
    source: Source, ticket: KvTicket, geometry: Geometry, *, way: KvTransport = "auto", token: str = TOKEN
) -> tuple[Sequence[KvCache], list[PullDone]]:
    """Every rank of a fresh lane pulls; returns the lane and how the pulls ended."""
    lane = make_lane(source.model, geometry)
    done: list[PullDone] = []
    for rank, cache in enumerate(lane):
        pulling = Pulling(cache, source, geometry, tp_rank=rank, token=token, way=way)
        done += pulling.run(make_order(ticket))
    return lane, done
