"""The ways from a source rank's cache into this one: shared memory on one host, TCP, torch.distributed P2P, NIXL.

Each writes a ticket's fragments into this rank's cache; a `Puller` takes the first that reaches the source.
"""

import logging
import mmap
import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal, Protocol

import numpy as np

from cluster.config import KvTransport
from cluster.kv_connection import KvConnection
from cluster.kv_wire import IDLE_TIMEOUT_S, MAX_PAYLOAD_BYTES, DamagedFrameError
from cluster.nixl_link import check_nixl
from cluster.pair import check_backend
from cluster.plan import KvTicket, SourceRank
from cluster.rank_memory import RankMemory
from cluster.recut import MAX_ROWS, Fragment, Rows
from router.errors import HandoffError
from shards.cache import CacheShape
from shards.row_copy import ByteArray

logger = logging.getLogger(__name__)

_MAX_MAPS: Final = 16
_MAX_IDLE_CONNECTIONS: Final = 32
_IO_TIMEOUT_S: Final = 5.0
_PIPELINED: Final = 2
_MAX_TRIES: Final = 3
"""Times a frame is asked for: bytes that come damaged again and again are no accident of the way."""
_COPY_BYTES: Final = 64 << 20
"""Largest copy between two looks at the clock."""


Way = Literal["tcp", "p2p", "nixl"]


class Transport(Protocol):
    """One way to the caches of source ranks, used by several pull threads at once."""

    def reaches(self, rank: SourceRank) -> bool:
        """Whether this way leads to a source rank."""
        ...

    def read(
        self,
        ticket: KvTicket,
        rank: SourceRank,
        shape: CacheShape,
        pieces: Sequence[Fragment],
        on_refetch: Callable[[], object],
    ) -> None:
        """Write one source rank's fragments into this rank's cache.

        All that was written was read before the ticket's expiry if it has not passed when this returns.

        Args:
            shape: the source rank's cache.
            on_refetch: called for each frame that came damaged and is asked for again.

        Raises:
            HandoffError: the ticket expired, or the source is gone or refuses.
            CorruptDataError: what came cannot be understood.
        """
        ...

    def close(self) -> None:
        """Cut what leads to sources; reads under way fail."""
        ...


def host_key() -> str:
    """Equal for processes that can map each other's memory: same boot, same pid namespace, same user."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    boot_id = boot.read_text().strip() if boot.exists() else f"pid-{os.getpid()}"
    namespace = Path("/proc/self/ns/pid")
    return f"{boot_id}/{namespace.readlink() if namespace.exists() else ''}/{os.getuid()}"


def make_transports(
    choice: KvTransport, memory: RankMemory, token: str, *, now: Callable[[], float] = time.time
) -> tuple[Transport, ...]:
    """The ways that a choice allows, the best first.

    Args:
        choice: auto is shared memory on one host and TCP to others; between GPUs P2P.
        memory: of the rank that pulls.
        token: the cluster token.
        now: unix seconds.

    Raises:
        ValueError: p2p, and this build of torch lacks its backend; nixl, and it is not installed.
    """
    if choice == "p2p" or (choice == "auto" and memory.device.type == "cuda"):
        check_backend(memory.device.type)
        return (SocketTransport(memory, token, over="p2p", now=now),)
    if choice == "nixl":
        check_nixl()
        return (SocketTransport(memory, token, over="nixl", now=now),)
    tcp = SocketTransport(memory, token, over="tcp", now=now)
    return (tcp,) if choice == "tcp" else (ShmTransport(memory, now=now), tcp)


def check_expiry(ticket: KvTicket, now: float) -> None:
    """Whether a ticket may still be read.

    Raises:
        HandoffError: its lease is over.
    """
    late_s = now - ticket.expires_unix_s
    if late_s >= 0:
        raise HandoffError(
            f"ticket {ticket.id} expired {late_s:.3f} s before its KV was here; raise the lease or add decode capacity"
        )


class ShmTransport:
    """Maps the memory files of sources on this host and copies from them: one copy."""

    def __init__(self, memory: RankMemory, *, now: Callable[[], float] = time.time) -> None:
        self._memory = memory
        self._now = now
        self._host_key = host_key()
        self._lock = threading.Lock()
        self._maps: OrderedDict[tuple[int, int], ByteArray] = OrderedDict()
        """By device and inode of the memory file: a pid can name another process later, an inode cannot."""

    def reaches(self, rank: SourceRank) -> bool:
        """As `Transport.reaches`: a process of this host with a memory file that may be mapped."""
        if rank.host_key != self._host_key or rank.pool_fd < 0:
            return False
        try:
            os.close(_open(rank))
        except PermissionError as error:
            logger.warning("source process %s cannot be mapped, reading over TCP: %s", rank.pid, error)
            return False
        except OSError:
            # It is gone: reading says so.
            return True
        return True

    def read(
        self,
        ticket: KvTicket,
        rank: SourceRank,
        shape: CacheShape,
        pieces: Sequence[Fragment],
        on_refetch: Callable[[], object],
    ) -> None:
        """As `Transport.read`."""
        # No wire, no frames.
        del on_refetch
        source, copied = self._map(rank, shape), 0
        for piece in pieces:
            self._memory.copy_from(source, piece.src, piece.dst)
            copied += piece.dst.total_bytes
            if copied >= _COPY_BYTES:
                check_expiry(ticket, self._now())
                copied = 0
        check_expiry(ticket, self._now())

    def close(self) -> None:
        """Let go of the maps."""
        with self._lock:
            self._maps.clear()

    def _map(self, rank: SourceRank, shape: CacheShape) -> ByteArray:
        """The source's flat buffer.

        Raises:
            HandoffError: the process is gone, or the file is no cache of that shape.
        """
        try:
            fd = _open(rank)
        except OSError as error:
            raise HandoffError(f"hand-off: source process {rank.pid} is gone ({error})") from error
        try:
            status = os.fstat(fd)
            if status.st_size < shape.total_bytes:
                raise HandoffError(
                    f"hand-off: {_path(rank)} holds {status.st_size} bytes, the source's layout {shape.total_bytes}; "
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


def _path(rank: SourceRank) -> str:
    return f"/proc/{rank.pid}/fd/{rank.pool_fd}"


def _open(rank: SourceRank) -> int:
    return os.open(_path(rank), os.O_RDONLY | os.O_CLOEXEC)


def _map_read_only(fd: int, num_bytes: int) -> ByteArray:
    return np.frombuffer(mmap.mmap(fd, num_bytes, access=mmap.ACCESS_READ), dtype=np.uint8)


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
        timeout_s = min(_IO_TIMEOUT_S, max(ticket.expires_unix_s - self._now(), 1e-3))
        connection = self._connect(rank.address, timeout_s)
        kept = False
        try:
            self._stream(ticket, connection, pieces, on_refetch)
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
