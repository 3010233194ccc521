"""KV between hosts: a rank's KV server and the connection that reads spans of its cache over TCP.

After the token hello the reader sends requests and gets one frame for each, in order:

    request   "<HIdI": format version, number of spans, ticket expiry (unix seconds), length of the ticket id; the id;
              4 uint64 a span
    frame     "<BII": status, CRC-32 and length of the payload: the spans' bytes one after the other, or a message

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

import numpy as np
import torch
from torch import Tensor

from cluster.plan import KV_FORMAT
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
_REQUEST = struct.Struct("<HIdI")
_SPAN = struct.Struct("<4Q")
_FRAME = struct.Struct("<BII")
_OK, _EXPIRED, _REFUSED = 0, 1, 2


class DamagedFrameError(CorruptDataError):
    """A frame's bytes are not those that were sent; the connection still works."""


ByteArray = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]


class RankMemory:
    """Spans of a flat uint8 buffer, on the CPU or a device, read and written by rows."""

    def __init__(self, buffer: Tensor) -> None:
        self._buffer = buffer
        # numpy copies byte rows with memmove on the calling thread; torch would start a thread pool for each caller.
        self._bytes: ByteArray | None = buffer.numpy() if buffer.device.type == "cpu" else None

    def holds(self, span: Span) -> bool:
        """Whether the span lies inside of the buffer, row by row."""
        fits = span.num_bytes > 0 and span.rows > 0 and span.end <= self._buffer.numel()
        return fits and (span.rows == 1 or span.stride >= span.num_bytes)

    def gather(self, spans: Sequence[Span]) -> ByteArray:
        """The bytes of the spans, one after the other."""
        if self._bytes is None:
            parts = [_window(self._buffer, span).reshape(-1) for span in spans]
            gathered: ByteArray = torch.cat(parts).cpu().numpy()
            return gathered
        out = np.empty(sum(span.total_bytes for span in spans), dtype=np.uint8)
        at = 0
        for span in spans:
            np.copyto(rows_at(out, at, span), rows_of(self._bytes, span))
            at += span.total_bytes
        return out

    def scatter(self, payload: ByteArray, spans: Sequence[Span]) -> None:
        """Write what `gather` of equally long spans gave."""
        source = payload if self._bytes is not None else torch.from_numpy(payload).to(self._buffer.device)
        at = 0
        for span in spans:
            self._write(source, at, span)
            at += span.total_bytes
        if self._bytes is None:
            # A rank's next step may run on another stream.
            torch.cuda.synchronize(self._buffer.device)

    def _write(self, source: "ByteArray | Tensor", at: int, span: Span) -> None:
        if isinstance(source, Tensor):
            part = source[at : at + span.total_bytes].view(span.rows, span.num_bytes)
            _window(self._buffer, span).copy_(part)
        else:
            assert self._bytes is not None
            np.copyto(rows_of(self._bytes, span), rows_at(source, at, span))

    def copy_from(self, source: ByteArray, src: Span, dst: Span) -> None:
        """Copy a span of another process's mapped cache into this one."""
        if self._bytes is None:
            packed = np.ascontiguousarray(rows_of(source, src)).reshape(-1)
            self.scatter(packed, [dst])
        else:
            np.copyto(rows_of(self._bytes, dst), rows_of(source, src))


def rows_of(array: ByteArray, span: Span) -> ByteArray:
    """A view [rows, num_bytes] of a flat array; the caller has checked the bounds."""
    shape, strides = (span.rows, span.num_bytes), (span.stride, 1)
    return np.ndarray(shape, np.uint8, buffer=array.data, offset=span.offset, strides=strides)


def rows_at(array: ByteArray, at: int, span: Span) -> ByteArray:
    """The packed bytes of a span that begin at `at`, as [rows, num_bytes]."""
    return array[at : at + span.total_bytes].reshape(span.rows, span.num_bytes)


def _window(buffer: Tensor, span: Span) -> Tensor:
    return buffer.as_strided((span.rows, span.num_bytes), (span.stride, 1), span.offset)


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
        try:
            _tune(sock)
            server_hello(sock, self._token)
            sock.settimeout(IDLE_TIMEOUT_S)
            while self._answer(sock):
                pass
        except (CorruptDataError, OSError) as error:
            if not self._closed:
                logger.warning("kv server %s: connection ended: %s", self.address, error)
        finally:
            with self._lock:
                self._connections.discard(sock)
            sock.close()

    def _answer(self, sock: socket.socket) -> bool:
        """Serve one request; False at the end of the stream."""
        header = _receive(sock, _REQUEST.size, end_allowed=True)
        if header is None:
            return False
        version, num_spans, expires_unix_s, id_bytes = _REQUEST.unpack(header)
        if version != KV_FORMAT:
            # What follows cannot be read: say why and end.
            message = f"KV format {KV_FORMAT} to a reader of format {version}; run one release on both pools".encode()
            sock.sendall(_FRAME.pack(_REFUSED, zlib.crc32(message), len(message)) + message)
            return False
        if num_spans > MAX_SPANS or id_bytes > _MAX_ID_BYTES:
            raise CorruptDataError(f"read of {num_spans} spans, ticket id of {id_bytes} bytes: over the limits")
        ticket_id = bytes(_receive(sock, id_bytes) or b"").decode(errors="replace")
        packed = bytes(_receive(sock, num_spans * _SPAN.size) or b"")
        spans = [
            Span(offset=offset, stride=stride, num_bytes=num_bytes, rows=rows)
            for offset, stride, num_bytes, rows in _SPAN.iter_unpack(packed)
        ]
        status, payload = self._read(spans, expires_unix_s, ticket_id)
        sock.sendall(_FRAME.pack(status, zlib.crc32(payload), len(payload)))
        sock.sendall(payload)
        return True

    def _read(self, spans: list[Span], expires_unix_s: float, ticket_id: str) -> tuple[int, memoryview]:
        bad = next((span for span in spans if not self._memory.holds(span)), None)
        total = sum(span.total_bytes for span in spans)
        if bad is not None or not 0 < total <= MAX_PAYLOAD_BYTES:
            message = f"ticket {ticket_id}: read of {total} bytes refused, span {bad}; the layouts do not agree"
            return _REFUSED, memoryview(message.encode())
        if self._now() < expires_unix_s:
            payload = self._memory.gather(spans)
            if self._now() < expires_unix_s:
                return _OK, payload.data
        return _EXPIRED, memoryview(b"")


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
        host, _, port = address.rpartition(":")
        try:
            self._sock = socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s)
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
        self._sock.settimeout(max(seconds, 1e-3))

    def request(self, ticket_id: str, expires_unix_s: float, spans: Sequence[Span]) -> None:
        """Ask for spans of at most MAX_PAYLOAD_BYTES together; `receive` gets them.

        Raises:
            HandoffError: the source is gone.
        """
        name = ticket_id.encode()
        parts = [_REQUEST.pack(KV_FORMAT, len(spans), expires_unix_s, len(name)), name]
        parts += [_SPAN.pack(span.offset, span.stride, span.num_bytes, span.rows) for span in spans]
        try:
            self._sock.sendall(b"".join(parts))
        except OSError as error:
            raise self._lost(error) from error

    def receive(self, num_bytes: int) -> ByteArray:
        """The next frame's payload, num_bytes long.

        Raises:
            HandoffError: the ticket expired, the source refused, or it is gone.
            DamagedFrameError: its checksum does not match; `request` may ask for it again.
            CorruptDataError: its length is none that a frame can have.
        """
        try:
            header = _receive(self._sock, _FRAME.size)
            status, checksum, length = _FRAME.unpack(header or b"")
            if length > MAX_PAYLOAD_BYTES:
                raise CorruptDataError(f"hand-off: frame of {length} bytes from {self.address} is over the limit")
            payload = _receive(self._sock, length)
        except OSError as error:
            raise self._lost(error) from error
        self.used_s = time.monotonic()
        if payload is None or zlib.crc32(payload) != checksum:
            raise DamagedFrameError(f"hand-off: checksum of {length} bytes from {self.address} does not match")
        if status == _EXPIRED:
            raise HandoffError("hand-off: the ticket expired at the source; raise the lease or add decode capacity")
        if status != _OK or length != num_bytes:
            text = bytes(payload[:500]).decode(errors="replace") if status != _OK else f"{length} bytes"
            raise HandoffError(f"hand-off: {self.address} answered {text} to a read of {num_bytes} bytes")
        return np.frombuffer(payload, dtype=np.uint8)

    def close(self) -> None:
        """Cut the connection; a thread inside of `receive` gets HandoffError."""
        _shut(self._sock)

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
