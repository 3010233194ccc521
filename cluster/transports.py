"""The ways from a source rank's cache into this one: shared memory on one host, TCP, torch.distributed P2P, NIXL.

Each writes a ticket's fragments into this rank's cache; a `Puller` takes the first that reaches the source.
"""

import logging
import mmap
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Protocol

import numpy as np

from cluster.config import KvTransport
from cluster.nixl_link import check_nixl
from cluster.pair import check_backend
from cluster.plan import KvTicket, SourceRank
from cluster.rank_memory import RankMemory
from cluster.recut import Fragment
from cluster.socket_transport import SocketTransport
from router.errors import HandoffError
from shards.cache import CacheShape
from shards.row_copy import ByteArray

logger = logging.getLogger(__name__)

_MAX_MAPS: Final = 16
_COPY_BYTES: Final = 64 << 20
"""Largest copy between two looks at the clock."""


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

    def written(self, ticket: KvTicket, rank: SourceRank, layers: int) -> int:
        """Wait until the ticket's step has written more than so many layers at a source rank -> how many.

        Raises:
            HandoffError, CorruptDataError: as `read`.
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
    return (tcp,) if choice == "tcp" else (ShmTransport(memory, tcp.written, now=now), tcp)


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
    """Maps the memory files of sources on this host and copies from them: one copy.

    Args:
        written: `Transport.written` of a way that can ask sources.
    """

    def __init__(
        self,
        memory: RankMemory,
        written: Callable[[KvTicket, SourceRank, int], int],
        *,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._memory = memory
        self._written = written
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

    def written(self, ticket: KvTicket, rank: SourceRank, layers: int) -> int:
        """As `Transport.written`."""
        return self._written(ticket, rank, layers)

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
