"""How many tokens to draft behind each row of a step: as many as pay, by measured acceptance and step times.

A step with d drafts gives 1 + p1 + p1 p2 + ... tokens a row (p_i: how often the draft at depth i is right where those
before it were) and takes a time that depends on d and on the batch. What is drafted is the d with the most tokens a
second. To know the times, steps with other d are tried now and then, on a budget: a try costs what a step takes longer
than its tokens would have taken without drafts, and all tries together may cost `_ALLOWANCE` of the time. Where hardly
a draft is right the policy naps: what only drafts need, the draft layer's KV, is not kept then.
"""

import math
from dataclasses import dataclass

_ALLOWANCE = 0.01
"""Part of the time that tries may cost."""
_START_STEPS = 6
"""Steps without drafts whose time tries may cost at once, before any has been saved up."""
_MOST_CREDIT_STEPS = 64
"""What is saved up or gained counts up to this many steps without drafts: what pays may stop paying."""
_SAMPLES = 4
"""Steps measured before a mean is used, and steps of one try."""
_STALE_STEPS = 1024
"""A time not measured for this many steps of its batch size is measured again."""
_MARGIN = 1.02
"""Drafting must promise this much more: the means are not exact."""
_HOPELESS = 0.1
"""Where fewer first drafts are right and drafting does not pay, the policy sleeps."""
_SHORTEST_NAP, _LONGEST_NAP = 512, 32768
"""Steps of a nap: the first one's, doubled each time that nothing has changed, and the most."""
_WARM_UP_STEPS = 64
"""Steps after a nap in which only the layer's KV is kept: sequences that begin in them can be drafted for."""
_TIME_WEIGHT = 0.1
_ACCEPTANCE_WEIGHT = 0.02


@dataclass(slots=True)
class _Mean:
    """An exponentially averaged value; the first `1 / weight` samples count alike."""

    weight: float
    value: float = 0.0
    count: int = 0
    seen_at: int = 0
    """The batch size's step at which it was measured last."""

    def add(self, sample: float) -> None:
        self.count += 1
        self.value += (sample - self.value) * max(self.weight, 1 / self.count)


class _Batch:
    """What is known of steps of one batch size."""

    def __init__(self, most: int) -> None:
        self.times = [_Mean(_TIME_WEIGHT) for _ in range(most + 1)]
        """Seconds a step, by drafts."""
        self.steps = 0
        self.trying = 0
        """Drafts of the try going on."""
        self.tries_left = 0


class DraftPolicy:
    """Chooses the drafts of each step of one engine. State with one writer, the scheduler.

    Args:
        most: drafts a row, at most.
        adaptive: False drafts `most` always.
    """

    def __init__(self, most: int, *, adaptive: bool) -> None:
        self.most = most
        self._adaptive = adaptive
        self._acceptance = [_Mean(_ACCEPTANCE_WEIGHT) for _ in range(most)]
        self._batches: dict[int, _Batch] = {}
        self._credit_s: float | None = None
        self._nap = _SHORTEST_NAP
        self._nap_left = 0
        self._warm_up_left = 0

    @property
    def asleep(self) -> bool:
        """Whether nothing that only drafts need has to be kept for now."""
        return self._nap_left > 0

    def acceptance(self, depth: int) -> float:
        """How often a draft at this depth (0 is the first) is right where those before it are; 1 while unknown."""
        mean = self._acceptance[depth]
        return mean.value if mean.count >= _SAMPLES else 1.0

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
        if self._rests():
            return 0
        batch = self._batch(rows)
        batch.steps += 1
        if not _is_known(batch.times[0]):
            return 0
        if batch.tries_left and not _is_hopeless(batch):
            batch.tries_left -= 1
            return batch.trying
        batch.tries_left = 0
        best = max(range(self.most + 1), key=lambda drafts: self._rate(batch, drafts))
        # Whatever the means say, it may not have paid.
        unpaid = best > 0 and self._credit_s is not None and self._credit_s < 0
        if (unpaid or not best) and self.acceptance(0) < _HOPELESS:
            self._nap_left, self._nap = self._nap, min(2 * self._nap, _LONGEST_NAP)
            return 0
        if best and self._acceptance[0].count * _ACCEPTANCE_WEIGHT >= 1:
            self._nap = _SHORTEST_NAP
        return 0 if unpaid else self._try_instead(batch, best)

    def _rests(self) -> bool:
        """Count down a nap and the warm-up behind it."""
        if self._nap_left > 1:
            self._nap_left -= 1
            return True
        if self._nap_left:
            self._nap_left, self._warm_up_left = 0, _WARM_UP_STEPS
            # What was measured is long ago.
            self._acceptance = [_Mean(_ACCEPTANCE_WEIGHT) for _ in range(self.most)]
        self._warm_up_left = max(0, self._warm_up_left - 1)
        return self._warm_up_left > 0

    def _rate(self, batch: _Batch, drafts: int) -> float:
        """Tokens a second and row that are to be expected; 0 where it was not tried yet."""
        time = batch.times[drafts]
        if not _is_known(time):
            return 0.0
        return self.expected_tokens(drafts) / (time.value * (_MARGIN if drafts else 1.0))

    def _try_instead(self, batch: _Batch, best: int) -> int:
        """`best`, or a number of drafts whose time should be measured (again) if the budget allows."""
        stale = [
            drafts
            for drafts, time in enumerate(batch.times)
            if drafts != best and (not _is_known(time) or batch.steps - time.seen_at > _STALE_STEPS)
        ]
        if not stale or self._credit_s is None:
            return best
        drafts = stale[0]
        # Untried, a draft costs at worst a step each; tried, what was measured.
        plain_s, known = batch.times[0].value, batch.times[drafts]
        longest_s = known.value if _is_known(known) else plain_s * (1 + drafts)
        if self._credit_s < (_SAMPLES + 1) * max(longest_s - plain_s, 0.0):
            return best
        batch.trying, batch.tries_left = drafts, _SAMPLES
        return drafts

    def verified(self, drafts: int, accepted: int) -> None:
        """A row verified this many drafts and accepted the first `accepted` of them."""
        for depth in range(min(accepted + 1, drafts)):
            self._acceptance[depth].add(float(depth < accepted))

    def measured(self, *, rows: int, drafts: int | None, tokens_a_row: float, seconds: float) -> None:
        """A step of decoding rows only took this long.

        Args:
            rows: of the fullest lane.
            drafts: what every row verified and drafted; None where they differ, as when `choose` changes its mind.
            tokens_a_row: what the rows got, on average.
        """
        if not self._adaptive or not self.most or seconds <= 0:
            return
        batch = self._batch(rows)
        if drafts is not None:
            batch.times[drafts].add(seconds)
            batch.times[drafts].seen_at = batch.steps
        plain = batch.times[0]
        if not _is_known(plain):
            return
        if self._credit_s is None:
            self._credit_s = _START_STEPS * plain.value
        if drafts != 0:
            self._credit_s += plain.value * tokens_a_row - seconds
        self._credit_s = min(self._credit_s + _ALLOWANCE * seconds, _MOST_CREDIT_STEPS * plain.value)

    def _batch(self, rows: int) -> _Batch:
        """Batch sizes up to four by themselves, larger ones by half octaves."""
        key = rows if rows <= 4 else 4 + int(2 * math.log2(rows / 4))
        return self._batches.setdefault(key, _Batch(self.most))


def _is_hopeless(batch: _Batch) -> bool:
    """Whether a try that goes on could not pay if every draft were right: then that is known already."""
    tried = batch.times[batch.trying]
    if not tried.count or tried.value < batch.times[0].value * (1 + batch.trying):
        return False
    tried.count = max(tried.count, _SAMPLES)
    return True


def _is_known(time: _Mean) -> bool:
    return time.count >= _SAMPLES
