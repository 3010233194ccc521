"""Qwen3-Next: what its config.json means."""

import dataclasses

from shards.config import ModelConfig
from shards.config_fields import Fields
from shards.family import Family, read_block, with_attention_bias, with_delta_layers, with_dense_layers, with_experts


def _read(fields: Fields) -> ModelConfig:
    # Defaults of head_dim and partial_rotary_factor are those of transformers.
    config = read_block(fields, "qwen3_next", default_head_dim=256, delta=True, default_partial=0.25)
    config = with_delta_layers(fields, with_attention_bias(fields, config))
    config = with_dense_layers(fields, with_experts(fields, config, shared=True))
    return dataclasses.replace(
        config,
        attention_gated=True,
        zero_centred_norm=True,
        norm_topk_prob=fields.flag("norm_topk_prob", True),
        may_have_mtp=True,
        num_nextn_predict_layers=fields.integer("num_nextn_predict_layers", 0, minimum=0),
    )


FAMILY = Family(
    read=_read,
    parts=("experts", "shared_expert", "delta"),
    published={
        "architectures": ["Qwen3NextForCausalLM"],
        "decoder_sparse_step": 1,
        "full_attention_interval": 4,
        "linear_conv_kernel_dim": 4,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "num_nextn_predict_layers": 1,
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000000.0,
    },
)
