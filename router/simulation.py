"""What a fleet of simulated members makes of a trace by one routing policy."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from router.choosers import PolicyName
from router.errors import ConfigError
from router.request import MemberId
from router.simulated_fleet import Fleet, FleetRun
from router.simulated_member import Job, MemberSpec, Progress, SimulatedMember
from router.trace import TraceRequest, reusable_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What a request must keep to count as served well."""

    ttft_s: float = 5.0
    itl_s: float = 0.1
    """Mean gap between its tokens."""


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
    alone_ttft_s: float
    """Mean, did each request find what that cache holds on a member that does nothing else: nobody can do better."""
    alone_good_share: float
    """Of requests that would then meet the objective."""
    one_queue_ttft_s: float
    """Mean, were all members one as fast as all together, with that cache, and served in order of arrival."""
    one_queue_good_share: float
    """Of requests that would then have their first token in time."""
    goodput: float
    """Requests a second that met the objective."""
    good_share: float
    imbalance: float
    """The busiest member's time over the mean."""
    mean_members: float
    """Up at once, until the last request has ended."""
    most_members: int


def simulate(
    trace: Sequence[TraceRequest], fleet: Fleet, policy: PolicyName, objective: Objective | None = None
) -> Result:
    """Serve a trace.

    Raises:
        ConfigError: no member has room for one of its requests; `split_by_room` leaves them out.
    """
    recorder = _Recorder()
    jobs, run = _serve(trace, fleet, policy, recorder)
    return _result(policy, fleet, jobs, run, recorder, objective or Objective())


def simulate_tenants(trace: Sequence[TraceRequest], fleet: Fleet, policy: PolicyName) -> dict[str, list[float]]:
    """Serve a trace -> the times to first token of each tenant's requests, sorted, without those refused."""
    jobs, _ = _serve(trace, fleet, policy, _Recorder())
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
    trace: Sequence[TraceRequest], fleet: Fleet, policy: PolicyName, recorder: _Recorder
) -> tuple[list[Job], FleetRun]:
    _, left_out = split_by_room(trace, fleet.spec)
    if left_out:
        raise ConfigError(
            f"{len(left_out)} requests fit no member of kv_tokens={fleet.spec.kv_tokens}, the first in line "
            f"{left_out[0].line}; leave them out or give members more"
        )
    jobs = [Job(number=number, request=each, arrival_s=each.arrival_s) for number, each in enumerate(trace)]
    run = FleetRun(fleet, policy, recorder.take)
    run.serve(jobs)
    return jobs, run


def _result(
    policy: PolicyName,
    fleet: Fleet,
    jobs: Sequence[Job],
    run: FleetRun,
    recorder: _Recorder,
    objective: Objective,
) -> Result:
    served = [job for job in jobs if not job.refused]
    ttfts = sorted(job.first_token_s - job.arrival_s for job in served)
    length_s = max(jobs[-1].arrival_s - jobs[0].arrival_s, 1e-9)
    good = sum(is_good(job, objective) for job in jobs)
    total = sum(job.request.prompt_tokens for job in served)
    requests, spec = [job.request for job in served], fleet.spec
    busy = [member.busy_s for member in run.members]
    mean_members, most_members = run.sizes(max(job.end_s for job in served))
    found = reusable_tokens(requests, spec.block_size, round(mean_members * spec.kv_tokens) // spec.block_size)
    alone_ttft_s, alone_good = _alone(requests, found, spec, objective)
    queue_ttft_s, queue_good = _one_queue(requests, found, spec, objective, mean_members)
    return Result(
        policy=policy,
        members=fleet.members,
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
        hit_bound_in_room=sum(found) / total,
        alone_ttft_s=alone_ttft_s,
        alone_good_share=alone_good / len(jobs),
        one_queue_ttft_s=queue_ttft_s,
        one_queue_good_share=queue_good / len(jobs),
        goodput=good / length_s,
        good_share=good / len(jobs),
        imbalance=max(busy) * len(busy) / max(sum(busy), 1e-9),
        mean_members=mean_members,
        most_members=most_members,
    )


def _alone(
    requests: Sequence[TraceRequest], found: Sequence[int], spec: MemberSpec, objective: Objective
) -> tuple[float, int]:
    """Mean seconds to a first token, and requests within the objective, were each served by itself.

    Args:
        found: tokens of each that are cached.
    """
    step, total_s, good = spec.step_time, 0.0, 0
    for request, cached in zip(requests, found, strict=True):
        steps, rest = divmod(request.prompt_tokens - cached, spec.step_tokens)
        sizes = [spec.step_tokens] * steps + [rest] * (rest > 0)
        ttft_s = 2 * spec.way_s + sum(
            step.step_s(prefill_tokens=size, decode_rows=0, context_tokens=0) for size in sizes
        )
        itl_s = step.step_s(
            prefill_tokens=0, decode_rows=1, context_tokens=request.prompt_tokens + request.output_tokens / 2
        )
        total_s += ttft_s
        good += ttft_s <= objective.ttft_s and (itl_s <= objective.itl_s or request.output_tokens == 1)
    return total_s / len(requests), good


def _one_queue(
    requests: Sequence[TraceRequest], found: Sequence[int], spec: MemberSpec, objective: Objective, members: float
) -> tuple[float, int]:
    """As `_alone`, of requests that wait for each other's prompts; decoding takes its part of the time throughout."""
    length_s = max(requests[-1].arrival_s - requests[0].arrival_s, 1e-9)
    prompts = sum(each.prompt_tokens for each in requests) - sum(found)
    token_s = spec.step_time.prefill_s_per_token(step_tokens=spec.step_tokens, decode_rows=0, context_tokens=0)
    decoding_s = work_s(requests, spec, 1, found) - prompts * token_s
    free = max(1.0 - decoding_s / length_s / members, 0.01)
    backlog_s, last_s, total_s, good = 0.0, requests[0].arrival_s, 0.0, 0
    for request, cached in zip(requests, found, strict=True):
        backlog_s = max(backlog_s - (request.arrival_s - last_s) * members * free, 0.0)
        last_s, own_s = request.arrival_s, (request.prompt_tokens - cached) * token_s
        ttft_s = (backlog_s / members + own_s) / free + 2 * spec.way_s
        backlog_s += own_s
        total_s += ttft_s
        good += ttft_s <= objective.ttft_s
    return total_s / len(requests), good


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


def work_s(trace: Sequence[TraceRequest], spec: MemberSpec, members: int, found: Sequence[int] | None = None) -> float:
    """Seconds of computing in a trace, did each request find so many tokens, or what one cache of all would hold."""
    step = spec.step_time
    if found is None:
        found = reusable_tokens(trace, spec.block_size, members * spec.kv_tokens // spec.block_size)
    new = sum(each.prompt_tokens - cached for each, cached in zip(trace, found, strict=True))
    prefill_s = new * step.prefill_s_per_token(step_tokens=spec.step_tokens, decode_rows=0, context_tokens=0)
    decode_s = sum(
        each.output_tokens * (step.decode_row_s + (each.prompt_tokens + each.output_tokens / 2) * step.context_token_s)
        for each in trace
    )
    return prefill_s + decode_s
