"""The estimate of a rank's working memory grows with what makes it grow."""

from typing import Any

import pytest

from shards.mesh import Layout
from shards.step_memory import working_bytes
from tests.support.model_configs import make_moe_config, make_next_config

LIMITS: dict[str, Any] = {
    "itemsize": 2,
    "max_rows": 4,
    "max_model_len": 1000,
    "max_step_tokens": 64,
    "block_size": 16,
}


def needed(**changes: int) -> int:
    return working_bytes(make_next_config(), Layout(), **(LIMITS | changes))


def test_a_longer_context_takes_its_rows_and_rotary_tables() -> None:
    # Block tables twice: also those of a decode step.
    rows, rotary = 4 * 16_000 * 8 + 2 * 4 * 1000 * 4, 2 * 16_000 * 4 * 4
    assert needed(max_model_len=17_000) - needed() == rows + rotary


@pytest.mark.parametrize("name", ["itemsize", "max_rows", "max_model_len", "max_step_tokens"])
def test_every_limit_counts(name: str) -> None:
    assert needed(**{name: 2 * LIMITS[name]}) > needed()


def test_lanes_that_slice_experts_compute_the_tokens_of_all() -> None:
    model = make_moe_config(num_experts_per_tok=8)
    assert working_bytes(model, Layout(dp=2), **LIMITS) > working_bytes(model, Layout(), **LIMITS)


def test_dense_model_has_no_experts_to_count() -> None:
    narrow = {"num_attention_heads": 1, "num_key_value_heads": 1}
    dense = make_moe_config(num_experts=0, num_experts_per_tok=0, **narrow)
    assert working_bytes(dense, Layout(), **LIMITS) < working_bytes(make_moe_config(**narrow), Layout(), **LIMITS)


def test_drafts_take_logits_of_their_own_and_what_delta_layers_replay() -> None:
    model = make_next_config()
    drafted = needed(draft_tokens=3) - needed()
    keys = model.linear_num_key_heads * model.linear_key_head_dim
    values = model.linear_num_value_heads * (model.linear_value_head_dim + 1)
    replayed = len(model.delta_layers) * 4 * 4 * 2 * (keys + values) * LIMITS["itemsize"]
    assert drafted == 3 * 3 * 4 * model.vocab_size * 4 + replayed
