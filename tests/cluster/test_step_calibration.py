"""Step times are learnt from the steps that were carried out, however few or alike they are."""

import random
from dataclasses import replace

import pytest

from cluster.plan import StepPlan
from cluster.step_calibration import MeasuredStep, StepCalibration, fit_step_time
from router.step_time import StepTime
from shards.batch import StepBatch

TRUE = StepTime(base_s=0.008, prefill_token_s=1e-4, decode_row_s=3e-4, context_token_s=2e-7)


def make_step(prefill: int, rows: int, context: int, *, noise: float = 1.0, true: StepTime = TRUE) -> MeasuredStep:
    seconds = noise * true.step_s(prefill_tokens=prefill, decode_rows=rows, context_tokens=context)
    return MeasuredStep(prefill_tokens=prefill, decode_rows=rows, context_tokens=context, seconds=seconds)


def seconds(step_time: StepTime, step: MeasuredStep) -> float:
    return step_time.step_s(
        prefill_tokens=step.prefill_tokens, decode_rows=step.decode_rows, context_tokens=step.context_tokens
    )


def make_steps(count: int, *, noise: float = 0.0) -> list[MeasuredStep]:
    rng = random.Random(3)
    steps = []
    for _ in range(count):
        rows = rng.randrange(64)
        prefill = rng.choice((0, 0, 0, rng.randrange(1, 2048)))
        steps.append(make_step(prefill, rows, rows * rng.randrange(8000), noise=1 + noise * rng.uniform(-1, 1)))
    return steps


def test_noisy_steps_give_the_prices_behind_them() -> None:
    fitted = fit_step_time(make_steps(256, noise=0.3), StepTime())
    assert fitted.prefill_token_s == pytest.approx(TRUE.prefill_token_s, rel=0.1)
    for step in make_steps(50):
        assert seconds(fitted, step) == pytest.approx(step.seconds, rel=0.15)


def test_a_mixture_of_experts_is_told_from_a_price_of_rows() -> None:
    # Of 64 experts each token takes 8; a step of 10 tokens reads three quarters of them, one of 50 or 500 all.
    true = StepTime(base_s=0.009, prefill_token_s=0.0003, decode_row_s=0.0005, context_token_s=0.0, experts_s=0.078)
    true = replace(true, expert_share=0.125)
    rng = random.Random(5)
    steps = [
        make_step(
            rng.choice((0, 0, rng.randrange(1, 256))), rng.randrange(1, 12), 0, noise=rng.gauss(1, 0.03), true=true
        )
        for _ in range(256)
    ]
    fitted = fit_step_time(steps, StepTime(expert_share=0.125))
    for tokens in (0, 10, 40, 250):
        step = make_step(tokens, 2, 0, true=true)
        assert seconds(fitted, step) == pytest.approx(step.seconds, rel=0.05)


def test_what_prompts_cost_once_a_step_is_told_from_what_every_step_costs() -> None:
    # Decode steps are played from tapes, others are not.
    true = StepTime(base_s=0.0005, prefill_token_s=4e-5, decode_row_s=5e-5, prompt_s=0.002)
    rng = random.Random(6)
    steps = [
        make_step(
            rng.choice((0, 0, rng.randrange(1, 256))), rng.randrange(1, 12), 0, noise=rng.gauss(1, 0.03), true=true
        )
        for _ in range(256)
    ]
    fitted = fit_step_time(steps, StepTime())
    for tokens, rows in ((0, 1), (0, 10), (2, 1), (30, 3), (250, 8)):
        step = make_step(tokens, rows, 0, true=true)
        assert seconds(fitted, step) == pytest.approx(step.seconds, rel=0.1)


def test_steps_of_one_kind_cost_their_mean_however_they_scatter() -> None:
    steps = [replace(make_step(0, 1, 0), seconds=each) for each in (0.001, 0.001, 0.001, 0.009)] * 20
    fitted = fit_step_time(steps, StepTime())
    assert seconds(fitted, steps[0]) == pytest.approx(0.003, rel=0.02)


def test_equal_steps_give_their_own_time_and_no_negative_price() -> None:
    step = make_step(0, 8, 4000, true=StepTime(base_s=0.0, decode_row_s=1e-5, context_token_s=0.0))
    fitted = fit_step_time([step] * 20, StepTime())
    assert seconds(fitted, step) == pytest.approx(step.seconds, rel=0.05, abs=1e-5)
    assert fitted.prefill_token_s == StepTime().prefill_token_s


def test_what_would_be_negative_is_nothing() -> None:
    # More decode rows, less time: rows cost nothing then, and a prompt token next to it.
    steps = [
        MeasuredStep(prefill_tokens=10 * n, decode_rows=n, context_tokens=0, seconds=1.0 / n) for n in range(1, 20)
    ]
    fitted = fit_step_time(steps, StepTime())
    assert fitted.decode_row_s == 0.0
    assert fitted.prefill_token_s <= 1e-4


def make_plan(*lanes: StepBatch) -> StepPlan:
    return StepPlan(step=0, lanes=lanes, pulls=())


def test_steps_are_timed_from_the_one_before_and_counted_over_all_lanes() -> None:
    calibration = StepCalibration()
    assert calibration.step_time() == StepTime()
    decode = StepBatch(rows_S=[0, 1], first_S=[9, 19], counts_S=[1, 3], samples_S=[1, 1], verifies_S=[0, 2])
    prompt = StepBatch(rows_S=[0], first_S=[0], counts_S=[100], samples_S=[1])
    now = 0.0
    for index in range(60):
        plan = make_plan(decode, prompt) if index % 2 else make_plan(decode, StepBatch())
        calibration.planned(plan, now)
        # Launched while the one before runs: its time begins when that one ends.
        calibration.planned(make_plan(decode, StepBatch()), now)
        now += 0.110 if index % 2 else 0.010
        calibration.committed(now, busy=True)
        now += 0.010
        calibration.committed(now, busy=False)
        now += 5.0
    fitted = calibration.step_time()
    assert fitted.step_s(prefill_tokens=0, decode_rows=2, context_tokens=32) == pytest.approx(0.01, rel=0.05)
    assert fitted.prefill_token_s == pytest.approx(0.001, rel=0.05)
    assert calibration.step_time() is fitted


def test_a_moment_of_short_steps_does_not_make_those_of_the_last_seconds_forgotten() -> None:
    calibration = StepCalibration()
    decode = make_plan(StepBatch(rows_S=[0], first_S=[9], counts_S=[1], samples_S=[1]))
    now = 0.0
    for seconds_each in [0.001] * 2000 + [0.004] * 120:
        calibration.planned(decode, now)
        now += seconds_each
        calibration.committed(now, busy=True)
    learnt_s = calibration.step_time().step_s(prefill_tokens=0, decode_rows=1, context_tokens=10)
    # 0.48 s of the 2.56 that 128 steps, remembered 20 ms apart, span.
    assert learnt_s == pytest.approx(0.001 + 0.003 * 0.48 / 2.56, rel=0.1)
    for _ in range(1500):
        calibration.planned(decode, now)
        now += 0.004
        calibration.committed(now, busy=True)
    learnt_s = calibration.step_time().step_s(prefill_tokens=0, decode_rows=1, context_tokens=10)
    assert learnt_s == pytest.approx(0.004, rel=0.05)


def test_a_step_that_took_no_time_teaches_nothing() -> None:
    calibration = StepCalibration()
    calibration.planned(make_plan(StepBatch(rows_S=[0], first_S=[0], counts_S=[4], samples_S=[1])), 1.0)
    calibration.committed(1.0, busy=False)
    assert calibration.step_time() == StepTime()
