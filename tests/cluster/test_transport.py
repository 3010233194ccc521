"""The KV server and its readers over real sockets."""

import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor

from cluster.plan import KV_FORMAT
from cluster.rank_memory import RankMemory
from cluster.recut import Span
from cluster.security import client_hello, new_token, server_hello
from cluster.transport import _FRAME, MAX_PAYLOAD_BYTES, KvConnection, KvServer
from router.errors import CorruptDataError, HandoffError

TOKEN = new_token()
FAR = 4e9


def make_buffer(num_bytes: int = 4096) -> Tensor:
    return torch.arange(num_bytes, dtype=torch.int64).remainder(251).to(torch.uint8)


@contextmanager
def serving(buffer: Tensor, now: float | None = None) -> Iterator[KvServer]:
    server = KvServer(buffer, TOKEN) if now is None else KvServer(buffer, TOKEN, now=lambda: now)
    try:
        yield server
    finally:
        server.close()


@contextmanager
def connected(address: str, token: str = TOKEN) -> Iterator[KvConnection]:
    connection = KvConnection(address, token, timeout_s=5)
    try:
        yield connection
    finally:
        connection.close()


@contextmanager
def strange_source(answer: bytes) -> Iterator[str]:
    """A listener that holds the token, reads one request and answers with `answer`, then closes."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        sock, _ = listener.accept()
        with sock:
            server_hello(sock, TOKEN)
            sock.recv(4096)
            sock.sendall(answer)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        thread.join(5)
        listener.close()


def read_one(connection: KvConnection) -> int:
    connection.request("t", FAR, [Span(offset=0, stride=1, num_bytes=1)])
    return int(connection.receive(1)[0])


def test_spans_arrive_packed_in_order() -> None:
    buffer = make_buffer()
    spans = [Span(offset=10, stride=100, num_bytes=7, rows=3), Span(offset=4000, stride=1, num_bytes=96)]
    wanted = [buffer[at : at + 7] for at in (10, 110, 210)] + [buffer[4000:]]
    with serving(buffer) as server, connected(server.address) as connection:
        connection.request("t", FAR, spans)
        got = connection.receive(sum(span.total_bytes for span in spans))
        assert torch.equal(torch.from_numpy(got), torch.cat(wanted))


def test_a_connection_serves_one_read_after_another() -> None:
    with serving(make_buffer()) as server, connected(server.address) as connection:
        for offset in (0, 5, 9):
            connection.request("t", FAR, [Span(offset=offset, stride=1, num_bytes=1)])
        assert [int(connection.receive(1)[0]) for _ in range(3)] == [0, 5, 9]


def test_an_expired_ticket_reads_nothing() -> None:
    with serving(make_buffer(), now=100.0) as server, connected(server.address) as connection:
        connection.request("t", 100.0, [Span(offset=0, stride=1, num_bytes=1)])
        with pytest.raises(HandoffError, match="expired at the source"):
            connection.receive(1)


def test_a_ticket_that_expires_while_its_rows_are_read_gives_nothing() -> None:
    times = iter([99.0, 101.0])
    server = KvServer(make_buffer(), TOKEN, now=lambda: next(times))
    try:
        with connected(server.address) as connection:
            connection.request("t", 100.0, [Span(offset=0, stride=1, num_bytes=1)])
            with pytest.raises(HandoffError, match="expired at the source"):
                connection.receive(1)
    finally:
        server.close()


@pytest.mark.parametrize(
    "span",
    [
        Span(offset=4090, stride=1, num_bytes=7),
        Span(offset=0, stride=2048, num_bytes=10, rows=4),
        Span(offset=0, stride=1, num_bytes=10, rows=2),
        Span(offset=0, stride=1, num_bytes=0),
        Span(offset=2**63, stride=1, num_bytes=2**63),
    ],
)
def test_a_read_outside_of_the_cache_is_refused_and_the_connection_lives(span: Span) -> None:
    with serving(make_buffer()) as server, connected(server.address) as connection:
        connection.request("t", FAR, [span])
        with pytest.raises(HandoffError, match="refused"):
            connection.receive(1)
        connection.request("t", FAR, [Span(offset=3, stride=1, num_bytes=1)])
        assert connection.receive(1)[0] == 3


def test_a_read_over_the_frame_limit_is_refused() -> None:
    with serving(make_buffer(MAX_PAYLOAD_BYTES + 1)) as server, connected(server.address) as connection:
        connection.request("t", FAR, [Span(offset=0, stride=1, num_bytes=MAX_PAYLOAD_BYTES + 1)])
        with pytest.raises(HandoffError, match="refused"):
            connection.receive(MAX_PAYLOAD_BYTES + 1)


def test_a_request_of_too_many_spans_ends_the_connection() -> None:
    with serving(make_buffer()) as server, connected(server.address) as connection:
        connection.request("t", FAR, [Span(offset=0, stride=1, num_bytes=1)] * 5000)
        with pytest.raises(HandoffError, match="lost"):
            connection.receive(5000)


def test_a_reader_without_the_token_gets_no_byte_of_the_cache() -> None:
    with serving(make_buffer()) as server:
        with pytest.raises(CorruptDataError, match="token"):
            KvConnection(server.address, new_token(), timeout_s=5)
        host, port = server.address.split(":")
        with socket.create_connection((host, int(port)), timeout=5) as sock:
            sock.sendall(b"\0" * 64)
            received = b""
            while part := sock.recv(4096):
                received += part
            assert len(received) == 9 + 32


def test_a_damaged_frame_is_detected() -> None:
    payload = b"abcd"
    with strange_source(_FRAME.pack(0, zlib.crc32(b"abcx"), 4) + payload) as address, connected(address) as connection:
        connection.request("t", FAR, [Span(offset=0, stride=1, num_bytes=4)])
        with pytest.raises(CorruptDataError, match="checksum"):
            connection.receive(4)


def test_a_frame_over_the_limit_is_refused_before_it_is_read() -> None:
    with strange_source(_FRAME.pack(0, 0, MAX_PAYLOAD_BYTES + 1)) as address, connected(address) as connection:
        connection.request("t", FAR, [Span(offset=0, stride=1, num_bytes=4)])
        with pytest.raises(CorruptDataError, match="over the limit"):
            connection.receive(4)


def test_a_frame_of_another_length_is_refused() -> None:
    with strange_source(_FRAME.pack(0, zlib.crc32(b"ab"), 2) + b"ab") as address, connected(address) as connection:
        connection.request("t", FAR, [Span(offset=0, stride=1, num_bytes=4)])
        with pytest.raises(HandoffError, match="2 bytes"):
            connection.receive(4)


def test_a_source_that_dies_inside_a_frame_is_lost_at_once() -> None:
    with strange_source(_FRAME.pack(0, 0, 1000) + b"half") as address, connected(address) as connection:
        began = time.monotonic()
        connection.request("t", FAR, [Span(offset=0, stride=1, num_bytes=1000)])
        with pytest.raises(HandoffError, match="lost"):
            connection.receive(1000)
        assert time.monotonic() - began < 2


def test_a_reader_of_another_format_version_is_told() -> None:
    with serving(make_buffer()) as server:
        host, port = server.address.split(":")
        with socket.create_connection((host, int(port)), timeout=5) as sock:
            client_hello(sock, TOKEN, timeout_s=5)
            sock.sendall(struct.pack("<HBIdI", KV_FORMAT + 1, 0, 0, FAR, 0))
            assert f"KV format {KV_FORMAT}".encode() in sock.recv(400)
            assert sock.recv(1) == b""


def test_nobody_listening_is_a_handoff_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    with pytest.raises(HandoffError, match="cannot be reached"):
        KvConnection(address, TOKEN, timeout_s=1)


def test_closing_the_server_cuts_its_readers() -> None:
    with serving(make_buffer()) as server, connected(server.address) as connection:
        assert read_one(connection) == 0
        server.close()
        with pytest.raises(HandoffError, match="lost"):
            read_one(connection)


def test_scatter_undoes_gather() -> None:
    source, target = make_buffer(), torch.zeros(4096, dtype=torch.uint8)
    spans = [Span(offset=64, stride=256, num_bytes=32, rows=5), Span(offset=3000, stride=9, num_bytes=9)]
    RankMemory(target).scatter(RankMemory(source).gather(spans), spans)
    assert np.array_equal(RankMemory(target).gather(spans), RankMemory(source).gather(spans))
    assert int((target != 0).sum()) <= 5 * 32 + 9
