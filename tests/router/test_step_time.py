"""Step times add up, and give the rate of a prompt between decode rows."""

from dataclasses import replace

import pytest

from router.errors import ConfigError
from router.step_time import StepTime

STEP = StepTime(base_s=1.0, prefill_token_s=0.1, decode_row_s=0.5, context_token_s=0.01)


def test_a_step_is_its_parts() -> None:
    assert STEP.step_s(prefill_tokens=10, decode_rows=2, context_tokens=100) == pytest.approx(1 + 1 + 1 + 1)


def test_a_step_with_prompt_tokens_has_a_price_of_its_own() -> None:
    step = replace(STEP, prompt_s=3.0)
    assert step.step_s(prefill_tokens=0, decode_rows=2, context_tokens=0) == pytest.approx(2.0)
    assert step.step_s(prefill_tokens=1, decode_rows=2, context_tokens=0) == pytest.approx(2.0 + 3.0 + 0.1)
    assert step.prefill_s_per_token(step_tokens=10, decode_rows=0, context_tokens=0) == pytest.approx(0.5)


def test_a_queued_token_takes_its_share_of_full_steps() -> None:
    assert STEP.prefill_s_per_token(step_tokens=10, decode_rows=0, context_tokens=0) == pytest.approx(0.2)
    assert STEP.prefill_s_per_token(step_tokens=10, decode_rows=5, context_tokens=0) == pytest.approx(0.1 + 3.5 / 5)
    assert STEP.prefill_s_per_token(step_tokens=4, decode_rows=9, context_tokens=0) == pytest.approx(0.1 + 5.5)


def test_prices_that_cannot_be_are_refused_by_name() -> None:
    for value in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=r"step_time\.base_s"):
            StepTime(base_s=value)
    with pytest.raises(ConfigError, match="prefill_token_s must be positive"):
        StepTime(prefill_token_s=0.0)
    with pytest.raises(ConfigError, match="expert_share must be at most 1"):
        StepTime(expert_share=1.5)


def test_a_step_reads_the_experts_that_its_tokens_are_sent_to_once() -> None:
    step = replace(STEP, experts_s=8.0, expert_share=0.25)
    seconds = [step.step_s(prefill_tokens=tokens, decode_rows=1, context_tokens=0) for tokens in (0, 1, 50, 100)]
    assert seconds[0] == pytest.approx(1.5 + 2.0)
    assert seconds[1] == pytest.approx(1.6 + 8 * (1 - 0.75**2))
    assert seconds[3] - seconds[2] == pytest.approx(50 * 0.1, rel=1e-3)
