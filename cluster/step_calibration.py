"""What a member's steps take, learnt from those it has carried out: a least-squares fit of router.step_time's model."""

from collections import deque
from dataclasses import dataclass
from operator import mul, truediv
from typing import Final

from cluster.plan import StepPlan
from router.step_time import StepTime, experts_read

_WINDOW: Final = 128
"""Steps remembered of each kind; what steps took before is forgotten, a slow start among it."""
_REFIT_STEPS: Final = 64
"""A fit takes 2.5 ms; so many steps are at least 0.6 s."""
_APART_S: Final = 0.02
"""Between the beginnings of two of them: so many of a millisecond one after the other would tell of a moment only."""
_DOUBT: Final = (1e-3, 1e-3, 1e-3, 1e-3, 2e-2, 1e-3)
"""Weight of the first guess of each price against the steps seen: it decides where these leave a price open, and little
else. Where all prompts are equally long, what they take is their tokens' and not the step's."""
_SWEEPS: Final = 200
_SETTLED: Final = 1e-7
_LEAST_S: Final = 1e-9
_Row = tuple[float, float, float, float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredStep:
    """One step: what was in it, over all lanes together, and its seconds."""

    prefill_tokens: int
    decode_rows: int
    context_tokens: int
    """That its decode rows attended to."""
    seconds: float

    def row(self, expert_share: float) -> _Row:
        """What each price of the model is multiplied with."""
        experts = experts_read(expert_share, self.prefill_tokens + self.decode_rows)
        prompt = float(self.prefill_tokens > 0)
        return (1.0, float(self.prefill_tokens), float(self.decode_rows), float(self.context_tokens), prompt, experts)


def fit_step_time(steps: list[MeasuredStep], guess: StepTime) -> StepTime:
    """Prices of least squares, none negative.

    A step counts by 1 / its seconds, so that short ones, of which there are many, and long ones weigh alike: by the
    seconds it should take, as a first fit says, for by those it took a short time would count for more just because it
    was short. Each price is drawn to `guess` with a small part of the weight that the steps have in it, so that equal
    steps do not leave it open (ridge regression: Hoerl and Kennard, 1970), and the whole is solved by coordinate
    descent, which keeps prices at 0 that would be negative.

    Args:
        steps: with positive seconds.
        guess: stays the price of what is in none of the steps; its `expert_share` is known.
    """
    rows = [step.row(guess.expert_share) for step in steps]
    seconds = [step.seconds for step in steps]
    start = (
        *(guess.base_s, guess.prefill_token_s, guess.decode_row_s, guess.context_token_s),
        *(guess.prompt_s, guess.experts_s),
    )
    first = _fit(rows, seconds, seconds, start)
    expected = [max(sum(map(mul, first, row)), _LEAST_S) for row in rows]
    base_s, prefill_s, row_s, context_s, prompt_s, experts_s = _fit(rows, seconds, expected, start)
    return StepTime(
        base_s=base_s,
        prefill_token_s=max(prefill_s, _LEAST_S),
        decode_row_s=row_s,
        context_token_s=context_s,
        prompt_s=prompt_s,
        experts_s=experts_s,
        expert_share=guess.expert_share,
    )


def _fit(rows: list[_Row], seconds: list[float], expected: list[float], start: _Row) -> list[float]:
    """Prices for which rows x prices are nearest `seconds`, each row weighing 1 / its `expected` seconds."""
    columns = list(zip(*rows, strict=True))
    weighted = [list(map(truediv, column, expected)) for column in columns]
    products = [[sum(map(mul, one, other)) for other in columns] for one in weighted]
    targets = [sum(map(mul, one, seconds)) for one in weighted]
    for i, (price, doubt) in enumerate(zip(start, _DOUBT, strict=True)):
        extra = doubt * products[i][i]
        products[i][i] += extra
        targets[i] += extra * price
    return _solve(products, targets, start)


def _solve(products: list[list[float]], targets: list[float], start: _Row) -> list[float]:
    """Prices p >= 0 of least p' products p / 2 - targets' p; those that occur nowhere stay as they start."""
    prices = list(start)
    for _ in range(_SWEEPS):
        moved = 0.0
        for i, row in enumerate(products):
            if row[i]:
                rest = targets[i] - sum(map(mul, row, prices)) + row[i] * prices[i]
                price = max(rest / row[i], 0.0)
                moved = max(moved, abs(price - prices[i]) * row[i])
                prices[i] = price
        if moved <= _SETTLED * max(targets):
            break
    return prices


class StepCalibration:
    """One scheduler's steps as they are planned and committed. Times are those given to the scheduler.

    Steps with and without prompt tokens are remembered apart: long decoding leaves what prompts cost in memory.

    Args:
        expert_share: of a layer's experts, those that one token is sent to; 0: the model has none.
    """

    def __init__(self, *, expert_share: float = 0.0) -> None:
        self._guess = StepTime(expert_share=expert_share)
        self._planned: deque[tuple[float, int, int, int]] = deque()
        """When each was given out, its prefill tokens, decode rows and context tokens."""
        self._prefills: deque[MeasuredStep] = deque(maxlen=_WINDOW)
        self._decodes: deque[MeasuredStep] = deque(maxlen=_WINDOW)
        self._next_s = {True: 0.0, False: 0.0}
        """When the next step with prompts, and without, is to begin that is remembered."""
        self._new = 0
        self._fitted = self._guess
        self._ended: float | None = None
        """When the last step ended; None when nothing was to be done then."""

    def planned(self, plan: StepPlan, now: float) -> None:
        """A plan with rows is given out."""
        prefill = rows = context = 0
        for lane in plan.lanes:
            if lane.only_decodes:
                # Each plain decode step: no loop over rows.
                rows += len(lane.rows_S)
                context += sum(lane.first_S) + sum(lane.counts_S)
                continue
            verifies = lane.verifies_S or [0] * len(lane.rows_S)
            for first, count, drafts in zip(lane.first_S, lane.counts_S, verifies, strict=True):
                if count - drafts == 1:
                    rows += 1
                    context += first + count
                else:
                    prefill += count
        self._planned.append((now, prefill, rows, context))

    def committed(self, now: float, *, busy: bool) -> None:
        """The oldest plan is done. `busy`: there is more to do, so that the next step's time begins now."""
        began, prefill, rows, context = self._planned.popleft()
        began = began if self._ended is None else max(began, self._ended)
        self._ended = now if busy else None
        prompts = prefill > 0
        kept = self._prefills if prompts else self._decodes
        # Or the clock went back.
        soon = self._next_s[prompts] - _APART_S <= began < self._next_s[prompts]
        if now <= began or (len(kept) == _WINDOW and soon):
            return
        step = MeasuredStep(prefill_tokens=prefill, decode_rows=rows, context_tokens=context, seconds=now - began)
        kept.append(step)
        self._next_s[prompts] = began + _APART_S
        self._new += 1

    def step_time(self) -> StepTime:
        """What steps take, by those of the last while; a first guess before there are any."""
        seen = len(self._prefills) + len(self._decodes)
        # The first steps are all there is to know; later ones change little each.
        if self._new >= min(_REFIT_STEPS, seen) > 0:
            self._fitted = fit_step_time([*self._prefills, *self._decodes], self._guess)
            self._new = 0
        return self._fitted
