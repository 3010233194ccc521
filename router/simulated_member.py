"""A member of a simulated fleet: continuous batching with chunked prefill, its steps timed by a step-time model.

As in the real engine a step is planned when the one before it begins: what comes while a step runs is in the second
step after it at the earliest. Steps that are alike are taken together: an event is the end of a prompt, of a sequence,
or of a reporting period.
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
    way_s: float = 0.0
    """That a request is under way from its client to the engine, and a token on the way back."""
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
        self.came_s = arrival_s
        """When its member got it."""
        self.new_tokens = 0
        """To compute, as it looked when it came to the member."""
        self.cached_tokens = 0
        self.saver = False
        """It goes before those that are none, `router.admission.Decisions.savers`, and they fill its step to half."""
        self.refused = False
        self.first_token_s = -1.0
        self.end_s = -1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Span:
    """Steps that are alike."""

    start_s: float
    step_s: float
    steps: int
    chunks: tuple[int, ...]
    """Prompt tokens of each step, by prompt."""

    @property
    def end_s(self) -> float:
        return self.start_s + self.steps * self.step_s


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


class _Prompt:
    """A job whose prompt is being computed."""

    def __init__(self, job: Job, left: int) -> None:
        self.job = job
        self.left = left
        """Tokens to compute."""


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
        self._prompts: deque[_Prompt] = deque()
        """Those that are being computed."""
        self._rows: list[tuple[int, int, Job]] = []
        self._context = 0
        self._step = 0
        self._span: _Span | None = None
        self._reports = 0
        self._events = 0

    @property
    def is_busy(self) -> bool:
        """Whether it computes something."""
        return self._span is not None

    def can_hold(self, request: TraceRequest) -> bool:
        """Whether it has room for such a request at all."""
        return sum(self._blocks_of(request)) <= self._cache.num_blocks

    def add(self, job: Job, now: float) -> float | None:
        """Take a request in; returns when to call `advance`, if that has changed."""
        self._waiting.insert(sum(each.saver for each in self._waiting) if job.saver else len(self._waiting), job)
        depth = self._cache.depth(job.request.full_blocks(self._spec.block_size))
        job.came_s = now + self._spec.way_s
        job.new_tokens = job.request.prompt_tokens - depth * self._spec.block_size
        self._waiting_tokens += job.new_tokens
        span = self._span
        if span is None:
            return self._begin(job.came_s, job.came_s)
        if not span.chunks or (job.saver and not self._prompts[-1].job.saver):
            # Its prompt goes before what is going on: the step behind that which runs now is the last of this span.
            steps = max(math.ceil((now - span.start_s) / span.step_s), 1) + 1
            if steps < span.steps:
                self._span = replace(span, steps=steps)
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
        self.busy_s += span.steps * span.step_s
        progress = Progress(rows=rows, steps=span.steps, gap_s=span.step_s)
        while self._rows and self._rows[0][0] <= self._step:
            self._end(heappop(self._rows)[2], now, progress)
        for prompt, chunk in zip(self._prompts, span.chunks, strict=False):
            prompt.left -= chunk * span.steps
        while self._prompts and not self._prompts[0].left:
            self._start(self._prompts.popleft().job, now, progress)
        self._span = None
        return progress, self._begin(now, now - span.step_s)

    def _start(self, job: Job, now: float, progress: Progress) -> None:
        """The prompt is computed: the first token is here."""
        self._cache.fill(job.request.full_blocks(self._spec.block_size))
        job.first_token_s = now + self._spec.way_s
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
        job.end_s = now + self._spec.way_s
        progress.ended.append(job)

    def _blocks_of(self, request: TraceRequest) -> tuple[int, int]:
        """Blocks that others can use, and further ones."""
        shared = len(request.full_blocks(self._spec.block_size))
        return shared, -(-(request.prompt_tokens + request.output_tokens) // self._spec.block_size) - shared

    def _admit(self, planned_s: float, at: int) -> bool:
        """Give the first waiting request a row, room and place, if it was there by `planned_s`; False: it waits."""
        if not self._waiting or len(self._rows) + len(self._prompts) >= self._spec.max_rows:
            return False
        job = self._waiting[0]
        blocks = job.request.full_blocks(self._spec.block_size)
        depth = self._cache.depth(blocks)
        if job.came_s > planned_s or not self._cache.reserve(blocks, self._blocks_of(job.request)[1]):
            return False
        self._waiting.popleft()
        self._waiting_tokens -= job.new_tokens
        job.cached_tokens = depth * self._spec.block_size
        self._prompts.insert(at, _Prompt(job, job.request.prompt_tokens - job.cached_tokens))
        return True

    def _chunks(self, planned_s: float) -> tuple[int, ...]:
        """What a step computes of each prompt; requests are taken in as long as there is room in the step."""
        room, spared = max(self._spec.step_tokens - len(self._rows), 1), 0
        chunks: list[int] = []
        while room:
            of_others = max(room - spared, 0)
            prompt = self._prompt(len(chunks), planned_s, of_others)
            if prompt is None:
                break
            chunks.append(min(prompt.left, room if prompt.job.saver else of_others))
            room -= chunks[-1]
            if prompt.job.saver:
                spared = self._spec.step_tokens // 2
        return tuple(chunks)

    def _prompt(self, at: int, planned_s: float, of_others: int) -> _Prompt | None:
        """The one in this place of a step, which has so much room for those that are no savers; None: there is none."""
        on = self._prompts[at] if at < len(self._prompts) else None
        if on is None or on.job.saver < self._next_is_saver:
            may_come = of_others or self._next_is_saver
            if may_come and self._admit(planned_s, at):
                return self._prompts[at]
        return on if on is not None and (of_others or on.job.saver) else None

    @property
    def _next_is_saver(self) -> bool:
        return bool(self._waiting) and self._waiting[0].saver

    def _begin(self, now: float, planned_s: float) -> float | None:
        """Start the next span, whose first step was planned at `planned_s`; returns its end, None: nothing to do."""
        chunks = self._chunks(planned_s)
        rows, step = len(self._rows), self._spec.step_time
        if not chunks and not rows:
            if not self._waiting:
                return None
            # Nothing was planned: the engine looks when the last step has ended, or when a request comes.
            now = max(now, self._waiting[0].came_s)
            chunks = self._chunks(now)
        tokens = sum(chunks)
        first_s = step.step_s(prefill_tokens=tokens, decode_rows=rows, context_tokens=self._context)
        steps = max(1, int(self._spec.report_s / first_s))
        if rows:
            steps = min(steps, self._rows[0][0] - self._step)
        if len(chunks) == 1:
            steps = min(steps, self._prompts[0].left // chunks[0])
        elif chunks or self._is_expected(planned_s):
            steps = 1
        step_s = first_s + rows * (steps - 1) / 2 * step.context_token_s
        self._span = _Span(start_s=now, step_s=step_s, steps=steps, chunks=chunks)
        self.version += 1
        return self._span.end_s

    def _is_expected(self, planned_s: float) -> bool:
        """Whether a request came too late for the step that begins, and is to be in the next one."""
        return bool(self._waiting) and self._waiting[0].came_s > planned_s

    def load(self) -> MemberLoad:
        """Its report."""
        self._reports += 1
        spec = self._spec
        return MemberLoad(
            member_id=self.member_id,
            role="mixed",
            sequence=self._reports,
            waiting_requests=len(self._waiting),
            waiting_tokens=self._waiting_tokens + self._unplanned_tokens(),
            running_requests=len(self._rows) + len(self._prompts),
            context_tokens=self._context,
            max_requests=spec.max_rows,
            step_tokens=spec.step_tokens,
            step_time=spec.step_time,
            free_blocks=self._cache.num_free,
            total_blocks=self._cache.num_blocks,
            block_size=spec.block_size,
        )

    def _unplanned_tokens(self) -> int:
        """Of prompts that are being computed, what is in neither of the two steps that are planned."""
        room = max(self._spec.step_tokens - len(self._rows), 1)
        return max(sum(prompt.left for prompt in self._prompts) - 2 * room, 0)

    def take_events(self) -> CacheEvents | None:
        """What its cache took in and let go since the last call; None: nothing."""
        stored, removed = self._cache.take_changes()
        if not stored and not removed and self._events:
            return None
        self._events += 1
        return CacheEvents(
            after=self._events - 1, sequence=self._events, cleared=self._events == 1, stored=stored, removed=removed
        )
