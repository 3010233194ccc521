from typing import Any

import pytest
import torch
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRotaryEmbedding
from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRotaryEmbedding

from shards.config_fields import Fields
from shards.rope import inverse_frequencies, rotary_tables
from shards.rope_config import RopeConfig, read_rope

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
SCALINGS = {
    "default": None,
    "yarn": YARN,
    "short original": {**YARN, "original_max_position_embeddings": 64},
    "betas": {**YARN, "beta_fast": 16, "beta_slow": 4},
    "not truncated": {**YARN, "truncate": False},
    "attention factor": {**YARN, "attention_factor": 1.25},
    "mscales": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
    "one mscale": {**YARN, "mscale": 0.7},
    "zeros mean unset": {**YARN, "beta_fast": 0, "beta_slow": 0, "mscale": 0, "mscale_all_dim": 0},
    "factor one": {**YARN, "factor": 1.0},
    "no length": {"rope_type": "yarn", "factor": 2.0},
}


def rope_of(scaling: dict[str, Any] | None, *, theta: float, partial: float) -> RopeConfig:
    fields = Fields({"rope_theta": theta, "rope_scaling": scaling}, "config.json")
    return read_rope(fields, head_dim=64, max_position_embeddings=40960, default_partial=partial)


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS.keys())
@pytest.mark.parametrize("arch", ["qwen3_moe", "qwen3_next"])
@pytest.mark.filterwarnings("ignore")
def test_frequencies_and_tables_equal_those_of_transformers(arch: str, scaling: dict[str, Any] | None) -> None:
    options: dict[str, Any] = {"head_dim": 64, "max_position_embeddings": 40960}
    parameters = {**(scaling or {"rope_type": "default"})}
    if arch == "qwen3_moe":
        rope = rope_of(scaling, theta=1e6, partial=1.0)
        theirs = Qwen3MoeRotaryEmbedding(Qwen3MoeConfig(rope_parameters={**parameters, "rope_theta": 1e6}, **options))
    else:
        rope = rope_of(scaling, theta=1e7, partial=0.25)
        theirs = Qwen3NextRotaryEmbedding(Qwen3NextConfig(rope_parameters={**parameters, "rope_theta": 1e7}, **options))
    inv_freq, attention_scaling = inverse_frequencies(rope)
    assert torch.equal(inv_freq, theirs.inv_freq)
    assert attention_scaling == theirs.attention_scaling
    expected = theirs(torch.zeros(1), torch.arange(5000)[None])
    for table, values in zip(rotary_tables(rope, 5000), expected, strict=True):
        assert table.dtype == torch.float32
        assert table.shape == (5000, rope.rotary_dim)
        torch.testing.assert_close(table, values[0], rtol=0, atol=3e-7)


@pytest.mark.parametrize("position", [131_071, 262_143, 1_010_000 - 1])
@pytest.mark.parametrize("long", [None, {**YARN, "original_max_position_embeddings": 262_144}], ids=["plain", "yarn"])
def test_tables_equal_those_of_transformers_at_large_positions(position: int, long: dict[str, Any] | None) -> None:
    fields = Fields({"rope_theta": 1e7, "rope_scaling": long}, "config.json")
    rope = read_rope(fields, head_dim=256, max_position_embeddings=1_010_000, default_partial=0.25)
    parameters = {**(long or {"rope_type": "default"}), "rope_theta": 1e7}
    theirs = Qwen3NextRotaryEmbedding(
        Qwen3NextConfig(head_dim=256, max_position_embeddings=1_010_000, rope_parameters=parameters)
    )
    positions = torch.arange(position - 999, position + 1)
    expected = theirs(torch.zeros(1), positions[None])
    for table, values in zip(rotary_tables(rope, position + 1), expected, strict=True):
        torch.testing.assert_close(table[positions], values[0], rtol=0, atol=3e-7)


@pytest.mark.parametrize("scaling", [None, YARN], ids=["default", "yarn"])
def test_bits_do_not_depend_on_the_tables_length(scaling: dict[str, Any] | None) -> None:
    rope = rope_of(scaling, theta=1e6, partial=0.25)
    long_cos, long_sin = rotary_tables(rope, 9001)
    for length in (1, 3, 4095, 4097, 9000):
        cos, sin = rotary_tables(rope, length)
        assert torch.equal(cos, long_cos[:length])
        assert torch.equal(sin, long_sin[:length])


def test_no_positions_give_empty_tables() -> None:
    cos, sin = rotary_tables(RopeConfig(theta=1e4, rotary_dim=8), 0)
    assert (cos.shape, sin.shape) == ((0, 8), (0, 8))


def test_odd_rotary_dim_is_refused() -> None:
    with pytest.raises(ValueError, match="rotary_dim must be even and at least 2, got 7"):
        RopeConfig(theta=1e4, rotary_dim=7)
