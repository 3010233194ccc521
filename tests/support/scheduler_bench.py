"""A scheduler whose plans are answered at once, and builders for what goes in."""

from itertools import count

from cluster.plan import HandoffReady, KvLayout, KvTicket, StepOutput, StepPlan
from cluster.scheduler import Scheduler
from cluster.scheduler_config import SchedulerConfig
from cluster.sequence import Mode
from router.request import MemberId, Request, RequestId, SamplingParams, TokenEvent
from shards.batch import LaneOutput, LogprobColumns
from tests.support.events import one_by_one

CONFIG = SchedulerConfig(
    lanes=1,
    num_blocks=16,
    num_slots=0,
    block_size=4,
    max_rows=4,
    max_step_tokens=16,
    chunk_tokens=16,
    max_model_len=64,
    vocab_size=1 << 20,
    prefix_cache=True,
    lease_s=10.0,
    lease_grace_s=2.0,
    max_waiting=8,
)


def make_request(
    name: str = "a",
    prompt: int | tuple[int, ...] = 4,
    *,
    max_tokens: int = 4,
    priority: int = 0,
    output: tuple[int, ...] = (),
    stops: tuple[int, ...] = (),
    logprobs: int | None = None,
    deadline: float | None = None,
) -> Request:
    """A number asks for a prompt of that length which shares nothing with others."""
    ids = prompt if isinstance(prompt, tuple) else tuple(1000 * (ord(name[0]) - 96) + i for i in range(prompt))
    return Request(
        id=RequestId(name),
        prompt_ids=ids,
        output_ids=output,
        sampling=SamplingParams(max_tokens=max_tokens, stop_token_ids=stops, logprobs=logprobs),
        priority=priority,
        deadline_unix_s=deadline,
    )


class Bench:
    """A scheduler whose plans are answered with the tokens 100, 101, ..."""

    def __init__(self, config: SchedulerConfig = CONFIG) -> None:
        self.scheduler = Scheduler(config)
        self.tokens = count(100)

    def add(self, request: Request, mode: Mode = "full") -> None:
        self.scheduler.add(request, mode=mode, now=0.0)

    def plan(self, now: float = 0.0) -> StepPlan:
        plan = self.scheduler.schedule(now)
        assert plan is not None
        self.scheduler.check_integrity()
        return plan

    def answer(self, plan: StepPlan) -> StepOutput:
        lanes = []
        for batch in plan.lanes:
            rows = [row for row, samples in zip(batch.rows_S, batch.samples_S, strict=True) if samples]
            tokens = [next(self.tokens) for _ in rows]
            columns = LogprobColumns(
                logprobs_N=[-1.0] * len(rows),
                ranks_N=[2] * len(rows),
                top_ids_NK=[[5, 6]] * len(rows),
                top_logprobs_NK=[[-0.5, -0.7]] * len(rows),
            )
            lanes.append(LaneOutput(rows_N=rows, tokens_N=tokens, logprobs=columns))
        return StepOutput(step=plan.step, lanes=tuple(lanes))

    def commit(self, plan: StepPlan, now: float = 0.0) -> list[TokenEvent | HandoffReady]:
        events = one_by_one(self.scheduler.commit(self.answer(plan), now))
        self.scheduler.check_integrity()
        return events

    def step(self, now: float = 0.0) -> list[TokenEvent | HandoffReady]:
        return self.commit(self.plan(now), now)

    def drain(self) -> None:
        while (plan := self.scheduler.schedule(0.0)) is not None:
            self.commit(plan)

    def free_blocks(self) -> int:
        return self.scheduler.load(0.0, MemberId("m"), "mixed").free_blocks


def make_ticket(
    request: Request, *, expires: float = 10.0, num_tokens: int | None = None, block_size: int = 4
) -> KvTicket:
    tokens = len(request.prompt_ids) if num_tokens is None else num_tokens
    layout = KvLayout(fingerprint="f", tp=1, block_size=block_size, num_blocks=9, num_slots=0, dtype="float32")
    return KvTicket(
        id="t",
        member_id=MemberId("p"),
        layout=layout,
        ranks=(),
        blocks=tuple(range(20, 20 + -(-tokens // 4))),
        state_slot=-1,
        num_tokens=tokens,
        expires_unix_s=expires,
    )


def tokens_of(events: list[TokenEvent | HandoffReady]) -> list[tuple[str, int | None]]:
    return [(event.request_id, event.token_id) for event in events if isinstance(event, TokenEvent)]
