from collections.abc import Callable

import pytest

from cluster.speculation import DraftPolicy

Times = Callable[[int, int], float]
"""(rows, drafts) -> seconds of a step."""


class Machine:
    """Steps of one policy, rows that all draft alike, and drafts that are right as often as said.

    Args:
        upkeep: part that a step takes longer where it keeps what only drafts need.
        first_s: seconds that the first step of each kind takes longer.
    """

    def __init__(
        self,
        policy: DraftPolicy,
        times: Times,
        right: tuple[float, ...],
        upkeep: float = 0.0,
        first_s: float = 0.0,
    ) -> None:
        self.policy = policy
        self.times = times
        self.right = right
        self.upkeep = upkeep
        self.first_s = first_s
        self._kinds: set[tuple[int, bool, int, int]] = set()
        self.seconds = 0.0
        self.tokens = 0.0
        self.chosen: list[int] = []
        self._ready = 0
        self._wrong = [0.0] * len(right)

    def step(self, rows: int) -> None:
        drafts = self.policy.choose(rows)
        verified = min(drafts, self._ready)
        kept = self.policy.keeps
        assert kept or not drafts
        seconds = self.times(rows, max(verified, drafts)) * (1 + kept * self.upkeep)
        kind = rows, kept, verified, drafts
        if (kept or verified) and kind not in self._kinds:
            self._kinds.add(kind)
            seconds += self.first_s
        tokens = 0
        for _ in range(rows):
            accepted = self._accept(verified)
            self.policy.verified(verified, accepted)
            tokens += accepted + 1
        alike = drafts if verified == drafts else None
        self.policy.measured(rows=rows, drafts=alike, kept=kept, tokens_a_row=tokens / rows, seconds=seconds)
        self._ready = drafts
        self.seconds += seconds
        self.tokens += tokens / rows
        self.chosen.append(drafts)

    def _accept(self, verified: int) -> int:
        """Wrong drafts evenly spread: no chance."""
        for depth in range(verified):
            self._wrong[depth] += 1 - self.right[depth]
            if self._wrong[depth] >= 1:
                self._wrong[depth] -= 1
                return depth
        return verified


def run(times: Times, right: tuple[float, ...], *, rows: int, steps: int = 3000, upkeep: float = 0.0) -> Machine:
    machine = Machine(DraftPolicy(len(right), adaptive=True), times, right, upkeep)
    for _ in range(steps):
        machine.step(rows)
    return machine


def cheap(rows: int, drafts: int) -> float:
    return 0.010 + 0.001 * drafts


def dear(rows: int, drafts: int) -> float:
    """Compute-bound: every position costs."""
    return 0.002 * rows * (1 + drafts)


@pytest.mark.parametrize("rows", [1, 3, 16, 64])
def test_drafts_that_never_pay_cost_less_than_three_percent(rows: int) -> None:
    machine = run(dear, (0.1, 0.1), rows=rows)

    assert machine.seconds / machine.tokens < 1.03 * dear(rows, 0)
    assert machine.chosen[-100:].count(0) > 90


@pytest.mark.parametrize(("right", "expected"), [((0.9, 0.9, 0.9), 3), ((0.9, 0.05, 0.05), 1), ((0.05, 0.05, 0.05), 0)])
def test_as_many_drafts_are_chosen_as_pay(right: tuple[float, ...], expected: int) -> None:
    machine = run(cheap, right, rows=4)

    assert max(set(machine.chosen[-200:]), key=machine.chosen[-200:].count) == expected


def test_batch_sizes_are_judged_apart() -> None:
    def bound_by_compute_when_large(rows: int, drafts: int) -> float:
        return cheap(rows, drafts) if rows < 8 else dear(rows, drafts)

    machine = Machine(DraftPolicy(2, adaptive=True), bound_by_compute_when_large, (0.8, 0.8))
    for _ in range(400):
        for rows in (2, 2, 2, 2, 2, 2, 2, 2, 32, 32, 32, 32, 32, 32, 32, 32):
            machine.step(rows)
    last = machine.chosen[-16:]

    assert last[1:8] == [2] * 7
    assert last[9:] == [0] * 7


def test_what_stopped_paying_is_given_up_and_what_pays_again_is_found() -> None:
    machine = run(cheap, (0.9,), rows=4)
    assert not machine.policy.asleep
    assert machine.chosen[-1] == 1

    machine.right = (0.0,)
    for _ in range(500):
        machine.step(4)
    assert machine.chosen[-1] == 0

    machine.right = (0.9,)
    for _ in range(3000):
        machine.step(4)
    assert machine.chosen[-50:].count(1) > 40


def test_drafting_that_gives_fewer_tokens_than_promised_is_bounded_too() -> None:
    policy, seconds, tokens = DraftPolicy(1, adaptive=True), 0.0, 0.0
    for _ in range(3000):
        drafts = policy.choose(1)
        # Right whenever verified, but some rows had no room to verify any.
        policy.verified(drafts, drafts)
        step_s = 0.010 * (1 + 0.5 * drafts)
        policy.measured(rows=1, drafts=drafts, kept=policy.keeps, tokens_a_row=1.2 if drafts else 1.0, seconds=step_s)
        seconds, tokens = seconds + step_s, tokens + (1.2 if drafts else 1.0)

    assert seconds / tokens < 1.03 * 0.010


def test_a_fixed_policy_always_drafts_all_and_measures_nothing() -> None:
    machine = Machine(DraftPolicy(2, adaptive=False), dear, (0.0, 0.0))
    for _ in range(20):
        machine.step(8)

    assert set(machine.chosen) == {2}


def test_no_rows_or_no_drafts_need_no_choice() -> None:
    assert DraftPolicy(0, adaptive=True).choose(5) == 0
    assert DraftPolicy(3, adaptive=True).choose(0) == 3


def test_steps_that_took_no_time_are_not_looked_at() -> None:
    policy = DraftPolicy(1, adaptive=True)
    for _ in range(50):
        policy.choose(1)
        policy.measured(rows=1, drafts=0, kept=True, tokens_a_row=1.0, seconds=0.0)

    assert policy.choose(1) == 0


def test_expected_tokens_multiply_acceptance_over_depth() -> None:
    policy = DraftPolicy(2, adaptive=True)
    assert policy.expected_tokens(2) == 3.0
    for _ in range(50):
        policy.verified(2, 1)
        policy.verified(2, 2)

    assert policy.acceptance(0) == 1.0
    assert policy.expected_tokens(2) == pytest.approx(2.5, abs=0.02)


def test_a_policy_whose_drafts_are_never_right_sleeps_nearly_always() -> None:
    machine = Machine(DraftPolicy(2, adaptive=True), cheap, (0.0, 0.0))
    awake = 0
    for _ in range(8000):
        machine.step(4)
        awake += not machine.policy.asleep

    assert awake < 0.08 * 8000
    assert machine.seconds / machine.tokens < 1.01 * cheap(4, 0)


def test_a_policy_that_slept_drafts_again_once_drafts_are_right() -> None:
    machine = run(cheap, (0.0,), rows=2, steps=900)
    assert machine.policy.asleep

    machine.right = (0.9,)
    for _ in range(1800):
        machine.step(2)

    assert not machine.policy.asleep
    assert machine.chosen[-200:].count(1) > 190


def dear_as(steps_a_draft: float) -> Times:
    """A draft costs so many steps."""
    return lambda rows, drafts: 0.0005 * rows * (1 + steps_a_draft * drafts)


@pytest.mark.parametrize(("rows", "right"), [(1, 0.0), (4, 0.0), (16, 0.0), (1, 0.5), (4, 0.5), (16, 0.5)])
@pytest.mark.parametrize("upkeep", [0.0, 0.04, 1.0])
@pytest.mark.parametrize(("steps_a_draft", "first_steps"), [(1.0, 0.0), (1.0, 3.0), (1.0, 12.0), (4.0, 0.0)])
def test_from_its_first_step_on_a_policy_that_knows_nothing_has_never_cost_three_percent(
    rows: int, right: float, upkeep: float, steps_a_draft: float, first_steps: float
) -> None:
    times = dear_as(steps_a_draft)
    machine = Machine(DraftPolicy(3, adaptive=True), times, (right,) * 3, upkeep, first_steps * times(rows, 0))
    for _ in range(12000):
        machine.step(rows)
        assert machine.seconds / machine.tokens < 1.03 * times(rows, 0), len(machine.chosen)

    assert sum(machine.chosen) > 0


@pytest.mark.parametrize("first_steps", [0.0, 3.0, 12.0])
def test_a_policy_finds_out_that_drafts_pay_within_some_thousand_steps_whatever_the_first_of_a_kind_takes(
    first_steps: float,
) -> None:
    first_s = first_steps * cheap(1, 0)
    machine = Machine(DraftPolicy(1, adaptive=True), cheap, (0.8,), upkeep=0.04, first_s=first_s)
    for _ in range(6000):
        machine.step(1)

    assert machine.chosen[-1000:].count(1) > 950


@pytest.mark.parametrize("first_steps", [40.0, 500.0])
def test_drafts_that_pay_are_found_too_where_the_first_of_a_kind_takes_more_than_credit_is_saved_up_for(
    first_steps: float,
) -> None:
    machine = Machine(DraftPolicy(1, adaptive=True), cheap, (0.8,), first_s=first_steps * cheap(1, 0))
    for _ in range(24000):
        machine.step(1)

    assert machine.chosen[-1000:].count(1) > 950


def test_a_first_try_whose_steps_were_recorded_ahead_is_paid_for_within_some_hundred_steps() -> None:
    machine = run(cheap, (0.8,), rows=1, steps=900, upkeep=0.04)

    assert machine.chosen.index(1) < 750
    assert machine.chosen[-100:].count(1) > 90


def test_where_one_draft_does_not_pay_and_three_do_three_are_found_within_some_thousand_steps() -> None:
    def step_s(rows: int, drafts: int) -> float:
        return 0.0003 * (1.0, 1.75, 2.0, 2.1)[drafts]

    machine = run(step_s, (0.75, 0.95, 0.95), rows=1, steps=4000)

    assert machine.chosen[-200:].count(3) > 150
    assert machine.chosen.index(3) < 3000


def test_a_batch_size_that_is_met_in_debt_is_measured_before_a_nap_as_long_as_the_debt() -> None:
    policy = DraftPolicy(1, adaptive=True)
    machine = Machine(policy, cheap, (0.9,))
    for _ in range(700):
        machine.step(4)
        if policy.keeps:
            break
    assert not machine.chosen[-1], "not the warm-up behind a nap"
    policy.measured(rows=4, drafts=0, kept=True, tokens_a_row=1.0, seconds=1.0)
    awake = 0
    while not policy.asleep:
        machine.step(1)
        awake += 1
    machine.step(1)
    while policy.asleep:
        machine.step(1)

    assert awake > 4
    assert len(machine.chosen) > 4000


def test_short_generations_of_a_new_engine_cost_nothing_at_all() -> None:
    machine = run(dear, (0.0,), rows=1, steps=64, upkeep=1.0)

    assert machine.seconds == pytest.approx(64 * dear(1, 0))
    assert machine.policy.keeps_prompts


def test_batches_that_change_all_the_time_cost_less_than_three_percent() -> None:
    machine, plain_s = Machine(DraftPolicy(2, adaptive=True), dear, (0.2, 0.2), upkeep=0.2), 0.0
    for step in range(8000):
        rows = 1 + step * 7 % 40
        before = machine.tokens
        machine.step(rows)
        plain_s += (machine.tokens - before) * dear(rows, 0)
        assert machine.seconds < 1.03 * plain_s

    assert sum(machine.chosen) > 0


def test_useless_drafts_are_given_up_in_the_middle_of_a_try() -> None:
    machine = run(cheap, (0.0,), rows=4, steps=900)

    assert machine.policy.asleep
    assert machine.chosen.count(1) == 2


def test_keeping_the_draft_layers_kv_is_given_up_where_it_costs_more_than_was_saved_up() -> None:
    machine = run(cheap, (0.9,), rows=4, steps=900, upkeep=1.0)

    assert machine.policy.asleep
    assert not any(machine.chosen)


def test_drafts_that_are_often_right_and_yet_never_pay_let_the_policy_nap_too() -> None:
    machine = run(dear, (0.6,), rows=16)

    assert machine.policy.asleep
    assert machine.chosen[-100:].count(0) > 90


def test_a_batch_size_at_which_drafts_pay_keeps_the_policy_awake() -> None:
    machine = Machine(DraftPolicy(1, adaptive=True), lambda rows, drafts: (cheap, dear)[rows > 8](rows, drafts), (0.6,))
    for _ in range(100):
        for rows in (2,) * 10 + (16,) * 10:
            machine.step(rows)

    assert not machine.policy.asleep
    assert machine.chosen[-20:-10].count(1) >= 9
    assert machine.chosen[-10:] == [0] * 10


def test_what_pays_only_against_steps_that_keep_the_draft_layers_kv_is_not_drafted() -> None:
    def step_s(rows: int, drafts: int) -> float:
        return 0.010 * (1 + 0.5 * drafts)

    # 1.6 tokens in 1.5 times a step with upkeep, but 1.65 times one without.
    machine = run(step_s, (0.6,), rows=4, upkeep=0.1)

    assert machine.policy.asleep
    assert machine.seconds / machine.tokens < 1.03 * 0.010


def test_what_was_learnt_holds_for_the_next_scheduler_and_lets_it_draft_at_once() -> None:
    learnt = run(cheap, (0.9,), rows=4, steps=900).policy
    machine = Machine(learnt, cheap, (0.9,))
    for _ in range(100):
        machine.step(4)

    assert machine.chosen.count(1) > 90


@pytest.mark.parametrize("longer", [10, 1000])
def test_a_step_that_something_else_held_up_changes_no_mind(longer: int) -> None:
    machine = run(cheap, (0.9,), rows=4, steps=900)
    machine.times = lambda rows, drafts: longer * cheap(rows, drafts)
    machine.step(4)
    machine.times = cheap
    for _ in range(100):
        machine.step(4)

    assert machine.chosen[-50:].count(1) == 50
