"""Decides each step of an engine and turns its results into events. Pure: plain data in and out, `now` an argument."""

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count, islice

from cluster.cache_log import CacheChanges
from cluster.decode_run import DecodeStep, Work, decoding
from cluster.drafting import Drafting
from cluster.early import EarlyPulls
from cluster.lane import Lane
from cluster.lane_draft import LaneWork
from cluster.leases import Leases
from cluster.plan import HandoffReady, KvTicket, PullDone, StepOutput, StepPlan
from cluster.request_check import check_request, check_ticket
from cluster.scheduler_config import SchedulerConfig
from cluster.sequence import Mode, Sequence, token_logprob
from cluster.speculation import DraftPolicy
from cluster.step_calibration import StepCalibration
from router.errors import InvalidRequestError, MoefleetError, OverloadedError
from router.load import MemberLoad
from router.request import MemberId, Request, RequestId, Role, TokenColumns, TokenEvent
from shards.batch import NO_TOKEN, LaneOutput

Events = list[TokenEvent | TokenColumns | HandoffReady]
_RETRY_AFTER_S = 1.0
_DESCRIBED = 8
"""Sequences that `describe` names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Uncommitted:
    """A plan given out, by lane."""

    step: int
    lanes: list[LaneWork]


class Scheduler:
    """Continuous batching over the lanes of one engine, up to two plans ahead of the last committed one.

    Used by one thread. Times are unix seconds.

    Args:
        draft_policy: what an earlier scheduler on the same ranks has learnt of drafts; None: nothing is known.
    """

    def __init__(self, config: SchedulerConfig, draft_policy: DraftPolicy | None = None) -> None:
        self.config = config
        self._lanes = [Lane(index, config) for index in range(config.lanes)]
        self._sequences: dict[RequestId, Sequence] = {}
        self._early = EarlyPulls(self._lanes, block_size=config.block_size)
        self._pulls: dict[int, Sequence] = {}
        self._leases = Leases(config, self._lanes)
        self._uncommitted: deque[_Uncommitted] = deque()
        self._drafting = Drafting(config, draft_policy)
        self._calibration = StepCalibration(expert_share=config.expert_share)
        self._arrivals = count()
        self._steps = count(config.first_step)
        self._pull_ids = count()
        self._reports = count()
        self._first_deadline = math.inf
        """Unix seconds before which no request's is over."""

    @property
    def is_idle(self) -> bool:
        """True when no sequence, pull, ticket or given-out plan is left."""
        return not (self.has_work or self._leases)

    @property
    def has_work(self) -> bool:
        """True when a sequence, pull or given-out plan is left; tickets may wait for others."""
        return bool(self._sequences or self._pulls or self._uncommitted) or not self._early.is_idle

    @property
    def num_uncommitted(self) -> int:
        """Plans with rows that were given out and not committed."""
        return len(self._uncommitted)

    @property
    def num_preemptions(self) -> int:
        """Running sequences that had to give up their room, since the start."""
        return sum(lane.num_preemptions for lane in self._lanes)

    @property
    def num_drafted(self) -> int:
        """Drafts verified, since the start."""
        return self._drafting.num_drafted

    @property
    def num_accepted(self) -> int:
        """Of those, the ones that were right."""
        return self._drafting.num_accepted

    def add(self, request: Request, *, mode: Mode, now: float) -> None:
        """Let a request wait for room; mode "prefill" ends at its first token with a HandoffReady.

        Raises:
            InvalidRequestError: it can never be served here, or its id is taken.
            OverloadedError: too many wait already.
        """
        del now
        # What was offered of it has lost its source, or there would be a ticket.
        self._early.forget(request.id)
        self._check(request, mode)
        self._place(request, mode, None)

    def expect(self, request_id: RequestId, hashes: Iterable[int], ticket: KvTicket) -> None:
        """Pull what is computed of a prompt so far, if there is room: the request comes later, by `add_handoff`.

        Each is to be ended, by `add`, `add_handoff` or `abort`.

        Args:
            hashes: of all blocks of our size that the ticket covers.
            ticket: a partial one; the next one of a request stands for all before it.
        """
        if request_id not in self._sequences:
            self._early.expect(request_id, tuple(hashes) if self.config.prefix_cache else (), ticket)

    def add_handoff(self, request: Request, ticket: KvTicket, now: float) -> None:
        """Let a request wait for room and then fetch the KV that `ticket` names.

        `request.output_ids` holds the tokens emitted so far. When the ticket expires before there is room, or the
        pull fails, prompt and output are computed here.

        Raises:
            HandoffError: the ticket does not fit the request or this cache.
            InvalidRequestError, OverloadedError: as `add`.
        """
        del now
        try:
            self._check(request, "full")
            check_ticket(request, ticket)
        except MoefleetError:
            self._early.forget(request.id)
            raise
        self._place(request, "full", ticket)

    def _check(self, request: Request, mode: Mode) -> None:
        if request.id in self._sequences:
            raise InvalidRequestError(f"request id {request.id} is running here already; use a new one", field="id")
        check_request(request, self.config, prefill_only=mode == "prefill")
        waiting = sum(len(lane.waiting) for lane in self._lanes)
        if waiting >= self.config.max_waiting:
            raise OverloadedError(
                f"{waiting} requests wait for room, the limit is {self.config.max_waiting}; send it again later",
                retry_after_s=_RETRY_AFTER_S,
            )

    def _place(self, request: Request, mode: Mode, ticket: KvTicket | None) -> None:
        """Queue on the lane with the least load, or where a part of its prompt was pulled to."""
        seq = Sequence(request, mode=mode, lane=0, order=(-request.priority, next(self._arrivals)))
        seq.ticket = ticket
        seq.awaits_pull = self._early.is_pulling(request.id)
        expected = self._early.claim(request.id)
        if expected is not None:
            seq.lane = expected.index
        elif len(self._lanes) > 1:
            seq.lane = min(range(len(self._lanes)), key=lambda index: self._lanes[index].expected_load(seq))
        self._sequences[request.id] = seq
        self._first_deadline = min(self._first_deadline, seq.deadline)
        self._lanes[seq.lane].enqueue(seq)

    def abort(self, request_id: RequestId, now: float) -> TokenEvent | None:
        """End a request and free its room, tickets included; None when it is not here.

        Room that a pull writes is freed when that pull is done; what an offer names, when that is released or over.
        """
        del now
        self._leases.release_of(request_id)
        was_expected = self._early.forget(request_id)
        seq = self._sequences.get(request_id)
        if seq is None:
            return TokenEvent(request_id=request_id, index=0, token_id=None, finish="abort") if was_expected else None
        self._drop(seq)
        return seq.end("abort")

    def _drop(self, seq: Sequence) -> None:
        if seq.offer is not None:
            self._leases.keep_offered(seq, seq.offer)
        else:
            self._lanes[seq.lane].end(seq)
        del self._sequences[seq.request.id]

    def release_ticket(self, ticket_id: str) -> None:
        """Free what a ticket holds; unknown (released or expired) tickets are no error."""
        self._leases.release(ticket_id)

    def expire(self, now: float) -> list[TokenEvent]:
        """Free tickets whose lease and grace are over, and end requests whose deadline is: their last events."""
        self._leases.expire(now)
        if now < self._first_deadline:
            return []
        late = [seq for seq in self._sequences.values() if seq.deadline <= now]
        for seq in late:
            self._drop(seq)
        self._first_deadline = min((seq.deadline for seq in self._sequences.values()), default=math.inf)
        return [seq.end("error", f"deadline passed after {seq.num_output} tokens") for seq in late]

    def schedule(self, now: float) -> StepPlan | None:
        """Plan the next step, or None when there is nothing to do. At most one plan may be uncommitted.

        Also None while a given-out plan verifies drafts: how far its sequences get is not known. Planning the others
        alone would split the batch in two for good.
        """
        assert len(self._uncommitted) <= 1, "schedule() with two plans uncommitted"
        drafting = self.config.draft_tokens > 0
        if drafting and any(lane.is_uncertain for lane in self._lanes):
            return None
        ready = [decoding(lane.active) for lane in self._lanes]
        tokens = self._drafting.choose([len(seqs) for seqs in ready]) if drafting else 0
        drafts = [lane.plan(now, self._pull_ids, seqs, tokens) for lane, seqs in zip(self._lanes, ready, strict=True)]
        # Behind them: who is here goes before who may come.
        orders = self._early.orders(now, self._pull_ids)
        if not orders and all(draft.is_empty for draft in drafts):
            return None
        for draft in drafts:
            for order, seq in draft.pulls:
                self._pulls[order.pull_id] = seq
                orders.append(order)
        keeps_mtp = self._drafting.keeps_mtp(drafts)
        lanes = tuple(draft.finish(keeps_mtp=keeps_mtp) for draft in drafts)
        step = next(self._steps)
        plan = StepPlan(step=step, lanes=lanes, pulls=tuple(orders), offers=self._leases.offers(drafts, step, now))
        if plan.has_rows:
            lane_works = [LaneWork(draft.decodes, draft.works) for draft in drafts]
            self._uncommitted.append(_Uncommitted(step=plan.step, lanes=lane_works))
            self._drafting.planned(plan, tokens, now)
            self._calibration.planned(plan, now)
        return plan

    def commit(self, output: StepOutput, now: float) -> Events:
        """Take in the results of the oldest uncommitted plan. Outputs of plans without rows change nothing."""
        events: Events = []
        if self._uncommitted and self._uncommitted[0].step == output.step:
            for planned, lane_output in zip(self._uncommitted.popleft().lanes, output.lanes, strict=True):
                self._commit_lane(planned, lane_output, now, events)
            busy = bool(self._sequences)
            self._drafting.committed(output, now, busy=busy)
            self._calibration.committed(now, busy=busy)
        else:
            assert not any(lane.rows_N for lane in output.lanes), f"results of step {output.step} out of order"
        return [*events, *self.expire(now)]

    def _commit_lane(self, planned: LaneWork, output: LaneOutput, now: float, events: Events) -> None:
        sampled, decodes = planned.rows_N, planned.decodes
        assert sampled == output.rows_N, f"ranks sampled rows {output.rows_N}, the plan rows {sampled}"
        end = 0
        if decodes is not None:
            end = len(decodes.first_S)
            self._commit_decodes(decodes, output, now, events)
        counts = iter((output.counts_N or [1] * len(sampled))[end:])
        for work in planned.works:
            begin, end = end, end + (next(counts) if work.samples else 0)
            if work.verifies:
                self._drafting.verified(work, end - begin - 1)
            self._commit_work(work, output, range(begin, end), now, events)
            if not work.samples and (offer := self._leases.offer(work.seq, now)) is not None:
                events.append(offer)

    def _commit_decodes(self, step: DecodeStep, output: LaneOutput, now: float, events: Events) -> None:
        """The rows that decode, together but for those of which there is more to tell."""
        run, tokens_S = step.run, output.tokens_N[: len(step.first_S)]
        singly = run.singled_out(step.first_S, tokens_S)
        if len(singly) < len(tokens_S):
            events.append(run.take(step.first_S, tokens_S, but=singly))
        for work in [step.work(index) for index in step.filled if index not in singly]:
            self._settle(work)
        for index in sorted(singly):
            self._commit_work(step.work(index), output, range(index, index + 1), now, events)

    def _settle(self, work: Work) -> None:
        lane = self._lanes[work.seq.lane]
        lane.settle(work)
        lane.settle_state(work, sound=True)

    def _commit_work(self, work: Work, output: LaneOutput, indices: range, now: float, events: Events) -> None:
        """One sequence's part: `indices` are its tokens in the output, accepted drafts first."""
        seq, lane = work.seq, self._lanes[work.seq.lane]
        if seq.phase == "ended":
            lane.settle_state(work, sound=False)
            return
        if work.verifies:
            seq.resolve(len(indices) - 1)
        if work.row in output.prompt_logprobs:
            seq.collect(output.prompt_logprobs[work.row])
        if not indices:
            self._settle(work)
        for accepted, index in enumerate(indices):
            if output.tokens_N[index] == NO_TOKEN:
                # Before its blocks can be found by others.
                lane.settle_state(work, sound=False)
                events.append(self._unsound(seq))
                return
            lane.settle(work, accepted)
            if work.saves and index == indices[-1]:
                lane.settle_state(work, sound=accepted == work.verifies)
            self._take(seq, output, index, now, events)
            if seq.phase == "ended":
                # Tokens behind the end are nobody's.
                if index != indices[-1]:
                    lane.settle_state(work, sound=False)
                return

    def _unsound(self, seq: Sequence) -> TokenEvent:
        """End a request whose next token cannot be chosen."""
        self._drop(seq)
        return seq.end(
            "error",
            f"the model's logits behind {len(seq.tokens)} tokens are not finite; check the checkpoint's weights, or "
            "serve it with dtype float32",
        )

    def _take(self, seq: Sequence, output: LaneOutput, index: int, now: float, events: Events) -> None:
        """One sampled token: its event, and what ends with it."""
        logprob = None
        if output.logprobs is not None and seq.request.sampling.logprobs is not None:
            logprob = token_logprob(output.logprobs, index, seq.request.sampling.logprobs)
        event = seq.take(output.tokens_N[index], logprob)
        events.append(event)
        if event.finish is not None:
            self._drop(seq)
        elif seq.mode == "prefill":
            del self._sequences[seq.request.id]
            events.append(self._leases.hand_over(seq, now))

    def pull_done(self, done: PullDone, now: float) -> None:
        """A pull ended. Failed, or ended after the ticket's expiry: the sequence computes its tokens itself."""
        seq = self._pulls.pop(done.pull_id, None)
        if seq is None:
            waits = self._sequences.get(self._early.pull_done(done, now) or RequestId(""))
            if waits is not None:
                waits.awaits_pull = False
            return
        lane = self._lanes[seq.lane]
        if seq.phase == "ended":
            lane.leave(seq)
        elif done.error or seq.ticket is None or not seq.ticket.lasts(now):
            lane.requeue(seq)
        else:
            lane.pulled(seq)

    def first_lease_end(self) -> float:
        """Unix seconds when the first pull under way must have ended, well or not; infinity: there is none."""
        if not self._pulls and self._early.is_idle:
            return math.inf
        leases = [seq.ticket.expires_unix_s for seq in self._pulls.values() if seq.ticket is not None]
        return min([*leases, *self._early.leases()], default=math.inf)

    def load(self, now: float, member_id: MemberId, role: Role) -> MemberLoad:
        """This member's state for the router; `draining` is for the caller to set."""
        lanes = self._lanes
        return MemberLoad(
            member_id=member_id,
            role=role,
            sequence=next(self._reports),
            waiting_requests=sum(len(lane.waiting) for lane in lanes),
            waiting_tokens=sum(lane.waiting_tokens() for lane in lanes),
            running_requests=sum(len(lane.active) for lane in lanes),
            context_tokens=sum(seq.computed for lane in lanes for seq in lane.active),
            max_requests=self.config.max_rows * len(lanes),
            step_tokens=self.config.max_step_tokens * len(lanes),
            step_time=self._calibration.step_time(),
            free_blocks=sum(lane.blocks.num_free for lane in lanes),
            total_blocks=self.config.num_blocks * len(lanes),
            block_size=self.config.block_size,
            free_state_slots=sum(lane.slots.num_free for lane in lanes),
            token_bytes=self.config.token_bytes,
            state_bytes=self.config.state_bytes,
            checkpoint_bytes=self.config.checkpoint_bytes,
            total_state_slots=self.config.num_slots * len(lanes),
            state_checkpoints=sum(lane.states.num_checkpoints for lane in lanes),
            evicted_checkpoints=sum(lane.states.num_evicted for lane in lanes),
            prefix_cache=self.config.prefix_cache,
            handoff_requests=self._leases.num_waiting(now),
        )

    def describe(self) -> str:
        """Who holds or waits for what, in a line, for the log of an engine that does not get on."""
        sequences = ", ".join(str(seq) for seq in islice(self._sequences.values(), _DESCRIBED))
        rooms = "; ".join(lane.describe() for lane in self._lanes)
        return (
            f"{len(self._sequences)} sequences [{sequences}], pulls {sorted(self._pulls)}, "
            f"{len(self._leases)} tickets, {len(self._uncommitted)} plans given out; {rooms}"
        )

    def take_cache_changes(self) -> list[CacheChanges]:
        """What each lane's prefix cache took in and let go since the last call."""
        return [CacheChanges(kv=lane.blocks.take_changes(), states=lane.states.take_changes()) for lane in self._lanes]

    def check_integrity(self) -> None:
        """Raise AssertionError naming what is off, unless all room is free or owned exactly as it should be."""
        for lane in self._lanes:
            uncommitted = [plan.lanes[lane.index] for plan in self._uncommitted]
            lane.check_integrity(self._leases.pinned(lane), uncommitted, self._early.blocks(lane))
        here = {seq.request.id for lane in self._lanes for seq in (*lane.waiting, *lane.active)}
        missing = self._sequences.keys() - here
        assert not missing, f"requests without a place in a lane: {sorted(missing)}"
