"""A member of a simulated fleet: continuous batching with chunked prefill, its steps timed by a step-time model.

Steps that are alike are taken together: an event is the end of a prompt, of a sequence, or of a reporting period.
"""

import math
from collections import deque
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush

from router.load import CacheEvents, MemberLoad
from router.request import MemberId
from router.simulated_cache import SimulatedCache
from router.step_time import StepTime
from router.trace import TraceRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberSpec:
    """What a simulated member can do."""

    step_time: StepTime
    block_size: int = 512
    kv_tokens: int = 1_000_000
    """Tokens whose KV it has room for."""
    max_rows: int = 128
    step_tokens: int = 8192
    report_s: float = 0.25
    """Time between two reports while steps last."""


class Job:
    """One request on its way through a member, which writes what it made of it.

    Args:
        number: orders requests.
        request: what was recorded.
        arrival_s: when its client sent it.
    """

    def __init__(self, *, number: int, request: TraceRequest, arrival_s: float) -> None:
        self.number = number
        self.request = request
        self.arrival_s = arrival_s
        self.new_tokens = 0
        """To compute, as it looked when it came to the member."""
        self.cached_tokens = 0
        self.refused = False
        self.first_token_s = -1.0
        self.end_s = -1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Span:
    """Steps that are alike."""

    start_s: float
    end_s: float
    steps: int
    prefilled: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What a span brought."""

    started: list[Job] = field(default_factory=list)
    """Have their first token."""
    ended: list[Job] = field(default_factory=list)
    rows: int = 0
    """Sequences that got a token in each step."""
    steps: int = 0
    gap_s: float = 0.0
    """Seconds a step."""


class SimulatedMember:
    """Times are seconds on the simulation's clock."""

    def __init__(self, member_id: MemberId, spec: MemberSpec) -> None:
        self.member_id = member_id
        self.version = 0
        """Of the end that was last told; an earlier one is void."""
        self.busy_s = 0.0
        self._spec = spec
        self._cache = SimulatedCache(spec.kv_tokens // spec.block_size)
        self._waiting: deque[Job] = deque()
        self._waiting_tokens = 0
        self._head: Job | None = None
        self._head_left = 0.0
        self._rows: list[tuple[int, int, Job]] = []
        self._context = 0
        self._step = 0
        self._span: _Span | None = None
        self._reports = 0
        self._events = 0

    def can_hold(self, request: TraceRequest) -> bool:
        """Whether it has room for such a request at all."""
        return sum(self._blocks_of(request)) <= self._cache.num_blocks

    def add(self, job: Job, now: float) -> float | None:
        """Take a request in; returns when to call `advance`, if that has changed."""
        self._waiting.append(job)
        depth = self._cache.depth(job.request.full_blocks(self._spec.block_size))
        job.new_tokens = job.request.prompt_tokens - depth * self._spec.block_size
        self._waiting_tokens += job.new_tokens
        span = self._span
        if span is None:
            return self._begin(now)
        if self._head is None:
            # Only decode steps are going on: the one that runs now is the last of this span.
            step_s = (span.end_s - span.start_s) / span.steps
            steps = min(max(math.ceil((now - span.start_s) / step_s), 1), span.steps)
            if steps < span.steps:
                self._span = replace(span, steps=steps, end_s=span.start_s + steps * step_s)
                self.version += 1
                return self._span.end_s
        return None

    def advance(self, now: float) -> tuple[Progress, float | None]:
        """End the span that ends now; returns what it brought, and when the next one ends."""
        span = self._span
        assert span is not None, "advance() of a member that does nothing"
        rows = len(self._rows)
        self._step += span.steps
        self._context += rows * span.steps
        self.busy_s += span.end_s - span.start_s
        progress = Progress(rows=rows, steps=span.steps, gap_s=(span.end_s - span.start_s) / span.steps)
        while self._rows and self._rows[0][0] <= self._step:
            self._end(heappop(self._rows)[2], now, progress)
        self._head_left -= span.prefilled
        if self._head is not None and self._head_left < 0.5:
            self._start(self._head, now, progress)
            self._head = None
        self._span = None
        return progress, self._begin(now)

    def _start(self, job: Job, now: float, progress: Progress) -> None:
        """The prompt is computed: the first token is here."""
        self._cache.fill(job.request.full_blocks(self._spec.block_size))
        job.first_token_s = now
        progress.started.append(job)
        self._context += job.request.prompt_tokens + 1
        if job.request.output_tokens > 1:
            heappush(self._rows, (self._step + job.request.output_tokens - 1, job.number, job))
        else:
            self._end(job, now, progress)

    def _end(self, job: Job, now: float, progress: Progress) -> None:
        blocks = job.request.full_blocks(self._spec.block_size)
        self._cache.release(blocks, self._blocks_of(job.request)[1])
        self._context -= job.request.prompt_tokens + job.request.output_tokens
        job.end_s = now
        progress.ended.append(job)

    def _blocks_of(self, request: TraceRequest) -> tuple[int, int]:
        """Blocks that others can use, and further ones."""
        shared = len(request.full_blocks(self._spec.block_size))
        return shared, -(-(request.prompt_tokens + request.output_tokens) // self._spec.block_size) - shared

    def _admit(self) -> None:
        """Give the first waiting request a row and room."""
        if self._head is not None or not self._waiting or len(self._rows) >= self._spec.max_rows:
            return
        job = self._waiting[0]
        blocks = job.request.full_blocks(self._spec.block_size)
        depth = self._cache.depth(blocks)
        if self._cache.reserve(blocks, self._blocks_of(job.request)[1]):
            self._waiting.popleft()
            self._waiting_tokens -= job.new_tokens
            job.cached_tokens = depth * self._spec.block_size
            self._head, self._head_left = job, float(job.request.prompt_tokens - job.cached_tokens)

    def _begin(self, now: float) -> float | None:
        """Start the next span; returns its end, or None when there is nothing to do."""
        self._admit()
        rows, step = len(self._rows), self._spec.step_time
        if self._head is None and not rows:
            return None
        room = 0.0 if self._head is None else max(self._spec.step_tokens - rows, 1)
        full_s = step.step_s(prefill_tokens=room, decode_rows=rows, context_tokens=self._context)
        steps = max(1, int(self._spec.report_s / full_s))
        if rows:
            steps = min(steps, self._rows[0][0] - self._step)
        prefilled = steps * room
        if self._head is not None and prefilled >= self._head_left:
            steps, prefilled = max(1, math.ceil(self._head_left / room)), self._head_left
        carried_s = step.step_s(
            prefill_tokens=0, decode_rows=rows, context_tokens=self._context + rows * (steps - 1) / 2
        )
        # The last step of a prompt has room for the beginning of the next one, which then need not pay for the step.
        shared = prefilled / room if self._waiting and room else steps
        length_s = prefilled * step.prefill_token_s + shared * carried_s
        self._span = _Span(start_s=now, end_s=now + length_s, steps=steps, prefilled=prefilled)
        self.version += 1
        return self._span.end_s

    def load(self) -> MemberLoad:
        """Its report."""
        self._reports += 1
        spec = self._spec
        return MemberLoad(
            member_id=self.member_id,
            role="mixed",
            sequence=self._reports,
            waiting_requests=len(self._waiting),
            waiting_tokens=self._waiting_tokens + int(self._head_left if self._head is not None else 0),
            running_requests=len(self._rows) + (self._head is not None),
            context_tokens=self._context,
            max_requests=spec.max_rows,
            step_tokens=spec.step_tokens,
            step_time=spec.step_time,
            free_blocks=self._cache.num_free,
            total_blocks=self._cache.num_blocks,
            block_size=spec.block_size,
        )

    def take_events(self) -> CacheEvents | None:
        """What its cache took in and let go since the last call; None: nothing."""
        stored, removed = self._cache.take_changes()
        if not stored and not removed and self._events:
            return None
        self._events += 1
        return CacheEvents(
            after=self._events - 1, sequence=self._events, cleared=self._events == 1, stored=stored, removed=removed
        )
