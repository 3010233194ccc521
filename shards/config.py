"""ModelConfig: what a checkpoint's config.json says about the function, for Qwen3-MoE and Qwen3-Next.

Every field that changes the function is honoured or refused by name. Both spellings are read: the released configs
(rope_theta and rope_scaling at the top level, num_experts) and those transformers 5 saves (rope_parameters,
num_local_experts).
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from shards.config_fields import Fields, read_json_object
from shards.rope_config import RopeConfig, read_rope

Architecture = Literal["qwen3_moe", "qwen3_next"]
LayerType = Literal["full_attention", "linear_attention"]

_HARMLESS = frozenset(
    {
        "_attn_implementation",
        "_commit_hash",
        "_from_model_config",
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "attn_implementation",
        "chunk_size_feed_forward",
        "dtype",
        "id2label",
        "initializer_range",
        "label2id",
        "max_window_layers",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "problem_type",
        "return_dict",
        "router_aux_loss_coef",
        "sliding_window",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
"""Fields that do not change what inference computes (sliding_window and max_window_layers only act with
use_sliding_window, which is refused)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One model's shape. Names are those of Hugging Face configs where they exist."""

    architecture: Architecture
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    """Width of the dense layers' MLP."""
    moe_intermediate_size: int
    shared_expert_intermediate_size: int = 0
    """0: no shared expert."""
    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    layer_types: tuple[LayerType, ...]
    """One entry a layer."""
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    rms_norm_eps: float = 1e-6
    rope: RopeConfig
    max_position_embeddings: int
    linear_num_key_heads: int = 0
    linear_num_value_heads: int = 0
    linear_key_head_dim: int = 0
    linear_value_head_dim: int = 0
    linear_conv_kernel_dim: int = 0
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    num_nextn_predict_layers: int = 0
    """Multi-token prediction layers in the checkpoint."""

    @property
    def zero_centred_norm(self) -> bool:
        """Whether norms multiply by 1 + weight (all but the delta output norm of Qwen3-Next)."""
        return self.architecture == "qwen3_next"

    @property
    def attention_gated(self) -> bool:
        """Whether q_proj carries a sigmoid gate beside each query head."""
        return self.architecture == "qwen3_next"

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Indices of the layers with paged KV."""
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == "full_attention")

    @property
    def delta_layers(self) -> tuple[int, ...]:
        """Indices of the layers with a recurrent state."""
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == "linear_attention")

    def is_moe_layer(self, index: int) -> bool:
        """Whether layer `index` has experts rather than a dense MLP."""
        return index not in self.mlp_only_layers and (index + 1) % self.decoder_sparse_step == 0

    def fingerprint(self) -> str:
        """Hex digest (64 digits) of every field: equal on two sides exactly when the configs are equal."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()


def load_model_config(path: Path) -> ModelConfig:
    """Read `path`/config.json.

    Raises:
        ValueError: naming file, field, value and remedy when the folder or file is missing or broken, a field is
            missing, of the wrong type, nonsensical, not supported, or unknown.
    """
    if not path.is_dir():
        raise ValueError(f"{path}: no such checkpoint folder; give a folder that holds config.json and safetensors")
    file = path / "config.json"
    return parse_model_config(Fields(read_json_object(file), str(file)))


def parse_model_config(fields: Fields) -> ModelConfig:
    """Build a ModelConfig from a config.json already parsed; errors as in `load_model_config`."""
    architecture = _architecture(fields)
    _refuse_unsupported(fields)
    heads, hidden = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    head_dim = _head_dim(fields, architecture, hidden, heads)
    layers, is_next = fields.integer("num_hidden_layers"), architecture == "qwen3_next"
    config = ModelConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=_kv_heads(fields, heads),
        head_dim=head_dim,
        intermediate_size=fields.integer("intermediate_size"),
        moe_intermediate_size=fields.integer("moe_intermediate_size"),
        shared_expert_intermediate_size=_shared_expert_size(fields, is_next),
        num_experts=(experts := _num_experts(fields)),
        num_experts_per_tok=_experts_per_token(fields, experts),
        norm_topk_prob=fields.flag("norm_topk_prob", is_next),
        decoder_sparse_step=fields.integer("decoder_sparse_step", 1),
        mlp_only_layers=_mlp_only_layers(fields, layers),
        layer_types=_layer_types(fields, architecture, layers),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        attention_bias=fields.flag("attention_bias", False),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=_rope(fields, head_dim, is_next),
        max_position_embeddings=fields.integer("max_position_embeddings"),
        linear_num_key_heads=fields.integer("linear_num_key_heads") if is_next else 0,
        linear_num_value_heads=_value_heads(fields) if is_next else 0,
        linear_key_head_dim=fields.integer("linear_key_head_dim") if is_next else 0,
        linear_value_head_dim=fields.integer("linear_value_head_dim") if is_next else 0,
        linear_conv_kernel_dim=fields.integer("linear_conv_kernel_dim", minimum=2) if is_next else 0,
        bos_token_id=_token_id(fields, "bos_token_id"),
        eos_token_ids=fields.integers("eos_token_id"),
        pad_token_id=_token_id(fields, "pad_token_id"),
        num_nextn_predict_layers=fields.integer("num_nextn_predict_layers", 0, minimum=0) if is_next else 0,
    )
    fields.refuse_unread(_HARMLESS)
    return config


def _architecture(fields: Fields) -> Architecture:
    name = fields.text("model_type")
    known = get_args(Architecture)
    if name not in known:
        raise fields.error("model_type", f"known architectures are {', '.join(known)}")
    return cast(Architecture, name)


def _refuse_unsupported(fields: Fields) -> None:
    if fields.raw("quantization_config") is not None:
        raise fields.error("quantization_config", "quantised checkpoints are not supported yet; use the bf16 release")
    if fields.text("hidden_act", "silu") != "silu":
        raise fields.error("hidden_act", "only silu is supported")
    if fields.flag("use_sliding_window", False):
        raise fields.error("use_sliding_window", "sliding-window attention is not supported; only false is")


def _head_dim(fields: Fields, architecture: Architecture, hidden: int, heads: int) -> int:
    if not fields.present("head_dim") and architecture == "qwen3_next":
        return fields.integer("head_dim", 256)  # transformers' default for this family
    if not fields.present("head_dim") and hidden % heads:
        raise fields.error("num_attention_heads", f"it must divide hidden_size {hidden}, or head_dim must be given")
    return fields.integer("head_dim", hidden // heads)


def _kv_heads(fields: Fields, heads: int) -> int:
    kv_heads = fields.integer("num_key_value_heads")
    if heads % kv_heads:
        raise fields.error("num_key_value_heads", f"it must divide num_attention_heads, {heads}")
    return kv_heads


def _shared_expert_size(fields: Fields, is_next: bool) -> int:
    return fields.integer("shared_expert_intermediate_size", minimum=0) if is_next else 0


def _rope(fields: Fields, head_dim: int, is_next: bool) -> RopeConfig:
    positions, partial = fields.integer("max_position_embeddings"), 0.25 if is_next else 1.0
    return read_rope(fields, head_dim=head_dim, max_position_embeddings=positions, default_partial=partial)


def _num_experts(fields: Fields) -> int:
    # transformers 5 saves Qwen3-MoE's num_experts as num_local_experts.
    values = {name: fields.integer(name) for name in ("num_experts", "num_local_experts") if fields.present(name)}
    if len(set(values.values())) > 1:
        raise fields.error("num_local_experts", f"num_experts says {values['num_experts']}; keep one of them")
    return next(iter(values.values())) if values else fields.integer("num_experts")


def _experts_per_token(fields: Fields, experts: int) -> int:
    top_k = fields.integer("num_experts_per_tok")
    if top_k > experts:
        raise fields.error("num_experts_per_tok", f"it must not exceed num_experts, {experts}")
    return top_k


def _mlp_only_layers(fields: Fields, layers: int) -> tuple[int, ...]:
    only = fields.integers("mlp_only_layers")
    if any(index >= layers for index in only):
        raise fields.error("mlp_only_layers", f"layer indices must be below num_hidden_layers, {layers}")
    return tuple(sorted(set(only)))


def _layer_types(fields: Fields, architecture: Architecture, layers: int) -> tuple[LayerType, ...]:
    interval = fields.integer("full_attention_interval", 4) if architecture == "qwen3_next" else 1
    value = fields.raw("layer_types")
    if value is None:
        return tuple("linear_attention" if (i + 1) % interval else "full_attention" for i in range(layers))
    known = get_args(LayerType) if architecture == "qwen3_next" else ("full_attention",)
    if not isinstance(value, list) or len(value) != layers:
        raise fields.error("layer_types", f"it must be a list with one entry for each of {layers} layers")
    if any(kind not in known for kind in value):
        raise fields.error("layer_types", f"entries for {architecture} are {', '.join(known)}")
    return tuple(cast(list[LayerType], value))


def _value_heads(fields: Fields) -> int:
    value_heads, key_heads = fields.integer("linear_num_value_heads"), fields.integer("linear_num_key_heads")
    if value_heads % key_heads:
        raise fields.error("linear_num_value_heads", f"it must be a multiple of linear_num_key_heads, {key_heads}")
    return value_heads


def _token_id(fields: Fields, name: str) -> int | None:
    ids = fields.integers(name)
    if len(ids) > 1:
        raise fields.error(name, "it must be one integer")
    return ids[0] if ids else None
