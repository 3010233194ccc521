"""Qwen3-MoE: what its config.json means."""

import dataclasses

from shards.config import ModelConfig
from shards.config_fields import Fields
from shards.family import Family, read_block, with_attention_bias, with_dense_layers, with_experts


def _read(fields: Fields) -> ModelConfig:
    config = with_attention_bias(fields, read_block(fields, "qwen3_moe"))
    config = with_dense_layers(fields, with_experts(fields, config, shared=False))
    return dataclasses.replace(config, norm_topk_prob=fields.flag("norm_topk_prob", False))


FAMILY = Family(
    read=_read,
    parts=("experts",),
    published={
        "architectures": ["Qwen3MoeForCausalLM"],
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "rope_theta": 1000000.0,
    },
)
