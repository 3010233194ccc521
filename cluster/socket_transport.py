"""Reads of sources' caches through their KV servers: over TCP, torch.distributed P2P or NIXL."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Final, Literal

from cluster.kv_connection import KvConnection
from cluster.kv_wire import IDLE_TIMEOUT_S, MAX_PAYLOAD_BYTES, DamagedFrameError
from cluster.plan import KvTicket, SourceRank
from cluster.rank_memory import RankMemory
from cluster.recut import MAX_ROWS, Fragment, Rows
from router.errors import HandoffError
from shards.cache import CacheShape

logger = logging.getLogger(__name__)

_MAX_IDLE_CONNECTIONS: Final = 32
_IO_TIMEOUT_S: Final = 5.0
_PIPELINED: Final = 2
_MAX_TRIES: Final = 3
"""Times a frame is asked for: bytes that come damaged again and again are no accident of the way."""

Way = Literal["tcp", "p2p", "nixl"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    """Fragments of one source that one frame carries."""

    fragments: tuple[Fragment, ...]
    tries: int = 1

    @property
    def dst(self) -> list[Rows]:
        """Where its bytes go."""
        return [piece.dst for piece in self.fragments]


def _batches(pieces: Sequence[Fragment]) -> Iterator[_Batch]:
    part: list[Fragment] = []
    num_bytes = num_rows = 0
    for piece in pieces:
        size, rows = piece.src.total_bytes, len(piece.src.offsets)
        if part and (num_bytes + size > MAX_PAYLOAD_BYTES or num_rows + rows > MAX_ROWS):
            yield _Batch(fragments=tuple(part))
            part.clear()
            num_bytes = num_rows = 0
        part.append(piece)
        num_bytes += size
        num_rows += rows
    if part:
        yield _Batch(fragments=tuple(part))


class SocketTransport:
    """Reads frames from KV servers.

    Args:
        over: how payloads come: over the TCP connection itself, over a torch.distributed group of the two ranks, or by
            NIXL; formed once a connection.
    """

    def __init__(self, memory: RankMemory, token: str, *, over: Way, now: Callable[[], float] = time.time) -> None:
        self._memory = memory
        self._token = token
        self._over: Way = over
        self._now = now
        self._lock = threading.Lock()
        self._idle: list[KvConnection] = []
        self._used: set[KvConnection] = set()
        self._closed = False

    def reaches(self, rank: SourceRank) -> bool:
        """As `Transport.reaches`: every rank has a KV server."""
        return bool(rank.address)

    def read(
        self,
        ticket: KvTicket,
        rank: SourceRank,
        shape: CacheShape,
        pieces: Sequence[Fragment],
        on_refetch: Callable[[], object],
    ) -> None:
        """As `Transport.read`."""
        del shape
        with self._connected(ticket, rank) as connection:
            self._stream(ticket, connection, pieces, on_refetch)

    def written(self, ticket: KvTicket, rank: SourceRank, layers: int) -> int:
        """As `Transport.written`."""
        with self._connected(ticket, rank) as connection:
            # A step takes as long as it does; a source that is lost ends the connection.
            connection.set_timeout(ticket.expires_unix_s - self._now())
            return connection.written(ticket.step, layers, ticket.expires_unix_s)

    @contextmanager
    def _connected(self, ticket: KvTicket, rank: SourceRank) -> Iterator[KvConnection]:
        """A connection to a source rank, which others may use behind the context if that ends well."""
        timeout_s = min(_IO_TIMEOUT_S, max(ticket.expires_unix_s - self._now(), 1e-3))
        connection = self._connect(rank.address, timeout_s)
        kept = False
        try:
            yield connection
            kept = True
        finally:
            self._put_back(connection, usable=kept)

    def _stream(
        self, ticket: KvTicket, connection: KvConnection, pieces: Sequence[Fragment], on_refetch: Callable[[], object]
    ) -> None:
        """Requests go a little ahead of the answers, so that the source never waits for us."""
        waiting: deque[_Batch] = deque()
        for batch in _batches(pieces):
            self._request(ticket, connection, batch)
            waiting.append(batch)
            if len(waiting) >= _PIPELINED:
                self._take(ticket, connection, waiting, on_refetch)
        while waiting:
            self._take(ticket, connection, waiting, on_refetch)

    def _request(self, ticket: KvTicket, connection: KvConnection, batch: _Batch) -> None:
        connection.set_timeout(min(_IO_TIMEOUT_S, ticket.expires_unix_s - self._now()))
        connection.request(ticket.id, ticket.expires_unix_s, [piece.src for piece in batch.fragments])

    def _take(
        self, ticket: KvTicket, connection: KvConnection, waiting: "deque[_Batch]", on_refetch: Callable[[], object]
    ) -> None:
        """Take the oldest batch's bytes, or put it last when they came damaged."""
        batch = waiting.popleft()
        try:
            connection.receive(batch.dst)
        except DamagedFrameError as error:
            if batch.tries >= _MAX_TRIES:
                raise
            logger.warning("ticket %s: asking again: %s", ticket.id, error)
            again = replace(batch, tries=batch.tries + 1)
            self._request(ticket, connection, again)
            waiting.append(again)
            on_refetch()

    def _connect(self, address: str, timeout_s: float) -> KvConnection:
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
        made = KvConnection(address, self._token, self._memory, timeout_s=timeout_s)
        formed = False
        try:
            if self._over == "p2p":
                made.form_pair()
            elif self._over == "nixl":
                made.open_nixl()
            formed = True
        finally:
            if not formed:
                made.close()
        with self._lock:
            late = self._closed
            if not late:
                self._used.add(made)
        if late:
            made.close()
            raise HandoffError(f"hand-off: pulls of this rank ended while it connected to {address}")
        return made

    def _put_back(self, connection: KvConnection, *, usable: bool) -> None:
        """Keep a connection for the next pull, or close it."""
        with self._lock:
            self._used.discard(connection)
            keep = usable and not self._closed and len(self._idle) < _MAX_IDLE_CONNECTIONS
            if keep:
                self._idle.append(connection)
        if not keep:
            connection.close()

    def close(self) -> None:
        """Cut all connections, for good."""
        with self._lock:
            self._closed = True
            connections = [*self._idle, *self._used]
            self._idle.clear()
        for connection in connections:
            connection.close()
