"""A fleet of simulated members that serves a trace by one routing policy, event by event."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from router.admission import Admission, AdmissionConfig, Capacity, Entrant
from router.choosers import Chooser, PolicyName, make_chooser
from router.errors import ConfigError, DeadlineExceededError, OverloadedError
from router.prompt import Prompt
from router.request import MemberId, RequestId
from router.router import RouterConfig
from router.simulated_member import Job, MemberSpec, Progress, SimulatedMember
from router.trace import TraceRequest, reusable_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What a request must keep to count as served well."""

    ttft_s: float = 5.0
    itl_s: float = 0.1
    """Mean gap between its tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """What serves."""

    members: int
    spec: MemberSpec
    router: RouterConfig = field(default_factory=RouterConfig)
    admission: AdmissionConfig | None = None
    """None: every request is routed as it comes."""
    min_report_gap_s: float = 0.05


class _Recorder:
    def __init__(self) -> None:
        self.gaps: Counter[int] = Counter()
        """Gaps between tokens by size, in buckets that grow by a hundredth."""

    def take(self, progress: Progress) -> None:
        if progress.rows:
            self.gaps[round(math.log(progress.gap_s) * 100)] += progress.rows * progress.steps

    @property
    def mean_s(self) -> float:
        """Of all gaps."""
        total = sum(math.exp(bucket / 100) * count for bucket, count in self.gaps.items())
        return total / max(self.gaps.total(), 1)

    def gap_s(self, share: float) -> float:
        """The gap that this share of all gaps does not exceed."""
        left = share * self.gaps.total()
        for bucket in sorted(self.gaps):
            left -= self.gaps[bucket]
            if left <= 0:
                return math.exp(bucket / 100)
        return 0.0


class _Run:
    """One policy's run. Times are seconds on the simulation's clock."""

    def __init__(self, fleet: Fleet, chooser: Chooser, members: Sequence[SimulatedMember]) -> None:
        self._fleet = fleet
        self._chooser = chooser
        self._members = {member.member_id: member for member in members}
        self._order = {member.member_id: number for number, member in enumerate(members)}
        self._ends: list[tuple[float, int, int, MemberId]] = []
        self._reported: dict[MemberId, float] = {}
        self._free = dict.fromkeys(self._members, 0)
        self._free_tokens = 0
        self._backlog = dict.fromkeys(self._members, 0)
        self._backlog_tokens = 0
        self._admission = Admission(fleet.admission) if fleet.admission is not None else None
        self._at_gate: dict[RequestId, Job] = {}
        self.recorder = _Recorder()
        for member in members:
            self._report(member, 0.0)

    def serve(self, jobs: Sequence[Job]) -> None:
        """Run until every request has ended."""
        for job in jobs:
            self._run_until(job.arrival_s)
            self._enter(job)
        self._run_until(math.inf)

    def _enter(self, job: Job) -> None:
        if self._admission is None:
            self._route(job, job.arrival_s)
            return
        request = job.request
        entrant = Entrant(
            id=RequestId(str(job.number)),
            tokens=request.prompt_tokens,
            max_output=request.output_tokens,
            tenant=request.tenant,
        )
        try:
            self._admission.admit(entrant, job.arrival_s)
        except (OverloadedError, DeadlineExceededError):
            job.refused = True
            return
        self._at_gate[entrant.id] = job
        self._decide(self._admission, job.arrival_s)

    def _decide(self, admission: Admission, now: float) -> None:
        fleet = self._fleet
        capacity = Capacity(
            members=fleet.members,
            step_tokens=fleet.spec.step_tokens,
            free_tokens=self._free_tokens,
            backlog_tokens=self._backlog_tokens,
        )
        decisions = admission.decide(capacity, now)
        for request_id in decisions.released:
            self._route(self._at_gate.pop(request_id), now)
            admission.routed(request_id)
        for request_id, _ in decisions.refused:
            self._at_gate.pop(request_id).refused = True

    def _route(self, job: Job, now: float) -> None:
        spec = self._fleet.spec
        blocks = job.request.full_blocks(spec.block_size)
        prompt = Prompt(
            _key(job),
            num_tokens=job.request.prompt_tokens,
            max_output=job.request.output_tokens,
            hashes={spec.block_size: blocks},
        )
        member = self._members[self._chooser.choose(prompt, blocks, now)]
        self._push(member, member.add(job, now))
        self._count_backlog(member.member_id, self._backlog[member.member_id] + job.new_tokens)

    def _count_backlog(self, member_id: MemberId, tokens: int) -> None:
        self._backlog_tokens += tokens - self._backlog[member_id]
        self._backlog[member_id] = tokens

    def _push(self, member: SimulatedMember, end_s: float | None) -> None:
        if end_s is not None:
            heappush(self._ends, (end_s, self._order[member.member_id], member.version, member.member_id))

    def _run_until(self, limit_s: float) -> None:
        while self._ends and self._ends[0][0] <= limit_s:
            now, _, version, member_id = heappop(self._ends)
            member = self._members[member_id]
            if version != member.version:
                continue
            progress, next_end = member.advance(now)
            self._push(member, next_end)
            self.recorder.take(progress)
            for job in progress.started:
                self._chooser.started(member_id, _key(job))
            for _ in progress.ended:
                self._chooser.ended(member_id)
            if next_end is None or now - self._reported[member_id] >= self._fleet.min_report_gap_s:
                self._report(member, now)
            if self._admission is not None:
                self._tell(self._admission, progress, now)

    def _tell(self, admission: Admission, progress: Progress, now: float) -> None:
        for job in progress.started:
            admission.started(RequestId(str(job.number)), now)
        for job in progress.ended:
            admission.done(RequestId(str(job.number)), now)
        self._decide(admission, now)

    def _report(self, member: SimulatedMember, now: float) -> None:
        self._reported[member.member_id] = now
        load = member.load()
        free = load.free_blocks * load.block_size
        self._free_tokens += free - self._free[member.member_id]
        self._free[member.member_id] = free
        self._count_backlog(member.member_id, load.waiting_tokens)
        self._chooser.report(load, member.take_events(), now)


def _key(job: Job) -> str:
    return f"r{job.number}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What one policy made of a trace."""

    policy: PolicyName
    members: int
    requests: int
    refused: int
    """By admission; they count as not good, and in no other figure."""
    mean_ttft_s: float
    p50_ttft_s: float
    p90_ttft_s: float
    p99_ttft_s: float
    ttft_percentiles_s: tuple[float, ...]
    """Of the shares 0.01, 0.02 and so on to 1."""
    mean_itl_s: float
    p50_itl_s: float
    p99_itl_s: float
    hit_rate: float
    """Share of prompt tokens found in a prefix cache."""
    hit_bound: float
    """The same with one cache without bounds for all members."""
    hit_bound_in_room: float
    """The same with one cache of all members' size."""
    goodput: float
    """Requests a second that met the objective."""
    good_share: float
    imbalance: float
    """The busiest member's time over the mean."""


def simulate(
    trace: Sequence[TraceRequest], fleet: Fleet, policy: PolicyName, objective: Objective | None = None
) -> Result:
    """Serve a trace.

    Raises:
        ConfigError: no member has room for one of its requests; `split_by_room` leaves them out.
    """
    members = [SimulatedMember(MemberId(f"m{number}"), fleet.spec) for number in range(fleet.members)]
    jobs, recorder = _serve(trace, fleet, policy, members)
    return _result(policy, fleet, jobs, members, recorder, objective or Objective())


def simulate_tenants(trace: Sequence[TraceRequest], fleet: Fleet, policy: PolicyName) -> dict[str, list[float]]:
    """Serve a trace -> the times to first token of each tenant's requests, sorted, without those refused."""
    members = [SimulatedMember(MemberId(f"m{number}"), fleet.spec) for number in range(fleet.members)]
    jobs, _ = _serve(trace, fleet, policy, members)
    times: dict[str, list[float]] = {}
    for job in jobs:
        if not job.refused:
            times.setdefault(job.request.tenant, []).append(job.first_token_s - job.arrival_s)
    return {tenant: sorted(each) for tenant, each in times.items()}


def split_by_room(trace: Sequence[TraceRequest], spec: MemberSpec) -> tuple[list[TraceRequest], list[TraceRequest]]:
    """The requests that a member has room for, and the others."""
    member = SimulatedMember(MemberId("any"), spec)
    held = [each for each in trace if member.can_hold(each)]
    return held, [each for each in trace if not member.can_hold(each)]


def _serve(
    trace: Sequence[TraceRequest], fleet: Fleet, policy: PolicyName, members: Sequence[SimulatedMember]
) -> tuple[list[Job], _Recorder]:
    _, left_out = split_by_room(trace, fleet.spec)
    if left_out:
        raise ConfigError(
            f"{len(left_out)} requests fit no member of kv_tokens={fleet.spec.kv_tokens}, the first in line "
            f"{left_out[0].line}; leave them out or give members more"
        )
    jobs = [Job(number=number, request=each, arrival_s=each.arrival_s) for number, each in enumerate(trace)]
    run = _Run(fleet, make_chooser(policy, [member.member_id for member in members], fleet.router), members)
    run.serve(jobs)
    return jobs, run.recorder


def _result(
    policy: PolicyName,
    fleet: Fleet,
    jobs: Sequence[Job],
    members: Sequence[SimulatedMember],
    recorder: _Recorder,
    objective: Objective,
) -> Result:
    served = [job for job in jobs if not job.refused]
    ttfts = sorted(job.first_token_s - job.arrival_s for job in served)
    length_s = max(jobs[-1].arrival_s - jobs[0].arrival_s, 1e-9)
    good = sum(is_good(job, objective) for job in jobs)
    total = sum(job.request.prompt_tokens for job in served)
    requests, spec = [job.request for job in served], fleet.spec
    room = fleet.members * spec.kv_tokens // spec.block_size
    busy = [member.busy_s for member in members]
    return Result(
        policy=policy,
        members=len(members),
        requests=len(jobs),
        refused=len(jobs) - len(served),
        mean_ttft_s=sum(ttfts) / len(ttfts),
        p50_ttft_s=percentile(ttfts, 0.5),
        p90_ttft_s=percentile(ttfts, 0.9),
        p99_ttft_s=percentile(ttfts, 0.99),
        ttft_percentiles_s=tuple(percentile(ttfts, number / 100) for number in range(1, 101)),
        mean_itl_s=recorder.mean_s,
        p50_itl_s=recorder.gap_s(0.5),
        p99_itl_s=recorder.gap_s(0.99),
        hit_rate=sum(job.cached_tokens for job in served) / total,
        hit_bound=sum(reusable_tokens(requests, spec.block_size)) / total,
        hit_bound_in_room=sum(reusable_tokens(requests, spec.block_size, room)) / total,
        goodput=good / length_s,
        good_share=good / len(jobs),
        imbalance=max(busy) * len(busy) / max(sum(busy), 1e-9),
    )


def is_good(job: Job, objective: Objective) -> bool:
    """Whether a request met the objective; one that was refused did not."""
    if job.refused:
        return False
    gaps = job.request.output_tokens - 1
    itl_s = (job.end_s - job.first_token_s) / gaps if gaps else 0.0
    return job.first_token_s - job.arrival_s <= objective.ttft_s and itl_s <= objective.itl_s


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value that this share of a sorted sequence does not exceed."""
    return ordered[min(math.ceil(share * len(ordered)), len(ordered)) - 1]


def work_s(trace: Sequence[TraceRequest], spec: MemberSpec, members: int) -> float:
    """Seconds of computing in a trace, did each request find what one cache of all members' size would hold."""
    step = spec.step_time
    found = reusable_tokens(trace, spec.block_size, members * spec.kv_tokens // spec.block_size)
    new = sum(each.prompt_tokens - cached for each, cached in zip(trace, found, strict=True))
    prefill_s = new * step.prefill_s_per_token(step_tokens=spec.step_tokens, decode_rows=0, context_tokens=0)
    decode_s = sum(
        each.output_tokens * (step.decode_row_s + (each.prompt_tokens + each.output_tokens / 2) * step.context_token_s)
        for each in trace
    )
    return prefill_s + decode_s
