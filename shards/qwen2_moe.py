"""Qwen2-MoE (Qwen1.5-MoE too): what its config.json means."""

import dataclasses

from shards.config import ModelConfig
from shards.config_fields import Fields
from shards.family import Family, read_block, with_dense_layers, with_experts


def _read(fields: Fields) -> ModelConfig:
    config = with_experts(fields, read_block(fields, "qwen2_moe"), shared=True)
    return dataclasses.replace(
        with_dense_layers(fields, config),
        norm_topk_prob=fields.flag("norm_topk_prob", False),
        qkv_bias=fields.flag("qkv_bias", True),
        qk_norm=False,
    )


FAMILY = Family(
    read=_read,
    parts=("experts", "shared_expert"),
    published={
        "architectures": ["Qwen2MoeForCausalLM"],
        "decoder_sparse_step": 1,
        "norm_topk_prob": False,
        "qkv_bias": True,
        "rope_theta": 1000000.0,
    },
)
