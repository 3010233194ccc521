"""The KV server and its readers over real sockets."""

import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor

from cluster.kv_connection import KvConnection
from cluster.kv_server import KvServer
from cluster.kv_wire import HEAD, MAX_PARTS, MAX_PAYLOAD_BYTES, OK, REFUSED, TAIL, DamagedFrameError, checksum
from cluster.plan import KV_FORMAT
from cluster.rank_memory import RankMemory
from cluster.recut import MAX_ROWS, Rows
from cluster.security import client_hello, new_token, server_hello
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


def rows(*offsets: int, num_bytes: int = 1) -> Rows:
    return Rows(offsets=np.array(offsets, np.int64), num_bytes=num_bytes)


class Reader:
    """A connection that reads into memory of its own."""

    def __init__(self, address: str, token: str = TOKEN) -> None:
        self.memory = torch.zeros(4096, dtype=torch.uint8)
        self.connection = KvConnection(address, token, RankMemory(self.memory), timeout_s=5)

    def ask(self, *parts: Rows, expires: float = FAR) -> None:
        self.connection.request("t", expires, parts)

    def take(self, num_bytes: int = 1) -> Tensor:
        """The next frame's bytes."""
        self.connection.receive([rows(0, num_bytes=num_bytes)])
        return self.memory[:num_bytes].clone()


@contextmanager
def connected(address: str) -> Iterator[Reader]:
    connection = Reader(address)
    try:
        yield connection
    finally:
        connection.connection.close()


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


def read_one(reader: Reader) -> int:
    reader.ask(rows(0))
    return int(reader.take())


def frame(payload: bytes, value: int | None = None, length: int | None = None) -> bytes:
    """A frame of a payload, or with another checksum or length in it."""
    head = HEAD.pack(OK, len(payload) if length is None else length)
    return head + payload + TAIL.pack(OK, checksum([memoryview(payload)]) if value is None else value)


def test_rows_arrive_packed_in_order() -> None:
    buffer = make_buffer()
    wanted = [buffer[at : at + 7] for at in (10, 210, 110)] + [buffer[4000:]]
    with serving(buffer) as server, connected(server.address) as reader:
        reader.ask(rows(10, 210, 110, num_bytes=7), rows(4000, num_bytes=96))
        assert torch.equal(reader.take(117), torch.cat(wanted))


def test_payloads_go_to_the_rows_that_are_named() -> None:
    buffer = make_buffer()
    with serving(buffer) as server, connected(server.address) as reader:
        reader.ask(rows(10, 20, num_bytes=4))
        reader.connection.receive([rows(100, num_bytes=3), rows(7, 50, 60, 61, 62)])
        wanted = torch.zeros(4096, dtype=torch.uint8)
        for at, value in zip((100, 101, 102, 7, 50, 60, 61, 62), (10, 11, 12, 13, 20, 21, 22, 23), strict=True):
            wanted[at] = value
        assert torch.equal(reader.memory, wanted)


def test_a_connection_serves_one_read_after_another() -> None:
    with serving(make_buffer()) as server, connected(server.address) as reader:
        for offset in (0, 5, 9):
            reader.ask(rows(offset))
        assert [int(reader.take()) for _ in range(3)] == [0, 5, 9]


def test_an_expired_ticket_reads_nothing() -> None:
    with serving(make_buffer(), now=100.0) as server, connected(server.address) as reader:
        reader.ask(rows(0), expires=100.0)
        with pytest.raises(HandoffError, match="expired at the source"):
            reader.take()


def test_a_ticket_that_expires_while_its_rows_are_read_counts_for_nothing() -> None:
    times = iter([99.0, 101.0])
    server = KvServer(make_buffer(), TOKEN, now=lambda: next(times))
    try:
        with connected(server.address) as reader:
            reader.ask(rows(0), expires=100.0)
            with pytest.raises(HandoffError, match="expired at the source"):
                reader.take()
    finally:
        server.close()


@pytest.mark.parametrize(
    "bad",
    [
        rows(4090, num_bytes=7),
        rows(0, 4095, num_bytes=10),
        rows(-1),
        rows(num_bytes=4),
        rows(0, num_bytes=0),
        rows(2**63 - 1),
        rows(0, num_bytes=2**32 - 1),
    ],
)
def test_a_read_outside_of_the_cache_is_refused_and_the_connection_lives(bad: Rows) -> None:
    with serving(make_buffer()) as server, connected(server.address) as reader:
        reader.ask(bad)
        with pytest.raises(HandoffError, match="refused"):
            reader.take()
        reader.ask(rows(3))
        assert int(reader.take()) == 3


def test_a_read_over_the_frame_limit_is_refused() -> None:
    with serving(make_buffer(MAX_PAYLOAD_BYTES + 1)) as server, connected(server.address) as reader:
        reader.ask(rows(0, num_bytes=MAX_PAYLOAD_BYTES + 1))
        with pytest.raises(HandoffError, match="refused"):
            reader.take()


@pytest.mark.parametrize("parts", [[rows(*range(MAX_ROWS + 1))], [rows(0)] * (MAX_PARTS + 1)])
def test_a_request_of_too_many_rows_or_parts_ends_the_connection(parts: list[Rows]) -> None:
    with serving(make_buffer()) as server, connected(server.address) as reader:
        reader.ask(*parts)
        with pytest.raises(HandoffError, match="lost"):
            reader.take(MAX_ROWS + 1)


def test_a_reader_without_the_token_gets_no_byte_of_the_cache() -> None:
    with serving(make_buffer()) as server:
        with pytest.raises(CorruptDataError, match="token"):
            Reader(server.address, new_token())
        host, port = server.address.split(":")
        with socket.create_connection((host, int(port)), timeout=5) as sock:
            sock.sendall(b"\0" * 64)
            received = b""
            while part := sock.recv(4096):
                received += part
            assert len(received) == 9 + 32


def test_a_damaged_frame_is_detected() -> None:
    with strange_source(frame(b"abcd", checksum([memoryview(b"abcx")]))) as address, connected(address) as reader:
        reader.ask(rows(0, num_bytes=4))
        with pytest.raises(DamagedFrameError, match="checksum"):
            reader.take(4)


def test_a_frame_over_the_limit_is_refused_before_it_is_read() -> None:
    with strange_source(HEAD.pack(OK, MAX_PAYLOAD_BYTES + 1)) as address, connected(address) as reader:
        reader.ask(rows(0, num_bytes=4))
        with pytest.raises(CorruptDataError, match="over the limit"):
            reader.take(4)


def test_a_frame_of_another_length_is_refused() -> None:
    with strange_source(frame(b"ab")) as address, connected(address) as reader:
        reader.ask(rows(0, num_bytes=4))
        with pytest.raises(HandoffError, match="2 bytes"):
            reader.take(4)


def test_a_damaged_refusal_is_detected() -> None:
    refusal = HEAD.pack(REFUSED, 2) + b"no" + TAIL.pack(REFUSED, 1)
    with strange_source(refusal) as address, connected(address) as reader:
        reader.ask(rows(0))
        with pytest.raises(CorruptDataError, match="message"):
            reader.take()


def test_a_source_that_dies_inside_a_frame_is_lost_at_once() -> None:
    with strange_source(HEAD.pack(OK, 1000) + b"half") as address, connected(address) as reader:
        began = time.monotonic()
        reader.ask(rows(0, num_bytes=1000))
        with pytest.raises(HandoffError, match="lost"):
            reader.take(1000)
        assert time.monotonic() - began < 2


def test_a_reader_of_another_format_version_is_told() -> None:
    with serving(make_buffer()) as server:
        host, port = server.address.split(":")
        with socket.create_connection((host, int(port)), timeout=5) as sock:
            client_hello(sock, TOKEN, timeout_s=5)
            sock.sendall(struct.pack("<HBHdI", KV_FORMAT + 1, 0, 0, FAR, 0))
            received = b""
            while part := sock.recv(400):
                received += part
            assert f"KV format {KV_FORMAT}".encode() in received


def test_nobody_listening_is_a_handoff_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    with pytest.raises(HandoffError, match="cannot be reached"):
        Reader(address)


def test_a_connection_that_is_lost_before_it_can_be_used_leaves_no_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    lost: list[socket.socket] = []

    def lose(sock: socket.socket) -> None:
        lost.append(sock)
        raise ConnectionResetError("reset by peer")

    monkeypatch.setattr("cluster.kv_connection.tune", lose)
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(HandoffError, match="lost: reset"):
        Reader(f"127.0.0.1:{listener.getsockname()[1]}")
    assert [sock.fileno() for sock in lost] == [-1]


def test_closing_the_server_cuts_its_readers() -> None:
    with serving(make_buffer()) as server, connected(server.address) as reader:
        assert read_one(reader) == 0
        server.close()
        with pytest.raises(HandoffError, match="lost"):
            read_one(reader)


def test_scatter_undoes_gather() -> None:
    source, target = make_buffer(), torch.zeros(4096, dtype=torch.uint8)
    parts = [rows(64, 1000, 500, num_bytes=32), rows(3000, num_bytes=9)]
    RankMemory(target).scatter(RankMemory(source).gather(parts), parts)
    assert torch.equal(RankMemory(target).gather(parts), RankMemory(source).gather(parts))
    assert int((target != 0).sum()) <= 3 * 32 + 9
