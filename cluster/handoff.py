"""The decode side of a hand-off: pulls a ticket's blocks and state into this rank's cache, in threads of its own.

A pull counts only when every read ended before the ticket's expiry, since the source may reuse its blocks after that.
"""

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cluster.early import MOST_BEHIND_STEPS
from cluster.kv_server import KvServer
from cluster.kv_wire import MAX_PAYLOAD_BYTES
from cluster.made_once import MadeOnce
from cluster.plan import KvLayout, KvTicket, PullDone, PullOrder, SourceRank
from cluster.recut import Fragment, KvMove, Recut, check_pair, fragments, recut
from cluster.transports import Transport, check_expiry, host_key
from router.errors import CorruptDataError, HandoffError
from shards.cache import CacheShape, KvCache, cache_shape
from shards.config import ModelConfig

logger = logging.getLogger(__name__)

_WORKERS = 2
_MAX_LAYOUTS = 16
_JOIN_S = 5.0
_Orders = queue.SimpleQueue[PullOrder | None]


def source_rank(cache: KvCache, tp_rank: int, server: KvServer) -> SourceRank:
    """How a ticket names this rank."""
    return SourceRank(tp_rank=tp_rank, host_key=host_key(), pid=os.getpid(), pool_fd=cache.fd, address=server.address)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cuts:
    """What of a source lane this rank takes."""

    shapes: Sequence[CacheShape]
    """Of the source's ranks."""
    recut: Recut


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """What a pull takes of one source rank."""

    way: Transport
    rank: SourceRank
    shape: CacheShape
    pieces: list[Fragment] = field(default_factory=list)


class _Pulled:
    """How a pull went; written by its thread."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self.waited_s = 0.0
        """For the source's step."""
        self.refetches = 0

    def refetched(self) -> None:
        """A frame came damaged."""
        self.refetches += 1


class Puller:
    """Carries out the pulls of one rank. `start` never blocks.

    Args:
        cache: this rank's cache; pulls write rows that no step touches.
        model: the model both sides serve.
        layout: this member's geometry, to be compared with the ticket's.
        tp_rank: this rank's place in its lane.
        transports: the ways to sources, from `make_transports`; the first that reaches a source is taken. Closed with
            the puller.
        on_done: told the end of each pull, in a thread of the puller.
        now: unix seconds.
    """

    def __init__(
        self,
        cache: KvCache,
        model: ModelConfig,
        layout: KvLayout,
        *,
        tp_rank: int,
        transports: Sequence[Transport],
        on_done: Callable[[PullDone], None],
        now: Callable[[], float] = time.time,
    ) -> None:
        self._shape = cache.shape
        self._model = model
        self._layout = layout
        self._tp_rank = tp_rank
        self._on_done = on_done
        self._now = now
        self._cuts = MadeOnce(self._make_cuts, most=_MAX_LAYOUTS)
        """By the source's geometry: they take longer than a small pull."""
        self._transports = transports
        self._orders: _Orders = queue.SimpleQueue()
        self._behind_steps: _Orders = queue.SimpleQueue()
        """Those that wait for a step of the source, in threads of their own: nobody waits behind them."""
        turns = [self._orders] * _WORKERS + [self._behind_steps] * MOST_BEHIND_STEPS
        self._threads = [
            threading.Thread(target=self._work, args=(orders,), name=f"kv-pull-{index}", daemon=True)
            for index, orders in enumerate(turns)
        ]
        for thread in self._threads:
            thread.start()

    def start(self, order: PullOrder) -> None:
        """Begin a pull. Orders are as many as the scheduler has rows for."""
        (self._orders if order.ticket.step < 0 else self._behind_steps).put(order)

    def close(self) -> None:
        """End the threads; pulls under way fail."""
        for _ in self._threads:
            self._orders.put(None)
            self._behind_steps.put(None)
        for transport in self._transports:
            transport.close()
        for thread in self._threads:
            thread.join(_JOIN_S)

    def _work(self, orders: _Orders) -> None:
        while (order := orders.get()) is not None:
            began = time.monotonic()
            error, pulled = "", _Pulled()
            try:
                self._pull(order, pulled)
            except (HandoffError, CorruptDataError, OSError) as problem:
                error = str(problem)
                logger.warning("ticket %s: pull failed: %s", order.ticket.id, error)
            except Exception as problem:
                # A pull that is never told of would hold its sequence for ever.
                error = f"{type(problem).__name__}: {problem}"
                logger.exception("ticket %s: pull failed", order.ticket.id)
            self._on_done(
                PullDone(
                    pull_id=order.pull_id,
                    error=error,
                    num_bytes=pulled.num_bytes,
                    # Load reports price a transfer by it.
                    seconds=time.monotonic() - began - pulled.waited_s,
                    # Also those of a pull that failed.
                    refetches=pulled.refetches,
                )
            )

    def _pull(self, order: PullOrder, pulled: _Pulled) -> None:
        """Carry out an order."""
        ticket = order.ticket
        check_expiry(ticket, self._now())
        check_pair(ticket.layout, self._layout)
        if sorted(rank.tp_rank for rank in ticket.ranks) != list(range(ticket.layout.tp)):
            raise HandoffError(f"ticket {ticket.id} names {len(ticket.ranks)} ranks of a lane of {ticket.layout.tp}")
        if order.dst_slot >= 0 and ticket.state_slot < 0:
            raise HandoffError(f"ticket {ticket.id} has no recurrent state, which this model needs")
        cuts = self._cuts.get(ticket.layout)
        pieces = self._fragments(order, cuts.recut)
        ranks, sources = {rank.tp_rank: rank for rank in ticket.ranks}, dict[int, _Source]()
        for piece in pieces:
            if (source := sources.get(piece.source)) is None:
                rank = ranks[piece.source]
                shape = cuts.shapes[piece.source]
                source = sources[piece.source] = _Source(way=self._way(ticket, rank), rank=rank, shape=shape)
            source.pieces.append(piece)
        if ticket.step < 0:
            for source in sources.values():
                source.way.read(ticket, source.rank, source.shape, source.pieces, pulled.refetched)
        else:
            self._pull_behind(ticket, list(sources.values()), pulled)
        check_expiry(ticket, self._now())
        pulled.num_bytes = sum(piece.dst.total_bytes for piece in pieces)

    def _pull_behind(self, ticket: KvTicket, sources: list[_Source], pulled: _Pulled) -> None:
        """Read what a step of the source writes, as many layers as are there at a time."""
        done, end = 0, 1 + max((piece.layer for source in sources for piece in source.pieces), default=-1)
        while done < end:
            began = time.monotonic()
            there = min(source.way.written(ticket, source.rank, done) for source in sources)
            pulled.waited_s += time.monotonic() - began
            for source in sources:
                ready = [piece for piece in source.pieces if done <= piece.layer < there]
                source.way.read(ticket, source.rank, source.shape, ready, pulled.refetched)
            done = there

    def _make_cuts(self, layout: KvLayout) -> _Cuts:
        shapes = self._source_shapes(layout)
        return _Cuts(shapes=shapes, recut=recut(shapes, self._shape, self._tp_rank))

    def _source_shapes(self, layout: KvLayout) -> list[CacheShape]:
        return [
            cache_shape(
                self._model,
                layout.tp,
                rank,
                num_blocks=layout.num_blocks,
                block_size=layout.block_size,
                num_slots=layout.num_slots,
                dtype=self._shape.dtype,
                state_dtype=self._shape.state_dtype,
            )
            for rank in range(layout.tp)
        ]

    def _fragments(self, order: PullOrder, cuts: Recut) -> list[Fragment]:
        move = KvMove(
            first=order.first,
            end=order.ticket.num_tokens,
            src_blocks=order.ticket.blocks,
            dst_blocks=order.dst_blocks,
        )
        slots = (order.ticket.state_slot, order.dst_slot) if order.dst_slot >= 0 else None
        return fragments(cuts, move, slots, max_bytes=MAX_PAYLOAD_BYTES)

    def _way(self, ticket: KvTicket, rank: SourceRank) -> Transport:
        way = next((transport for transport in self._transports if transport.reaches(rank)), None)
        if way is None:
            raise HandoffError(f"ticket {ticket.id}: no transport leads to rank {rank.tp_rank}; check kv_transport")
        return way
