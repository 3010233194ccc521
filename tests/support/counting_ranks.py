"""Ranks without a model: the next token follows from the tokens so far by arithmetic, so that tests know it."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cluster.plan import PullDone, StepOutput, StepPlan
from router.errors import MemberLostError
from shards.batch import LaneOutput, StepBatch

VOCAB = 97


def next_token(tokens: Sequence[int]) -> int:
    """The token behind `tokens`."""
    return (3 * tokens[-1] + 7 * len(tokens) + sum(tokens)) % VOCAB


def continued(prompt: Sequence[int], count: int) -> list[int]:
    """The `count` tokens behind a prompt."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


@dataclass(slots=True)
class _Row:
    tokens: list[int]


class CountingRanks:
    """`Ranks` of one thread. `fail` makes the next result fail; pulls end at the next poll, or never."""

    def __init__(self, lanes: int = 1) -> None:
        self.launched = 0
        self.most_in_flight = 0
        self.fail: MemberLostError | None = None
        self.pull_error = ""
        self.pulls_end = True
        self.closed = False
        self._rows: list[dict[int, _Row]] = [{} for _ in range(lanes)]
        self._outputs: deque[StepOutput] = deque()
        self._pulls: list[PullDone] = []
        self._wake: Callable[[], None] = lambda: None

    def launch(self, plan: StepPlan) -> None:
        self.launched += 1
        if self.pulls_end:
            self._pulls += [PullDone(pull_id=order.pull_id, error=self.pull_error, seconds=0.5) for order in plan.pulls]
        lanes = tuple(self._lane(rows, batch) for rows, batch in zip(self._rows, plan.lanes, strict=True))
        if plan.has_rows:
            self._outputs.append(StepOutput(step=plan.step, lanes=lanes))
            self.most_in_flight = max(self.most_in_flight, len(self._outputs))
        if plan.pulls:
            self._wake()

    def _lane(self, rows: dict[int, _Row], batch: StepBatch) -> LaneOutput:
        for start in batch.starts:
            rows[start.row] = _Row(list(start.token_ids))
        output = LaneOutput()
        for row, first, count, samples in zip(
            batch.rows_S, batch.first_S, batch.counts_S, batch.samples_S, strict=True
        ):
            if samples:
                token = next_token(rows[row].tokens[: first + count])
                rows[row].tokens[first + count :] = [token]
                output.rows_N.append(row)
                output.tokens_N.append(token)
        return output

    def result(self) -> StepOutput:
        if self.fail is not None:
            raise self.fail
        return self._outputs.popleft()

    def poll_pulls(self) -> list[PullDone]:
        done = self._pulls
        self._pulls = []
        return done

    def wake_on(self, wake: Callable[[], None]) -> None:
        self._wake = wake

    def close(self) -> None:
        self.closed = True
