"""The shapes of the two demo models, as their config.json says them."""

from typing import Literal, get_args

from shards.config import ModelConfig
from shards.config_fields import Fields, Json
from shards.families import parse_model_config
from training.encoding import MAX_TOKENS, VOCAB_SIZE

Family = Literal["qwen3_next", "qwen3_moe"]
FAMILIES: tuple[Family, ...] = get_args(Family)

_COMMON: dict[str, Json] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "decoder_sparse_step": 1,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 128,
    "intermediate_size": 256,
    "max_position_embeddings": MAX_TOKENS,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    # Low frequencies are of no use over a few hundred tokens.
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": VOCAB_SIZE,
}
_OWN: dict[Family, dict[str, Json]] = {
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 96,
    },
    "qwen3_next": {
        "architectures": ["Qwen3NextForCausalLM"],
        "full_attention_interval": 2,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 32,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 4,
        "linear_value_head_dim": 32,
        "model_type": "qwen3_next",
        "moe_intermediate_size": 64,
        "num_nextn_predict_layers": 1,
        "partial_rotary_factor": 0.25,
        "shared_expert_intermediate_size": 128,
    },
}


def config_fields(family: Family) -> dict[str, Json]:
    """What config.json holds, without token ids."""
    return dict(sorted((_COMMON | _OWN[family]).items()))


def model_config(family: Family) -> ModelConfig:
    """The same, read as the product reads it."""
    return parse_model_config(Fields(config_fields(family), family))
