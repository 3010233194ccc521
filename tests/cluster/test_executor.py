import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue

import pytest

from cluster.executor import RankGroup
from cluster.plan import KvLayout, KvTicket, PullDone, PullOrder, StepPlan
from cluster.plan_codec import RankWork, decode_work
from cluster.reports import LoadProgress, RankEnded, RankReady, Report, StepAnswer, encode_report
from cluster.wire import Channel
from router.errors import CheckpointError, MemberLostError
from shards.batch import LaneOutput, RowSampling, RowStart, StepBatch
from shards.mesh import Layout


class OwnEnd:
    """The group's own rank as the test plays it."""

    def __init__(self) -> None:
        self.inbox: SimpleQueue[RankWork | None] = SimpleQueue()

    def finish(self) -> None:
        self.inbox.put(None)


class Ranks:
    """A group and the far ends of its ranks."""

    def __init__(self, layout: Layout, step_timeout_s: float) -> None:
        self.group = RankGroup(layout, step_timeout_s=step_timeout_s)
        self.own = OwnEnd()
        self.group.set_own(self.own)
        self.peers: dict[int, Channel] = {}
        for rank in range(1, layout.world):
            near, far = socket.socketpair()
            far.settimeout(5)
            self.group.add_peer(rank, Channel(near))
            self.peers[rank] = Channel(far)

    def tell(self, rank: int, report: Report) -> None:
        if rank:
            self.peers[rank].send(encode_report(report))
        else:
            self.group.report(0, report)

    def work_of(self, rank: int) -> RankWork:
        if rank:
            return decode_work(self.peers[rank].recv())
        work = self.own.inbox.get(timeout=5)
        assert work is not None
        return work


@contextmanager
def make_ranks(layout: Layout, step_timeout_s: float = 5) -> Iterator[Ranks]:
    ranks = Ranks(layout, step_timeout_s)
    try:
        yield ranks
    finally:
        ranks.group.close()
        for channel in ranks.peers.values():
            channel.close()


def make_plan(step: int, lane_rows: list[list[int]], pulls: tuple[PullOrder, ...] = ()) -> StepPlan:
    lanes = tuple(
        StepBatch(rows_S=rows, first_S=[0] * len(rows), counts_S=[1] * len(rows), samples_S=[1] * len(rows))
        for rows in lane_rows
    )
    return StepPlan(step=step, lanes=lanes, pulls=pulls)


def make_order(lane: int) -> PullOrder:
    layout = KvLayout(fingerprint="f", tp=2, block_size=4, num_blocks=4, num_slots=0, dtype="float32")
    ticket = KvTicket(
        id="t", member_id="p", layout=layout, ranks=(), blocks=(1,), state_slot=-1, num_tokens=3, expires_unix_s=1e12
    )
    return PullOrder(pull_id=7, ticket=ticket, lane=lane, first=0, dst_blocks=(2,), dst_slot=-1)


def answer(step: int, token: int) -> StepAnswer:
    return StepAnswer(step=step, output=LaneOutput(rows_N=[0], tokens_N=[token]))


def test_every_rank_gets_its_lanes_batch() -> None:
    with make_ranks(Layout(tp=2, dp=2)) as ranks:
        ranks.group.launch(make_plan(0, [[0, 1], []]))
        assert [ranks.work_of(rank).batch.rows_S for rank in range(4)] == [[0, 1], [0, 1], [], []]


def test_results_come_in_launch_order_whichever_lane_is_first() -> None:
    with make_ranks(Layout(tp=1, dp=2)) as ranks:
        ranks.group.launch(make_plan(0, [[0], [0]]))
        ranks.group.launch(make_plan(1, [[0], [0]]))
        for rank, step in ((1, 0), (1, 1), (0, 0), (0, 1)):
            ranks.tell(rank, answer(step, 10 * rank + step))
        for step in (0, 1):
            output = ranks.group.result()
            assert (output.step, [lane.tokens_N for lane in output.lanes]) == (step, [[step], [10 + step]])


def test_plan_without_rows_reaches_the_ranks_and_has_no_result() -> None:
    with make_ranks(Layout()) as ranks:
        ranks.group.launch(make_plan(0, [[]]))
        assert not ranks.work_of(0).answers
        ranks.group.launch(make_plan(1, [[0]]))
        ranks.tell(0, answer(1, 5))
        assert ranks.group.result().step == 1


def test_pull_is_done_when_all_ranks_of_its_lane_are() -> None:
    with make_ranks(Layout(tp=2, dp=2)) as ranks:
        woken = threading.Event()
        ranks.group.wake_on(woken.set)
        ranks.group.launch(make_plan(0, [[], []], pulls=(make_order(lane=1),)))
        assert [len(ranks.work_of(rank).pulls) for rank in range(4)] == [0, 0, 1, 1]
        ranks.tell(2, PullDone(pull_id=7, num_bytes=10, seconds=0.25))
        assert woken.wait(5)
        woken.clear()
        assert ranks.group.poll_pulls() == []
        ranks.tell(3, PullDone(pull_id=7, error="source is gone", num_bytes=5, seconds=0.5))
        assert woken.wait(5)
        assert ranks.group.poll_pulls() == [PullDone(pull_id=7, error="source is gone", num_bytes=15, seconds=0.5)]


def test_lost_connection_surfaces_from_result_and_names_the_rank() -> None:
    with make_ranks(Layout(tp=2)) as ranks:
        ranks.group.launch(make_plan(0, [[0]]))
        ranks.peers[1].close()
        with pytest.raises(MemberLostError, match="rank 1 of 2 is lost"):
            ranks.group.result()


def test_lost_connection_wakes_an_idle_engine() -> None:
    with make_ranks(Layout(tp=2)) as ranks:
        woken = threading.Event()
        ranks.group.wake_on(woken.set)
        ranks.peers[1].close()
        assert woken.wait(5)
        with pytest.raises(MemberLostError, match="rank 1"):
            ranks.group.poll_pulls()


def test_error_in_a_ranks_step_is_told_with_its_text() -> None:
    with make_ranks(Layout(tp=2)) as ranks:
        ranks.group.launch(make_plan(0, [[0]]))
        ranks.tell(1, RankEnded(error="RuntimeError: boom"))
        with pytest.raises(MemberLostError, match="rank 1 of 2 is lost: RuntimeError: boom"):
            ranks.group.result()


def test_hanging_step_is_an_error_that_names_the_lane() -> None:
    with make_ranks(Layout(dp=2), step_timeout_s=0.05) as ranks:
        ranks.group.launch(make_plan(3, [[0], [0]]))
        ranks.tell(0, answer(3, 1))
        with pytest.raises(MemberLostError, match=r"step 3 hangs: no answer from lane\(s\) \[1\]"):
            ranks.group.result()


def test_reports_of_other_ranks_do_not_prolong_a_hanging_step() -> None:
    with make_ranks(Layout(dp=2), step_timeout_s=0.2) as ranks:
        ranks.group.launch(make_plan(0, [[0], [0]]))
        stop = threading.Event()

        def chatter() -> None:
            while not stop.wait(0.02):
                ranks.tell(0, LoadProgress(done_bytes=1, total_bytes=1))

        talking = threading.Thread(target=chatter)
        talking.start()
        try:
            with pytest.raises(MemberLostError, match="step 0 hangs"):
                ranks.group.result()
        finally:
            stop.set()
            talking.join()


def test_peer_that_takes_nothing_in_is_lost_and_does_not_hold_up_the_engine() -> None:
    with make_ranks(Layout(tp=2), step_timeout_s=0.1) as ranks:
        start = RowStart(row=0, token_ids=(70000,) * 500_000, prompt_len=1, blocks=(), sampling=RowSampling())
        plan = StepPlan(step=0, lanes=(StepBatch(starts=(start,)),))
        with pytest.raises(MemberLostError, match="rank 1 of 2 is lost"):
            ranks.group.launch(plan)


def test_damaged_report_counts_as_a_lost_rank() -> None:
    with make_ranks(Layout(tp=2)) as ranks:
        ranks.group.launch(make_plan(0, [[0]]))
        ranks.peers[1].send(["strange"])
        with pytest.raises(MemberLostError, match="unknown report 'strange'"):
            ranks.group.result()


def test_group_is_ready_when_all_ranks_are_and_adds_up_their_progress() -> None:
    with make_ranks(Layout(tp=2)) as ranks:
        for rank in (0, 1):
            assert not ranks.group.is_ready
            ranks.tell(rank, LoadProgress(done_bytes=4, total_bytes=8))
            ranks.tell(rank, RankReady())
        while not ranks.group.is_ready:
            ranks.group.take_reports(1)
        assert ranks.group.progress == LoadProgress(done_bytes=8, total_bytes=16)
        assert ranks.group.sources(0) == ()


def test_rank_that_cannot_serve_the_model_is_a_checkpoint_error() -> None:
    with make_ranks(Layout()) as ranks:
        ranks.tell(0, RankEnded(error="model.safetensors: truncated", refused=True))
        with pytest.raises(CheckpointError, match="truncated"):
            ranks.group.take_reports(1)
