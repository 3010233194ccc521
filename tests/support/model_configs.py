"""Builders of small ModelConfigs for tests that need no checkpoint."""

import dataclasses

from shards.config import ModelConfig
from shards.rope_config import RopeConfig


def make_moe_config(**changes: object) -> ModelConfig:
    """A four-layer Qwen3-MoE shape with one dense layer."""
    config = ModelConfig(
        architecture="qwen3_moe",
        vocab_size=131,
        hidden_size=48,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        mlp_only_layers=(1,),
        layer_types=("full_attention",) * 4,
        rope=RopeConfig(theta=1e4, rotary_dim=16),
        max_position_embeddings=256,
    )
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def make_next_config(**changes: object) -> ModelConfig:
    """A four-layer Qwen3-Next shape: three delta layers, one attention layer, a shared expert."""
    config = make_moe_config(
        architecture="qwen3_next",
        attention_gated=True,
        zero_centred_norm=True,
        mlp_only_layers=(),
        layer_types=("linear_attention", "linear_attention", "linear_attention", "full_attention"),
        shared_expert_intermediate_size=16,
        rope=RopeConfig(theta=1e4, rotary_dim=4),
        linear_num_key_heads=4,
        linear_num_value_heads=8,
        linear_key_head_dim=8,
        linear_value_head_dim=12,
        linear_conv_kernel_dim=4,
    )
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]
