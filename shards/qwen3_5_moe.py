"""Qwen3.5-MoE and Qwen3.6-MoE: what their config.json means, of text models and of the text half of multimodal ones.

Text tokens have the same position in all three axes of the multimodal rotary embedding, which is then the plain one.
"""

import dataclasses

from shards.config import ModelConfig
from shards.config_fields import Fields
from shards.family import (
    HARMLESS,
    Family,
    read_block,
    with_attention_bias,
    with_delta_layers,
    with_experts,
)
from shards.quantisation import with_quantisation

_NAME = "qwen3_5_moe_text"
_HARMLESS_TEXT = HARMLESS | {"intermediate_size"}
_HARMLESS_ROPE = frozenset({"mrope_interleaved", "mrope_section"})
_HARMLESS_AROUND = HARMLESS | {
    "image_token_id",
    "video_token_id",
    "vision_config",
    "vision_end_token_id",
    "vision_start_token_id",
}


def _read_text(fields: Fields) -> ModelConfig:
    config = read_block(
        fields, _NAME, default_head_dim=256, delta=True, default_partial=0.25, harmless_rope=_HARMLESS_ROPE
    )
    config = with_delta_layers(fields, with_attention_bias(fields, config))
    _refuse_other_functions(fields)
    return dataclasses.replace(
        with_experts(fields, config, shared=True),
        attention_gated=True,
        zero_centred_norm=True,
        norm_topk_prob=True,
        linear_split_projections=True,
        may_have_mtp=True,
        num_nextn_predict_layers=fields.integer("mtp_num_hidden_layers", 0, minimum=0),
    )


def _refuse_other_functions(fields: Fields) -> None:
    """Fields with one value in all releases, whose other values transformers has no code for."""
    if not fields.flag("attn_output_gate", True):
        raise fields.error("attn_output_gate", "attention without a gate is not supported; only true is")
    if fields.text("mamba_ssm_dtype", "float32") != "float32":
        raise fields.error("mamba_ssm_dtype", "the recurrent state is float32; only that is supported")
    if fields.flag("mtp_use_dedicated_embeddings", False):
        raise fields.error("mtp_use_dedicated_embeddings", "only false is supported")
    if not fields.flag("norm_topk_prob", True):
        raise fields.error("norm_topk_prob", "the top-k weights of this family are always renormalised; only true is")
    if fields.integers("mlp_only_layers"):
        raise fields.error("mlp_only_layers", "every layer of this family has experts; leave the list empty")


def _read_multimodal(fields: Fields) -> ModelConfig:
    text = fields.section("text_config")
    if text is None:
        raise fields.error("text_config", "it must hold the config of the text model")
    if text.text("model_type", _NAME) != _NAME:
        raise text.error("model_type", f"the text model of this family is {_NAME}")
    config = _read_text(text)
    text.refuse_unread(_HARMLESS_TEXT)
    tied = config.tie_word_embeddings or fields.flag("tie_word_embeddings", False)
    config = dataclasses.replace(config, tie_word_embeddings=tied, unused_tensors=("model.visual.",))
    return with_quantisation(fields, config)


TEXT_FAMILY = Family(
    read=_read_text,
    harmless=_HARMLESS_TEXT,
    parts=("experts", "shared_expert", "delta"),
    published={
        "architectures": ["Qwen3_5MoeForCausalLM"],
        "full_attention_interval": 4,
        "linear_conv_kernel_dim": 4,
        "mtp_num_hidden_layers": 1,
        "rope_parameters": {"partial_rotary_factor": 0.25, "rope_theta": 10000000.0, "rope_type": "default"},
    },
)
MULTIMODAL_FAMILY = Family(read=_read_multimodal, harmless=_HARMLESS_AROUND)
