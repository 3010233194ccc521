"""The decode side of a hand-off: pulls a ticket's blocks and state into this rank's cache, in threads of its own.

A source on the same host is mapped through /proc/<pid>/fd/<fd> and copied directly; any other is read over TCP. A
pull counts only when every read ended before the ticket's expiry, since the source may reuse its blocks after that.
"""

import logging
import mmap
import os
import queue
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cluster.plan import KvLayout, KvTicket, PullDone, PullOrder, SourceRank
from cluster.recut import Fragment, KvMove, Recut, check_pair, fragments, recut
from cluster.transport import (
    IDLE_TIMEOUT_S,
    MAX_PAYLOAD_BYTES,
    MAX_SPANS,
    ByteArray,
    DamagedFrameError,
    KvConnection,
    KvServer,
    RankMemory,
)
from router.errors import CorruptDataError, HandoffError
from shards.cache import CacheShape, KvCache, cache_shape
from shards.config import ModelConfig

logger = logging.getLogger(__name__)

_WORKERS = 2
_MAX_MAPS = 16
_MAX_LAYOUTS = 16
_MAX_IDLE_CONNECTIONS = 32
_IO_TIMEOUT_S = 5.0
_PIPELINED = 2
_MAX_TRIES = 3
"""Times a frame is asked for: bytes that come damaged again and again are no accident of the way."""
_COPY_BYTES = 64 << 20
"""Largest copy between two looks at the clock."""


def host_key() -> str:
    """Equal for processes that can map each other's memory: same boot, same pid namespace, same user."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    boot_id = boot.read_text().strip() if boot.exists() else f"pid-{os.getpid()}"
    namespace = Path("/proc/self/ns/pid")
    return f"{boot_id}/{namespace.readlink() if namespace.exists() else ''}/{os.getuid()}"


def source_rank(cache: KvCache, tp_rank: int, server: KvServer) -> SourceRank:
    """How a ticket names this rank."""
    return SourceRank(tp_rank=tp_rank, host_key=host_key(), pid=os.getpid(), pool_fd=cache.fd, address=server.address)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    """Fragments of one source that one frame carries."""

    fragments: tuple[Fragment, ...]
    num_bytes: int
    tries: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cuts:
    """What of a source lane this rank takes."""

    shapes: Sequence[CacheShape]
    """Of the source's ranks."""
    recut: Recut


@dataclass(frozen=True, slots=True, kw_only=True)
class _Moved:
    """What one pull brought."""

    num_bytes: int = 0
    refetches: int = 0


class Puller:
    """Carries out the pulls of one rank. `start` never blocks.

    Args:
        cache: this rank's cache; pulls write rows that no step touches.
        model: the model both sides serve.
        layout: this member's geometry, to be compared with the ticket's.
        tp_rank: this rank's place in its lane.
        token: the cluster token, for sources on other hosts.
        on_done: told the end of each pull, in a thread of the puller.
        now: unix seconds.
        same_host: map the memory of sources whose host_key equals ours; off reads everything over TCP.
    """

    def __init__(
        self,
        cache: KvCache,
        model: ModelConfig,
        layout: KvLayout,
        *,
        tp_rank: int,
        token: str,
        on_done: Callable[[PullDone], None],
        now: Callable[[], float] = time.time,
        same_host: bool = True,
    ) -> None:
        self._shape = cache.shape
        self._memory = RankMemory(cache.buffer)
        self._model = model
        self._layout = layout
        self._tp_rank = tp_rank
        self._on_done = on_done
        self._now = now
        self._cuts: dict[KvLayout, _Cuts] = {}
        """By the source's geometry; of a few members' kinds."""
        self._host_key = host_key() if same_host else ""
        self._sources = _Sources(token)
        self._orders: queue.SimpleQueue[PullOrder | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"kv-pull-{index}", daemon=True) for index in range(_WORKERS)
        ]
        for thread in self._threads:
            thread.start()

    def start(self, order: PullOrder) -> None:
        """Begin a pull. Orders are as many as the scheduler has rows for."""
        self._orders.put(order)

    def close(self) -> None:
        """End the threads; pulls under way fail."""
        for _ in self._threads:
            self._orders.put(None)
        self._sources.close()
        for thread in self._threads:
            thread.join(_IO_TIMEOUT_S)

    def _work(self) -> None:
        while (order := self._orders.get()) is not None:
            began = time.monotonic()
            error, moved = "", _Moved()
            try:
                moved = self._pull(order)
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
                    num_bytes=moved.num_bytes,
                    seconds=time.monotonic() - began,
                    refetches=moved.refetches,
                )
            )

    def _pull(self, order: PullOrder) -> "_Moved":
        ticket = order.ticket
        self._check_expiry(ticket)
        check_pair(ticket.layout, self._layout)
        if sorted(rank.tp_rank for rank in ticket.ranks) != list(range(ticket.layout.tp)):
            raise HandoffError(f"ticket {ticket.id} names {len(ticket.ranks)} ranks of a lane of {ticket.layout.tp}")
        if order.dst_slot >= 0 and ticket.state_slot < 0:
            raise HandoffError(f"ticket {ticket.id} has no recurrent state, which this model needs")
        cuts = self._cuts_of(ticket.layout)
        pieces = self._fragments(order, cuts.recut)
        by_source: dict[int, list[Fragment]] = {}
        for piece in pieces:
            by_source.setdefault(piece.source, []).append(piece)
        ranks = {rank.tp_rank: rank for rank in ticket.ranks}
        refetches = 0
        for source, part in by_source.items():
            refetches += self._read_source(ticket, ranks[source], cuts.shapes[source], part)
        self._check_expiry(ticket)
        return _Moved(num_bytes=sum(piece.dst.total_bytes for piece in pieces), refetches=refetches)

    def _cuts_of(self, layout: KvLayout) -> "_Cuts":
        """Made once for each geometry: it takes longer than a small pull."""
        found = self._cuts.get(layout)
        if found is None:
            shapes = self._source_shapes(layout)
            found = self._cuts[layout] = _Cuts(shapes=shapes, recut=recut(shapes, self._shape, self._tp_rank))
            if len(self._cuts) > _MAX_LAYOUTS:
                self._cuts.pop(next(iter(self._cuts)), None)
        return found

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

    def _read_source(self, ticket: KvTicket, rank: SourceRank, shape: CacheShape, pieces: Sequence[Fragment]) -> int:
        """Read what one source rank holds; returns how many frames were asked for again."""
        if rank.host_key == self._host_key and rank.pool_fd >= 0:
            try:
                self._copy(ticket, self._sources.map(rank, shape), pieces)
                return 0
            except PermissionError as error:
                logger.warning("ticket %s: cannot map the source, reading over TCP: %s", ticket.id, error)
        return self._read_tcp(ticket, rank, pieces)

    def _copy(self, ticket: KvTicket, source: ByteArray, pieces: Sequence[Fragment]) -> None:
        copied = 0
        for piece in pieces:
            self._memory.copy_from(source, piece.src, piece.dst)
            copied += piece.dst.total_bytes
            if copied >= _COPY_BYTES:
                self._check_expiry(ticket)
                copied = 0
        self._check_expiry(ticket)

    def _read_tcp(self, ticket: KvTicket, rank: SourceRank, pieces: Sequence[Fragment]) -> int:
        timeout_s = min(_IO_TIMEOUT_S, max(ticket.expires_unix_s - self._now(), 1e-3))
        connection = self._sources.connect(rank.address, timeout_s)
        kept = False
        try:
            refetches = self._stream(ticket, connection, pieces)
            kept = True
            return refetches
        finally:
            self._sources.put_back(connection, usable=kept)

    def _stream(self, ticket: KvTicket, connection: KvConnection, pieces: Sequence[Fragment]) -> int:
        """Requests go a little ahead of the answers, so that the source never waits for us."""
        waiting: deque[_Batch] = deque()
        refetches = 0
        for batch in _batches(pieces):
            self._request(ticket, connection, batch)
            waiting.append(batch)
            if len(waiting) >= _PIPELINED:
                refetches += self._take(ticket, connection, waiting)
        while waiting:
            refetches += self._take(ticket, connection, waiting)
        return refetches

    def _request(self, ticket: KvTicket, connection: KvConnection, batch: _Batch) -> None:
        connection.set_timeout(min(_IO_TIMEOUT_S, ticket.expires_unix_s - self._now()))
        connection.request(ticket.id, ticket.expires_unix_s, [piece.src for piece in batch.fragments])

    def _take(self, ticket: KvTicket, connection: KvConnection, waiting: "deque[_Batch]") -> int:
        """Write the oldest batch's bytes, or put it last when they came damaged; returns how many are asked again."""
        batch = waiting.popleft()
        try:
            payload = connection.receive(batch.num_bytes)
        except DamagedFrameError as error:
            if batch.tries >= _MAX_TRIES:
                raise
            logger.warning("ticket %s: asking again: %s", ticket.id, error)
            again = replace(batch, tries=batch.tries + 1)
            self._request(ticket, connection, again)
            waiting.append(again)
            return 1
        self._memory.scatter(payload, [piece.dst for piece in batch.fragments])
        return 0

    def _check_expiry(self, ticket: KvTicket) -> None:
        late_s = self._now() - ticket.expires_unix_s
        if late_s >= 0:
            raise HandoffError(
                f"ticket {ticket.id} expired {late_s:.3f} s before its KV was here; "
                "raise the lease or add decode capacity"
            )


def _batches(pieces: Sequence[Fragment]) -> Iterator[_Batch]:
    part: list[Fragment] = []
    num_bytes = 0
    for piece in pieces:
        size = piece.src.total_bytes
        if part and (num_bytes + size > MAX_PAYLOAD_BYTES or len(part) >= MAX_SPANS // 4):
            yield _Batch(fragments=tuple(part), num_bytes=num_bytes)
            part.clear()
            num_bytes = 0
        part.append(piece)
        num_bytes += size
    if part:
        yield _Batch(fragments=tuple(part), num_bytes=num_bytes)


class _Sources:
    """Mapped caches of this host and idle connections to others, shared by the pull threads."""

    def __init__(self, token: str) -> None:
        self._token = token
        self._lock = threading.Lock()
        self._maps: OrderedDict[tuple[int, int], ByteArray] = OrderedDict()
        """By device and inode of the memory file: a pid can name another process later, an inode cannot."""
        self._idle: list[KvConnection] = []
        self._used: set[KvConnection] = set()

    def map(self, rank: SourceRank, shape: CacheShape) -> ByteArray:
        """The source's flat buffer.

        Raises:
            HandoffError: the process is gone, or the file is no cache of that shape.
            PermissionError: its memory may not be mapped by this process.
        """
        path = f"/proc/{rank.pid}/fd/{rank.pool_fd}"
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except PermissionError:
            raise
        except OSError as error:
            raise HandoffError(f"hand-off: source process {rank.pid} is gone ({error})") from error
        try:
            status = os.fstat(fd)
            if status.st_size < shape.total_bytes:
                raise HandoffError(
                    f"hand-off: {path} holds {status.st_size} bytes, the source's layout {shape.total_bytes}; "
                    "the ticket does not belong to this process"
                )
            with self._lock:
                key = (status.st_dev, status.st_ino)
                if key not in self._maps:
                    self._maps[key] = _map_read_only(fd, status.st_size)
                    if len(self._maps) > _MAX_MAPS:
                        self._maps.popitem(last=False)
                self._maps.move_to_end(key)
                return self._maps[key]
        finally:
            os.close(fd)

    def connect(self, address: str, timeout_s: float) -> KvConnection:
        """An idle connection to `address`, or a new one.

        Raises:
            HandoffError, CorruptDataError: as `KvConnection`.
        """
        with self._lock:
            # The source closes connections that stay idle; younger ones are safe to use again.
            stale = [one for one in self._idle if time.monotonic() - one.used_s > IDLE_TIMEOUT_S / 2]
            self._idle = [one for one in self._idle if one not in stale]
            found = next((one for one in self._idle if one.address == address), None)
            if found is not None:
                self._idle.remove(found)
                self._used.add(found)
        for one in stale:
            one.close()
        if found is not None:
            return found
        made = KvConnection(address, self._token, timeout_s=timeout_s)
        with self._lock:
            self._used.add(made)
        return made

    def put_back(self, connection: KvConnection, *, usable: bool) -> None:
        """Keep a connection for the next pull, or close it."""
        with self._lock:
            self._used.discard(connection)
            keep = usable and len(self._idle) < _MAX_IDLE_CONNECTIONS
            if keep:
                self._idle.append(connection)
        if not keep:
            connection.close()

    def close(self) -> None:
        """Cut all connections and let go of the maps."""
        with self._lock:
            connections = [*self._idle, *self._used]
            self._idle.clear()
            self._maps.clear()
        for connection in connections:
            connection.close()


def _map_read_only(fd: int, num_bytes: int) -> ByteArray:
    return np.frombuffer(mmap.mmap(fd, num_bytes, access=mmap.ACCESS_READ), dtype=np.uint8)
