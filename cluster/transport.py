"""KV between hosts: a rank's KV server and the connection that reads spans of its cache over TCP.

After the token hello the reader sends requests and gets one frame for each, in order:

    request   "<HBIdI": format version, kind, number of spans, ticket expiry (unix seconds), length of the ticket id;
              the id; 4 uint64 a span
    frame     "<BII": status, CRC-32 and length of the payload: the spans' bytes one after the other, or a message

A request of kind "pair" (no spans; the id is "<name> <device>") forms a torch.distributed group of the two ranks: its
frame holds the port of the source's store. From then on kind "send" has the payload follow its frame over that group
and not over this connection, with a CRC-32 between CPUs and none between GPUs.

A damaged payload leaves the stream in step: its spans can be asked for again.

The server reads its memory first and checks the expiry after that, so that no frame carries rows that may have been
given to another sequence meanwhile.
"""

import logging
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor
from torch.distributed import TCPStore

from cluster.pair import READER, SOURCE, Pair, join_store, open_store
from cluster.plan import KV_FORMAT
from cluster.rank_memory import ByteArray, RankMemory
from cluster.recut import Span
from cluster.security import client_hello, server_hello
from router.errors import CorruptDataError, HandoffError

logger = logging.getLogger(__name__)

MAX_PAYLOAD_BYTES = 4 << 20
"""Longest payload of a frame; what a connection may make either side hold."""
MAX_SPANS = 4096
MAX_CONNECTIONS = 64
IDLE_TIMEOUT_S = 60.0
_MAX_ID_BYTES = 256
_REQUEST = struct.Struct("<HBIdI")
_SPAN = struct.Struct("<4Q")
_FRAME = struct.Struct("<BII")
_OK, _EXPIRED, _REFUSED = 0, 1, 2
_READ, _PAIR, _SEND = 0, 1, 2
_PAIR_TIMEOUT_S = 5.0
"""Longest wait for the other end, to form a pair and in each of its sends."""


class DamagedFrameError(CorruptDataError):
    """A frame's bytes are not those that were sent; the connection still works."""


class KvServer:
    """Serves reads of one rank's cache to holders of the cluster token, in threads of its own.

    Args:
        buffer: the rank's flat cache buffer, uint8.
        token: the cluster token.
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
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._memory = RankMemory(buffer)
        self._token = token
        self._now = now
        self._host = host
        self._store: TCPStore | None = None
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
        _shut(self._listener)
        for sock in connections:
            _shut(sock)
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
        session = _Session(self._memory, sock, self._open_store, self._now)
        try:
            _tune(sock)
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


class _Session:
    """The source's side of one connection, and of the pair that its reader asked for."""

    def __init__(
        self, memory: RankMemory, sock: socket.socket, open_pairs: Callable[[], TCPStore], now: Callable[[], float]
    ) -> None:
        self._memory = memory
        self._sock = sock
        self._open_pairs = open_pairs
        self._now = now
        self._pair: Pair | None = None

    def close(self) -> None:
        """Cut connection and pair."""
        self._sock.close()
        if self._pair is not None:
            self._pair.close()

    def answer(self) -> bool:
        """Serve one request; False at the end of the stream."""
        header = _receive(self._sock, _REQUEST.size, end_allowed=True)
        if header is None:
            return False
        version, kind, num_spans, expires_unix_s, id_bytes = _REQUEST.unpack(header)
        if version != KV_FORMAT:
            # What follows cannot be read: say why and end.
            self._frame(
                _REFUSED, f"KV format {KV_FORMAT} to a reader of format {version}; run one release on both pools"
            )
            return False
        if num_spans > MAX_SPANS or id_bytes > _MAX_ID_BYTES:
            raise CorruptDataError(f"read of {num_spans} spans, ticket id of {id_bytes} bytes: over the limits")
        name = bytes(_receive(self._sock, id_bytes) or b"").decode(errors="replace")
        if kind == _PAIR:
            self._form(name)
            return True
        packed = bytes(_receive(self._sock, num_spans * _SPAN.size) or b"")
        spans = [
            Span(offset=offset, stride=stride, num_bytes=num_bytes, rows=rows)
            for offset, stride, num_bytes, rows in _SPAN.iter_unpack(packed)
        ]
        self._read(spans, expires_unix_s, name, paired=kind == _SEND)
        return True

    def _form(self, wanted: str) -> None:
        """Form the pair that the reader names; its device must be of our kind."""
        name, _, device = wanted.partition(" ")
        ours = self._memory.device.type
        if device != ours:
            self._frame(_REFUSED, f"KV on {ours} to a reader on {device}; use kv_transport=tcp on both pools")
            return
        store = self._open_pairs()
        self._frame(_OK, str(store.port))
        host = self._sock.getsockname()[0]
        self._pair = Pair(store, name, rank=SOURCE, host=host, device=self._memory.device, timeout_s=_PAIR_TIMEOUT_S)

    def _frame(self, status: int, message: str) -> None:
        payload = message.encode()
        self._sock.sendall(_FRAME.pack(status, zlib.crc32(payload), len(payload)) + payload)

    def _read(self, spans: list[Span], expires_unix_s: float, ticket_id: str, *, paired: bool) -> None:
        bad = next((span for span in spans if not self._memory.holds(span)), None)
        total = sum(span.total_bytes for span in spans)
        if bad is not None or not 0 < total <= MAX_PAYLOAD_BYTES:
            self._frame(
                _REFUSED, f"ticket {ticket_id}: read of {total} bytes refused, span {bad}; the layouts do not agree"
            )
            return
        payload = self._gather(spans, expires_unix_s)
        if payload is None:
            self._frame(_EXPIRED, "")
            return
        self._sock.sendall(_FRAME.pack(_OK, _checksum(payload), total))
        if not paired:
            self._sock.sendall(payload.cpu().numpy().data)
        elif self._pair is None:
            raise CorruptDataError(f"ticket {ticket_id}: a payload was asked for over a pair that was not formed")
        else:
            self._pair.send(payload, timeout_s=_PAIR_TIMEOUT_S)

    def _gather(self, spans: list[Span], expires_unix_s: float) -> Tensor | None:
        """The bytes as they were before the expiry; None behind it."""
        if self._now() >= expires_unix_s:
            return None
        payload = self._memory.gather_there(spans)
        return payload if self._now() < expires_unix_s else None


def _checksum(payload: Tensor) -> int:
    """CRC-32; 0 for bytes on a device, which a host would have to fetch."""
    return zlib.crc32(payload.numpy().data) if payload.device.type == "cpu" else 0


class KvConnection:
    """Reads spans of a remote rank's cache; used by one thread at a time.

    Raises:
        HandoffError: nobody listens at `address`.
        CorruptDataError: the other side holds another cluster token.
    """

    def __init__(self, address: str, token: str, *, timeout_s: float) -> None:
        self.address = address
        self.used_s = time.monotonic()
        """When the last frame came, on the monotonic clock."""
        self._pair: Pair | None = None
        self._device = torch.device("cpu")
        self._timeout_s = timeout_s
        host, _, port = address.rpartition(":")
        try:
            self._host = host.strip("[]")
            self._sock = socket.create_connection((self._host, int(port)), timeout=timeout_s)
        except (OSError, ValueError) as error:
            raise HandoffError(f"hand-off: source rank at {address} cannot be reached: {error}") from error
        try:
            _tune(self._sock)
            client_hello(self._sock, token, timeout_s=timeout_s)
        except CorruptDataError:
            self._sock.close()
            raise

    def set_timeout(self, seconds: float) -> None:
        """Longest wait of each following send and receive."""
        self._timeout_s = max(seconds, 1e-3)
        self._sock.settimeout(self._timeout_s)

    def request(self, ticket_id: str, expires_unix_s: float, spans: Sequence[Span]) -> None:
        """Ask for spans of at most MAX_PAYLOAD_BYTES together; `receive` gets them.

        Raises:
            HandoffError: the source is gone.
        """
        self._ask(_READ if self._pair is None else _SEND, ticket_id, expires_unix_s, spans)

    def form_pair(self, device: torch.device) -> None:
        """Have payloads come over a torch.distributed group of two from now on, into memory of `device`.

        Raises:
            HandoffError: the source refuses, is gone, or does not come to the group.
            CorruptDataError: as `receive`.
        """
        name = uuid4().hex
        self._ask(_PAIR, f"{name} {device.type}", 0.0, ())
        status, _, length = self._header()
        answer = bytes(self._payload(length)).decode(errors="replace")
        if status != _OK or not answer.isdigit():
            raise HandoffError(f"hand-off: {self.address} forms no pair: {answer[:500]}")
        store = join_store(self._host, int(answer), timeout_s=self._timeout_s)
        host = self._sock.getsockname()[0]
        self._pair = Pair(store, name, rank=READER, host=host, device=device, timeout_s=self._timeout_s)
        self._device = device

    def _ask(self, kind: int, ticket_id: str, expires_unix_s: float, spans: Sequence[Span]) -> None:
        name = ticket_id.encode()
        parts = [_REQUEST.pack(KV_FORMAT, kind, len(spans), expires_unix_s, len(name)), name]
        parts += [_SPAN.pack(span.offset, span.stride, span.num_bytes, span.rows) for span in spans]
        try:
            self._sock.sendall(b"".join(parts))
        except OSError as error:
            raise self._lost(error) from error

    def receive(self, num_bytes: int) -> ByteArray | Tensor:
        """The next frame's payload, num_bytes long; a tensor where it came over a pair.

        Raises:
            HandoffError: the ticket expired, the source refused, or it is gone.
            DamagedFrameError: its checksum does not match; `request` may ask for it again.
            CorruptDataError: its length is none that a frame can have.
        """
        status, checksum, length = self._header()
        payload = self._from_pair(length) if status == _OK and self._pair is not None else self._payload(length)
        self.used_s = time.monotonic()
        if (_checksum(payload) if isinstance(payload, Tensor) else zlib.crc32(payload)) != checksum:
            raise DamagedFrameError(f"hand-off: checksum of {length} bytes from {self.address} does not match")
        if status == _EXPIRED:
            raise HandoffError("hand-off: the ticket expired at the source; raise the lease or add decode capacity")
        if status != _OK or length != num_bytes:
            text = f"{length} bytes" if status == _OK else bytes(payload[:500]).decode(errors="replace")
            raise HandoffError(f"hand-off: {self.address} answered {text} to a read of {num_bytes} bytes")
        return payload if isinstance(payload, Tensor) else np.frombuffer(payload, dtype=np.uint8)

    def _header(self) -> tuple[int, int, int]:
        try:
            status, checksum, length = _FRAME.unpack(_receive(self._sock, _FRAME.size) or b"")
        except OSError as error:
            raise self._lost(error) from error
        if length > MAX_PAYLOAD_BYTES:
            raise CorruptDataError(f"hand-off: frame of {length} bytes from {self.address} is over the limit")
        return status, checksum, length

    def _payload(self, length: int) -> bytearray:
        try:
            return _receive(self._sock, length) or bytearray()
        except OSError as error:
            raise self._lost(error) from error

    def _from_pair(self, length: int) -> Tensor:
        assert self._pair is not None
        payload = torch.empty(length, dtype=torch.uint8, device=self._device)
        self._pair.receive(payload, timeout_s=self._timeout_s)
        return payload

    def close(self) -> None:
        """Cut the connection; a thread inside of `receive` gets HandoffError."""
        _shut(self._sock)
        if self._pair is not None:
            self._pair.close()

    def _lost(self, error: OSError) -> HandoffError:
        return HandoffError(f"hand-off: source rank at {self.address} was lost: {error}")


def _tune(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _shut(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    sock.close()


def _receive(sock: socket.socket, num_bytes: int, *, end_allowed: bool = False) -> bytearray | None:
    """Exactly num_bytes; None at the end of the stream where that is allowed.

    Raises:
        ConnectionError: the stream ended early.
        TimeoutError: nothing came within the socket's timeout.
    """
    data = bytearray(num_bytes)
    view = memoryview(data)
    at = 0
    while at < num_bytes:
        count = sock.recv_into(view[at:])
        if not count:
            if end_allowed and at == 0:
                return None
            raise ConnectionError(f"connection closed {num_bytes - at} bytes early")
        at += count
    return data
