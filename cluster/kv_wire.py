"""What goes between a rank's KV server and its readers over TCP.

After the token hello the reader sends requests and gets one frame for each, in order:

    request   "<HBHdI": format version, kind, number of parts, ticket expiry (unix seconds), length of the ticket id;
              the id; "<II" a part: length and number of its rows; an int64 a row: where it begins
    frame     "<BI": status and length of the payload; the payload: the rows' bytes one after the other, or a message;
              "<BQ": status behind it, and the payload's XXH3

A request of kind "pair" (no parts; the id is "<name> <device>") forms a torch.distributed group of the two ranks: its
frame holds the port of the source's store. From then on kind "send" has the payload come over that group and not
between the two ends of its frame, with its checksum between CPUs and none between GPUs, which no host sees.

The frame of kind "open" holds what NIXL needs to know of the source's memory; from then on the reader reads by itself,
and kind "hash" has a frame without a payload say whether it was in time, and the checksum, as with "send".

The frame of kind "wait" (no parts; the id is "<step> <layers>") comes when that step has written more than so many
attention layers, and holds how many; EXPIRED where it has not when the ticket is over.

A damaged payload leaves the stream in step: its rows can be asked for again.

Payloads go from cache to cache without a copy between, so the server looks at the expiry behind them too: a frame that
is OK at both ends carries no rows that may have been given to another sequence meanwhile.
"""

import socket
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import xxhash

from cluster.plan import KV_FORMAT
from cluster.recut import MAX_ROWS, Rows
from router.errors import CorruptDataError

MAX_PAYLOAD_BYTES: Final = 4 << 20
"""Longest payload of a frame; what a connection may make either side hold. Frames of 1 MB cost gloo twice the time."""
MAX_PARTS: Final = 1024
IDLE_TIMEOUT_S: Final = 60.0
OK, EXPIRED, REFUSED = 0, 1, 2
READ, PAIR, SEND, OPEN, HASH, WAIT = 0, 1, 2, 3, 4, 5
_MAX_ID_BYTES: Final = 256
_REQUEST: Final = struct.Struct("<HBHdI")
_PART: Final = struct.Struct("<II")
HEAD: Final = struct.Struct("<BI")
TAIL: Final = struct.Struct("<BQ")


class DamagedFrameError(CorruptDataError):
    """A frame's bytes are not those that were sent; the connection still works."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request as the server reads it."""

    version: int
    kind: int = READ
    expires_unix_s: float = 0.0
    name: str = ""
    parts: tuple[Rows, ...] = ()


def encode_request(kind: int, name: str, expires_unix_s: float, parts: Sequence[Rows]) -> bytes:
    """A request's bytes."""
    packed = name.encode()
    head = _REQUEST.pack(KV_FORMAT, kind, len(parts), expires_unix_s, len(packed))
    sizes = [_PART.pack(part.num_bytes, len(part.offsets)) for part in parts]
    return b"".join([head, packed, *sizes, *(part.offsets.astype("<i8").tobytes() for part in parts)])


def read_request(sock: socket.socket) -> Asked | None:
    """The next request; None at the end of the stream. Of another version only that it is.

    Raises:
        CorruptDataError: it is over the limits.
        OSError: the stream ended early.
    """
    header = receive_bytes(sock, _REQUEST.size, end_allowed=True)
    if header is None:
        return None
    version, kind, num_parts, expires_unix_s, id_bytes = _REQUEST.unpack(header)
    if version != KV_FORMAT:
        return Asked(version=version)
    if num_parts > MAX_PARTS or id_bytes > _MAX_ID_BYTES:
        raise CorruptDataError(f"read of {num_parts} parts, ticket id of {id_bytes} bytes: over the limits")
    name = (receive_bytes(sock, id_bytes) or b"").decode(errors="replace")
    sizes = list(_PART.iter_unpack(receive_bytes(sock, num_parts * _PART.size) or b""))
    num_rows = sum(rows for _, rows in sizes)
    if num_rows > MAX_ROWS:
        raise CorruptDataError(f"read of {num_rows} rows, ticket {name}: over the limit of {MAX_ROWS}")
    offsets = np.frombuffer(receive_bytes(sock, 8 * num_rows) or b"", dtype="<i8").astype(np.int64)
    parts: list[Rows] = []
    at = 0
    for num_bytes, rows in sizes:
        parts.append(Rows(offsets=offsets[at : at + rows], num_bytes=num_bytes))
        at += rows
    return Asked(version=version, kind=kind, expires_unix_s=expires_unix_s, name=name, parts=tuple(parts))


def checksum(pieces: Sequence[memoryview]) -> int:
    """XXH3 of the pieces one after the other."""
    state = xxhash.xxh3_64()
    for piece in pieces:
        state.update(piece)
    return state.intdigest()


def send_pieces(sock: socket.socket, pieces: Sequence[memoryview]) -> None:
    """Send all bytes of the pieces from where they lie."""
    _move(pieces, sock.sendmsg)


def receive_pieces(sock: socket.socket, pieces: Sequence[memoryview]) -> None:
    """Fill the pieces one after the other.

    Raises:
        ConnectionError: the stream ended early.
        TimeoutError: nothing came within the socket's timeout.
    """
    _move(pieces, lambda some: sock.recvmsg_into(some)[0])


def _move(pieces: Sequence[memoryview], move: Callable[[list[memoryview]], int]) -> None:
    left, first = list(pieces), 0
    while first < len(left):
        count = move(left[first : first + MAX_ROWS])
        if not count:
            raise ConnectionError(f"connection closed {sum(len(piece) for piece in left[first:])} bytes early")
        while first < len(left) and count >= len(left[first]):
            count -= len(left[first])
            first += 1
        if count:
            left[first] = left[first][count:]


def receive_bytes(sock: socket.socket, num_bytes: int, *, end_allowed: bool = False) -> bytearray | None:
    """Exactly num_bytes; None at the end of the stream where that is allowed.

    Raises:
        ConnectionError, TimeoutError: as `receive_pieces`.
    """
    data = bytearray(num_bytes)
    if end_allowed:
        count = sock.recv_into(data)
        if not count:
            return None
        receive_pieces(sock, [memoryview(data)[count:]] if count < num_bytes else [])
    elif num_bytes:
        receive_pieces(sock, [memoryview(data)])
    return data


def tune(sock: socket.socket) -> None:
    """Send small messages at once."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def shut(sock: socket.socket) -> None:
    """Close, and wake whoever waits on it."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    sock.close()
