"""The step loop of one member: takes requests in, schedules, runs the ranks, gives events out.

One thread owns the scheduler and the ranks. The plan of step n + 1 is made and launched while step n runs; an idle
engine sleeps and wakes with the next command.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from typing import Final, Literal

from cluster.cache_log import CacheLog
from cluster.engine_commands import Abort, Command, Expect, Release, Submit
from cluster.engine_stats import EngineStats
from cluster.executor import Ranks
from cluster.plan import HandoffReady, KvTicket, StepPlan
from cluster.scheduler import Scheduler
from cluster.scheduler_config import SchedulerConfig
from cluster.speculation import DraftPolicy
from router.errors import MemberLostError, MoefleetError, OverloadedError
from router.load import CacheEvents, MemberLoad
from router.request import MemberId, Request, RequestId, Role, TokenColumns, TokenEvent

logger = logging.getLogger(__name__)

_LOCAL: Final = MemberId("local")
_LOAD_PERIOD_S: Final = 0.05
_EXPIRY_PERIOD_S: Final = 0.05
"""Between two looks at leases and deadlines while nothing runs."""
_JOIN_S: Final = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TicketReady:
    """A prefilled request's KV waits to be fetched; comes right behind its first token, partial ones before it."""

    request_id: RequestId
    ticket: KvTicket


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """A submitted request was not taken in."""

    request_id: RequestId
    error: MoefleetError


EngineEvent = TokenEvent | TokenColumns | TicketReady | Rejected


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOutlets:
    """Where an engine's results go; all are called in the engine's thread and must not block."""

    on_events: Callable[[list[EngineEvent]], None]
    """Once a step, with that step's events; rows that merely go on come together, as `TokenColumns`."""
    make_ticket: Callable[[HandoffReady], KvTicket]
    on_failure: Callable[[MoefleetError], None]
    """Once, when the ranks have failed; every request has had its last event by then."""


class Engine:
    """One member's engine. All public methods may be called from any thread.

    Args:
        limits: rows, blocks and lengths.
        ranks: the loaded ranks; closed by `stop`.
        outlets: where events go.
        step_timeout_s: an engine that has work but does nothing for this long, and the lease that a pull may last,
            counts as lost.
        draft_policy: what an earlier engine on the same ranks has learnt of drafts; None: nothing is known.
        clock: unix seconds.
    """

    def __init__(
        self,
        limits: SchedulerConfig,
        ranks: Ranks,
        outlets: EngineOutlets,
        *,
        member_id: MemberId = _LOCAL,
        role: Role = "mixed",
        step_timeout_s: float = 60.0,
        draft_policy: DraftPolicy | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._stall_s = step_timeout_s + limits.lease_s
        # A rank begins a pull behind the step that it is busy with.
        self._pull_grace_s = step_timeout_s + limits.lease_grace_s
        self._active_at = time.monotonic()
        """When something was last done or came in."""
        # Later engines on the same ranks begin later.
        self._scheduler = Scheduler(replace(limits, first_step=time.monotonic_ns() // 1000), draft_policy)
        self._ranks = ranks
        self._outlets = outlets
        self._member_id = member_id
        self._role: Role = role
        self._clock = clock
        self._commands: SimpleQueue[Command] = SimpleQueue()
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._draining = False
        self._drained = threading.Event()
        self._live: set[RequestId] = set()
        self._events: list[EngineEvent] = []
        self._stats = EngineStats()
        self._load = self._scheduler.load(clock(), member_id, role)
        self._load_at = 0.0
        self._cache_log = CacheLog()
        self._failure: MoefleetError | None = None
        self._pending: StepPlan | None = None
        """The plan in flight."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        ranks.wake_on(self._wake.set)

    @property
    def failure(self) -> MoefleetError | None:
        """Why the engine ended by itself; None while it is well."""
        return self._failure

    def stats(self) -> EngineStats:
        """A snapshot of the counters."""
        return replace(self._stats)

    def load(self) -> MemberLoad:
        """The latest load report, at most 50 ms old while there is work."""
        return self._load

    def cache_events(self, after: int | None) -> list[CacheEvents]:
        """What brings somebody up to date who knows the prefix cache up to `after`, or not at all."""
        return self._cache_log.since(after)

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def submit(self, request: Request, *, mode: Literal["full", "prefill"] = "full") -> None:
        """Take a request in; "prefill" ends with its first token and a TicketReady. Refusals come as `Rejected`."""
        self._command(Submit(request=request, mode=mode, ticket=None))

    def submit_handoff(self, request: Request, ticket: KvTicket) -> None:
        """Go on with a request prefilled elsewhere; `request.output_ids` holds its first token."""
        self._command(Submit(request=request, mode="full", ticket=ticket))

    def expect(self, request_id: RequestId, hashes: Sequence[int], ticket: KvTicket) -> None:
        """Fetch what is prefilled elsewhere so far of a request that is submitted or aborted later."""
        self._command(Expect(request_id=request_id, hashes=hashes, ticket=ticket))

    def abort(self, request_id: RequestId) -> None:
        """End a request; its last event has finish "abort". Unknown ids are no error."""
        self._command(Abort(request_id=request_id))

    def release_ticket(self, ticket_id: str) -> None:
        """Free the KV of a ticket: it was fetched, or nobody will come."""
        self._command(Release(ticket_id=ticket_id))

    def set_role(self, role: Role) -> None:
        """Report another role from now on. Requests that are here go on: an engine serves every kind at any time."""
        self._role = role
        self._wake.set()

    def drain(self, timeout_s: float | None = None) -> bool:
        """Refuse new requests and wait until running ones and unfetched KV are gone; True when they are."""
        self._draining = True
        self._wake.set()
        return self._drained.wait(timeout_s)

    def halt(self) -> None:
        """End the loop: running requests get finish "abort". The ranks stay up, for another engine."""
        self._stopping.set()
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join(_JOIN_S)

    def stop(self) -> None:
        """`halt`, then close the ranks."""
        self.halt()
        self._ranks.close()

    def _command(self, command: Command) -> None:
        self._commands.put(command)
        self._wake.set()

    def _run(self) -> None:
        try:
            self._loop()
        except MoefleetError as error:
            self._fail(error)
        except Exception as error:
            # Whoever waits for a token must be told, whatever went wrong: nothing else ends this thread.
            logger.exception("engine failed")
            self._fail(MemberLostError(f"engine failed: {type(error).__name__}: {error}"))
        self._drained.set()

    def _loop(self) -> None:
        while not self._stopping.is_set():
            if not self.turn():
                self._check_stall()
                self._wake.wait(None if self._scheduler.is_idle else _EXPIRY_PERIOD_S)
                self._wake.clear()
                self._stats.idle_s += time.monotonic() - self._load_at
        if self._pending is not None:
            self._ranks.result()
        for request_id in tuple(self._live):
            self._end(request_id)
        self._flush()

    def turn(self) -> bool:
        """Take in what was asked for, launch the next step and give out the results of the one before, or rest.

        For the engine's thread; or for the one thread that drives an engine which was not started.

        Returns:
            whether there was anything to do; if not, what comes next is a command, a pull, a lost rank or an expiry.
        """
        self._take_commands()
        committed = self._pending is not None
        plan = self._step()
        self._flush()
        # What was committed may be what the next plan waited for.
        if plan is None and self._pending is None and not committed:
            self._rest()
            return False
        self._active_at = time.monotonic()
        return True

    def check_integrity(self) -> None:
        """As `Scheduler.check_integrity`, between two turns."""
        self._scheduler.check_integrity()

    def _step(self) -> StepPlan | None:
        """Plan and launch the next step, then take the result of the one in flight -> the plan."""
        now = self._clock()
        for done in self._ranks.poll_pulls():
            self._stats.pulls += 1
            self._stats.refetched_frames += done.refetches
            if done.error:
                self._stats.failed_pulls += 1
                logger.warning("pull %s failed, computing its tokens here: %s", done.pull_id, done.error)
            else:
                self._stats.pulled_bytes += done.num_bytes
                self._stats.pull_s += done.seconds
            self._scheduler.pull_done(done, now)
        self._check_pulls(now)
        began = time.monotonic()
        plan = self._scheduler.schedule(now)
        decided = time.monotonic()
        self._stats.schedule_s += decided - began
        has_rows = plan is not None and plan.has_rows
        if plan is not None:
            self._ranks.launch(plan)
            self._stats.launch_s += time.monotonic() - decided
            for offer in plan.offers:
                self._emit(offer)
            self._stats.steps += has_rows
            self._stats.computed_tokens += sum(sum(lane.counts_S) for lane in plan.lanes)
            self._stats.admissions += sum(len(lane.starts) for lane in plan.lanes)
            self._stats.preemptions = self._scheduler.num_preemptions
            if plan.offers:
                self._flush()
        if self._pending is not None:
            self._take_result()
        self._pending = plan if has_rows else None
        return plan

    def _take_result(self) -> None:
        waited_from = time.monotonic()
        output = self._ranks.result()
        came_at = time.monotonic()
        self._stats.wait_s += came_at - waited_from
        self._stats.compute_s += max(lane.compute_s for lane in output.lanes)
        self._stats.sampled_tokens += sum(len(lane.tokens_N) for lane in output.lanes)
        for event in self._scheduler.commit(output, self._clock()):
            self._emit(event)
        self._stats.drafted_tokens = self._scheduler.num_drafted
        self._stats.accepted_tokens = self._scheduler.num_accepted
        self._stats.commit_s += time.monotonic() - came_at

    def _emit(self, event: TokenEvent | TokenColumns | HandoffReady) -> None:
        if isinstance(event, HandoffReady):
            if not event.partial:
                self._live.discard(event.request_id)
            self._events.append(TicketReady(request_id=event.request_id, ticket=self._outlets.make_ticket(event)))
            return
        if isinstance(event, TokenEvent):
            self._stats.cached_tokens += event.cached_tokens
            if event.finish is not None:
                self._live.discard(event.request_id)
        self._events.append(event)

    def _flush(self) -> None:
        """Give out what happened, and refresh the load report."""
        self._cache_log.record(self._scheduler.take_cache_changes())
        if self._events:
            events = self._events
            self._events = []
            self._outlets.on_events(events)
        now = time.monotonic()
        if now - self._load_at >= _LOAD_PERIOD_S:
            self._report_load(now)

    def _report_load(self, now: float) -> None:
        load = self._scheduler.load(self._clock(), self._member_id, self._role)
        self._load = replace(load, draining=self._draining, counts=self._stats.counts())
        self._load_at = now

    def _check_pulls(self, now: float) -> None:
        """Fail when the end of a pull was lost, whatever else runs: its sequence and its room would wait for ever."""
        late_s = now - self._scheduler.first_lease_end()
        if late_s > self._pull_grace_s:
            self._stall(f"a pull has not ended {late_s:.3g} s behind its lease")

    def _check_stall(self) -> None:
        """Nothing runs: fail when there is work and nothing has happened for too long."""
        idle_s = time.monotonic() - self._active_at
        if self._scheduler.has_work and idle_s > self._stall_s:
            self._stall(f"the engine has work and did nothing for {idle_s:.3g} s")

    def _stall(self, what: str) -> None:
        logger.error("engine stalls: %s", self._scheduler.describe())
        raise MemberLostError(f"{what}; its log has the state")

    def _rest(self) -> None:
        """Nothing runs: end what has expired, and report."""
        for event in self._scheduler.expire(self._clock()):
            self._emit(event)
        self._flush()
        self._report_load(time.monotonic())
        if self._draining and self._scheduler.is_idle and self._commands.empty():
            self._drained.set()

    def _take_commands(self) -> None:
        while True:
            try:
                command = self._commands.get_nowait()
            except Empty:
                return
            self._active_at = time.monotonic()
            match command:
                case Submit():
                    self._take_in(command)
                case Abort(request_id=request_id):
                    self._end(request_id)
                case Release(ticket_id=ticket_id):
                    self._scheduler.release_ticket(ticket_id)
                case Expect():
                    self._scheduler.expect(command.request_id, command.hashes, command.ticket)

    def _take_in(self, command: Submit) -> None:
        request, now = command.request, self._clock()
        try:
            if self._draining:
                raise OverloadedError(f"{self._member_id} is draining; send the request elsewhere", retry_after_s=0.0)
            if command.ticket is None:
                self._scheduler.add(request, mode=command.mode, now=now)
            else:
                self._scheduler.add_handoff(request, command.ticket, now)
        except MoefleetError as error:
            self._stats.rejected += 1
            self._events.append(Rejected(request_id=request.id, error=error))
            return
        self._live.add(request.id)
        self._stats.requests += 1

    def _end(self, request_id: RequestId) -> None:
        event = self._scheduler.abort(request_id, self._clock())
        if event is not None:
            self._emit(event)

    def _fail(self, error: MoefleetError) -> None:
        """The ranks are gone: every request ends with an error, later ones are rejected."""
        logger.error("engine ends: %s", error)
        self._failure = error
        self._draining = True
        for request_id in tuple(self._live):
            event = self._scheduler.abort(request_id, self._clock())
            if event is not None:
                self._emit(replace(event, finish="error", error=str(error)))
        self._flush()
        self._outlets.on_failure(error)
        self._drained.set()
        while not self._stopping.is_set():
            self._reject_commands(error)
            self._wake.wait()
            self._wake.clear()
        self._reject_commands(error)

    def _reject_commands(self, error: MoefleetError) -> None:
        while not self._commands.empty():
            command = self._commands.get_nowait()
            if isinstance(command, Submit):
                self._outlets.on_events([Rejected(request_id=command.request.id, error=error)])
