"""How many tokens to draft behind each row of a step: as many as pay, by measured acceptance and step times.

A step with d drafts gives 1 + p1 + p1 p2 + ... tokens a row (p_i: how often the draft at depth i is right where those
before it were) and takes a time that depends on d and on the batch. What is drafted is the d with the most tokens a
second. To know the times, steps with other d are tried now and then, on a budget: a try costs what a step takes longer
than its tokens would have taken without drafts, and all tries together may cost `_ALLOWANCE` of the time so far, from
the first step on. So a policy that knows nothing saves up first: it measures some steps without drafts and naps until a
try is paid for. The first step of a kind may take longer than later ones, as it is written down or compiled; that is
learnt and paid for too. Where drafting does not pay it naps too. In a nap nothing is measured, and what only drafts
need, the draft layer's KV, is not kept. What that KV costs is booked as well, against steps that do without.
"""

import math
import statistics
from collections import deque
from dataclasses import dataclass, field

_ALLOWANCE = 0.01
"""Part of the time that tries may cost."""
_OVERDRAFT_STEPS = 2
"""A try that costs this many steps without drafts more than was saved up for it ends at once."""
_MOST_CREDIT_STEPS = 64
"""What is saved up or gained counts up to this many steps without drafts: what pays may stop paying."""
_SAMPLES = 4
"""Steps measured before a time is used, and steps of one try; drafts verified before their acceptance is used."""
_REMEMBERED = 2
"""What was known of acceptance before a nap counts like this many drafts behind it."""
_STALE_STEPS = 1024
"""A time not measured for this many steps of its batch size is measured again."""
_DOUBTFUL_STEPS = 64
"""As `_STALE_STEPS`, for the time without drafts when drafting seems not to have paid: contexts grow."""
_MARGIN = 1.02
"""Drafting must promise this much more: times are not exact."""
_HOPELESS = 0.1
"""Where fewer first drafts are right the policy naps at once, in the middle of a try if need be."""
_IDLE_STEPS = 64
"""It also naps when drafting has not paid for this many steps, at none of the batch sizes there were, or is in debt."""
_SHORTEST_NAP, _LONGEST_NAP = 512, 32768
"""Steps of a nap where drafting does not pay: the first one's, doubled each time that nothing has changed, and the
most."""
_SHORTEST_SAVING = 64
"""Steps of a nap that saves up for a try, at least."""
_WARM_UP_STEPS = 32
"""Steps after a nap in which only the layer's KV is kept, at the nap's expense: drafts behind them can be right."""
_UPKEEP = 0.05
"""Part of a step that keeping the layer's KV is taken to cost, until it was measured."""
_HELD_UP = 1.5
"""A step's time is booked up to this many times the usual one,"""
_UNKNOWN_STEPS = 64
"""and up to this many steps without drafts where the usual one is not known."""
_ACCEPTANCE_WEIGHT = 0.02


@dataclass(slots=True)
class _Acceptance:
    """How often drafts of one depth are right, exponentially averaged; the first ones count alike."""

    value: float = 0.0
    count: int = 0

    def add(self, *, right: bool) -> None:
        self.count += 1
        self.value += (right - self.value) * max(_ACCEPTANCE_WEIGHT, 1 / self.count)


@dataclass(slots=True)
class _Time:
    """What steps of one kind take: the median of the latest, as some are held up by what else the machine does."""

    samples: deque[float] = field(default_factory=lambda: deque(maxlen=16))
    value: float = 0.0
    """The median; it is asked for several times a step."""
    seen_at: int = 0
    """The batch size's step at which one was measured last."""
    is_new: bool = True
    """There was none yet."""

    @property
    def is_known(self) -> bool:
        return len(self.samples) >= _SAMPLES

    def add(self, *seconds: float) -> None:
        self.samples.extend(seconds)
        self.value = statistics.median(self.samples)


class _Batch:
    """What is known of steps of one batch size."""

    def __init__(self, most: int) -> None:
        self.times = [_Time() for _ in range(most + 1)]
        """Seconds a step, by drafts; without drafts of steps that do not keep the layer's KV either, which all else is
        compared with."""
        self.kept = _Time()
        """Seconds of a step without drafts that keeps the layer's KV."""
        self.steps = 0
        self.trying = 0
        """Drafts of the try going on."""
        self.tries_left = 0

    @property
    def plain_s(self) -> float:
        """A step without drafts and the layer's KV."""
        return self.times[0].value

    def warm_up_s(self, first_s: float) -> float:
        """Seconds that keeping the KV before a try costs.

        Args:
            first_s: what the first step of a kind takes longer.
        """
        if not self.kept.is_known:
            return _WARM_UP_STEPS * _UPKEEP * self.plain_s + self.kept.is_new * first_s
        return _WARM_UP_STEPS * max(self.kept.value - self.plain_s, 0.0)

    def try_s(self, drafts: int, first_s: float) -> float:
        """Seconds that a try may lose: what was measured; untried, what fewer drafts let expect, or a step a draft."""
        known = self.times[drafts]
        if known.is_known:
            return (_SAMPLES + 1) * max(known.value - self.plain_s, 0.0)
        each_s = self.plain_s
        if self.times[1].is_known:
            each_s = max(self.times[1].value - self.plain_s, 0.0)
        # The first that drafts, and the first that verifies.
        return (_SAMPLES + 1) * each_s * drafts + 2 * known.is_new * first_s

    @property
    def next_try(self) -> int:
        """The fewest drafts that were not tried lately; one where all were."""
        return next((drafts for drafts in range(1, len(self.times)) if self.stale(drafts)), 1)

    def stale(self, drafts: int, steps: int = _STALE_STEPS) -> bool:
        """Whether this time should be measured (again)."""
        time = self.times[drafts]
        return not time.is_known or self.steps - time.seen_at > steps

    def begin_try(self, drafts: int) -> int:
        """Measure steps with this many drafts from now on -> `drafts`. What was measured long ago is forgotten."""
        time = self.times[drafts]
        self.trying, self.tries_left = drafts, _SAMPLES + time.is_new if drafts else 0
        time.samples.clear()
        return drafts


class DraftPolicy:
    """Chooses the drafts of each step of one replica. State with one writer, the scheduler.

    It may outlive a scheduler: what was learnt holds for the next one on the same ranks.

    Args:
        most: drafts a row, at most.
        adaptive: False drafts `most` always.
    """

    def __init__(self, most: int, *, adaptive: bool) -> None:
        self.most = most
        self.keeps = True
        """Whether the step chosen for keeps what only drafts need."""
        self._adaptive = adaptive
        self._acceptance = [_Acceptance() for _ in range(most)]
        self._batches: dict[int, _Batch] = {}
        self._credit_s = 0.0
        """What tries may still cost; below 0 nothing is drafted."""
        self._is_new = True
        """No try was saved up for yet."""
        self._first_s = 0.0
        """What the first step of a kind took longer than others."""
        self._idle = 0
        """Steps since drafts were chosen because they pay."""
        self._nap = _SHORTEST_NAP
        self._nap_left = 0
        self._nap_gain_s = 0.0
        """What the nap going on adds to the credit."""
        self._warm_up_left = 0

    @property
    def asleep(self) -> bool:
        """Whether nothing is measured, nor anything kept of decoded tokens that only drafts need."""
        return self._nap_left > 0

    @property
    def keeps_prompts(self) -> bool:
        """Whether what only drafts need is kept of prompts: also where the first try is still being saved up for."""
        return self._is_new or not self.asleep

    def acceptance(self, depth: int) -> float:
        """How often a draft at this depth (0 is the first) is right where those before it are; 1 while unknown."""
        known = self._acceptance[depth]
        return known.value if known.count >= _SAMPLES else 1.0

    def expected_tokens(self, drafts: int) -> float:
        """Tokens that a row gets in a step with this many drafts."""
        tokens, right = 1.0, 1.0
        for depth in range(drafts):
            right *= self.acceptance(depth)
            tokens += right
        return tokens

    def choose(self, rows: int) -> int:
        """Drafts for the next step, in which this many rows decode (in the fullest lane)."""
        if not self._adaptive or not self.most or not rows:
            return self.most
        if self._nap_left:
            return self._sleep()
        batch = self._batch(rows)
        batch.steps += 1
        self._idle += 1
        self.keeps = batch.times[0].is_known
        if not self.keeps:
            # Nor could a nap be long enough, in debt or not, without what a step takes.
            return 0
        tries = batch.tries_left > 0 or self._warm_up_left > 0
        if tries and self._credit_s < -_OVERDRAFT_STEPS * batch.plain_s:
            return self._fall_asleep(batch)
        if self._is_new or self.acceptance(0) < _HOPELESS:
            return self._fall_asleep(batch)
        if self._warm_up_left:
            self._warm_up_left -= 1
            return 0
        if batch.tries_left and not _is_hopeless(batch):
            batch.tries_left -= 1
            return batch.trying
        batch.tries_left = 0
        return self._best(batch)

    def _sleep(self) -> int:
        """One step of a nap; behind the last the layer's KV is kept for a while."""
        self._nap_left -= 1
        self.keeps = False
        if not self._nap_left:
            self._is_new = False
            self._credit_s += self._nap_gain_s
            self._warm_up_left = _WARM_UP_STEPS
            for known in self._acceptance:
                known.count = min(known.count, _REMEMBERED)
            for batch in self._batches.values():
                batch.times[0].samples.clear()
        return 0

    def _fall_asleep(self, batch: _Batch) -> int:
        """Begin a nap with the next step, long enough for the next try to be paid -> no drafts."""
        self.keeps = False
        self._idle = self._warm_up_left = 0
        step_gain_s = _ALLOWANCE * batch.plain_s
        tried = batch.next_try
        lacking_s = batch.warm_up_s(self._first_s) + batch.try_s(tried, self._first_s) - self._credit_s
        saving = min(math.ceil(lacking_s / step_gain_s), _LONGEST_NAP) if step_gain_s else 0
        self._nap_left = max(saving, _SHORTEST_SAVING)
        if (batch.times[1].is_known and tried == 1) or self.acceptance(0) < _HOPELESS:
            # All numbers of drafts were found not to pay, not only left.
            self._nap_left, self._nap = max(saving, self._nap), min(2 * self._nap, _LONGEST_NAP)
        self._nap_gain_s = self._nap_left * step_gain_s
        for batch in self._batches.values():
            batch.tries_left = 0
        return 0

    def _best(self, batch: _Batch) -> int:
        """What promises most, or a number of drafts that is to be tried instead."""
        best = max(range(self.most + 1), key=lambda drafts: self._rate(batch, drafts))
        # Whatever the times say, it may not have paid.
        in_debt = self._credit_s < 0
        tried = self._to_try(batch, best, _DOUBTFUL_STEPS if in_debt else _STALE_STEPS)
        if tried is not None:
            self.keeps = tried > 0
            return batch.begin_try(tried)
        if best and not in_debt:
            self._idle = 0
            if self._acceptance[0].count * _ACCEPTANCE_WEIGHT >= 1:
                self._nap = _SHORTEST_NAP
            return best
        return self._fall_asleep(batch) if in_debt or self._idle > _IDLE_STEPS else 0

    def _rate(self, batch: _Batch, drafts: int) -> float:
        """Tokens a second and row that are to be expected; 0 where it was not tried yet."""
        time = batch.times[drafts]
        return self.expected_tokens(drafts) / (time.value * (_MARGIN if drafts else 1.0)) if time.is_known else 0.0

    def _to_try(self, batch: _Batch, best: int, plain_stale: int) -> int | None:
        """Drafts whose time should be measured (again) and that the budget allows; none only after all others.

        A sequence lacks the layer's KV where it was done without: its drafts are worse then.
        """
        for drafts in range(1, self.most + 1):
            if drafts != best and batch.stale(drafts) and batch.try_s(drafts, self._first_s) <= self._credit_s:
                return drafts
        return 0 if batch.stale(0, plain_stale) else None

    def verified(self, drafts: int, accepted: int) -> None:
        """A row verified this many drafts and accepted the first `accepted` of them."""
        for depth in range(min(accepted + 1, drafts)):
            self._acceptance[depth].add(right=depth < accepted)

    def measured(self, *, rows: int, drafts: int | None, kept: bool, tokens_a_row: float, seconds: float) -> None:
        """A step of decoding rows only took this long.

        Args:
            rows: of the fullest lane.
            drafts: what every row verified and drafted; None where they differ, as when `choose` changes its mind.
            kept: what `keeps` was for it.
            tokens_a_row: what the rows got, on average.
        """
        if not self._adaptive or not self.most or self.asleep or seconds <= 0:
            return
        batch = self._batch(rows)
        plain_s = batch.plain_s
        if batch.times[0].is_known:
            self._book(batch, drafts, kept=kept, seconds=seconds, tokens_a_row=tokens_a_row)
        if drafts is None:
            return
        time = batch.kept if kept and not drafts else batch.times[drafts]
        time.seen_at = batch.steps
        if not time.is_new:
            time.add(seconds)
        elif kept and batch.times[0].is_known:
            # No more than is booked of it.
            self._first_s = max(min(seconds, _UNKNOWN_STEPS * plain_s) - (1 + drafts) * plain_s, 0.0)
        time.is_new = False

    def _book(self, batch: _Batch, drafts: int | None, *, kept: bool, seconds: float, tokens_a_row: float) -> None:
        """Win or lose what a step took less or more than its tokens without drafts, and gain the allowance.

        What is far beyond the usual is not the drafts' doing: something else held the step up.
        """
        plain_s = batch.plain_s
        usual = batch.kept if drafts == 0 else batch.times[self.most if drafts is None else drafts]
        most_s = _HELD_UP * usual.value if usual.is_known else _UNKNOWN_STEPS * plain_s
        seconds = min(seconds, most_s) if kept or drafts != 0 else plain_s
        credit_s = self._credit_s + plain_s * tokens_a_row - (1 - _ALLOWANCE) * seconds
        # A try that costs more than the credit may hold would never be made.
        self._credit_s = min(credit_s, _MOST_CREDIT_STEPS * plain_s + 2 * self._first_s)

    def _batch(self, rows: int) -> _Batch:
        """Batch sizes up to four by themselves, larger ones by half octaves."""
        key = rows if rows <= 4 else 4 + int(2 * math.log2(rows / 4))
        found = self._batches.get(key)
        if found is None:
            found = self._batches[key] = _Batch(self.most)
        return found


def _is_hopeless(batch: _Batch) -> bool:
    """Whether a try that goes on could not pay if every draft were right: then that is known already."""
    tried = batch.times[batch.trying]
    if not batch.trying or not tried.samples or tried.value < batch.plain_s * (1 + batch.trying):
        return False
    tried.add(*[tried.value] * _SAMPLES)
    return True
