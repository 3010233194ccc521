"""Family: how the models of one `model_type` are read from config.json, and what the families' readers share.

Every field that changes the function is honoured or refused by name. Both spellings are read: the released configs
(rope_theta and rope_scaling at the top level, num_experts) and those transformers 5 saves (rope_parameters,
num_local_experts).
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, cast

from shards.config import LayerType, ModelConfig
from shards.config_fields import Fields, Json
from shards.quantisation import with_quantisation
from shards.rope_config import read_rope

Part = Literal["experts", "shared_expert", "delta"]

HARMLESS = frozenset(
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
class Family:
    """One row of the table of families."""

    read: Callable[[Fields], ModelConfig]
    """Reads a parsed config.json; ValueError names file, field, value and remedy."""
    harmless: frozenset[str] = HARMLESS
    """Fields at the top of config.json that `read` may leave unread."""
    parts: tuple[Part, ...] = ()
    """What its models have beside attention and dense MLPs: decides the sizes that a made-up config is given."""
    published: Mapping[str, Json] | None = None
    """Fields of config.json that every released model of the family has alike; None: no config is made up for it."""


def read_block(
    fields: Fields,
    architecture: str,
    *,
    default_head_dim: int | None = None,
    delta: bool = False,
    default_partial: float = 1.0,
    harmless_rope: frozenset[str] = frozenset(),
) -> ModelConfig:
    """What every family has: sizes, heads, norms, rotary embedding, kinds of layers; no MLP yet.

    Args:
        fields: the whole config.json.
        architecture: the family's name.
        default_head_dim: where head_dim is missing; None takes hidden_size over the number of heads.
        delta: some layers are gated delta layers.
        default_partial: partial_rotary_factor where it is missing.
        harmless_rope: fields of the rotary section that text positions do not need.
    """
    _refuse_unsupported(fields)
    heads, hidden = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    head_dim = _head_dim(fields, hidden, heads, default_head_dim)
    layers, positions = fields.integer("num_hidden_layers"), fields.integer("max_position_embeddings")
    rope = read_rope(
        fields,
        head_dim=head_dim,
        max_position_embeddings=positions,
        default_partial=default_partial,
        harmless=harmless_rope,
    )
    config = ModelConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=_kv_heads(fields, heads),
        head_dim=head_dim,
        layer_types=_layer_types(fields, architecture, layers, delta=delta),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=rope,
        # Whoever stretches a released model adds YaRN's section and leaves the length as it was.
        max_position_embeddings=max(positions, rope.stretched_positions),
        bos_token_id=_token_id(fields, "bos_token_id"),
        eos_token_ids=fields.integers("eos_token_id"),
        pad_token_id=_token_id(fields, "pad_token_id"),
    )
    return with_quantisation(fields, config)


def with_attention_bias(fields: Fields, config: ModelConfig) -> ModelConfig:
    """attention_bias: on all four projections."""
    bias = fields.flag("attention_bias", False)
    return dataclasses.replace(config, qkv_bias=bias, o_proj_bias=bias)


def with_dense_layers(fields: Fields, config: ModelConfig) -> ModelConfig:
    """The width of dense MLPs, and in a model with experts which layers have them."""
    config = dataclasses.replace(config, intermediate_size=fields.integer("intermediate_size"))
    if not config.num_experts:
        return config
    only = fields.integers("mlp_only_layers")
    if any(index >= config.num_hidden_layers for index in only):
        raise fields.error(
            "mlp_only_layers", f"layer indices must be below num_hidden_layers, {config.num_hidden_layers}"
        )
    step = fields.integer("decoder_sparse_step", 1)
    return dataclasses.replace(config, decoder_sparse_step=step, mlp_only_layers=tuple(sorted(set(only))))


def with_experts(fields: Fields, config: ModelConfig, *, shared: bool) -> ModelConfig:
    """Number and width of the experts, and of the shared one; `norm_topk_prob` is the family's to read."""
    experts, width = _num_experts(fields), fields.integer("moe_intermediate_size")
    top_k = fields.integer("num_experts_per_tok")
    if top_k > experts:
        raise fields.error("num_experts_per_tok", f"it must not exceed num_experts, {experts}")
    return dataclasses.replace(
        config,
        num_experts=experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=width,
        shared_expert_intermediate_size=fields.integer("shared_expert_intermediate_size", minimum=0) if shared else 0,
    )


def with_delta_layers(fields: Fields, config: ModelConfig) -> ModelConfig:
    """Heads and sizes of the gated delta layers."""
    key_heads, value_heads = fields.integer("linear_num_key_heads"), fields.integer("linear_num_value_heads")
    if value_heads % key_heads:
        raise fields.error("linear_num_value_heads", f"it must be a multiple of linear_num_key_heads, {key_heads}")
    return dataclasses.replace(
        config,
        linear_num_key_heads=key_heads,
        linear_num_value_heads=value_heads,
        linear_key_head_dim=fields.integer("linear_key_head_dim"),
        linear_value_head_dim=fields.integer("linear_value_head_dim"),
        linear_conv_kernel_dim=fields.integer("linear_conv_kernel_dim", minimum=2),
    )


def _refuse_unsupported(fields: Fields) -> None:
    if fields.text("hidden_act", "silu") != "silu":
        raise fields.error("hidden_act", "only silu is supported")
    if fields.flag("use_sliding_window", False):
        raise fields.error("use_sliding_window", "sliding-window attention is not supported; only false is")


def _head_dim(fields: Fields, hidden: int, heads: int, default: int | None) -> int:
    if default is not None:
        return fields.integer("head_dim", default)
    if not fields.present("head_dim") and hidden % heads:
        raise fields.error("num_attention_heads", f"it must divide hidden_size {hidden}, or head_dim must be given")
    return fields.integer("head_dim", hidden // heads)


def _kv_heads(fields: Fields, heads: int) -> int:
    kv_heads = fields.integer("num_key_value_heads")
    if heads % kv_heads:
        raise fields.error("num_key_value_heads", f"it must divide num_attention_heads, {heads}")
    return kv_heads


def _layer_types(fields: Fields, architecture: str, layers: int, *, delta: bool) -> tuple[LayerType, ...]:
    """layer_types, or by default full attention in every layer (with delta layers: in every interval's last)."""
    known: tuple[LayerType, ...] = ("full_attention", "linear_attention") if delta else ("full_attention",)
    interval = fields.integer("full_attention_interval", 4) if delta else 1
    value = fields.raw("layer_types")
    if value is None:
        return tuple("linear_attention" if (i + 1) % interval else "full_attention" for i in range(layers))
    if not isinstance(value, list) or len(value) != layers:
        raise fields.error("layer_types", f"it must be a list with one entry for each of {layers} layers")
    if any(kind not in known for kind in value):
        raise fields.error("layer_types", f"entries for {architecture} are {', '.join(known)}")
    return tuple(cast(list[LayerType], value))


def _num_experts(fields: Fields) -> int:
    # transformers 5 saves num_experts of some families as num_local_experts.
    values = {name: fields.integer(name) for name in ("num_experts", "num_local_experts") if fields.present(name)}
    if len(set(values.values())) > 1:
        raise fields.error("num_local_experts", f"num_experts says {values['num_experts']}; keep one of them")
    return next(iter(values.values())) if values else fields.integer("num_experts")


def _token_id(fields: Fields, name: str) -> int | None:
    ids = fields.integers(name)
    if len(ids) > 1:
        raise fields.error(name, "it must be one integer")
    return ids[0] if ids else None
