"""What NIXL cannot do is told as a hand-off that failed: its own errors have no class in common."""

import os
import struct
import time
from multiprocessing.connection import Connection

import numpy as np
import pytest
import torch

pytest.importorskip("nixl", reason="nixl is not installed: moefleet[nixl]")

from cluster.kv_connection import KvConnection
from cluster.kv_server import KvServer
from cluster.nixl_link import NixlLink, NixlSource
from cluster.rank_memory import RankMemory
from cluster.recut import Rows
from cluster.security import new_token
from router.errors import HandoffError
from tests.support.fork_server import fork_server


def test_source_that_cannot_be_understood_is_refused_by_name() -> None:
    with pytest.raises(HandoffError, match=r"NIXL does not understand the source; .*nixl\w+Error"):
        NixlLink(struct.pack("<Q", 5) + os.urandom(64))


def test_rows_that_the_source_does_not_have_fail_as_a_hand_off() -> None:
    source = NixlSource(torch.zeros(1 << 20, dtype=torch.uint8))
    link, room = NixlLink(source.description), torch.empty(1 << 16, dtype=torch.uint8)
    link.register(room)
    with pytest.raises(HandoffError, match=r"NIXL cannot read from the source; .*nixlNotFoundError"):
        link.start_read(room, [Rows(offsets=np.array([1 << 40]), num_bytes=64)])


def test_reader_is_told_when_the_source_cannot_start_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # A way that UCX does not have.
    monkeypatch.setenv("UCX_TLS", "nonesuch")
    token, memory = new_token(), RankMemory(torch.zeros(64, dtype=torch.uint8))
    server = KvServer(torch.zeros(64, dtype=torch.uint8), token)
    connection = KvConnection(server.address, token, memory, timeout_s=5)
    try:
        with pytest.raises(HandoffError, match=r"NIXL cannot be set up; use kv_transport=tcp .*nixl\w+Error"):
            connection.open_nixl()
    finally:
        connection.close()
        server.close()


def describe_source(pipe: Connection) -> None:
    """A process that can be read, until the pipe closes."""
    memory = torch.ones(1 << 20, dtype=torch.uint8)
    source = NixlSource(memory)
    pipe.send_bytes(source.description)
    pipe.recv_bytes()


def test_who_only_reads_computes_nothing_between_reads() -> None:
    context = fork_server()
    ours, theirs = context.Pipe()
    child = context.Process(target=describe_source, args=(theirs,), daemon=True)
    child.start()
    link, room = NixlLink(ours.recv_bytes()), torch.zeros(1 << 16, dtype=torch.uint8)
    link.register(room)
    read = link.start_read(room, [Rows(offsets=np.array([64, 4096]), num_bytes=1024)])
    link.finish(read, timeout_s=10)
    assert (int(room[:2048].sum()), int(room[2048:].sum())) == (2048, 0)
    before_s = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before_s < 0.1
    ours.send_bytes(b"end")
    child.join(10)
