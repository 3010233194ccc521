"""Prompt log probabilities when a prompt is computed more than once: told once, whole, with the first token."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from cluster.plan import StepOutput, StepPlan
from router.request import Request, TokenEvent
from shards.batch import LogprobColumns
from tests.support.events import one_by_one
from tests.support.scheduler_bench import CONFIG, Bench, make_request

PROMPT_LEN = 16


class AskedRows:
    """Answers with log probability -p for each computed prompt position p of rows whose start asks for it."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.prompt_lens: dict[int, int] = {}
        self.positions = 0

    def answer(self, plan: StepPlan) -> StepOutput:
        output, batch = self.bench.answer(plan), plan.lanes[0]
        for start in batch.starts:
            self.prompt_lens[start.row] = start.prompt_len if start.sampling.prompt_logprobs is not None else 0
        told: dict[int, LogprobColumns] = {}
        for row, first, count in zip(batch.rows_S, batch.first_S, batch.counts_S, strict=True):
            known = range(first, min(first + count, self.prompt_lens[row] - 1))
            if known:
                self.positions += len(known)
                nothing: list[list[int]] = [[]] * len(known)
                told[row] = LogprobColumns(
                    logprobs_N=[-float(position) for position in known],
                    ranks_N=[1] * len(known),
                    top_ids_NK=nothing,
                    top_logprobs_NK=[[]] * len(known),
                )
        return replace(output, lanes=(replace(output.lanes[0], prompt_logprobs=told),))

    def commit(self, plan: StepPlan) -> list[TokenEvent]:
        events = one_by_one(self.bench.scheduler.commit(self.answer(plan), 0.0))
        self.bench.scheduler.check_integrity()
        return [event for event in events if isinstance(event, TokenEvent)]

    def one_step_ahead(self) -> Iterator[TokenEvent]:
        """Run to the end with each step planned before the one before it is committed."""
        pending: StepPlan | None = None
        while True:
            plan = self.bench.scheduler.schedule(0.0)
            if pending is not None:
                yield from self.commit(pending)
            if plan is None and pending is None:
                return
            pending = plan


def asking(request: Request) -> Request:
    return replace(request, sampling=replace(request.sampling, prompt_logprobs=0))


@pytest.mark.parametrize("max_tokens", [6, 9])
@pytest.mark.parametrize("chunk", [1, 2, 3, 16])
def test_preemption_at_any_moment_neither_repeats_nor_loses_any(chunk: int, max_tokens: int) -> None:
    bench = Bench(replace(CONFIG, num_blocks=8, max_step_tokens=32, chunk_tokens=chunk))
    rows = AskedRows(bench)
    bench.add(make_request("a", 8, max_tokens=20))
    bench.add(asking(make_request("b", PROMPT_LEN, max_tokens=max_tokens)))
    told = [event.prompt_logprobs for event in rows.one_step_ahead() if event.request_id == "b"]
    assert bench.scheduler.num_preemptions > 0
    assert [entry and entry.logprob for entry in told[0]] == [None, *(-float(p) for p in range(PROMPT_LEN - 1))]
    assert told[1:] == [()] * (max_tokens - 1)


def test_a_prompt_whose_first_token_was_told_computes_none_again() -> None:
    bench = Bench(replace(CONFIG, num_blocks=8, max_step_tokens=32))
    rows = AskedRows(bench)
    bench.add(make_request("a", 11, max_tokens=20))
    bench.add(asking(make_request("b", PROMPT_LEN, max_tokens=9)))
    list(rows.one_step_ahead())
    assert bench.scheduler.num_preemptions == 1
    assert rows.positions == PROMPT_LEN - 1
