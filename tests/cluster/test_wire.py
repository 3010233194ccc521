import socket
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import msgpack
import pytest

from cluster.plan import KvLayout, KvTicket, PullDone, PullOrder, SourceRank
from cluster.plan_codec import RankWork, decode_pull_order, decode_work, encode_pull_order, encode_work
from cluster.reports import LoadProgress, RankEnded, RankReady, Report, StepAnswer, decode_report, encode_report
from cluster.wire import Channel, accept, connect, listen
from router.errors import CorruptDataError
from shards.batch import LaneOutput, LogprobColumns, RowSampling, RowStart, StepBatch

TOKEN = "a-token-of-the-test"


@contextmanager
def make_pair(max_frame_bytes: int = 1 << 20) -> Iterator[tuple[Channel, socket.socket]]:
    left, right = socket.socketpair()
    with left, right:
        left.settimeout(5)
        yield Channel(left, max_frame_bytes=max_frame_bytes), right


def make_order() -> PullOrder:
    source = SourceRank(tp_rank=0, host_key="boot/ns", pid=17, pool_fd=5, address="127.0.0.1:4000")
    layout = KvLayout(fingerprint="ab", tp=1, block_size=16, num_blocks=8, num_slots=0, dtype="float32")
    ticket = KvTicket(
        id="r/0",
        member_id="p0",
        layout=layout,
        ranks=(source,),
        blocks=(3, 1),
        state_slot=-1,
        num_tokens=20,
        expires_unix_s=1e9,
    )
    return PullOrder(pull_id=4, ticket=ticket, lane=0, first=4, dst_blocks=(0, 7), dst_slot=-1)


def make_work() -> RankWork:
    sampling = RowSampling(temperature=0.5, logit_bias=((3, -1.0),), seed=2**64 - 1, stop_token_ids=(7,), logprobs=2)
    start = RowStart(
        row=1, token_ids=(5, 6, 7), prompt_len=2, blocks=(4,), num_stored=2, state_slot=0, sampling=sampling
    )
    batch = StepBatch(
        starts=(start,),
        grown_rows=[0],
        grown_blocks=[9],
        rows_S=[0, 1],
        first_S=[8, 0],
        counts_S=[1, 3],
        samples_S=[1, 1],
    )
    return RankWork(step=12, answers=True, batch=batch, pulls=(make_order(),))


def over_the_wire(message: list[object]) -> list[object]:
    with make_pair() as (channel, other):
        Channel(other).send(message)
        received = channel.recv()
    assert received is not None
    return received


def test_work_arrives_as_it_was_sent() -> None:
    work = make_work()
    assert decode_work(over_the_wire(encode_work(work))) == work


@pytest.mark.parametrize(
    "report",
    [
        LoadProgress(done_bytes=1, total_bytes=2),
        RankReady(),
        RankReady(source=make_order().ticket.ranks[0]),
        PullDone(pull_id=3, error="gone", num_bytes=7, seconds=0.5),
        RankEnded(error="out of memory", refused=True),
        StepAnswer(
            step=3,
            output=LaneOutput(
                rows_N=[2],
                tokens_N=[40],
                logprobs=LogprobColumns(
                    logprobs_N=[-0.5], ranks_N=[1], top_ids_NK=[[40, 2]], top_logprobs_NK=[[-0.5, -1.0]]
                ),
                prompt_logprobs={
                    1: LogprobColumns(logprobs_N=[], ranks_N=[], top_ids_NK=[], top_logprobs_NK=[]),
                },
                compute_s=0.25,
            ),
        ),
    ],
)
def test_report_arrives_as_it_was_sent(report: Report) -> None:
    assert decode_report(over_the_wire(encode_report(report))) == report


@pytest.mark.parametrize(
    "damage",
    [
        ["work"],
        ["work", "1", True, [], [[], [], [], [], [], []], []],
        ["work", 1, True, [], [[], [], [1], [], [], []], []],
        ["work", 1, True, [[1]], [[], [], [], [], [], []], []],
        ["work", 1, True, [], [[], [], ["a"], [0], [1], [1]], []],
    ],
)
def test_work_of_another_shape_is_refused(damage: list[object]) -> None:
    with pytest.raises(CorruptDataError):
        decode_work(damage)


@pytest.mark.parametrize("damage", [["output", 1], ["pulled", "x", "", 0, 0.0], ["strange"], ["ended", 1, True]])
def test_report_of_another_shape_is_refused(damage: list[object]) -> None:
    with pytest.raises(CorruptDataError):
        decode_report(damage)


def test_pull_order_of_another_shape_is_refused() -> None:
    fields = encode_pull_order(make_order())
    fields[3] = [1.5]
    with pytest.raises(CorruptDataError):
        decode_pull_order(fields)


def test_end_of_stream_between_frames_is_no_error() -> None:
    with make_pair() as (channel, other):
        other.close()
        assert channel.recv() is None


def pack(value: object) -> bytes:
    packed = msgpack.packb(value)
    assert packed is not None
    return packed


def frame(payload: bytes, *, length: int | None = None, checksum: int | None = None) -> bytes:
    return struct.pack("<II", len(payload) if length is None else length, checksum or zlib.crc32(payload)) + payload


@pytest.mark.parametrize(
    "data",
    [
        frame(b"\x93", length=2),
        frame(b"")[:5],
        frame(b"", length=7),
        frame(pack(["work"]), checksum=1),
        frame(b"x", length=2 << 20),
        frame(b"\xc1"),
        frame(pack([])),
        frame(pack({"a": 1})),
        frame(pack([1])),
    ],
)
def test_damaged_frame_is_refused(data: bytes) -> None:
    with make_pair() as (channel, other):
        other.sendall(data)
        other.close()
        with pytest.raises(CorruptDataError):
            channel.recv()


def test_message_over_the_frame_limit_is_not_sent() -> None:
    with make_pair(max_frame_bytes=64) as (channel, _), pytest.raises(ValueError, match="frame limit of 64"):
        channel.send(["x", b"y" * 100])


def test_client_with_the_cluster_token_gets_in_and_one_without_does_not() -> None:
    with listen("127.0.0.1") as listener:
        listener.settimeout(5)
        port: int = listener.getsockname()[1]
        admitted: list[Channel | None] = []
        server = threading.Thread(target=lambda: admitted.extend(accept(listener, TOKEN) for _ in range(2)))
        server.start()
        with pytest.raises(CorruptDataError):
            connect("127.0.0.1", port, "some-other-token-here")
        client = connect("127.0.0.1", port, TOKEN)
        server.join()
        assert admitted[0] is None
        assert admitted[1] is not None
        client.send(["hello"])
        assert admitted[1].recv() == ["hello"]
        client.close()
        assert admitted[1].recv() is None
        admitted[1].close()
