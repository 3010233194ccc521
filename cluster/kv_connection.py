"""A reader's connection to the KV server of another rank: asks for rows and writes them into this rank's cache."""

import socket
import time
from collections import deque
from collections.abc import Sequence
from uuid import uuid4

import torch
from torch import Tensor

from cluster.kv_wire import (
    EXPIRED,
    HASH,
    HEAD,
    MAX_PAYLOAD_BYTES,
    OK,
    OPEN,
    PAIR,
    READ,
    SEND,
    TAIL,
    WAIT,
    DamagedFrameError,
    checksum,
    encode_request,
    receive_bytes,
    receive_pieces,
    shut,
    tune,
)
from cluster.nixl_link import NixlLink, NixlRead
from cluster.pair import READER, Pair, Transfer, join_store
from cluster.rank_memory import RankMemory
from cluster.recut import Rows
from cluster.security import client_hello
from router.errors import CorruptDataError, HandoffError


class KvConnection:
    """Reads rows of a remote rank's cache; used by one thread at a time.

    Args:
        memory: where they go.

    Raises:
        HandoffError: nobody listens at `address`.
        CorruptDataError: the other side holds another cluster token.
    """

    def __init__(self, address: str, token: str, memory: RankMemory, *, timeout_s: float) -> None:
        self.address = address
        self.used_s = time.monotonic()
        """When the last frame came, on the monotonic clock."""
        self._memory = memory
        self._pair: Pair | None = None
        self._nixl: NixlLink | None = None
        self._coming: deque[tuple[Tensor, Transfer | NixlRead]] = deque()
        """Payloads asked for that come beside the connection, each at the beginning of its room."""
        self._room: list[Tensor] = []
        """For payloads, where nothing is coming."""
        self._timeout_s = timeout_s
        host, _, port = address.rpartition(":")
        try:
            self._host = host.strip("[]")
            self._sock = socket.create_connection((self._host, int(port)), timeout=timeout_s)
        except (OSError, ValueError) as error:
            raise HandoffError(f"hand-off: source rank at {address} cannot be reached: {error}") from error
        met = False
        try:
            tune(self._sock)
            client_hello(self._sock, token, timeout_s=timeout_s)
            met = True
        except OSError as error:
            raise self._lost(error) from error
        finally:
            if not met:
                self._sock.close()

    def set_timeout(self, seconds: float) -> None:
        """Longest wait of each following send and receive."""
        self._timeout_s = max(seconds, 1e-3)
        self._sock.settimeout(self._timeout_s)

    def request(self, ticket_id: str, expires_unix_s: float, parts: Sequence[Rows]) -> None:
        """Ask for rows of at most MAX_PAYLOAD_BYTES together; `receive` gets them.

        Raises:
            HandoffError: the source is gone.
        """
        if self._nixl is not None:
            self._ask(HASH, ticket_id, expires_unix_s, parts)
            room = self._take_room()
            self._coming.append((room, self._nixl.start_read(room, parts)))
        elif self._pair is not None:
            self._ask(SEND, ticket_id, expires_unix_s, parts)
            # Now, so that the source need not wait for us when it sends.
            room = self._take_room()
            total = sum(part.total_bytes for part in parts)
            self._coming.append((room, self._pair.start_receive(room[:total])))
        else:
            self._ask(READ, ticket_id, expires_unix_s, parts)

    def _take_room(self) -> Tensor:
        if self._room:
            return self._room.pop()
        room = torch.empty(MAX_PAYLOAD_BYTES, dtype=torch.uint8, device=self._memory.device)
        if self._nixl is not None:
            self._nixl.register(room)
        return room

    def form_pair(self) -> None:
        """Have payloads come over a torch.distributed group of two from now on.

        Raises:
            HandoffError: the source refuses, is gone, or does not come to the group.
            CorruptDataError: as `receive`.
        """
        name, device = uuid4().hex, self._memory.device
        self._ask(PAIR, f"{name} {device.type}", 0.0, ())
        status, payload = self._message()
        answer = payload[:500].decode(errors="replace")
        if status != OK or not answer.isdigit():
            raise HandoffError(f"hand-off: {self.address} forms no pair: {answer}")
        store = join_store(self._host, int(answer), timeout_s=self._timeout_s)
        host = self._sock.getsockname()[0]
        self._pair = Pair(store, name, rank=READER, host=host, device=device, timeout_s=self._timeout_s)

    def open_nixl(self) -> None:
        """Read by NIXL from now on.

        Raises:
            HandoffError: the source refuses or is gone.
            CorruptDataError: as `receive`.
        """
        self._ask(OPEN, "", 0.0, ())
        status, payload = self._message()
        if status != OK:
            raise HandoffError(f"hand-off: {self.address}: {payload[:500].decode(errors='replace')}")
        self._nixl = NixlLink(payload)

    def written(self, step: int, layers: int, expires_unix_s: float) -> int:
        """Wait until a step of the source has written more than so many layers -> how many.

        Raises:
            HandoffError: the ticket expired first, or the source is gone.
            CorruptDataError: as `receive`.
        """
        self._ask(WAIT, f"{step} {layers}", expires_unix_s, ())
        status, payload = self._message()
        answer = payload[:500].decode(errors="replace")
        if status != OK or not answer.isdigit():
            raise HandoffError(self._why(status, answer, 0))
        self.used_s = time.monotonic()
        return int(answer)

    def _ask(self, kind: int, name: str, expires_unix_s: float, parts: Sequence[Rows]) -> None:
        try:
            self._sock.sendall(encode_request(kind, name, expires_unix_s, parts))
        except OSError as error:
            raise self._lost(error) from error

    def receive(self, parts: Sequence[Rows]) -> None:
        """Write the next frame's payload into rows of this rank's cache, as long as those asked for.

        Raises:
            HandoffError: the ticket expired, the source refused, or it is gone.
            DamagedFrameError: its checksum does not match; `request` may ask for it again.
            CorruptDataError: its length is none that a frame can have.
        """
        try:
            status, length = self._head()
            total = sum(part.total_bytes for part in parts)
            if status != OK:
                text = self._payload(length)[:500].decode(errors="replace")
                raise HandoffError(self._why(status, text, total))
            if length != total:
                raise HandoffError(f"hand-off: {self.address} answered {length} bytes to a read of {total}")
            whole = self._take_beside(parts) if self._coming else self._take(parts)
        except OSError as error:
            raise self._lost(error) from error
        self.used_s = time.monotonic()
        if not whole:
            raise DamagedFrameError(f"hand-off: checksum of {total} bytes from {self.address} does not match")

    def _take(self, parts: Sequence[Rows]) -> bool:
        """A payload from the connection -> whether it is what was sent."""
        pieces = self._memory.views(parts)
        if pieces is not None:
            receive_pieces(self._sock, pieces)
            value = checksum(pieces)
        else:
            payload = torch.empty(sum(part.total_bytes for part in parts), dtype=torch.uint8)
            receive_pieces(self._sock, [payload.numpy().data])
            value = checksum([payload.numpy().data])
            self._memory.scatter(payload, parts)
        return value == self._tail()

    def _take_beside(self, parts: Sequence[Rows]) -> bool:
        """A payload from the pair or by NIXL -> whether it is what was sent."""
        value = self._tail()
        room, coming = self._coming.popleft()
        if isinstance(coming, Transfer):
            assert self._pair is not None
            self._pair.finish(coming, timeout_s=self._timeout_s)
        else:
            assert self._nixl is not None
            self._nixl.finish(coming, timeout_s=self._timeout_s)
        payload = coming.payload
        whole = payload.device.type != "cpu" or checksum([payload.numpy().data]) == value
        if whole:
            self._memory.scatter(payload, parts)
        self._room.append(room)
        return whole

    def _head(self) -> tuple[int, int]:
        status, length = HEAD.unpack(receive_bytes(self._sock, HEAD.size) or b"")
        if length > MAX_PAYLOAD_BYTES:
            raise CorruptDataError(f"hand-off: frame of {length} bytes from {self.address} is over the limit")
        return status, length

    def _tail(self) -> int:
        """The checksum behind a payload, which was read in time."""
        status, value = TAIL.unpack(receive_bytes(self._sock, TAIL.size) or b"")
        if status != OK:
            raise HandoffError(self._why(status, "", 0))
        return int(value)

    def _message(self) -> tuple[int, bytes]:
        """A frame without rows."""
        try:
            status, length = self._head()
            return status, self._payload(length)
        except OSError as error:
            raise self._lost(error) from error

    def _payload(self, length: int) -> bytes:
        """A payload that is a message."""
        payload = receive_bytes(self._sock, length) or b""
        _, value = TAIL.unpack(receive_bytes(self._sock, TAIL.size) or b"")
        if checksum([memoryview(payload)]) != value:
            raise CorruptDataError(f"hand-off: checksum of a message from {self.address} does not match")
        return bytes(payload)

    def _why(self, status: int, text: str, num_bytes: int) -> str:
        if status == EXPIRED:
            return "hand-off: the ticket expired at the source; raise the lease or add decode capacity"
        return f"hand-off: {self.address} answered {text} to a read of {num_bytes} bytes"

    def close(self) -> None:
        """Cut the connection; a thread inside of `receive` gets HandoffError."""
        shut(self._sock)
        if self._pair is not None:
            self._pair.close()
        if self._nixl is not None:
            self._nixl.close()

    def _lost(self, error: OSError) -> HandoffError:
        return HandoffError(f"hand-off: source rank at {self.address} was lost: {error}")
