"""Which tensors a checkpoint holds, by published name, and seeded values for them.

A tensor's values depend on the seed and its name alone, so neither sharding nor the experts' form changes them.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from shards.config import ModelConfig

ExpertForm = Literal["per_expert", "fused"]

# Standard deviations at hidden size 1024 and more. Found by measuring: with attention at 0.04 or experts at 0.03 its
# average of the context drowns the last token and greedy output circles among 5 to 30 tokens; with these, 64 greedy
# tokens hold 57 to 64 distinct ones.
_EMBEDDING_STD = 0.5
_ATTENTION_STD = 0.02
_GATE_UP_STD = 0.04
_DOWN_STD = 0.06
_ROUTER_STD = 0.06
_HEAD_STD = 0.06
_NORM_STD = 0.1
_CONV_STD = 0.4
_BIAS_STD = 0.02
_WIDE_ENOUGH = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One tensor to be written."""

    name: str
    shape: tuple[int, ...]
    std: float
    mean: float = 0.0
    kind: Literal["normal", "log_uniform"] = "normal"
    """log_uniform: the logarithm of a uniform number between 0.05 and 4, what A_log wants."""
    parts: tuple["TensorSpec", ...] = ()
    """Where given, the values are theirs, one after the other."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def draw(spec: TensorSpec, seed: int) -> torch.Tensor:
    """Make the tensor's values, float32."""
    if spec.parts:
        return torch.cat([draw(part, seed).flatten() for part in spec.parts]).view(spec.shape)
    digest = hashlib.blake2b(f"{seed}:{spec.name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    if spec.kind == "log_uniform":
        return torch.empty(spec.shape).uniform_(0.05, 4.0, generator=generator).log()
    return torch.empty(spec.shape).normal_(spec.mean, spec.std, generator=generator)


def checkpoint_tensors(model: ModelConfig, form: ExpertForm) -> list[TensorSpec]:
    """List every tensor of the checkpoint in the order it is written."""
    return [
        TensorSpec(
            name="model.embed_tokens.weight",
            shape=(model.vocab_size, model.hidden_size),
            # A tied embedding is the output head too; at the full size a token would only ever predict itself.
            std=_HEAD_STD * _scale(model) if model.tie_word_embeddings else _EMBEDDING_STD,
        ),
        *(spec for index in range(model.num_hidden_layers) for spec in _layer(model, index, form)),
        _norm(model, "model.norm.weight", model.hidden_size),
        *([] if model.tie_word_embeddings else [_linear(model, "lm_head", model.vocab_size, std=_HEAD_STD)]),
        *(_mtp(model, form) if model.num_nextn_predict_layers else ()),
    ]


def _scale(model: ModelConfig) -> float:
    return max(1.0, (_WIDE_ENOUGH / model.hidden_size) ** 0.5)


def _linear(model: ModelConfig, name: str, rows: int, columns: int = 0, *, std: float) -> TensorSpec:
    shape = (rows, columns or model.hidden_size)
    return TensorSpec(name=f"{name}.weight", shape=shape, std=std * _scale(model))


def _norm(model: ModelConfig, name: str, width: int, *, zero_centred: bool | None = None) -> TensorSpec:
    centred = model.zero_centred_norm if zero_centred is None else zero_centred
    return TensorSpec(name=name, shape=(width,), std=_NORM_STD, mean=0.0 if centred else 1.0)


def _layer(model: ModelConfig, index: int, form: ExpertForm) -> Iterator[TensorSpec]:
    prefix = f"model.layers.{index}"
    yield _norm(model, f"{prefix}.input_layernorm.weight", model.hidden_size)
    if model.layer_types[index] == "full_attention":
        yield from _attention(model, f"{prefix}.self_attn")
    else:
        yield from _delta(model, f"{prefix}.linear_attn")
    yield _norm(model, f"{prefix}.post_attention_layernorm.weight", model.hidden_size)
    if model.is_moe_layer(index):
        yield from _moe(model, f"{prefix}.mlp", form)
    else:
        yield from _mlp(model, f"{prefix}.mlp", model.intermediate_size)


def _attention(model: ModelConfig, prefix: str) -> Iterator[TensorSpec]:
    query = model.num_attention_heads * model.head_dim
    key = model.num_key_value_heads * model.head_dim
    rows = {"q_proj": query * (2 if model.attention_gated else 1), "k_proj": key, "v_proj": key}
    for name, width in rows.items():
        yield _linear(model, f"{prefix}.{name}", width, std=_ATTENTION_STD)
    yield _linear(model, f"{prefix}.o_proj", model.hidden_size, query, std=_ATTENTION_STD)
    biased = (rows if model.qkv_bias else {}) | ({"o_proj": model.hidden_size} if model.o_proj_bias else {})
    for name, width in biased.items():
        yield TensorSpec(name=f"{prefix}.{name}.bias", shape=(width,), std=_BIAS_STD)
    if model.qk_norm:
        yield _norm(model, f"{prefix}.q_norm.weight", model.head_dim)
        yield _norm(model, f"{prefix}.k_norm.weight", model.head_dim)


def _delta(model: ModelConfig, prefix: str) -> Iterator[TensorSpec]:
    key = model.linear_num_key_heads * model.linear_key_head_dim
    value = model.linear_num_value_heads * model.linear_value_head_dim
    heads = model.linear_num_value_heads
    projections = {"qkvz": 2 * key + 2 * value, "ba": 2 * heads}
    if model.linear_split_projections:
        projections = {"qkv": 2 * key + value, "z": value, "b": heads, "a": heads}
    for kind, width in projections.items():
        yield _linear(model, f"{prefix}.in_proj_{kind}", width, std=_ATTENTION_STD)
    conv_shape = (2 * key + value, 1, model.linear_conv_kernel_dim)
    yield TensorSpec(name=f"{prefix}.conv1d.weight", shape=conv_shape, std=_CONV_STD)
    yield TensorSpec(name=f"{prefix}.A_log", shape=(heads,), std=0.0, kind="log_uniform")
    yield TensorSpec(name=f"{prefix}.dt_bias", shape=(heads,), std=1.0)
    yield _norm(model, f"{prefix}.norm.weight", model.linear_value_head_dim, zero_centred=False)
    yield _linear(model, f"{prefix}.out_proj", model.hidden_size, value, std=_ATTENTION_STD)


def _mlp(model: ModelConfig, prefix: str, width: int) -> tuple[TensorSpec, TensorSpec, TensorSpec]:
    return (
        _linear(model, f"{prefix}.gate_proj", width, std=_GATE_UP_STD),
        _linear(model, f"{prefix}.up_proj", width, std=_GATE_UP_STD),
        _linear(model, f"{prefix}.down_proj", model.hidden_size, width, std=_DOWN_STD),
    )


def _moe(model: ModelConfig, prefix: str, form: ExpertForm) -> Iterator[TensorSpec]:
    yield _linear(model, f"{prefix}.gate", model.num_experts, std=_ROUTER_STD)
    width = model.moe_intermediate_size
    experts = [_mlp(model, f"{prefix}.experts.{e}", width) for e in range(model.num_experts)]
    if form == "per_expert":
        yield from (spec for expert in experts for spec in expert)
    else:
        yield TensorSpec(
            name=f"{prefix}.experts.gate_up_proj",
            shape=(model.num_experts, 2 * width, model.hidden_size),
            std=0.0,
            parts=tuple(spec for gate, up, _ in experts for spec in (gate, up)),
        )
        yield TensorSpec(
            name=f"{prefix}.experts.down_proj",
            shape=(model.num_experts, model.hidden_size, width),
            std=0.0,
            parts=tuple(down for _, _, down in experts),
        )
    if model.shared_expert_intermediate_size:
        yield from _mlp(model, f"{prefix}.shared_expert", model.shared_expert_intermediate_size)
        yield _linear(model, f"{prefix}.shared_expert_gate", 1, std=_ROUTER_STD)


def _mtp(model: ModelConfig, form: ExpertForm) -> Iterator[TensorSpec]:
    """The multi-token prediction head: one attention and MoE layer over [embedding | hidden]."""
    hidden = model.hidden_size
    yield _linear(model, "mtp.fc", hidden, 2 * hidden, std=_ATTENTION_STD)
    yield _norm(model, "mtp.pre_fc_norm_embedding.weight", hidden)
    yield _norm(model, "mtp.pre_fc_norm_hidden.weight", hidden)
    for index in range(model.num_nextn_predict_layers):
        prefix = f"mtp.layers.{index}"
        yield _norm(model, f"{prefix}.input_layernorm.weight", hidden)
        yield from _attention(model, f"{prefix}.self_attn")
        yield _norm(model, f"{prefix}.post_attention_layernorm.weight", hidden)
        yield from _moe(model, f"{prefix}.mlp", form)
    yield _norm(model, "mtp.norm.weight", hidden)
