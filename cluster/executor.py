"""Rank 0's view of all ranks of a replica: hands out plans, gathers answers, and notices who is lost."""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Final, Protocol

from cluster.plan import PullDone, SourceRank, StepOutput, StepPlan
from cluster.plan_codec import RankWork, encode_work
from cluster.reports import LoadProgress, RankEnded, RankReady, Report, StepAnswer, decode_report
from cluster.wire import Channel
from router.errors import CheckpointError, CorruptDataError, MemberLostError
from shards.batch import LaneOutput
from shards.mesh import Layout, Place

_SEND_S: Final = 10.0
"""A peer that takes in nothing for this long counts as hung: plans are small, and two at most are under way."""


class Ranks(Protocol):
    """The ranks as the engine uses them. All methods but `wake_on` are called from the engine's thread."""

    def launch(self, plan: StepPlan) -> None:
        """Queue a plan on every rank; plans are carried out in order.

        Raises:
            MemberLostError: a rank is gone.
        """
        ...

    def result(self) -> StepOutput:
        """Wait for the oldest launched plan with rows whose result was not taken yet.

        Raises:
            MemberLostError: a rank is gone, has failed, or hangs; the message names it.
        """
        ...

    def poll_pulls(self) -> list[PullDone]:
        """Pulls that ended since the last call, without waiting.

        Raises:
            MemberLostError: as `result`.
        """
        ...

    def wake_on(self, wake: Callable[[], None]) -> None:
        """Call `wake` (from any thread) when a pull ends or a rank is lost."""
        ...

    def close(self) -> None:
        """End all ranks."""
        ...


class OwnRank(Protocol):
    """The rank of this process, in a thread of its own."""

    @property
    def inbox(self) -> "SimpleQueue[RankWork | None]":
        """Work in order; None ends it."""
        ...

    def finish(self) -> None:
        """End it: wait for its queue, and free it if it hangs."""
        ...


@dataclass(slots=True, kw_only=True)
class _Pull:
    """A pull that some ranks of its lane have not ended yet."""

    waiting: set[int]
    done: list[PullDone] = field(default_factory=list)


class RankGroup:
    """`Ranks` over this process's own rank and one channel to every other rank.

    Reports of all ranks come into one queue; the state below is the engine thread's alone.
    """

    def __init__(self, layout: Layout, *, step_timeout_s: float = 60.0) -> None:
        self._layout = layout
        self._step_timeout_s = step_timeout_s
        self._own: OwnRank | None = None
        self._peers: dict[int, Channel] = {}
        self._reports: SimpleQueue[tuple[int, Report]] = SimpleQueue()
        self._wake: Callable[[], None] = _ignore
        self._launched: deque[int] = deque()
        self._answers: dict[int, dict[int, LaneOutput]] = {}
        self._pulls: dict[int, _Pull] = {}
        self._pulls_done: list[PullDone] = []
        self._ready: dict[int, RankReady] = {}
        self._progress: dict[int, LoadProgress] = {}

    def report(self, rank: int, report: Report) -> None:
        """Take in what a rank tells; from any thread."""
        self._reports.put((rank, report))
        if isinstance(report, (PullDone, RankEnded)):
            self._wake()

    def set_own(self, own: OwnRank) -> None:
        """Tell the group of rank 0."""
        self._own = own

    def add_peer(self, rank: int, channel: Channel) -> None:
        """Tell the group of an authenticated connection to rank `rank`, and listen to it."""
        channel.limit_send(min(_SEND_S, self._step_timeout_s))
        self._peers[rank] = channel
        threading.Thread(target=self._listen, args=(rank, channel), name=f"rank{rank}-reports", daemon=True).start()

    def _listen(self, rank: int, channel: Channel) -> None:
        error = "connection closed"
        try:
            while (message := channel.recv()) is not None:
                self.report(rank, decode_report(message))
        except (OSError, CorruptDataError) as failure:
            error = str(failure)
        self.report(rank, RankEnded(error=error))

    @property
    def num_peers(self) -> int:
        """Connections so far."""
        return len(self._peers)

    @property
    def is_ready(self) -> bool:
        """True when every rank has loaded."""
        return len(self._ready) == self._layout.world

    @property
    def progress(self) -> LoadProgress:
        """Bytes of weights read by all ranks together."""
        parts = self._progress.values()
        return LoadProgress(
            done_bytes=sum(part.done_bytes for part in parts), total_bytes=sum(part.total_bytes for part in parts)
        )

    def sources(self, lane: int) -> tuple[SourceRank, ...]:
        """Where the caches of a lane's ranks can be read, by tp_rank; empty when they serve no pulls."""
        first = lane * self._layout.tp
        found = [self._ready[rank].source for rank in range(first, first + self._layout.tp)]
        return tuple(source for source in found if source is not None)

    def take_reports(self, timeout_s: float) -> None:
        """Wait for a report at most `timeout_s`; take in all that are there.

        Raises:
            CheckpointError: a rank cannot serve the model.
            MemberLostError: a rank is gone or has failed.
        """
        try:
            self._take(*self._reports.get(timeout=timeout_s))
            while True:
                self._take(*self._reports.get_nowait())
        except Empty:
            return

    def _take(self, rank: int, report: Report) -> None:
        match report:
            case StepAnswer():
                lane = Place(layout=self._layout, rank=rank).dp_rank
                self._answers.setdefault(report.step, {})[lane] = report.output
            case PullDone():
                self._take_pull(rank, report)
            case RankReady():
                self._ready[rank] = report
            case LoadProgress():
                self._progress[rank] = report
            case RankEnded(refused=True):
                raise CheckpointError(report.error)
            case RankEnded():
                raise MemberLostError(f"rank {rank} of {self._layout.world} is lost: {report.error}")

    def _take_pull(self, rank: int, done: PullDone) -> None:
        pull = self._pulls.get(done.pull_id)
        if pull is None or rank not in pull.waiting:
            return
        pull.waiting.discard(rank)
        pull.done.append(done)
        if pull.waiting:
            return
        del self._pulls[done.pull_id]
        self._pulls_done.append(
            PullDone(
                pull_id=done.pull_id,
                error="; ".join(part.error for part in pull.done if part.error),
                num_bytes=sum(part.num_bytes for part in pull.done),
                seconds=max(part.seconds for part in pull.done),
                refetches=sum(part.refetches for part in pull.done),
            )
        )

    def launch(self, plan: StepPlan) -> None:
        """Send each rank its lane's part, lanes in order; the own rank last, as it starts at once."""
        layout = self._layout
        for order in plan.pulls:
            first = order.lane * layout.tp
            self._pulls[order.pull_id] = _Pull(waiting=set(range(first, first + layout.tp)))
        works = [
            RankWork(
                step=plan.step,
                answers=plan.has_rows,
                batch=batch,
                pulls=tuple(order for order in plan.pulls if order.lane == lane),
            )
            for lane, batch in enumerate(plan.lanes)
        ]
        messages = [encode_work(work) for work in works] if self._peers else []
        for rank, channel in self._peers.items():
            try:
                channel.send(messages[rank // layout.tp])
            except OSError as error:
                raise MemberLostError(f"rank {rank} of {layout.world} is lost: {error}") from error
        assert self._own is not None, "launch() before set_own()"
        self._own.inbox.put(works[0])
        if plan.has_rows:
            self._launched.append(plan.step)

    def result(self) -> StepOutput:
        """As `Ranks.result`."""
        step = self._launched[0]
        deadline = time.monotonic() + self._step_timeout_s
        while len(self._answers.get(step, ())) < self._layout.dp:
            try:
                rank, report = self._reports.get(timeout=max(deadline - time.monotonic(), 0.0))
            except Empty:
                missing = [lane for lane in range(self._layout.dp) if lane not in self._answers.get(step, {})]
                raise MemberLostError(
                    f"step {step} hangs: no answer from lane(s) {missing} within {self._step_timeout_s:g} s"
                ) from None
            self._take(rank, report)
        self._launched.popleft()
        answers = self._answers.pop(step)
        return StepOutput(step=step, lanes=tuple(answers[lane] for lane in range(self._layout.dp)))

    def poll_pulls(self) -> list[PullDone]:
        """As `Ranks.poll_pulls`."""
        self.take_reports(0.0)
        done = self._pulls_done
        self._pulls_done = []
        return done

    def wake_on(self, wake: Callable[[], None]) -> None:
        """As `Ranks.wake_on`."""
        self._wake = wake

    def close(self) -> None:
        """Tell every rank to end after what it has got, and wait for the own one."""
        for channel in self._peers.values():
            try:
                channel.send(["close"])
            except OSError:
                pass
        if self._own is not None:
            self._own.finish()
        for channel in self._peers.values():
            channel.close()


def _ignore() -> None:
    """Nobody waits yet."""
