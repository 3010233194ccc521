"""Messages between the ranks of a replica: authenticated, framed msgpack over TCP or unix sockets. No pickle.

A frame is an 8-byte header (payload length, CRC-32) and a msgpack payload: a list that begins with its kind.
"""

import socket
import struct
import threading
import zlib
from typing import Final

import msgpack

from cluster.security import HELLO_TIMEOUT_S, client_hello, server_hello
from router.errors import CorruptDataError

MAX_FRAME_BYTES: Final = 256 << 20
_HEADER = struct.Struct("<II")

Message = list[object]


class Channel:
    """One end of an authenticated connection. `send` may be called from several threads, `recv` from one."""

    def __init__(self, sock: socket.socket, *, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._sock = sock
        self._send_lock = threading.Lock()
        self._max_frame_bytes = max_frame_bytes

    def set_timeout(self, seconds: float | None) -> None:
        """Limit how long `send` and `recv` may wait; None waits for ever."""
        self._sock.settimeout(seconds)

    def limit_send(self, seconds: float) -> None:
        """Limit how long `send` may wait for a peer that takes nothing in; `recv` waits as before."""
        whole = int(seconds)
        limit = struct.pack("@ll", whole, int((seconds - whole) * 1e6))
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)

    def send(self, message: Message) -> None:
        """Send one message.

        Raises:
            ValueError: it exceeds the frame limit.
            OSError: the other side is gone, or took nothing in within the limit.
        """
        payload = msgpack.packb(message)
        assert payload is not None
        if len(payload) > self._max_frame_bytes:
            raise ValueError(f"message of {len(payload)} bytes exceeds the frame limit of {self._max_frame_bytes}")
        with self._send_lock:
            self._sock.sendall(_HEADER.pack(len(payload), zlib.crc32(payload)) + payload)

    def recv(self) -> Message | None:
        """Wait for one message; None when the other side has closed the connection.

        Raises:
            CorruptDataError: the frame is too large, damaged or cut off, or is no message.
            OSError: the connection broke.
        """
        header = self._read(_HEADER.size)
        if header is None:
            return None
        length, checksum = _HEADER.unpack(header)
        if length > self._max_frame_bytes:
            raise CorruptDataError(f"frame of {length} bytes exceeds the limit of {self._max_frame_bytes}")
        payload = self._read(length)
        if payload is None:
            raise CorruptDataError(f"connection ended before a frame's {length} bytes")
        if zlib.crc32(payload) != checksum:
            raise CorruptDataError(f"checksum of a {length}-byte frame does not match")
        return _unpack(payload)

    def close(self) -> None:
        """Close; a thread that waits in `recv` wakes with end of stream."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._sock.close()

    def _read(self, length: int) -> bytes | None:
        """Exactly `length` bytes; None at the end of the stream before the first byte."""
        chunks: list[bytes] = []
        missing = length
        while missing:
            chunk = self._sock.recv(min(missing, 1 << 20))
            if not chunk:
                if chunks:
                    raise CorruptDataError(f"connection ended {missing} bytes short of {length}")
                return None
            chunks.append(chunk)
            missing -= len(chunk)
        return b"".join(chunks)


def _unpack(payload: bytes) -> Message:
    try:
        message = msgpack.unpackb(payload, strict_map_key=False)
    except (ValueError, msgpack.UnpackException) as error:
        raise CorruptDataError(f"frame of {len(payload)} bytes is no msgpack: {error}") from error
    if not isinstance(message, list) or not message or not isinstance(message[0], str):
        raise CorruptDataError("frame is no message: expected a list that begins with its kind")
    return message


def listen(host: str) -> socket.socket:
    """A TCP listener on a free port of `host`."""
    return socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)


def accept(listener: socket.socket, token: str) -> Channel | None:
    """Let the next client in; None when it could not prove the cluster token (it is closed).

    Raises:
        TimeoutError: nobody came within the listener's timeout.
    """
    sock, _ = listener.accept()
    sock.settimeout(None)
    try:
        server_hello(sock, token)
    except CorruptDataError:
        sock.close()
        return None
    return Channel(sock)


def connect(host: str, port: int, token: str, *, timeout_s: float = HELLO_TIMEOUT_S) -> Channel:
    """An authenticated channel to host:port.

    Raises:
        OSError: nobody answers there within timeout_s.
        CorruptDataError: the other side holds another cluster token or is no MoEFleet rank.
    """
    sock = socket.create_connection((host, port), timeout=timeout_s)
    sock.settimeout(None)
    try:
        client_hello(sock, token, timeout_s=timeout_s)
    except CorruptDataError:
        sock.close()
        raise
    return Channel(sock)
