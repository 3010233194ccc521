"""A rank's KV server: holders of the cluster token read rows of its cache. The bytes between are in `kv_wire`."""

import logging
import socket
import threading
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed import TCPStore

from cluster.kv_wire import (
    EXPIRED,
    HASH,
    HEAD,
    IDLE_TIMEOUT_S,
    MAX_PAYLOAD_BYTES,
    OK,
    OPEN,
    PAIR,
    REFUSED,
    SEND,
    TAIL,
    WAIT,
    Asked,
    checksum,
    read_request,
    send_pieces,
    shut,
    tune,
)
from cluster.nixl_link import NixlSource
from cluster.pair import SOURCE, Pair, Transfer, open_store
from cluster.plan import KV_FORMAT
from cluster.rank_memory import RankMemory
from cluster.recut import Rows
from cluster.security import server_hello
from router.errors import CorruptDataError, HandoffError
from shards.step_progress import StepProgress

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 64
_PAIR_TIMEOUT_S = 5.0
"""Longest wait for the other end, to form a pair and in each of its sends."""


class KvServer:
    """Serves reads of one rank's cache to holders of the cluster token, in threads of its own.

    Args:
        buffer: the rank's flat cache buffer, uint8.
        token: the cluster token.
        progress: of the steps that write the buffer; None: nobody waits for one.
        host: address of the node's interface to listen on.
        port: 0 takes a free one.
        now: unix seconds; the clock that made the tickets' expiry.

    Raises:
        OSError: host and port cannot be listened on.
    """

    def __init__(
        self,
        buffer: Tensor,
        token: str,
        progress: StepProgress | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._memory = RankMemory(buffer)
        self._buffer = buffer
        self._progress = progress or StepProgress()
        self._token = token
        self._now = now
        self._host = host
        self._store: TCPStore | None = None
        self._nixl: NixlSource | None = None
        self._listener = socket.create_server((host, port), backlog=MAX_CONNECTIONS)
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._closed = False
        self.address = f"{host}:{self._listener.getsockname()[1]}"
        """host:port that tickets name."""
        self._acceptor = threading.Thread(target=self._accept, name="kv-server", daemon=True)
        self._acceptor.start()

    def close(self) -> None:
        """Stop listening and cut the connections."""
        with self._lock:
            self._closed = True
            connections = list(self._connections)
        shut(self._listener)
        for sock in connections:
            shut(sock)
        self._acceptor.join(5)

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                refused = self._closed or len(self._connections) >= MAX_CONNECTIONS
                if not refused:
                    self._connections.add(sock)
            if refused:
                logger.warning("kv server %s: over %s connections, one more was closed", self.address, MAX_CONNECTIONS)
                sock.close()
                continue
            threading.Thread(target=self._serve, args=(sock,), name="kv-connection", daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        """One connection, until its reader closes it or breaks the protocol."""
        session = _Session(self._memory, sock, self._progress, self._open_store, self._open_nixl, self._now)
        try:
            tune(sock)
            server_hello(sock, self._token)
            sock.settimeout(IDLE_TIMEOUT_S)
            while session.answer():
                pass
        except (CorruptDataError, HandoffError, OSError) as error:
            if not self._closed:
                logger.warning("kv server %s: connection ended: %s", self.address, error)
        finally:
            with self._lock:
                self._connections.discard(sock)
            session.close()

    def _open_store(self) -> TCPStore:
        """Where pairs meet; opened for the first."""
        with self._lock:
            if self._store is None:
                self._store = open_store(self._host)
            return self._store

    def _open_nixl(self) -> NixlSource:
        """This rank's memory for NIXL; opened for the first reader."""
        with self._lock:
            if self._nixl is None:
                self._nixl = NixlSource(self._buffer)
            return self._nixl


class _Session:
    """The source's side of one connection, and of the pair that its reader asked for."""

    def __init__(
        self,
        memory: RankMemory,
        sock: socket.socket,
        progress: StepProgress,
        open_pairs: Callable[[], TCPStore],
        open_nixl: Callable[[], NixlSource],
        now: Callable[[], float],
    ) -> None:
        self._memory = memory
        self._sock = sock
        self._progress = progress
        self._open_pairs = open_pairs
        self._open_nixl = open_nixl
        self._now = now
        self._pair: Pair | None = None
        self._sending: Transfer | None = None
        """The last payload over the pair: the next is put together meanwhile."""
        self._room: tuple[Tensor, Tensor] | None = None
        """Where they are put together, in turns."""

    def close(self) -> None:
        """Cut connection and pair."""
        self._sock.close()
        if self._pair is not None:
            self._pair.close()

    def answer(self) -> bool:
        """Serve one request; False at the end of the stream."""
        asked = read_request(self._sock)
        if asked is None:
            return False
        if asked.version != KV_FORMAT:
            # What follows cannot be read: say why and end.
            self._tell(
                REFUSED,
                f"KV format {KV_FORMAT} to a reader of format {asked.version}; run one release on both pools",
            )
            return False
        if asked.kind == PAIR:
            self._form(asked.name)
        elif asked.kind == OPEN:
            self._open()
        elif asked.kind == WAIT:
            self._wait(asked)
        else:
            self._read(asked)
        return True

    def _form(self, wanted: str) -> None:
        """Form the pair that the reader names; its device must be of our kind."""
        name, _, device = wanted.partition(" ")
        ours = self._memory.device.type
        if device != ours:
            self._tell(REFUSED, f"KV on {ours} to a reader on {device}; use kv_transport=tcp on both pools")
            return
        store = self._open_pairs()
        self._tell(OK, str(store.port))
        host = self._sock.getsockname()[0]
        self._pair = Pair(store, name, rank=SOURCE, host=host, device=self._memory.device, timeout_s=_PAIR_TIMEOUT_S)
        if ours == "cpu":
            room = torch.empty((2, MAX_PAYLOAD_BYTES), dtype=torch.uint8)
            self._room = room[0], room[1]

    def _open(self) -> None:
        try:
            self._tell(OK, self._open_nixl().description)
        except (HandoffError, ValueError) as error:
            self._tell(REFUSED, str(error))

    def _wait(self, asked: Asked) -> None:
        """Tell how many layers a step has written, when they are more than the reader knows of."""
        step, _, layers = asked.name.partition(" ")
        if not (step.isdigit() and layers.isdigit()):
            raise CorruptDataError(f"a wait for {asked.name!r}, which names no step and layers")
        there = self._progress.wait(int(step), int(layers), asked.expires_unix_s - self._now())
        if there > int(layers):
            self._tell(OK, str(there))
        else:
            self._tell(EXPIRED, "")

    def _tell(self, status: int, message: str | bytes) -> None:
        payload = message.encode() if isinstance(message, str) else message
        tail = TAIL.pack(status, checksum([memoryview(payload)]))
        self._sock.sendall(HEAD.pack(status, len(payload)) + payload + tail)

    def _read(self, asked: Asked) -> None:
        bad = next((part for part in asked.parts if not self._memory.holds(part)), None)
        total = sum(part.total_bytes for part in asked.parts)
        if bad is not None or not 0 < total <= MAX_PAYLOAD_BYTES:
            text = "" if bad is None else f", rows of {bad.num_bytes} at {bad.offsets[:3].tolist()}"
            self._tell(REFUSED, f"ticket {asked.name}: read of {total} bytes refused{text}; the layouts do not agree")
        elif self._is_over(asked):
            self._tell(EXPIRED, "")
        elif asked.kind == SEND:
            self._send_paired(asked, total)
        elif asked.kind == HASH:
            self._hash(asked, total)
        else:
            self._send(asked, total)

    def _is_over(self, asked: Asked) -> bool:
        return self._now() >= asked.expires_unix_s

    def _send(self, asked: Asked, total: int) -> None:
        pieces = self._memory.views(asked.parts) or [self._memory.gather(asked.parts).cpu().numpy().data]
        value = checksum(pieces)
        send_pieces(self._sock, [memoryview(HEAD.pack(OK, total)), *pieces])
        self._sock.sendall(TAIL.pack(EXPIRED if self._is_over(asked) else OK, value))

    def _hash(self, asked: Asked, total: int) -> None:
        pieces = self._memory.views(asked.parts)
        value = 0 if pieces is None else checksum(pieces)
        self._sock.sendall(HEAD.pack(OK, total) + TAIL.pack(EXPIRED if self._is_over(asked) else OK, value))

    def _send_paired(self, asked: Asked, total: int) -> None:
        if self._pair is None:
            raise CorruptDataError(f"ticket {asked.name}: a payload was asked for over a pair that was not formed")
        payload = self._gather(asked.parts)
        on_host = payload.device.type == "cpu"
        value = checksum([payload.numpy().data]) if on_host else 0
        if self._is_over(asked):
            self._tell(EXPIRED, "")
            return
        self._sock.sendall(HEAD.pack(OK, total) + TAIL.pack(OK, value))
        if self._sending is not None:
            self._pair.finish(self._sending, timeout_s=_PAIR_TIMEOUT_S)
        self._sending = self._pair.start_send(payload)

    def _gather(self, parts: Sequence[Rows]) -> Tensor:
        """The payload; what is being sent stays as it is."""
        if self._room is None:
            return self._memory.gather(parts)
        free, busy = self._room
        self._room = busy, free
        return self._memory.gather(parts, out=free)
