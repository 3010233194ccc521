"""The cluster token: a mutual proof at the start of every socket inside the cluster.

The token never crosses a plain socket. The listening side opens with a random challenge, the connecting side answers
with its own challenge and a proof, the listening side verifies and proves itself in turn:

    server -> client   MAGIC, challenge S (32 bytes)
    client -> server   challenge C (32 bytes), HMAC-SHA256(token, "client" + S + C)
    server -> client   HMAC-SHA256(token, "server" + S + C)
"""

import hashlib
import hmac
import secrets
import socket
import time
from collections.abc import Generator
from typing import TypeAlias

from router.errors import ConfigError, CorruptDataError

HELLO_TIMEOUT_S = 5.0
_MAGIC = b"MOEFLEET1"
_NONCE_BYTES = 32
_PROOF_BYTES = 32
_MIN_TOKEN_CHARS = 16

Exchange: TypeAlias = Generator[tuple[bytes, int], bytes, None]
"""One side of the proof: yields bytes to send and how many to receive next, and is sent these."""


def new_token() -> str:
    """A fresh cluster token: 64 hex digits from the system's random source."""
    return secrets.token_hex(32)


def check_token(token: str) -> str:
    """Return the token when it can serve as one.

    Raises:
        ConfigError: it is short, or holds anything but printable ASCII without spaces.
    """
    if len(token) < _MIN_TOKEN_CHARS or not all("!" <= char <= "~" for char in token):
        raise ConfigError(
            f"cluster token has {len(token)} characters; it needs at least {_MIN_TOKEN_CHARS} of printable ASCII "
            "without spaces, the same in every process (cluster.security.new_token() makes one)"
        )
    return token


def client_hello(sock: socket.socket, token: str, *, timeout_s: float = HELLO_TIMEOUT_S) -> None:
    """Prove knowledge of the token to the listening side and have it prove the same.

    Args:
        sock: a connected blocking socket; its timeout is restored afterwards.
        token: the cluster token.
        timeout_s: longest time for the whole exchange.

    Raises:
        CorruptDataError: the peer is no MoEFleet listener, closed or stalled, or holds another token.
    """
    _carry_out(client_exchange(token, _peer(sock)), sock, timeout_s)


def server_hello(sock: socket.socket, token: str, *, timeout_s: float = HELLO_TIMEOUT_S) -> None:
    """The listening side of `client_hello`; nothing else is read from the socket before the proof is checked.

    Raises:
        CorruptDataError: the peer closed or stalled, or holds another token. The caller closes the socket.
    """
    _carry_out(server_exchange(token, _peer(sock)), sock, timeout_s)


def client_exchange(token: str, peer: str) -> Exchange:
    """The connecting side, for whoever moves the bytes.

    Raises:
        CorruptDataError: the peer is no MoEFleet listener, or holds another token.
    """
    opening = yield b"", len(_MAGIC) + _NONCE_BYTES
    if opening[: len(_MAGIC)] != _MAGIC:
        raise CorruptDataError(f"hello: {peer} does not speak this protocol; check the address")
    server_nonce = opening[len(_MAGIC) :]
    nonce = secrets.token_bytes(_NONCE_BYTES)
    answer = yield nonce + _proof(token, b"client", server_nonce, nonce), _PROOF_BYTES
    _check_proof(answer, _proof(token, b"server", server_nonce, nonce), peer)


def server_exchange(token: str, peer: str) -> Exchange:
    """The listening side, for whoever moves the bytes.

    Raises:
        CorruptDataError: the peer holds another token.
    """
    nonce = secrets.token_bytes(_NONCE_BYTES)
    answer = yield _MAGIC + nonce, _NONCE_BYTES + _PROOF_BYTES
    client_nonce, proof = answer[:_NONCE_BYTES], answer[_NONCE_BYTES:]
    _check_proof(proof, _proof(token, b"client", nonce, client_nonce), peer)
    yield _proof(token, b"server", nonce, client_nonce), 0


def _peer(sock: socket.socket) -> str:
    """What errors call the other side."""
    try:
        return str(sock.getpeername() or "the peer")
    except OSError:
        return "the peer"


def _check_proof(given: bytes, wanted: bytes, peer: str) -> None:
    if not hmac.compare_digest(given, wanted):
        raise CorruptDataError(f"hello: {peer} holds another cluster token; start both with the same one")


def _carry_out(exchange: Exchange, sock: socket.socket, timeout_s: float) -> None:
    """Move an exchange's bytes over a blocking socket."""
    before = sock.gettimeout()
    deadline = time.monotonic() + timeout_s
    try:
        out, wanted = next(exchange)
        while True:
            if out:
                _send(sock, out, deadline)
            out, wanted = exchange.send(_receive(sock, wanted, deadline))
    except StopIteration:
        return
    finally:
        sock.settimeout(before)


def _proof(token: str, side: bytes, server_nonce: bytes, client_nonce: bytes) -> bytes:
    return hmac.new(token.encode(), side + server_nonce + client_nonce, hashlib.sha256).digest()


def _left(deadline: float) -> float:
    # A zero timeout would turn the socket non-blocking.
    return max(deadline - time.monotonic(), 1e-3)


def _send(sock: socket.socket, data: bytes, deadline: float) -> None:
    sock.settimeout(_left(deadline))
    try:
        sock.sendall(data)
    except OSError as error:
        raise CorruptDataError(
            f"hello: {_peer(sock)} closed or stalled ({error}); do the cluster tokens agree?"
        ) from error


def _receive(sock: socket.socket, num_bytes: int, deadline: float) -> bytes:
    data, peer = bytearray(), _peer(sock)
    while len(data) < num_bytes:
        sock.settimeout(_left(deadline))
        try:
            part = sock.recv(num_bytes - len(data))
        except OSError as error:
            raise CorruptDataError(f"hello: {peer} stalled ({error}); do the cluster tokens agree?") from error
        if not part:
            raise CorruptDataError(f"hello: {peer} closed the connection; do the cluster tokens agree?")
        data += part
    return bytes(data)
